"""How much memory a scan will take, from its header and the model alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from volseg.bundle import ModelBundle
from volseg.errors import ScanError, VolsegError
from volseg.execute.cpu import enough_bytes, give_back_freed_memory, resident_bytes, total_memory
from volseg.execute.memory import over_budget
from volseg.infer.stream import Tiling
from volseg.infer.tiles import thinnest_axis
from volseg.measure.memory import ID_BYTES, lesion_bytes, report_bytes, writing_bytes
from volseg.models import build_segmentation
from volseg.preprocess.crop import AxisOrder, canonical_geometry
from volseg.preprocess.prepare import SLAB_VOXELS, PrepareSettings, separate_axis
from volseg.preprocess.resample import SLAB_VALUES, resampled_shape
from volseg.volume import Geometry

# Measured with benchmarks/memory.py: what a backend takes of the tensors that are alive at the worst moment, and beside them.
OVERHEAD = {
    "openvino": 1.05,
    "torch": 2.3,
    "cuda": 1.3,
}  # torch on a CPU keeps freed blocks for speed
WORKSPACE = 150 << 20
STAGING = 2 * 4 * SLAB_VALUES  # source planes on their way to a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes at the peak, by what they are for."""

    process: int  # libraries and weights, before a scan is read
    scans: int  # as stored; three where the next one is read and the last one written meanwhile
    masks: int  # mask, confidence and lesion ids
    network: int  # activations and logits of one batch of patches
    stream: int  # prepared planes and the ring of blended logits, one patch deep
    restore: int  # planes on their way back to the scan's grid
    lesions: int  # finding and measuring them, whatever the mask, when the network's memory is free again
    page: int = 0  # and rows of the scan before, where they are made meanwhile
    # Of its own memory, with the weights there: network, stream and restore then take nothing of the main memory.
    gpu: int = 0

    @property
    def inference(self) -> int:
        """Of the network and what is prepared for it and comes out of it."""
        return self.network + self.stream + self.restore

    @property
    def total(self) -> int:
        """Inference and lesions follow each other."""
        return (
            self.process + self.scans + self.masks + self.page + max(self.inference, self.lesions)
        )

    def __str__(self) -> str:
        parts = {"process": self.process, "scans": self.scans, "masks": self.masks}
        parts |= {"page": self.page} if self.page else {}
        parts |= (
            {"network and stream": self.inference}
            if self.inference >= self.lesions
            else {"lesions": self.lesions}
        )
        return f"{self.total / 2**30:.2f} GB ({', '.join(f'{name} {size / 2**30:.2f}' for name, size in parts.items())})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a scan is segmented so that it fits."""

    footprint: Footprint
    half_logits: bool  # blend logits in float16
    read_ahead: bool  # read the next scan meanwhile
    batch_size: int  # tiles that go through the network together
    shape: tuple[
        int, int, int
    ]  # of the prepared grid over the whole scan, where the body is not known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanHeader:
    """What a header says of a scan's size: `itemsize` bytes per stored voxel, over all channels."""

    geometry: Geometry
    itemsize: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkPass:
    """A bundle's network run over a scan: on which grid, in which tiles, by which backend. `network_bytes` is that function's."""

    bundle: ModelBundle
    tiling: Tiling
    settings: PrepareSettings
    backend: str
    network_bytes: int
    n_channels: int  # that it gives of each voxel: logits, or features where its head is put off
    head_is_off: bool = False
    on_gpu: bool = False
    half: bool = False  # activations of two bytes


def plan_memory(
    header: ScanHeader,
    fine: NetworkPass,
    *,
    coarse: NetworkPass | None = None,
    is_alone: bool = False,
    n_cases: int = 1,
    max_ram: int | None = None,
    max_vram: int | None = None,
) -> MemoryPlan:
    """The fastest way to segment a scan within budgets of bytes; the first of these that fits: all at its best; without
    reading ahead; with fewer tiles at a time, half as many and at last one; logits blended in float16, as they are on a CPU in half
    precision anyhow. A scan that `is_alone` has no next one to read.

    How high a slab is follows from the patch: it is a view of the ring of sums, one patch deep, and takes no memory of its own.

    Args:
        coarse: a first pass, whose memory is free again when the other begins.
        n_cases: of the results folder, of which there are tables and a page afterwards.

    Raises:
        ScanError: none fits; says what would.
    """
    give_back_freed_memory()
    process = resident_bytes()
    shape = _prepared_grid(header.geometry, fine.settings)[1]
    plans = []
    for read_ahead, batch_size, half_logits in _ways(fine, is_alone=is_alone):
        run = replace(fine, tiling=replace(fine.tiling, batch_size=batch_size))
        footprint = _footprint(
            header, run, coarse, process, read_ahead=read_ahead, half=half_logits
        )
        footprint = replace(footprint, lesions=max(footprint.lesions, report_bytes(n_cases)))
        plan = MemoryPlan(
            footprint=footprint,
            half_logits=half_logits,
            read_ahead=read_ahead,
            batch_size=batch_size,
            shape=shape,
        )
        # Without a budget only what this machine can never hold is refused, as where a wrong spacing makes the grid far too fine.
        fits = (
            footprint.inference <= total_memory() if max_ram is None else footprint.total <= max_ram
        )
        if fits and (max_vram is None or footprint.gpu <= max_vram):
            return plan
        plans.append(plan)
    least = plans[-1].footprint
    if max_ram is None and least.inference > (memory := total_memory()):
        raise ScanError(
            f"segmenting this scan takes {least.inference / 2**30:,.1f} GB for the network and its grid of {' × '.join(map(str, shape))} voxels, "
            f"and this machine has {memory / 2**30:.1f} GB of memory",
            fix="check the spacing of the scan, or use a model with a coarser spacing",
            code="E_RAM",
        )
    if max_ram is None or least.total <= max_ram:
        assert max_vram is not None
        raise ScanError(
            f"segmenting this scan takes {least.gpu / 2**30:.2f} GB of the GPU's memory at the least, and the budget is {max_vram / 2**30:.2f} GB",
            fix=f"give --max-vram {enough_bytes(least.gpu)}, or --device cpu, or a model with a smaller patch",
            code="E_VRAM",
        )
    raise over_budget(
        f"segmenting this scan takes {least} at the least",
        max_ram,
        enough=least.total,
        otherwise="a model with a smaller patch",
    )


def _ways(run: NetworkPass, *, is_alone: bool) -> list[tuple[bool, int, bool]]:
    """(read ahead, tiles at a time, blend in float16), best first."""
    # Sums in float16 lose nothing of logits that the chip computed in half precision.
    half = run.half and not run.on_gpu
    batches = [run.tiling.batch_size]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    ways = [
        (not is_alone, batches[0], half),
        *((False, batch, half) for batch in batches),
        (False, 1, True),
    ]
    return list(dict.fromkeys(ways))


def gpu_memory() -> int:
    """Bytes of the GPU's memory that this process has or may have."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


@contextmanager
def limited_gpu(limit: int | None) -> Iterator[None]:
    """Let torch take no more than this many bytes of the GPU, so that what cuDNN tries out stays within it; None: no limit."""
    if limit is None or not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _footprint(
    header: ScanHeader,
    fine: NetworkPass,
    coarse: NetworkPass | None,
    process: int,
    *,
    read_ahead: bool,
    half: bool,
) -> Footprint:
    voxels = math.prod(header.geometry.shape)
    label_bytes = 1 if max(fine.bundle.recipe.data.labels.values()) < 256 else 2
    needs_body = any(
        getattr(normaliser, "region", "") == "nonzero" for normaliser in fine.settings.normalisers
    )
    passes = [_pass_bytes(header.geometry, fine, half=half)]
    if coarse is not None:  # looks only for a box: nothing goes back to the scan's grid
        passes.append(replace(_pass_bytes(header.geometry, coarse, half=False), restore=0))
    larger = max(passes, key=lambda each: each.total)
    recipe = fine.bundle.recipe
    # Steps hold the mask without other labels and the cleaned one; an organ, the mask without it and where it is.
    copies = 2 * label_bytes if recipe.postprocess or recipe.measure.organ is not None else 0
    lesions = lesion_bytes(voxels, header.itemsize, copies=copies, calcium=recipe.measure.calcium)
    on_host = _PassBytes(network=0, stream=STAGING, restore=0) if fine.on_gpu else larger
    return Footprint(
        process=process,
        scans=voxels * header.itemsize * (3 if read_ahead else 1),
        masks=voxels * (label_bytes + 1 + ID_BYTES) * (2 if read_ahead else 1)
        + (3 * voxels if needs_body else 0),
        network=on_host.network,
        stream=on_host.stream,
        restore=on_host.restore,
        lesions=max(lesions, 0 if read_ahead else writing_bytes()),
        page=writing_bytes() if read_ahead else 0,  # else it follows inference
        gpu=larger.total + torch.cuda.memory_allocated() if fine.on_gpu else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PassBytes:
    """As in `Footprint`, of one of two passes."""

    network: int
    stream: int
    restore: int

    @property
    def total(self) -> int:
        return self.network + self.stream + self.restore


def _pass_bytes(grid: Geometry, run: NetworkPass, *, half: bool) -> _PassBytes:
    settings, tiling = run.settings, run.tiling
    geometry, shape = _prepared_grid(grid, settings)
    axis = separate_axis(geometry.spacing_mm, settings.spacing_mm, settings.separate_above)
    axis = thinnest_axis(shape, tiling.patch_shape) if axis is None else axis
    padded = [len(tiled.source) for tiled in tiling.axes(shape)]
    plane = math.prod(
        n for other, n in enumerate(padded) if other != axis
    )  # with what lies beyond its faces
    ring_plane = math.prod(n for other, n in enumerate(shape) if other != axis)
    depth = tiling.patch_shape[axis]
    channels, classes = len(run.bundle.recipe.data.channels), run.n_channels
    # Source planes of one layer, resampled within the plane, and the layer itself before and after new planes join it.
    source_planes = depth * max(1.0, geometry.shape[axis] / shape[axis]) + 2
    window = 4 * channels * plane * (2 * source_planes + 3 * depth)
    members = len(run.bundle.members)
    summed = (
        3 if tiling.tta_axes else 2 if members > 1 else 1
    )  # sum, new logits, the same mirrored back
    share = 4 * ring_plane * depth if settings.crop == "body" else 0
    logits_bytes = 2 if run.half and run.head_is_off and not run.on_gpu else 4
    logits = logits_bytes * classes * tiling.batch_size * math.prod(tiling.patch_shape) * summed
    if run.on_gpu and members == 1:  # a recording has an input and an output of its own
        logits += 4 * (classes + channels) * tiling.batch_size * math.prod(tiling.patch_shape)
    # A network that OpenVINO compiled keeps its memory until the scan is done.
    activations = (
        run.network_bytes * tiling.batch_size * (members if run.backend == "openvino" else 1)
    )
    overhead = OVERHEAD["cuda" if run.on_gpu else run.backend] * (0.5 if run.half else 1)
    return _PassBytes(
        network=round(activations * overhead) + logits + WORKSPACE,
        stream=round(window + (2 if half else 4) * classes * ring_plane * depth) + share,
        restore=40 * max(SLAB_VOXELS, math.prod(geometry.shape) // geometry.shape[axis])
        + 4 * classes * 3 * plane,
    )


def _prepared_grid(
    geometry: Geometry, settings: PrepareSettings
) -> tuple[Geometry, tuple[int, int, int]]:
    """The scan's grid with the prepared axes, and its shape at the prepared spacing: of the whole scan, as the body is not known yet."""
    canonical = settings.axes == "canonical"
    order = (AxisOrder.of(geometry) if canonical else AxisOrder.stored()).transposed(
        settings.transpose
    )
    prepared = canonical_geometry(geometry, order)
    return prepared, resampled_shape(prepared, settings.spacing_mm)


def network_bytes(bundle: ModelBundle) -> int:
    """Bytes of the tensors that are alive at the worst moment of one patch's way through the segmentation network."""
    with torch.device("meta"):
        network: nn.Module = build_segmentation(bundle.recipe).eval()
        patch = torch.empty(1, len(bundle.recipe.data.channels), *bundle.plan.patch_shape)
    try:
        with torch.inference_mode(), _Live() as live:
            network(patch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise VolsegError(
            f"{bundle.recipe.name}: its network cannot be run on a patch of {' × '.join(map(str, bundle.plan.patch_shape))} "
            f"voxels ({str(error).strip().splitlines()[0]})",
            fix="copy the model again, or make the patch a multiple of the network's strides",
            code="E_CKPT",
        ) from error
    return live.peak


def check_patch(bundle: ModelBundle, needed: int, memory: int) -> None:
    """Refuse a model of which one batch of patches does not fit into the memory, before any of it is allocated.

    Args:
        needed: `network_bytes` of the bundle.

    Raises:
        VolsegError: it does not fit.
    """
    batch_size, patch = bundle.recipe.infer.batch_size, bundle.plan.patch_shape
    if needed * batch_size > memory:
        raise VolsegError(
            f"{bundle.recipe.name}: a batch of {batch_size} patches of {' × '.join(map(str, patch))} voxels takes "
            f"{needed * batch_size / 2**30:,.1f} GB, and this machine has {memory / 2**30:.1f} GB of memory",
            fix="use a machine with more memory, or a model with a smaller patch",
            code="E_RAM",
        )


class _Live(TorchDispatchMode):
    """Watches which tensors are alive; with tensors on the device `meta` nothing is computed or allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return found

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
