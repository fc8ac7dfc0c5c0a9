"""Predict the memory that a scan needs, from its header and the model alone."""

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
from volseg.execution.cpu import enough_bytes, resident_bytes, total_memory, trim_freed_memory
from volseg.execution.memory import over_budget
from volseg.inference.stream import Tiling
from volseg.inference.tiles import thinnest_axis
from volseg.measurement.memory import ID_BYTES, lesion_bytes, report_bytes, writing_bytes
from volseg.networks import build_segmentation
from volseg.preprocessing.prepare import SLAB_VOXELS, separate_axis
from volseg.preprocessing.resample import SLAB_VALUES, resampled_shape
from volseg.recipe import GATE, Preprocess
from volseg.recipe.section import closed
from volseg.volume import AxisOrder, Geometry
from volseg.words import format_sizes

# Measured with benchmarks/memory.py: a backend's memory relative to the peak of live tensors, and
# its fixed workspace. Torch on a CPU keeps freed blocks for speed.
OVERHEAD = {"openvino": 1.05, "torch": 2.3, "cuda": 1.3}
WORKSPACE = 150 << 20
STAGING = 2 * 4 * SLAB_VALUES  # source planes on their way to a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak bytes by purpose."""

    process: int  # libraries and weights, before a scan is read
    scans: int  # as stored; three if the next one is read and the last one written meanwhile
    masks: int  # mask, confidence and lesion ids
    network: int  # activations and logits of one batch of patches
    stream: int  # prepared planes and the ring of blended logits, one patch deep
    restore: int  # planes being resampled to the scan's grid
    lesions: int  # finding and measuring lesions of any mask, after the network's memory is freed
    page: int = 0  # page and rows of the previous scan, if they are made meanwhile
    # GPU memory including weights; network, stream and restore then take no main memory
    gpu: int = 0

    @property
    def inference(self) -> int:
        """Bytes of the network, its input and its output."""
        return self.network + self.stream + self.restore

    @property
    def total(self) -> int:
        """Bytes of everything at the peak; inference and lesions follow each other."""
        largest = max(self.inference, self.lesions)
        return self.process + self.scans + self.masks + self.page + largest

    def __str__(self) -> str:
        parts = {"process": self.process, "scans": self.scans, "masks": self.masks}
        parts |= {"page": self.page} if self.page else {}
        if self.inference >= self.lesions:
            parts["network and stream"] = self.inference
        else:
            parts["lesions"] = self.lesions
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"{self.total / 2**30:.2f} GB ({listed})"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The settings with which a scan is segmented within its memory budget."""

    footprint: Footprint
    half_logits: bool  # blend logits in float16
    read_ahead: bool  # read the next scan meanwhile
    batch_size: int  # tiles per forward pass
    shape: tuple[int, int, int]  # of the prepared grid over the whole scan: no body crop yet


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimits:
    """Budgets in bytes of main memory and of GPU memory; None: no limit but the machine's."""

    ram: int | None = None
    vram: int | None = None

    def admit(self, footprint: Footprint) -> bool:
        """Check whether a scan may take this memory.

        Without a budget, refuse only what this machine can never hold, such as the huge grid of a
        wrong spacing.
        """
        if self.ram is None:
            fits = footprint.inference <= total_memory()
        else:
            fits = footprint.total <= self.ram
        return fits and (self.vram is None or footprint.gpu <= self.vram)

    def refusal(self, plan: MemoryPlan) -> ScanError:
        """Return the error if even this plan, the most frugal one, takes too much."""
        least, memory = plan.footprint, total_memory()
        if self.ram is None and least.inference > memory:
            return ScanError(
                f"segmenting this scan needs {least.inference / 2**30:,.1f} GB for the network and "
                f"its grid of {format_sizes(plan.shape)} voxels, "
                f"and this machine has {memory / 2**30:.1f} GB of memory",
                fix="check the spacing of the scan, or use a model with a coarser spacing",
                code="E_RAM",
            )
        if self.ram is not None and least.total > self.ram:
            return over_budget(
                f"segmenting this scan needs at least {least}",
                self.ram,
                enough=least.total,
                otherwise="a model with a smaller patch",
            )
        assert self.vram is not None
        return ScanError(
            f"segmenting this scan needs at least {least.gpu / 2**30:.2f} GB of GPU memory, "
            f"and the budget is {self.vram / 2**30:.2f} GB",
            fix=f"use --max-vram {enough_bytes(least.gpu)}, --device cpu, or a model with a "
            "smaller patch",
            code="E_VRAM",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSize:
    """The grid of a scan and its bytes per stored voxel, summed over the channels."""

    geometry: Geometry
    itemsize: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkPass:
    """A pass of a bundle's network over a scan: its grid, tiles and backend.

    `coarse` is the first pass, whose memory is free again when this one begins.
    """

    bundle: ModelBundle
    tiling: Tiling
    backend: str
    network_bytes: int  # from the function of that name
    n_channels: int  # output channels: logits, or features if the head is deferred
    head_is_deferred: bool = False
    on_gpu: bool = False
    half: bool = False  # activations of two bytes
    coarse: NetworkPass | None = None


def plan_memory(
    scan: ScanSize,
    fine: NetworkPass,
    limits: MemoryLimits,
    *,
    is_alone: bool = False,
    n_cases: int = 1,
) -> MemoryPlan:
    """Return the fastest way to segment a scan within limits.

    It is the first of these that fits: the settings as they are; without reading ahead; with fewer
    tiles per batch, halved down to one; with logits blended in float16, as they always are in half
    precision on a CPU. Slabs need no memory of their own: they are views of the ring.

    Args:
        is_alone: whether there is no next scan to read ahead.
        n_cases: cases in the results folder, whose tables and page are written afterwards.

    Raises:
        ScanError: no plan fits; names the budget that would.
    """
    trim_freed_memory()
    process = resident_bytes()
    shape = _prepared_grid(scan.geometry, fine.bundle.recipe.preprocess)[1]
    plans = []
    for read_ahead, batch_size, half_logits in _options(fine, is_alone=is_alone):
        dtype = torch.float16 if half_logits else torch.float32
        tiling = replace(fine.tiling, batch_size=batch_size, dtype=dtype)
        footprint = _footprint(scan, replace(fine, tiling=tiling), process, read_ahead)
        plan = MemoryPlan(
            footprint=replace(footprint, lesions=max(footprint.lesions, report_bytes(n_cases))),
            half_logits=half_logits,
            read_ahead=read_ahead,
            batch_size=batch_size,
            shape=shape,
        )
        if limits.admit(plan.footprint):
            return plan
        plans.append(plan)
    raise limits.refusal(plans[-1])


def _options(fine: NetworkPass, *, is_alone: bool) -> list[tuple[bool, int, bool]]:
    """Return (read ahead, tiles per batch, blend in float16), fastest first."""
    # Sums in float16 lose nothing of logits that the CPU computed in half precision.
    half = fine.half and not fine.on_gpu
    sizes = [fine.tiling.batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    reading_less = [(False, size, half) for size in sizes]
    return list(dict.fromkeys([(not is_alone, sizes[0], half), *reading_less, (False, 1, True)]))


def gpu_memory() -> int:
    """Return the bytes of GPU memory that this process holds or could allocate."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


@contextmanager
def limited_gpu(limit: int | None) -> Iterator[None]:
    """Limit torch to this many bytes of GPU memory, also when cuDNN tries algorithms; None: all."""
    if limit is None or not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _footprint(scan: ScanSize, fine: NetworkPass, process: int, read_ahead: bool) -> Footprint:
    recipe = fine.bundle.recipe
    voxels = math.prod(scan.geometry.shape)
    label_bytes = 1 if max(recipe.data.labels.values()) < 256 else 2
    n_scans, n_masks, page = (3, 2, writing_bytes()) if read_ahead else (1, 1, 0)
    mask_bytes = (label_bytes + 1 + ID_BYTES) * n_masks
    forms = map(recipe.preprocess.normaliser_of, recipe.data.channels)
    if "nonzero" in [form.fitted_region for form in forms]:
        mask_bytes += 3  # the body
    passes = [_pass_bytes(scan.geometry, fine)]
    if fine.coarse is not None:  # it only finds a box: nothing is resampled to the scan's grid
        passes.append(replace(_pass_bytes(scan.geometry, fine.coarse), restore=0))
    larger = max(passes, key=lambda network_pass: network_pass.total)
    # Post-processing holds the mask of one label and the cleaned mask; an organ, the mask without
    # it and the organ.
    copies = 2 * label_bytes if recipe.postprocess or recipe.measure.organ else 0
    lesions = lesion_bytes(voxels, scan.itemsize, copies=copies, calcium=recipe.measure.calcium)
    on_host = _PassBytes(network=0, stream=STAGING, restore=0) if fine.on_gpu else larger
    return Footprint(
        process=process,
        scans=voxels * scan.itemsize * n_scans,
        masks=voxels * mask_bytes,
        network=on_host.network,
        stream=on_host.stream,
        restore=on_host.restore,
        lesions=max(lesions, writing_bytes() - page),  # without reading ahead, writing follows
        page=page,
        gpu=larger.total + torch.cuda.memory_allocated() if fine.on_gpu else 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PassBytes:
    """Bytes of one of two passes, as in `Footprint`."""

    network: int
    stream: int
    restore: int

    @property
    def total(self) -> int:
        return self.network + self.stream + self.restore


def _pass_bytes(grid: Geometry, run: NetworkPass) -> _PassBytes:
    settings, tiling = run.bundle.recipe.preprocess, run.tiling
    geometry, shape = _prepared_grid(grid, settings)
    axis = separate_axis(geometry.spacing_mm, run.bundle.recipe.spacing_mm, settings.separate_above)
    axis = thinnest_axis(shape, tiling.patch_shape) if axis is None else axis
    padded = [len(tiled.source) for tiled in tiling.axes(shape)]
    plane = math.prod(padded) // padded[axis]  # with margin and padding
    ring_plane = math.prod(shape) // shape[axis]
    depth = tiling.patch_shape[axis]
    # Source planes of one layer, resampled in-plane, and the layer before and after new planes are
    # added.
    source_planes = depth * max(1.0, geometry.shape[axis] / shape[axis]) + 2
    channels = len(run.bundle.recipe.data.channels)
    window = 4 * channels * plane * (2 * source_planes + 3 * depth)
    may_skip = settings.crop == "body" or run.bundle.recipe.classifier(GATE) is not None
    weight = 4 * ring_plane * depth if may_skip else 0
    source_plane = math.prod(geometry.shape) // geometry.shape[axis]
    ring = tiling.dtype.itemsize * run.n_channels * ring_plane * depth
    return _PassBytes(
        network=_forward_bytes(run),
        stream=round(window + ring) + weight,
        restore=40 * max(SLAB_VOXELS, source_plane) + 4 * run.n_channels * 3 * plane,
    )


def _forward_bytes(run: NetworkPass) -> int:
    """Return the bytes of the network's activations and logits for one batch of tiles."""
    tiling, members = run.tiling, len(run.bundle.segmentation_names)
    # sum, new logits, the same flipped back
    n_arrays = 3 if tiling.tta_axes else 2 if members > 1 else 1
    logits_bytes = 2 if run.half and run.head_is_deferred and not run.on_gpu else 4
    batch_voxels = tiling.batch_size * math.prod(tiling.patch_shape)
    logits = logits_bytes * run.n_channels * batch_voxels * n_arrays
    if run.on_gpu and members == 1:  # a CUDA graph has its own input and output
        logits += 4 * (run.n_channels + len(run.bundle.recipe.data.channels)) * batch_voxels
    # A network compiled by OpenVINO keeps its memory until the scan is done.
    n_networks = members if run.backend == "openvino" else 1
    activations = run.network_bytes * tiling.batch_size * n_networks
    overhead = OVERHEAD["cuda" if run.on_gpu else run.backend] * (0.5 if run.half else 1)
    return round(activations * overhead) + logits + WORKSPACE


def _prepared_grid(
    geometry: Geometry, settings: Preprocess
) -> tuple[Geometry, tuple[int, int, int]]:
    """Return the whole scan's grid in prepared axes, and its shape at the prepared spacing."""
    canonical = settings.axes == "canonical"
    order = AxisOrder.of(geometry) if canonical else AxisOrder.stored()
    prepared = geometry.reordered(order.transposed(settings.transpose))
    return prepared, resampled_shape(prepared, closed(settings.spacing_mm))


def network_bytes(bundle: ModelBundle) -> int:
    """Return the peak bytes of live tensors while one patch passes through the network."""
    with torch.device("meta"):
        network: nn.Module = build_segmentation(bundle.recipe).eval()
        patch = torch.empty(1, len(bundle.recipe.data.channels), *bundle.recipe.patch_shape)
    try:
        with torch.inference_mode(), _Live() as live:
            network(patch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        size = format_sizes(bundle.recipe.patch_shape)
        raise VolsegError(
            f"{bundle.recipe.name}: its network cannot be run on a patch of {size} "
            f"voxels ({str(error).strip().splitlines()[0]})",
            fix="copy the model again, or make the patch a multiple of the network's strides",
            code="E_CKPT",
        ) from error
    return live.peak


def check_patch(bundle: ModelBundle, memory: int | None = None, *, half: bool = False) -> None:
    """Refuse a model whose batch of patches does not fit into memory, before allocating it.

    Args:
        memory: bytes of the GPU; None for the main memory of this machine.
        half: the network is run in half precision or less.

    Raises:
        VolsegError: the batch does not fit.
    """
    batch_size, memory = bundle.recipe.infer.batch_size, memory or total_memory()
    needed = network_bytes(bundle) // (2 if half else 1) * batch_size
    if needed > memory:
        size = format_sizes(bundle.recipe.patch_shape)
        raise VolsegError(
            f"{bundle.recipe.name}: a batch of {batch_size} patches of {size} voxels needs "
            f"{needed / 2**30:,.1f} GB, and this machine has {memory / 2**30:.1f} GB of memory",
            fix="use a machine with more memory, or a model with a smaller patch",
            code="E_RAM",
        )


class _Live(TorchDispatchMode):
    """A counter of the bytes of live tensors; on the device `meta` nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def forget(_: object) -> None:
            self._storages.pop(key, None)
            self.total -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.total += size
        self.peak = max(self.peak, self.total)
