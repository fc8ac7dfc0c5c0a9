"""THE CHAIN: one scan → lesions and numbers. No path, no print, no device name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from volseg.bundle import ModelBundle
from volseg.errors import ScanError
from volseg.execute.cpu import total_memory
from volseg.infer.backends import (
    Backend,
    EnsembleBackend,
    OpenVINOBackend,
    TorchBackend,
    choose_backend,
    device_of,
    load_backend,
)
from volseg.infer.classify import classify_lesions
from volseg.infer.duration import Work, seconds_per_tile
from volseg.infer.memory import (
    MemoryPlan,
    NetworkPass,
    ScanHeader,
    check_patch,
    network_bytes,
    plan_memory,
)
from volseg.infer.roi import find_region
from volseg.infer.stream import Tiling, predict_slabs
from volseg.infer.tiles import thinnest_axis, widest
from volseg.measure.rows import LesionMeasurement
from volseg.measure.specks import MeasuredLesions, Specks, measure_largest
from volseg.mismatch import Resemblance, compare_scan
from volseg.postprocess.lesions import CONNECTIVITY, MANY, label_lesions, without_organ
from volseg.postprocess.steps import make_steps
from volseg.preprocess.align import completed, on_one_grid
from volseg.preprocess.crop import scaled_box
from volseg.preprocess.prepare import Preparation
from volseg.preprocess.restore import MaskRestorer
from volseg.recipe import Data
from volseg.volume import WORLD_AXES, BoundingBox, Geometry, Volume

OnTile = Callable[[int, int], None]  # tiles done, of how many


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle whose networks are loaded and ready: made once, used for every scan."""

    bundle: ModelBundle
    segmentation: Backend
    classifier: Backend | None
    device: str = "cpu"
    coarse: Model | None = None  # of the first pass, where the recipe has one


@dataclass(frozen=True, slots=True, eq=False)
class CaseResult:
    """What one scan gives: masks on its own grid and a row per lesion, the largest first."""

    mask: Volume  # label values of the recipe
    lesion_ids: Volume  # 1 = largest
    lesions: Sequence[
        LesionMeasurement
    ]  # of a mask that looks like noise the largest; `specks` are the others
    resemblance: Resemblance  # to the training scans of the model
    organ_voxels: int | None = None  # of the organ's own label; None where no label is the organ
    specks: Specks | None = None

    @property
    def measured(self) -> MeasuredLesions:
        """All lesions, of which rows are made when they are asked for."""
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
        device: `auto`, `cpu` or `cuda`. backend: `auto`, `torch` or `openvino`.
        precision: `auto`, `fp32`, `fp16` or `int8`, of the segmentation; the classifier is small and always runs in torch, and a coarse
            first pass, whose errors cannot be made good, runs in fp32 where int8 is asked for.
        folder: the bundle's own, from which files made for OpenVINO are read where it has them.
    """
    choice = choose_backend(backend, device, precision)
    on_cpu = choice.device.type == "cpu"
    memory = (
        total_memory() if on_cpu else torch.cuda.get_device_properties(choice.device).total_memory
    )
    for part in (bundle, bundle.coarse):
        if part is not None:
            check_patch(
                part, network_bytes(part) // (1 if choice.precision == "fp32" else 2), memory
            )
    classifier = bundle.classifier_network()
    coarse = None
    if bundle.coarse is not None:
        exact = replace(choice, precision="fp32") if choice.precision == "int8" else choice
        first_pass = load_backend(bundle.coarse, exact, folder=folder)
        coarse = Model(bundle.coarse, first_pass, None, choice.device.type)
    return Model(
        bundle,
        load_backend(bundle, choice, folder=folder),
        None
        if classifier is None
        else TorchBackend(classifier, choice.device, precision=choice.precision),
        choice.device.type,
        coarse,
    )


def segment_case(
    images: Mapping[str, Volume],
    model: Model,
    *,
    case_id: str,
    half_logits: bool = False,
    accept_mismatch: bool = False,
    on_tile: OnTile = lambda done, total: None,
) -> CaseResult:
    """Compare one scan with those of training, then segment, post-process, label, score and measure it.

    Args:
        images: channel name → scan; every channel of the recipe must be there, unless it says that cases may miss some.
        half_logits: blend logits in float16: half the buffer, logits rounded to three digits.
        accept_mismatch: segment a scan of another modality than in training too; it has no density, mass, calcium score or class then.
        on_tile: called before the first tile and after each; not where there is no body to run tiles on.

    Raises:
        ScanError: a channel is missing, the channels lie on different grids, or the scan is of another modality.
    """
    recipe = model.bundle.recipe
    channels = recipe.data.channels
    chosen = {name: images[name] for name in _present(images, recipe.data, case_id)}
    if recipe.data.grids == "first":
        chosen = on_one_grid(chosen, align=recipe.data.align == "rigid")
    scan = chosen[channels[0]]
    resemblance = compare_scan(chosen, recipe, model.bundle.fingerprint)
    if resemblance.contradictions and not accept_mismatch:
        raise ScanError(
            f"case {case_id!r} is not of the modality that model {recipe.name!r} was trained on: {'; '.join(resemblance.contradictions)}",
            fix="use a model for its modality, or --accept-mismatch to segment it anyway, without density and class",
            code="E_MODALITY",
        )
    absent = [name for name in channels if name not in chosen]
    mask, confidence = _predict(
        completed(chosen, channels), absent, model, half_logits=half_logits, on_tile=on_tile
    )
    for step in make_steps(recipe.postprocess):
        mask = step(mask, scan.geometry)
    organ, organ_voxels, lesion_mask = recipe.measure.organ, None, mask
    if organ is not None:
        value = recipe.data.labels[organ]
        lesion_mask, organ_voxels = without_organ(mask, value)
        confidence[mask == value] = 0  # of being the organ, which says nothing of a lesion
    lesions = label_lesions(lesion_mask, scan.geometry)
    classes = None
    if model.classifier is not None and recipe.classify is not None:
        # Under a doubted unit no lesion has a class; of noise the largest have one.
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
    """Bytes of the tensors alive at the worst moment of one patch's way through the segmentation network."""
    backend = (
        model.segmentation.backends[0]
        if isinstance(model.segmentation, EnsembleBackend)
        else model.segmentation
    )
    return (
        backend.patch_bytes if isinstance(backend, OpenVINOBackend) else network_bytes(model.bundle)
    )


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
    """How a scan with this header fits into memory.

    Args:
        itemsize: bytes per stored voxel over all channels.
        needed, coarse_needed: of the network and of that of the first pass, where there is one, from `patch_bytes`.
        is_alone: no other scan is read or written meanwhile.
        n_cases: of the results folder.

    Raises:
        ScanError: it does not fit into `max_ram` bytes of main memory, or `max_vram` of the GPU's.
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
    recipe, plan, head = model.bundle.recipe, model.bundle.plan, model.segmentation.head
    return NetworkPass(
        bundle=model.bundle,
        tiling=tiling_of(model.bundle),
        settings=plan.prepare_settings(recipe.preprocess, recipe.data.channels),
        backend=model.segmentation.identity["backend"],
        n_channels=recipe.data.n_outputs if head is None else 1 + head.n_features,
        network_bytes=needed,
        head_is_off=head is not None,
        on_gpu=model.device != "cpu",
        half=model.segmentation.identity["precision"] in ("fp16", "bf16"),
    )


def work_ahead(model: Model, shapes: Sequence[tuple[int, int, int]]) -> Work:
    """The tiles over prepared grids of these shapes, and what one costs: a blank batch is run to find that out."""
    recipe, plan = model.bundle.recipe, model.bundle.plan
    tiling = tiling_of(model.bundle)
    batch_shape = (tiling.batch_size, len(recipe.data.channels), *plan.patch_shape)
    seconds = seconds_per_tile(model.segmentation, batch_shape)
    return Work(
        tiling=tiling, shapes=shapes, seconds_per_tile=seconds, on_gpu=model.device != "cpu"
    )


def tiling_of(bundle: ModelBundle) -> Tiling:
    """How the bundle's recipe and plan cut a volume into tiles."""
    infer = bundle.recipe.infer
    return Tiling(
        patch_shape=bundle.plan.patch_shape,
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
    """Mask (I, J, K) of label values and confidence (I, J, K) uint8, both on the scan's grid."""
    recipe, plan = model.bundle.recipe, model.bundle.plan
    preparation = Preparation(
        images, plan.prepare_settings(recipe.preprocess, list(images), absent)
    )
    trail = preparation.trail
    regions = recipe.data.regions_class_order
    values = list(recipe.data.label_names) if regions is None else list(regions)
    tiling = replace(
        tiling_of(model.bundle), empty_level=None if regions else preparation.empty_level
    )
    part = _tiled_part(preparation, tiling, model)
    shape = trail.shape if part is None else part.shape
    axis = (
        thinnest_axis(shape, plan.patch_shape)
        if trail.separate_axis is None
        else trail.separate_axis
    )
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
    """The part of the prepared grid that tiles are run on; None where there is no body."""
    shape = preparation.trail.shape
    if not preparation.has_body:
        return None
    inside_body = model.bundle.recipe.infer.inside == "body"
    box = preparation.body_box() if inside_body else BoundingBox.whole(shape)
    if box is None:
        return None
    region = _region(preparation, model)
    if region is not None:  # where nothing was found, or only outside the body, nothing is left out
        box = box.intersection(region) or box
    # The mirror image goes on from the faces of this part, so what is in it stays as far from them as from those of the scan.
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
    """Where the coarse first pass finds something, with the recipe's margin, on the prepared grid; None where it finds nothing."""
    roi, coarse = model.bundle.recipe.roi, model.coarse
    if roi is None or coarse is None:
        return None
    whole = preparation.at(coarse.bundle.plan.spacing_mm)
    tiling = replace(tiling_of(coarse.bundle), empty_level=whole.empty_level)
    try:
        found = find_region(
            whole.planes(
                thinnest_axis(whole.trail.shape, tiling.patch_shape),
                device=device_of(coarse.segmentation),
            ),
            coarse.segmentation,
            tiling,
        )
    finally:
        coarse.segmentation.release()
    if found is None:
        return None
    trail = preparation.trail
    return scaled_box(
        found, whole.trail.shape, trail.shape, [roi.margin_mm / mm for mm in trail.spacing_mm]
    )


def _present(images: Mapping[str, Volume], data: Data, case_id: str) -> Sequence[str]:
    """The channels of the recipe that the case has."""
    missing = [name for name in data.channels if name not in images]
    if missing and (data.missing == "error" or data.channels[0] in missing):
        raise ScanError(
            f"case {case_id!r} lacks channels {missing}; it has {sorted(images)}",
            fix=f"add the {missing[0]!r} scan, or use a model without it",
            code="E_CHANNELS",
        )
    return [name for name in data.channels if name in images]
