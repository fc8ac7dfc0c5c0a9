"""The pipeline for one scan: from images to lesions and measurements, without file access."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from volseg.bundle import ModelBundle
from volseg.errors import ScanError
from volseg.execution.cpu import total_memory
from volseg.inference.backend import Backend, EnsembleBackend, device_of
from volseg.inference.choose import choose_backend, load_backend
from volseg.inference.classify import classify_lesions
from volseg.inference.duration import Work, seconds_per_tile
from volseg.inference.memory import (
    MemoryPlan,
    NetworkPass,
    ScanHeader,
    check_patch,
    network_bytes,
    plan_memory,
)
from volseg.inference.openvino_backend import OpenVINOBackend
from volseg.inference.roi import find_region
from volseg.inference.stream import Tiling, predict_slabs
from volseg.inference.tiles import thinnest_axis, widest
from volseg.inference.torch_backend import TorchBackend
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.specks import MeasuredLesions, Specks, measure_largest
from volseg.mismatch import Resemblance, compare_scan
from volseg.postprocessing.lesions import CONNECTIVITY, MANY, label_lesions, remove_organ
from volseg.postprocessing.steps import make_steps
from volseg.preprocessing.align import completed, to_first_grid
from volseg.preprocessing.crop import scaled_box
from volseg.preprocessing.prepare import Preparation
from volseg.preprocessing.restore import MaskRestorer
from volseg.recipe import Data
from volseg.volume import WORLD_AXES, BoundingBox, Geometry, Volume

OnTile = Callable[[int, int], None]  # (tiles done, total)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle with its networks loaded, reused for every scan."""

    bundle: ModelBundle
    segmentation: Backend
    classifier: Backend | None
    device: str = "cpu"
    coarse: Model | None = None  # the coarse first pass, if the recipe has one


@dataclass(frozen=True, slots=True, eq=False)
class CaseResult:
    """The result for one scan: masks on its own grid and a row per lesion, largest first."""

    mask: Volume  # label values of the recipe
    lesion_ids: Volume  # 1 = largest
    lesions: Sequence[LesionMeasurement]  # of a noisy mask only the largest; see `specks`
    resemblance: Resemblance  # to the training scans of the model
    organ_voxels: int | None = None  # of the organ's label; None without an organ
    specks: Specks | None = None

    @property
    def measured(self) -> MeasuredLesions:
        """All lesions; their rows are made on demand."""
        return MeasuredLesions(self.lesions, self.specks)


def load_model(
    bundle: ModelBundle,
    device: str = "auto",
    *,
    backend: str = "auto",
    precision: str = "auto",
    folder: Path | None = None,
) -> Model:
    """Make the bundle's networks ready to run.

    Args:
        device: `auto`, `cpu` or `cuda`.
        backend: `auto`, `torch` or `openvino`.
        precision: `auto`, `fp32`, `fp16` or `int8`, for segmentation. The coarse first pass stays
            in fp32 even with int8: a region it misses is lost. The classifier runs in torch.
        folder: of the bundle; its OpenVINO files are used if it has any.
    """
    choice = choose_backend(backend, device, precision)
    on_cpu = choice.device.type == "cpu"
    gpu = None if on_cpu else torch.cuda.get_device_properties(choice.device)
    memory = total_memory() if gpu is None else gpu.total_memory
    for part in (bundle, bundle.coarse):
        if part is not None:
            divisor = 1 if choice.precision == "fp32" else 2
            check_patch(part, network_bytes(part) // divisor, memory)
    network, classifier, coarse = bundle.classifier_network(), None, None
    if bundle.coarse is not None:
        exact = replace(choice, precision="fp32") if choice.precision == "int8" else choice
        first_pass = load_backend(bundle.coarse, exact, folder=folder)
        coarse = Model(bundle.coarse, first_pass, None, choice.device.type)
    segmentation = load_backend(bundle, choice, folder=folder)
    if network is not None:
        classifier = TorchBackend(network, choice.device, precision=choice.precision)
    return Model(bundle, segmentation, classifier, choice.device.type, coarse)


def segment_case(
    images: Mapping[str, Volume],
    model: Model,
    *,
    case_id: str,
    half_logits: bool = False,
    accept_mismatch: bool = False,
    on_tile: OnTile = lambda done, total: None,
) -> CaseResult:
    """Segment one scan and measure its lesions, if it resembles the training scans.

    Args:
        images: channel name → scan; must contain every channel of the recipe, unless the recipe
            accepts cases with missing channels.
        half_logits: blend logits in float16: half the buffer, logits rounded to three digits.
        accept_mismatch: also segment a scan of another modality than in training; then it gets no
            density, mass, calcium score or class.
        on_tile: called before the first tile and after each; not called for a scan without a body.

    Raises:
        ScanError: a channel is missing, the channels lie on different grids, or the scan is of
            another modality.
    """
    recipe = model.bundle.recipe
    channels = recipe.data.channels
    scans = {name: images[name] for name in _present(images, recipe.data, case_id)}
    if recipe.data.grids == "first":
        scans = to_first_grid(scans, align=recipe.data.align == "rigid")
    scan = scans[channels[0]]
    resemblance = compare_scan(scans, recipe, model.bundle.fingerprint)
    if resemblance.contradictions and not accept_mismatch:
        raise ScanError(
            f"case {case_id!r} is of another modality than the training scans of model "
            f"{recipe.name!r}: {'; '.join(resemblance.contradictions)}",
            fix="use a model for its modality, or segment it with --accept-mismatch, without "
            "density and class",
            code="E_MODALITY",
        )
    absent = [name for name in channels if name not in scans]
    mask, confidence = _predict(
        completed(scans, channels), absent, model, half_logits=half_logits, on_tile=on_tile
    )
    for step in make_steps(recipe.postprocess):
        mask = step(mask, scan.geometry)
    organ, organ_voxels, lesion_mask = recipe.measure.organ, None, mask
    if organ is not None:
        value = recipe.data.labels[organ]
        lesion_mask, organ_voxels = remove_organ(mask, value)
        confidence[mask == value] = 0  # confidence in the organ says nothing about a lesion
    lesions = label_lesions(lesion_mask, scan.geometry)
    classes = None
    if model.classifier is not None and recipe.classify is not None:
        # With a doubted unit no lesion gets a class; in noise only the largest get one.
        classes = (
            [None] * min(MANY, len(lesions.labels))
            if resemblance.unit.doubt
            else classify_lesions(scan, lesions.ids, model.classifier, recipe.classify, most=MANY)
        )
    measured = measure_largest(
        scan,
        lesions.ids,
        lesions.labels,
        case_id=case_id,
        label_names=recipe.data.label_names,
        intensity_unit=resemblance.unit.name,
        unit_doubt=resemblance.unit.doubt,
        confidence=confidence,
        classes=classes,
        settings=recipe.measure,
        connectivity=CONNECTIVITY,
        model=model.bundle.name,
    )
    ids = scan.with_array(lesions.ids)
    return CaseResult(
        mask=scan.with_array(mask),
        lesion_ids=ids,
        lesions=measured.largest,
        resemblance=resemblance,
        organ_voxels=organ_voxels,
        specks=measured.specks,
    )


def patch_bytes(model: Model) -> int:
    """Return the peak memory in bytes of the segmentation network for one patch."""
    backend = model.segmentation
    if isinstance(backend, EnsembleBackend):
        backend = backend.backends[0]
    is_openvino = isinstance(backend, OpenVINOBackend)
    return backend.patch_bytes if is_openvino else network_bytes(model.bundle)


def plan_case_memory(
    geometry: Geometry,
    itemsize: int,
    model: Model,
    needed: int,
    max_ram: int | None = None,
    *,
    max_vram: int | None = None,
    coarse_needed: int = 0,
    is_alone: bool = True,
    n_cases: int = 1,
) -> MemoryPlan:
    """Plan how a scan with this header fits into memory.

    Args:
        itemsize: bytes per stored voxel, summed over channels.
        needed, coarse_needed: `patch_bytes` of the network and of that of the first pass, if any.
        is_alone: no other scan is read or written at the same time.
        n_cases: number of cases in the results folder.

    Raises:
        ScanError: it does not fit into `max_ram` bytes of main memory or `max_vram` of GPU memory.
    """
    return plan_memory(
        ScanHeader(geometry=geometry, itemsize=itemsize),
        _network_pass(model, needed),
        coarse=None if model.coarse is None else _network_pass(model.coarse, coarse_needed),
        is_alone=is_alone,
        n_cases=n_cases,
        max_ram=max_ram,
        max_vram=max_vram,
    )


def _network_pass(model: Model, needed: int) -> NetworkPass:
    recipe, head = model.bundle.recipe, model.segmentation.head
    return NetworkPass(
        bundle=model.bundle,
        tiling=tiling_of(model.bundle),
        backend=model.segmentation.identity["backend"],
        n_channels=recipe.data.n_outputs if head is None else 1 + head.n_features,
        network_bytes=needed,
        head_is_deferred=head is not None,
        on_gpu=model.device != "cpu",
        half=model.segmentation.identity["precision"] in ("fp16", "bf16"),
    )


def estimate_work(model: Model, shapes: Sequence[tuple[int, int, int]]) -> Work:
    """Estimate the work for prepared grids of these shapes, by timing a blank batch."""
    recipe = model.bundle.recipe
    tiling = tiling_of(model.bundle)
    batch_shape = (tiling.batch_size, len(recipe.data.channels), *recipe.patch_shape)
    seconds = seconds_per_tile(model.segmentation, batch_shape)
    return Work(
        tiling=tiling, shapes=shapes, seconds_per_tile=seconds, on_gpu=model.device != "cpu"
    )


def tiling_of(bundle: ModelBundle) -> Tiling:
    """Return the tiling that the bundle's recipe prescribes."""
    infer = bundle.recipe.infer
    return Tiling(
        patch_shape=bundle.recipe.patch_shape,
        overlap=infer.overlap,
        tta_axes=[WORLD_AXES[name] for name in infer.tta_axes],
        batch_size=infer.batch_size,
        margin=infer.margin,
    )


def _predict(
    images: Mapping[str, Volume],
    absent: Sequence[str],
    model: Model,
    *,
    half_logits: bool,
    on_tile: OnTile,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mask (I, J, K) of label values and confidence (I, J, K) uint8 on the scan's grid."""
    recipe = model.bundle.recipe
    preparation = Preparation(images, recipe.preprocess, absent)
    trail = preparation.trail
    regions = recipe.data.regions_class_order
    values = list(recipe.data.label_names) if regions is None else list(regions)
    tiling = replace(
        tiling_of(model.bundle), empty_level=None if regions else preparation.empty_level
    )
    part = _tiled_part(preparation, tiling, model)
    shape = trail.shape if part is None else part.shape
    axis = trail.separate_axis
    if axis is None:
        axis = thinnest_axis(shape, recipe.patch_shape)
    head = model.segmentation.head
    restorer = MaskRestorer(
        trail, values, axis=axis, regions=regions is not None, part=part, head=head
    )
    if part is not None:
        done, total = count(1), tiling.count(part.shape)
        on_tile(0, total)
        slabs = predict_slabs(
            preparation.planes(axis, part, device_of(model.segmentation)),
            model.segmentation,
            tiling,
            n_classes=recipe.data.n_outputs if head is None else head.n_features,
            dtype=torch.float16 if half_logits else torch.float32,
            on_tile=lambda is_empty: on_tile(next(done), total),
        )
        try:
            for slab in slabs:
                restorer.add(slab)
        finally:
            model.segmentation.release()
    return restorer.result()


def _tiled_part(preparation: Preparation, tiling: Tiling, model: Model) -> BoundingBox | None:
    """Return the part of the prepared grid to run tiles on; None if there is no body."""
    shape = preparation.trail.shape
    if not preparation.has_body:
        return None
    inside_body = model.bundle.recipe.infer.inside == "body"
    box = preparation.body_box() if inside_body else BoundingBox.whole(shape)
    if box is None:
        return None
    region = _region(preparation, model)
    if region is not None:  # a region outside the body is ignored
        box = box.intersection(region) or box
    # Reflect padding starts at the faces of this part, so keep the same margin from them as from
    # the faces of the scan.
    margin = tiling.margin
    ends = [
        widest(max(0, start - margin), min(n, stop + margin), n, patch, tiling.overlap, margin)
        for start, stop, n, patch in zip(
            box.start, box.stop, shape, tiling.patch_shape, strict=True
        )
    ]
    (r, r_stop), (a, a_stop), (s, s_stop) = ends
    return BoundingBox((r, a, s), (r_stop, a_stop, s_stop))


def _region(preparation: Preparation, model: Model) -> BoundingBox | None:
    """Return the box, with margin, that the coarse first pass finds; None if it finds none."""
    roi, coarse = model.bundle.recipe.roi, model.coarse
    if roi is None or coarse is None:
        return None
    whole = preparation.at(coarse.bundle.recipe.spacing_mm)
    tiling = replace(tiling_of(coarse.bundle), empty_level=whole.empty_level)
    try:
        axis = thinnest_axis(whole.trail.shape, tiling.patch_shape)
        planes = whole.planes(axis, device=device_of(coarse.segmentation))
        region = find_region(planes, coarse.segmentation, tiling)
    finally:
        coarse.segmentation.release()
    if region is None:
        return None
    trail = preparation.trail
    margin = [roi.margin_mm / mm for mm in trail.spacing_mm]
    return scaled_box(region, whole.trail.shape, trail.shape, margin)


def _present(images: Mapping[str, Volume], data: Data, case_id: str) -> Sequence[str]:
    """Return the channels of the recipe that the case has."""
    missing = [name for name in data.channels if name not in images]
    if missing and (data.missing == "error" or data.channels[0] in missing):
        raise ScanError(
            f"case {case_id!r} lacks channels {missing}; it has {sorted(images)}",
            fix=f"add the {missing[0]!r} scan, or use a model without it",
            code="E_CHANNELS",
        )
    return [name for name in data.channels if name in images]
