import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from volseg.errors import VolsegError
from volseg.networks import build_network
from volseg.recipe import Loss
from volseg.sizing import BATCHES, SMALLEST_EDGE, STEPS, Budget, Scans, choose_size, topology
from volseg.training.losses import SegmentationLoss

GB = 1 << 30
SCANS = {
    "hippocampus": ((35, 50, 36), (1.0, 1.0, 1.0)),
    "prostate": ((320, 320, 20), (0.6, 0.6, 3.6)),
    "body": ((512, 512, 450), (0.8, 0.8, 1.0)),
    "nodule": ((44, 44, 8), (0.7, 0.7, 1.25)),
}
shapes = st.tuples(*[st.integers(2, 600)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)


def sized(name, memory=8 * GB, **changes):
    budget = changes.pop("budget", Budget(memory=memory))
    return choose_size(scans(*SCANS[name]), budget, **changes)


def scans(shape, spacing_mm, *, n_cases=100, channels=1, outputs=3):
    return Scans(
        shape=shape, spacing_mm=spacing_mm, n_cases=n_cases, channels=channels, outputs=outputs
    )


def network_of(size, outputs=3):
    shape = {"features": size.features, "strides": size.strides, "kernels": size.kernels}
    with torch.device("meta"):
        return build_network("unet3d", in_channels=1, out_channels=outputs, **shape)


@given(shape=shapes, spacing=spacings, memory=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_the_chosen_size_fits_the_budget_and_can_be_built(shape, spacing, memory):
    budget = Budget(memory=memory * GB)
    size = choose_size(scans(shape, spacing, n_cases=50, channels=2), budget)
    assert size.training_bytes(2, 3) <= budget.memory
    assert BATCHES[0] <= size.batch_size <= BATCHES[1]
    assert len(size.features) == len(size.strides) == len(size.kernels)
    for voxels, steps in zip(size.patch_shape, zip(*size.strides, strict=True), strict=True):
        assert voxels % math.prod(steps) == 0
        assert voxels // math.prod(steps) >= SMALLEST_EDGE or math.prod(steps) == 1


@given(shape=shapes, spacing=spacings, order=st.permutations(range(3)))
@settings(deadline=None, max_examples=60)
def test_the_order_of_the_axes_does_not_matter(shape, spacing, order):
    def turned(numbers):
        return tuple(numbers[n] for n in order)

    strides, kernels = topology(shape, spacing)
    assert topology(turned(shape), turned(spacing)) == (
        tuple(map(turned, strides)),
        tuple(map(turned, kernels)),
    )


@pytest.mark.parametrize("name", SCANS)
def test_operations_and_weights_equal_those_of_the_network(name):
    size = sized(name, memory=2 * GB)
    network = network_of(size)
    weights = dict(network.named_parameters())
    # A fine voxel meets one position of a transposed kernel, so a 2 × 2 × 2 kernel counts once.
    counted = sum(
        tensor.numel() // (math.prod(tensor.shape[2:]) if "transp_conv" in label else 1)
        for label, tensor in weights.items()
        if tensor.ndim == 5
    )
    assert size.n_weights(1, 3) == counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty((size.batch_size, 1, *size.patch_shape), device="meta"))
    assert size.step_flops(1, 3) == pytest.approx(3 * counter.get_total_flops(), rel=1e-6)


def test_more_memory_never_gives_a_smaller_plan():
    for name in SCANS:
        plans = [sized(name, memory=memory * GB) for memory in (1, 2, 4, 8, 16, 32)]
        sizes = [
            (plan.features[0], math.prod(plan.patch_shape) * plan.batch_size) for plan in plans
        ]
        assert sizes == sorted(sizes)


def test_kernels_are_flat_across_thick_slices_until_pixels_are_as_coarse():
    strides, kernels = topology((320, 256, 20), (0.6, 0.6, 3.6))
    assert strides[:4] == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2))
    assert kernels[:3] == ((3, 3, 1), (3, 3, 1), (3, 3, 3))
    flat = [kernel[2] for kernel in kernels]
    assert flat == sorted(flat)  # never flat again


def test_a_patch_has_the_proportions_of_the_scan_in_mm():
    size = sized("body")
    edges = [n * mm for n, mm in zip(size.patch_shape, SCANS["body"][1], strict=True)]
    assert max(edges) / min(edges) < 1.3
    assert sized("hippocampus").patch_shape == (40, 56, 40)  # the whole scan


def test_a_time_budget_leaves_enough_steps():
    flops = 5e14
    size = sized("body", budget=Budget(memory=32 * GB, flops=flops))
    assert flops / size.step_flops(1, 3) >= STEPS
    assert math.prod(size.patch_shape) < math.prod(sized("body", memory=32 * GB).patch_shape)


def test_a_stated_patch_and_batch_are_kept():
    size = sized("body", patch_shape=(48, 40, 24), batch_size=3)
    assert (size.patch_shape, size.batch_size) == ((48, 40, 24), 3)
    network_of(size)(torch.empty((3, 1, 48, 40, 24), device="meta"))


def test_the_error_for_an_impossible_budget_says_which_number_to_change():
    stated = {"patch_shape": (256, 256, 256), "batch_size": 8}
    problem = r"batch 8, 8 features\) takes .* GB, and the budget is 1.00 GB"
    with pytest.raises(VolsegError, match=problem) as caught:
        sized("body", memory=GB, **stated)
    needed = float(caught.value.fix.split("budget of ")[1].split("G")[0])
    assert "train.patch_shape" in caught.value.fix
    assert sized("body", memory=int(needed * GB), **stated).features[0] == 8
    with pytest.raises(VolsegError, match="fewer than") as caught:
        sized("body", budget=Budget(memory=8 * GB, flops=1e9))
    assert "--time-budget" in caught.value.fix


@pytest.mark.parametrize("patch_shape", [(32, 32, 32), (48, 40, 16)])
@pytest.mark.parametrize(
    "extra", [{}, {"residual": True}, {"deep_supervision": 1}, {"dropout": 0.2}]
)
def test_the_estimated_memory_is_close_to_what_autograd_keeps_in_a_real_step(patch_shape, extra):
    size = choose_size(
        scans((60, 60, 30), (1, 1, 1.5), n_cases=10),
        Budget(memory=2 * GB),
        patch_shape=patch_shape,
        batch_size=2,
    )
    layers = {"features": size.features, "strides": size.strides, "kernels": size.kernels}
    network = build_network("unet3d", in_channels=1, out_channels=3, **layers, **extra)
    size = replace(
        size,
        depths=1 + extra.get("deep_supervision", 0),
        residual="residual" in extra,
        dropout="dropout" in extra,
    )
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(2, 1, *patch_shape)
    target = torch.randint(0, 3, (2, *patch_shape), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = SegmentationLoss(Loss())(network(images), target)
    assert torch.isfinite(loss)
    estimated = size.training_bytes(1, 3) - 5 * 4 * size.n_weights(1, 3)
    assert 0.7 < estimated / sum(kept.values()) < 1.6
