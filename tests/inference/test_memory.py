import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from bundles import with_recipe
from laws import oblique

from volseg.bundle import load_bundle
from volseg.errors import ScanError
from volseg.inference.memory import (
    MemoryLimits,
    NetworkPass,
    ScanSize,
    network_bytes,
    plan_memory,
)
from volseg.inference.stream import Tiling
from volseg.options.declare import amount
from volseg.volume import Geometry


@pytest.fixture(scope="module")
def bundle(model):
    return load_bundle(model)


def plan_for(bundle, shape, max_ram=None, network=100 << 20, backend="torch", max_vram=None, **gpu):
    header = ScanSize(geometry=Geometry(shape, oblique((0.8, 0.8, 1.5))), itemsize=2)
    run = NetworkPass(
        bundle=bundle,
        tiling=Tiling.of(bundle.recipe),
        backend=backend,
        network_bytes=network,
        n_channels=2,
        **gpu,
    )
    return plan_memory(header, run, MemoryLimits(ram=max_ram, vram=max_vram))


def test_only_scan_and_masks_grow_with_the_number_of_slices(bundle):
    short, long = (plan_for(bundle, (256, 256, n)).footprint for n in (100, 800))
    assert short.network == long.network
    # a short scan may be cut along another axis
    assert long.stream == pytest.approx(short.stream, rel=0.1)
    assert long.restore == pytest.approx(short.restore, rel=0.1)
    assert long.scans == 8 * short.scans == 3 * 2 * 256 * 256 * 800
    assert long.masks == 8 * short.masks


SLACK = 8 << 20  # the memory of the process itself varies from call to call


def test_the_first_plan_that_fits_the_budget_is_used(bundle):
    large = with_recipe(bundle, train={"patch_shape": (96, 96, 96)})
    shape, network = (400, 400, 400), 600 << 20
    best = plan_for(large, shape, network=network)
    assert (best.read_ahead, best.half_logits) == (True, False)
    tighter = plan_for(large, shape, network=network, max_ram=best.footprint.total - SLACK)
    assert (tighter.read_ahead, tighter.half_logits) == (False, False)
    assert best.footprint.scans == 3 * tighter.footprint.scans
    tightest = plan_for(large, shape, network=network, max_ram=tighter.footprint.total - SLACK)
    assert (tightest.read_ahead, tightest.half_logits) == (False, True)
    assert tightest.footprint.stream < tighter.footprint.stream - SLACK


def test_a_budget_lowers_the_batch_size_before_the_precision_of_the_logits(bundle):
    batched = with_recipe(bundle, train={"patch_shape": (96, 96, 96)}, infer={"batch_size": 6})
    shape, network = (400, 400, 400), 600 << 20
    plans = [plan_for(batched, shape, network=network)]
    for _ in range(4):
        max_ram = plans[-1].footprint.total - SLACK
        plans.append(plan_for(batched, shape, network=network, max_ram=max_ram))
    assert [(plan.read_ahead, plan.batch_size, plan.half_logits) for plan in plans] == [
        (True, 6, False),
        (False, 6, False),
        (False, 3, False),
        (False, 1, False),
        (False, 1, True),
    ]
    assert plans[3].footprint.network < plans[2].footprint.network < plans[1].footprint.network


def test_a_scan_that_cannot_fit_is_refused_with_a_budget_that_is_enough(bundle):
    with pytest.raises(ScanError, match=r"the budget is 0\.10 GB") as caught:
        plan_for(bundle, (512, 512, 900), max_ram=100 << 20)
    assert caught.value.code == "E_RAM"
    enough = amount(caught.value.fix.split("--max-ram ")[1].split(",")[0])
    assert plan_for(bundle, (512, 512, 900), max_ram=enough).footprint.total <= enough


def test_the_network_needs_the_peak_of_its_live_tensors(bundle):
    once = network_bytes(bundle)
    voxels = int(np.prod(bundle.recipe.patch_shape))
    features = bundle.recipe.network.settings["features"][0]
    assert once >= 2 * features * voxels * 4  # at the finest level a layer's input and output
    r, a, s = bundle.recipe.patch_shape
    twice = with_recipe(bundle, train={"patch_shape": (2 * r, a, s)})
    assert network_bytes(twice) == pytest.approx(2 * once, rel=0.02)


def test_of_two_passes_the_larger_one_counts(bundle):
    header = ScanSize(geometry=Geometry((256, 256, 200), oblique((0.8, 0.8, 1.5))), itemsize=2)

    def run(spacing_mm, network, coarse=None):
        return NetworkPass(
            bundle=with_recipe(bundle, preprocess={"spacing_mm": spacing_mm}),
            tiling=Tiling.of(bundle.recipe),
            backend="torch",
            network_bytes=network,
            n_channels=2,
            coarse=coarse,
        )

    def footprint(coarse=None):
        fine = run((1.0, 1.0, 1.0), 100 << 20, coarse)
        return plan_memory(header, fine, MemoryLimits()).footprint

    alone = footprint()
    small = footprint(coarse=run((4.0, 4.0, 4.0), 50 << 20))
    large = footprint(coarse=run((4.0, 4.0, 4.0), 400 << 20))
    assert replace(small, process=0) == replace(alone, process=0)
    assert large.network > alone.network + (500 << 20)
    assert large.stream < alone.stream
    assert (large.scans, large.masks, large.lesions) == (alone.scans, alone.masks, alone.lesions)


def test_with_a_deferred_head_memory_does_not_grow_with_the_classes(bundle):
    header = ScanSize(geometry=Geometry((256, 256, 400), oblique((0.8, 0.8, 1.5))), itemsize=2)

    def total(n_classes):
        labels = {f"label_{n}": n for n in range(1, n_classes)}
        data = bundle.recipe.data.model_copy(update={"labels": labels})
        many = replace(bundle, recipe=bundle.recipe.model_copy(update={"data": data}))
        run = NetworkPass(
            bundle=many,
            tiling=Tiling.of(many.recipe),
            backend="openvino",
            network_bytes=600 << 20,
            n_channels=min(n_classes, 17),
        )
        footprint = plan_memory(header, run, MemoryLimits()).footprint
        return footprint.total - footprint.process

    assert total(25) == total(117)
    assert total(25) > total(2)


def test_on_a_gpu_network_and_logits_are_in_its_own_memory(bundle):
    host = plan_for(bundle, (256, 256, 400)).footprint
    device = plan_for(bundle, (256, 256, 400), on_gpu=True).footprint
    assert host.gpu == 0
    assert (device.network, device.restore) == (0, 0)
    assert (device.scans, device.masks) == (host.scans, host.masks)
    # torch keeps less freed memory on a GPU
    assert host.network > device.gpu - host.stream - host.restore > (100 << 20)
    half = plan_for(bundle, (256, 256, 400), on_gpu=True, half=True).footprint
    assert half.gpu < device.gpu - (50 << 20)


def test_half_precision_on_a_cpu_holds_features_and_their_sums_in_two_bytes(bundle):
    header = {"on_gpu": False, "head_is_deferred": True}
    full, half = (plan_for(bundle, (256, 256, 400), half=half, **header) for half in (False, True))
    assert (full.half_logits, half.half_logits) == (False, True)
    assert half.footprint.stream < full.footprint.stream
    assert half.footprint.network < full.footprint.network / 2 + (100 << 20)


def test_a_gpu_too_small_for_the_ring_blends_in_half_precision_or_names_a_budget(bundle):
    large = with_recipe(bundle, train={"patch_shape": (96, 96, 96)})
    best = plan_for(large, (400, 400, 400), on_gpu=True)
    assert not best.half_logits
    tight = plan_for(large, (400, 400, 400), on_gpu=True, max_vram=best.footprint.gpu - 1)
    assert tight.half_logits
    with pytest.raises(ScanError, match=r"needs at least .* of GPU memory") as caught:
        plan_for(large, (400, 400, 400), on_gpu=True, max_vram=tight.footprint.gpu - 1)
    assert caught.value.code == "E_VRAM"
    enough = amount(caught.value.fix.split("--max-vram ")[1].split(",")[0])
    assert plan_for(large, (400, 400, 400), on_gpu=True, max_vram=enough).footprint.gpu <= enough


@pytest.mark.parametrize(
    ("text", "size"), [("4G", 4 << 30), ("500m", 500 << 20), ("1.5G", 3 << 29), ("4096", 4096)]
)
def test_amounts_of_memory_are_read(text, size):
    assert amount(text) == size


@pytest.mark.parametrize("text", ["", "G", "four", "-1G", "nan", "0"])
def test_an_invalid_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError):
        amount(text)


LIMITED = """
import ctypes, resource, sys
from pathlib import Path
import numpy as np
from volseg.execution.cpu import M_TOP_PAD, keep_freed_memory
keep_freed_memory()
ctypes.CDLL(None).mallopt(M_TOP_PAD, 1 << 20)  # address space reserved ahead is not memory
from volseg.bundle import load_bundle
from volseg.errors import VolsegError
from volseg.inference.memory import MemoryLimits, ScanSize, plan_memory
from volseg.segmentation import load_model, network_pass, segment_case
from volseg.volume import Geometry, Volume

bundle = load_bundle(Path(sys.argv[1]))
model = load_model(bundle, "cpu", backend="torch")
channel = bundle.recipe.data.channels[0]
small = Volume(np.full((24, 24, 24), 40, np.int16), Geometry((24, 24, 24), np.eye(4)))
# warm up: thread stacks are allocated, libraries loaded
segment_case({channel: small}, model, case_id="warm", accept_mismatch=True)
geometry = Geometry((256, 256, 64), np.diag([0.8, 0.8, 1.5, 1.0]))
header = ScanSize(geometry=geometry, itemsize=2)
plan = plan_memory(header, network_pass(model), MemoryLimits(), is_alone=True)
held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
predicted = plan.footprint.total - plan.footprint.process
room = predicted if sys.argv[2] == "predicted" else int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
try:
    array = np.full(geometry.shape, 40, np.int16, order="F")
    array[:, :, ::2] += 7
    segment_case({channel: Volume(array, geometry)}, model, case_id="limited", accept_mismatch=True)
    print("segmented")
except (MemoryError, VolsegError) as error:
    print("refused", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS works on Linux only")
@pytest.mark.parametrize(
    ("room", "outcome"),
    [
        pytest.param("predicted", "segmented", marks=pytest.mark.slow),
        pytest.param(str(20 << 20), "refused", marks=pytest.mark.slow),
    ],
)
def test_a_scan_is_segmented_in_the_predicted_memory_and_refused_in_less(model, room, outcome):
    command = [sys.executable, "-c", LIMITED, model, room]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split(maxsplit=1)[:1] == [outcome], done.stdout + done.stderr[-2000:]
