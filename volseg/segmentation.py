"""The pipeline for one scan: from images to lesions and measurements, without file access."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from volseg.attached import load_attached
from volseg.bundle import ModelBundle
from volseg.errors import ScanError
from volseg.inference.backend import Backend, EnsembleBackend, device_of
from volseg.inference.choose import BackendChoice, choose_backend, load_backend
from volseg.inference.classify import classify_lesions
from volseg.inference.duration import Work, seconds_per_tile
from volseg.inference.export import batch_shape_of
from volseg.inference.memory import NetworkPass, check_patch, network_bytes
from volseg.inference.openvino_backend import OpenVINOBackend
from volseg.inference.roi import find_region
from volseg.inference.roles import (
    GateReport,
    KeptSlices,
    RunningClassifier,
    classes_of_lesions,
    lesion_probabilities,
)
from volseg.inference.stream import Tiling, predict_slabs
from volseg.inference.tiles import thinnest_axis, widest
from volseg.inference.torch_backend import TorchBackend
from volseg.measurement.rows import LesionMeasurement
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.specks import MeasuredLesions, measure_largest
from volseg.mismatch import Resemblance, compare_scan
from volseg.postprocessing.lesions import MANY, Lesions, label_lesions, remove_organ
from volseg.postprocessing.steps import make_steps
from volseg.preprocessing.channels import completed, on_one_grid
from volseg.preprocessing.crop import scaled_box
from volseg.preprocessing.prepare import Preparation, Trail
from volseg.preprocessing.probabilities import ProbabilityMaps
from volseg.preprocessing.restore import MaskRestorer
from volseg.preprocessing.tilt import Straight
from volseg.recipe import FILTER, GATE, TYPE, Data, Recipe, Role
from volseg.volume import BoundingBox, Geometry, Volume

OnTile = Callable[[int, int], None]  # (tiles done, total)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle with its networks loaded, reused for every scan."""

    bundle: ModelBundle
    segmentation: Backend
    classifier: Backend | None
    device: str = "cpu"
    coarse: Model | None = None  # the coarse first pass, if the recipe has one
    attached: Mapping[Role, RunningClassifier] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streaming:
    """How the logits of a scan are streamed.

    Args:
        half_logits: blend them in float16: half the buffer, logits rounded to three digits.
        probabilities: receives the probability of every label; None: it is not kept.
    """

    half_logits: bool = False
    probabilities: ProbabilityMaps | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CaseResult:
    """The result for one scan: masks on its own grid and a row per lesion, largest first."""

    mask: Volume  # label values of the recipe
    # (I, J, K) uint8, see SegmentedScan; None once it was dropped to free its memory
    confidence: np.ndarray | None
    measured: MeasuredLesions
    resemblance: Resemblance  # to the training scans of the model
    n_dropped: int | None = None  # lesions that the model's filter dropped; None without a filter
    gate: GateReport | None = None  # what the model's gate skipped; None without a gate

    @property
    def lesions(self) -> Sequence[LesionMeasurement]:
        """Lesions with every column: of a noisy mask only the largest."""
        return self.measured.largest

    @property
    def lesion_ids(self) -> Volume:
        """Number of the lesion in each voxel, 1 for the largest."""
        return self.measured.lesion_ids


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
    memory = None
    if choice.device.type != "cpu":
        memory = torch.cuda.get_device_properties(choice.device).total_memory
    coarse_bundle = bundle.coarse_bundle
    for part in (bundle, coarse_bundle):
        if part is not None:
            check_patch(part, memory, half=choice.precision != "fp32")
    network, classifier, coarse = bundle.classifier_network(), None, None
    if coarse_bundle is not None:
        exact = replace(choice, precision="fp32") if choice.precision == "int8" else choice
        first_pass = load_backend(coarse_bundle, exact, folder=folder)
        coarse = Model(coarse_bundle, first_pass, None, choice.device.type)
    segmentation = load_backend(bundle, choice, folder=folder)
    if network is not None:
        classifier = TorchBackend(network, choice.device, precision=choice.precision)
    attached = _load_attached(bundle, choice, folder)
    return Model(bundle, segmentation, classifier, choice.device.type, coarse, attached)


def _load_attached(
    bundle: ModelBundle, choice: BackendChoice, folder: Path | None
) -> Mapping[Role, RunningClassifier]:
    """Load the attached classifiers: in torch, and on a CPU in fp32, so that they always agree."""
    precision = "fp32" if choice.device.type == "cpu" else choice.precision
    choice = replace(choice, backend="torch", precision=precision)
    return {
        item.role: RunningClassifier.load(item, loaded, choice)
        for role, loaded in load_attached(bundle, folder).items()
        if (item := bundle.recipe.classifier(role)) is not None
    }


def segment_case(
    images: Mapping[str, Volume],
    model: Model,
    *,
    case_id: str,
    streaming: Streaming | None = None,
    accept_mismatch: bool = False,
    on_tile: OnTile = lambda done, total: None,
) -> CaseResult:
    """Segment one scan and measure its lesions, if it resembles the training scans.

    Args:
        images: channel name → scan; must contain every channel of the recipe, unless the recipe
            accepts cases with missing channels.
        streaming: how logits are blended and whether probabilities are kept.
        accept_mismatch: also segment a scan of another modality than in training; then it gets no
            density, mass, calcium score or class.
        on_tile: called before the first tile and after each; not called for a scan without a body.

    Raises:
        ScanError: a channel is missing, the channels lie on different grids, or the scan is of
            another modality.
    """
    recipe = model.bundle.recipe
    scans = on_one_grid(_present(images, recipe.data, case_id), recipe)
    scan = scans[recipe.data.channels[0]]
    resemblance = compare_scan(scans, recipe, model.bundle.fingerprint)
    if resemblance.contradictions and not accept_mismatch:
        raise _other_modality(resemblance, case_id, recipe.name)
    straight = Straight.of(scan.geometry) if scan.geometry.is_tilted else None
    is_doubted = bool(resemblance.unit.doubt)
    if is_doubted:  # a scan unlike those on which the classifiers were trained
        model = replace(
            model, attached={TYPE: model.attached[TYPE]} if TYPE in model.attached else {}
        )
    mask, confidence, gate = _predict(scans, model, straight, streaming or Streaming(), on_tile)
    for step in make_steps(recipe.postprocess):
        mask = step(mask, scan.geometry)
    organ, organ_voxels, lesion_mask = recipe.measure.organ, None, mask
    if organ is not None:
        value = recipe.data.labels[organ]
        lesion_mask, organ_voxels = remove_organ(mask, value)
        confidence[mask == value] = 0  # confidence in the organ says nothing about a lesion
    lesions, n_dropped = label_lesions(lesion_mask, scan.geometry), None
    if (filtering := model.attached.get(FILTER)) is not None:
        is_false = _false_lesions(scan, lesions, filtering, straight)
        n_dropped = int(np.count_nonzero(is_false))
        lesions = _drop(lesions, is_false, scan.geometry, (lesion_mask, mask, confidence))
    segmented = SegmentedScan(
        case_id=case_id,
        image=scan,
        lesions=lesions,
        unit=resemblance.unit,
        label_names=recipe.data.label_names,
        settings=recipe.measure,
        organ_voxels=organ_voxels,
        confidence=confidence,
        classes=_classes(scan, lesions, model, straight, is_doubted=is_doubted),
        model=model.bundle.name,
    )
    measured = measure_largest(segmented)
    return CaseResult(scan.with_array(mask), confidence, measured, resemblance, n_dropped, gate)


def network_pass(model: Model) -> NetworkPass:
    """Return what `plan_memory` must know of a model's passes over a scan."""
    recipe, backend = model.bundle.recipe, model.segmentation
    head, identity = backend.head, backend.identity
    return NetworkPass(
        bundle=model.bundle,
        tiling=Tiling.of(recipe),
        backend=identity["backend"],
        n_channels=recipe.data.n_outputs if head is None else 1 + head.n_features,
        network_bytes=_patch_bytes(model),
        head_is_deferred=head is not None,
        on_gpu=model.device != "cpu",
        half=identity["precision"] in ("fp16", "bf16"),
        coarse=None if model.coarse is None else network_pass(model.coarse),
    )


def _patch_bytes(model: Model) -> int:
    """Return the peak memory in bytes of the segmentation network for one patch."""
    backend = model.segmentation
    if isinstance(backend, EnsembleBackend):
        backend = backend.backends[0]
    is_openvino = isinstance(backend, OpenVINOBackend)
    return backend.patch_bytes if is_openvino else network_bytes(model.bundle)


def estimate_work(model: Model, shapes: Sequence[tuple[int, int, int]]) -> Work:
    """Estimate the work for prepared grids of these shapes, by timing a blank batch."""
    seconds = seconds_per_tile(model.segmentation, batch_shape_of(model.bundle))
    return Work(
        tiling=Tiling.of(model.bundle.recipe),
        shapes=shapes,
        seconds_per_tile=seconds,
        on_gpu=model.device != "cpu",
    )


def _predict(
    scans: Mapping[str, Volume],
    model: Model,
    straight: Straight | None,
    streaming: Streaming,
    on_tile: OnTile,
) -> tuple[np.ndarray, np.ndarray, GateReport | None]:
    """Return mask (I, J, K) of label values and confidence (I, J, K) uint8 on the scan's grid.

    Also what the gate skipped, if the model has one.

    Args:
        straight: how the stack becomes right-angled for the network; None if it is.
    """
    if straight is None:
        return _predict_upright(scans, model, streaming=streaming, on_tile=on_tile)
    seen = {name: straight.scan(scan) for name, scan in scans.items()}
    mask, confidence, gate = _predict_upright(seen, model, streaming=streaming, on_tile=on_tile)
    return straight.unstack(mask), straight.unstack(confidence), gate


def _streaming_axis(trail: Trail, part: BoundingBox | None, tiling: Tiling) -> int:
    """Return the axis along which planes are prepared, run and restored."""
    if trail.separate_axis is not None:
        return trail.separate_axis
    return thinnest_axis(trail.shape if part is None else part.shape, tiling.patch_shape)


def _tiling(preparation: Preparation, recipe: Recipe, streaming: Streaming) -> Tiling:
    """Return the tiling of a scan; tiles without a body are left out unless regions overlap."""
    return replace(
        Tiling.of(recipe),
        empty_level=None if recipe.data.regions_class_order else preparation.empty_level,
        dtype=torch.float16 if streaming.half_logits else torch.float32,
    )


def _drop(
    lesions: Lesions, is_false: np.ndarray, geometry: Geometry, arrays: Sequence[np.ndarray]
) -> Lesions:
    """Return the other lesions, after setting the voxels of the false ones to 0 in all arrays.

    Args:
        is_false: bool (n + 1,), by lesion number. arrays: (I, J, K); the first is of lesions alone.
    """
    if not is_false.any():
        return lesions
    dropped = is_false[lesions.ids]
    for array in arrays:
        array[dropped] = 0
    return label_lesions(arrays[0], geometry)


def _predict_upright(
    scans: Mapping[str, Volume], model: Model, *, streaming: Streaming, on_tile: OnTile
) -> tuple[np.ndarray, np.ndarray, GateReport | None]:
    """Return mask, confidence and gate report of a scan whose axes are at right angles."""
    recipe, backend = model.bundle.recipe, model.segmentation
    data = recipe.data
    absent = [name for name in data.channels if name not in scans]
    preparation = Preparation(completed(scans, data.channels), recipe.preprocess, absent)
    trail, tiling = preparation.trail, _tiling(preparation, recipe, streaming)
    part, gating = _tiled_part(preparation, tiling, model), model.attached.get(GATE)
    slices = None if gating is None else KeptSlices.of(scans[data.channels[0]], gating)
    if slices is not None and part is not None and slices.skipped.size:
        tiling = replace(tiling, kept_planes=slices.planes(trail, part))
    axis = _streaming_axis(trail, part, tiling)
    values, is_regions = output_values(data), data.regions_class_order is not None
    restorer = MaskRestorer(
        trail, values, axis=axis, regions=is_regions, part=part, head=backend.head
    )
    if streaming.probabilities is not None:
        streaming.probabilities.begin(trail)
        restorer.on_logits = streaming.probabilities.add
    started = time.monotonic()
    if part is not None:
        done, total = count(1), tiling.count(part.shape)
        on_tile(0, total)
        planes = preparation.planes(axis, part, device_of(backend))
        try:
            for slab in predict_slabs(
                planes,
                backend,
                tiling,
                n_classes=data.n_outputs,
                on_tile=lambda is_empty: on_tile(next(done), total),
            ):
                restorer.add(slab)
        finally:
            backend.release()
    seconds = time.monotonic() - started
    gate = None if slices is None else _gate_report(slices, tiling, part, seconds)
    return *restorer.result(), gate


def _gate_report(
    slices: KeptSlices, tiling: Tiling, part: BoundingBox | None, seconds: float
) -> GateReport:
    """Return what a gate skipped; `seconds` is what the tiles took that were run."""
    n_tiles = 0 if part is None else tiling.count(part.shape)
    n_skipped = 0 if part is None else tiling.count_skipped(part.shape)
    n_run = n_tiles - n_skipped
    return GateReport(
        n_slices=len(slices.is_kept),
        n_skipped=len(slices.skipped),
        n_tiles=n_tiles,
        n_tiles_skipped=n_skipped,
        seconds=slices.seconds,
        seconds_saved=seconds * n_skipped / n_run if n_run else None,
        skipped=slices.skipped,
    )


def output_values(data: Data) -> list[int]:
    """Return the mask value of each output of the network, without the background."""
    return list(data.regions_class_order or data.label_names)


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
    tiling = replace(Tiling.of(coarse.bundle.recipe), empty_level=whole.empty_level)
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


def _classes(
    scan: Volume, lesions: Lesions, model: Model, straight: Straight | None, *, is_doubted: bool
) -> Sequence[Mapping[str, float] | None] | None:
    """Return the class probabilities of each lesion; None without a classifier.

    With a doubted unit no lesion gets a class; in noise only the largest get one.
    """
    settings, typing = model.bundle.recipe.classify, model.attached.get(TYPE)
    if typing is None and (model.classifier is None or settings is None):
        return None
    if is_doubted:
        return [None] * min(MANY, len(lesions.labels))
    scan, lesions = _upright(scan, lesions, straight)
    if typing is not None:
        return classes_of_lesions(scan, lesions, typing, most=MANY)
    assert model.classifier is not None and settings is not None
    return classify_lesions(scan, lesions.ids, model.classifier, settings, most=MANY)


def _false_lesions(
    scan: Volume, lesions: Lesions, filtering: RunningClassifier, straight: Straight | None
) -> np.ndarray:
    """Return (n + 1,) bool: which numbers in `ids` a filter drops; none after the first `MANY`."""
    is_false = np.zeros(len(lesions.labels) + 1, bool)
    probabilities = lesion_probabilities(*_upright(scan, lesions, straight), filtering, most=MANY)
    is_false[1 : 1 + len(probabilities)] = ~filtering.keeps(probabilities)
    return is_false


def _upright(scan: Volume, lesions: Lesions, straight: Straight | None) -> tuple[Volume, Lesions]:
    """Return a scan and its lesions as classifiers see them: at right angles."""
    if straight is None:
        return scan, lesions
    return straight.scan(scan), replace(lesions, ids=straight.stack(lesions.ids, 0))


def _present(images: Mapping[str, Volume], data: Data, case_id: str) -> Mapping[str, Volume]:
    """Return those channels of the recipe that the case has."""
    missing = [name for name in data.channels if name not in images]
    if missing and (data.missing == "error" or data.channels[0] in missing):
        raise ScanError(
            f"case {case_id!r} lacks channels {missing}; it has {sorted(images)}",
            fix=f"add the {missing[0]!r} scan, or use a model without it",
            code="E_CHANNELS",
        )
    return {name: images[name] for name in data.channels if name in images}


def _other_modality(resemblance: Resemblance, case_id: str, model: str) -> ScanError:
    return ScanError(
        f"case {case_id!r} is of another modality than the training scans of model {model!r}: "
        f"{'; '.join(resemblance.contradictions)}",
        fix="use a model for its modality, or segment it with --accept-mismatch, without density "
        "and class",
        code="E_MODALITY",
    )
