"""`volseg.segment`, `volseg.measure_mask` and `volseg.load_model`: scans in memory, no files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import MeasuredCase, done_row, path_in_unit
from volseg.commands.mask_measurement import MaskedScan, measure_masked
from volseg.commands.measuring import settings_of_masks
from volseg.errors import ScanError, VolsegError
from volseg.io.arrays import (
    ACCEPTED,
    NOWHERE,
    InMemory,
    Placement,
    as_mask,
    as_scan,
    kind_of,
    label_names_of,
    like_source,
    needs_placement,
    notes_on_mask,
    type_name,
)
from volseg.io.series import IN_SUV, with_mark
from volseg.measurement.confidence import probabilities_in
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.measurement.units import warnings_in
from volseg.options import LoadModelOptions, MeasureMaskOptions, SegmentOptions, command
from volseg.options.memory import Placed
from volseg.recipe import Data, as_recipe, asks_for_suv
from volseg.reports import html_of, text_of, text_of_lesions, totals_of_cases
from volseg.store.tables import frame_of
from volseg.volume import Geometry, Volume
from volseg.words import lesion_noun

if TYPE_CHECKING:
    from pandas import DataFrame

    from volseg.segmentation import Model

STAGE = "Segmenting"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class MaskResult:
    """The lesions of a scan in memory.

    Args:
        mask: (I, J, K), the value of the label in each voxel.
        lesion_ids: (I, J, K), the number of the lesion in each voxel, 1 for the largest.
        geometry: grid of both, that of the scan; its `affine` is voxel index → RAS mm.
        lesions: a row per lesion, with the columns of lesions.csv.
        cases: one row, with the columns of cases.csv.
        warnings: what to know before trusting the numbers, as `W_CODE: sentence`.
        source: the scan as it was given.
    """

    mask: np.ndarray
    lesion_ids: np.ndarray
    geometry: Geometry
    lesions: DataFrame
    cases: DataFrame
    warnings: Sequence[str]
    source: Any

    @property
    def affine(self) -> np.ndarray:
        """(4, 4): voxel index → RAS mm."""
        return self.geometry.affine

    def volume(self, name: str = "mask") -> Volume:
        """Return `mask`, `lesion_ids` or `confidence` as a volume, for `volseg.write_volume`."""
        array = getattr(self, name, None) if name in ("mask", "lesion_ids", "confidence") else None
        if array is None:
            text = f"{name!r} is not one of its arrays"
            fix = "give 'mask', 'lesion_ids' or, after volseg.segment, 'confidence'"
            raise VolsegError(text, fix=fix, code="E_USAGE")
        return Volume(array, self.geometry)

    def like_input(self, name: str = "mask") -> Any:
        """Return `mask`, `lesion_ids` or `confidence` in the form in which the scan was given.

        A SimpleITK image for a SimpleITK image, and so on; a Volume for a path.
        """
        return like_source(self.volume(name), self.source)

    def __repr__(self) -> str:
        noun = lesion_noun(self.lesions["connectivity"])
        outcome = text_of_lesions(*totals_of_cases(self.cases), noun)
        return text_of(type(self).__name__, outcome, self.warnings)

    def _repr_html_(self) -> str:
        return html_of(repr(self), self.lesions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class SegmentResult(MaskResult):
    """The lesions that a model segmented in a scan in memory.

    Args:
        confidence_uint8: (I, J, K), the confidence from 0 to 255.
    """

    confidence_uint8: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """(I, J, K) float32 from 0 to 1: the probability of the predicted label.

        In the background, that of any label. It is computed on each access.
        """
        return self.confidence_uint8 / np.float32(255)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LoadedModel(PathLike[str]):
    """A model with its networks loaded; call it for as many scans as you like.

    Threads may share it: their scans are segmented one after another. Every command that takes the
    folder of a model takes this too, and loads it again.
    """

    folder: Path
    network: Model
    # OpenVINO refuses two calls of one network at the same time.
    lock: Lock = field(default_factory=Lock)

    @property
    def name(self) -> str:
        """Name and start of the hash."""
        return self.network.bundle.name

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the scans that it needs of each case."""
        return tuple(self.network.bundle.recipe.data.channels)

    @property
    def labels(self) -> Mapping[int, str]:
        """The values of its masks and their names."""
        return self.network.bundle.recipe.data.label_names

    def __call__(
        self,
        image: Any,
        *,
        affine: Any = None,
        spacing_mm: Sequence[float] | None = None,
        case_id: str = "scan",
        accept_mismatch: bool = False,
    ) -> SegmentResult:
        """Segment a scan, as `volseg.segment(image, model=self, ...)` does."""
        return segment(
            image,
            model=self,
            affine=affine,
            spacing_mm=spacing_mm,
            case_id=case_id,
            accept_mismatch=accept_mismatch,
        )

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        recipe, identity = self.network.bundle.recipe, self.network.segmentation.identity
        labels = ", ".join(f"{value} {name}" for value, name in self.labels.items())
        return (
            f"LoadedModel {self.name}: {recipe.intended_use}\n"
            f"  channels: {', '.join(self.channels)} ({recipe.data.intensity_unit}); "
            f"labels: {labels}\n"
            f"  limits: {recipe.limits}\n"
            f"  runs on: {self.network.device}, {identity['backend']}, {identity['precision']}"
        )


@command(LoadModelOptions)
def load_model(options: LoadModelOptions) -> LoadedModel:
    """Load a model once.

    Raises:
        VolsegError: the folder is not a model, or the device or backend is missing.

    Example:
        >>> import volseg
        >>> model = volseg.load_model("model", device="cpu")
        >>> model.channels, model.labels
        (('ct',), {3: 'lesion'})
    """
    from volseg import segmentation
    from volseg.bundle import load_bundle, shipped_bundle

    folder = options.model or shipped_bundle()
    network = segmentation.load_model(
        load_bundle(folder),
        options.device,
        backend=options.backend,
        precision=options.precision,
        folder=folder,
    )
    return LoadedModel(folder.absolute(), network)


@command(SegmentOptions)
def segment(options: SegmentOptions) -> SegmentResult:
    """Segment a scan in memory and measure its lesions.

    Raises:
        VolsegError: the type of image or model is unknown (`E_TYPE`), before anything is loaded;
            or the scan cannot be used.

    Example:
        >>> import volseg
        >>> scan = volseg.read_volume("sample_data/images/phantom_15.nii.gz")
        >>> result = volseg.segment(scan.array, affine=scan.geometry.affine, model="model")
        >>> result.mask.shape == scan.array.shape
        True
        >>> len(result.lesions) == int(result.lesion_ids.max())
        True
    """
    started, model = time.monotonic(), options.model
    if not isinstance(model, str | PathLike | None):
        fix = "give a model of volseg.load_model, or the folder of one"
        raise VolsegError(f"model is of type {type_name(model)}", fix=fix, code="E_TYPE")
    scans = _scans(options)
    if not isinstance(model, LoadedModel):
        model = load_model(model)
    data = model.network.bundle.recipe.data
    scans = {name: _in_unit_of(data, scan) for name, scan in _by_channel(scans, model).items()}
    first = scans[next(name for name in model.channels if name in scans)]
    from volseg.segmentation import segment_case

    with model.lock:
        result = segment_case(
            {name: scan.volume for name, scan in scans.items()},
            model.network,
            case_id=options.case_id,
            accept_mismatch=options.accept_mismatch,
            on_tile=lambda done, total: options.progress(STAGE, done / total, f"{done} of {total}"),
        )
    assert result.confidence is not None
    measured = MeasuredCase(
        path=_path_of(first),
        lesions=result.measured,
        seconds=time.monotonic() - started,
        sha256=(),
        model=model.name,
        remarks=result.resemblance.remarks,
        n_dropped=result.n_dropped,
        slices_skipped=None if result.gate is None else result.gate.ranges or None,
    )
    content = _content(measured, first, result.mask.array)
    return SegmentResult(confidence_uint8=result.confidence, **content)


@command(MeasureMaskOptions)
def measure_mask(options: MeasureMaskOptions) -> MaskResult:
    """Measure the lesions of a mask in memory.

    Raises:
        VolsegError: the type of image or mask is unknown (`E_TYPE`), or they do not fit together.

    Example:
        >>> import numpy as np
        >>> import volseg
        >>> image = np.random.default_rng(0).normal(size=(30, 30, 20))
        >>> mask = np.zeros(image.shape, np.uint8)
        >>> mask[5:15, 5:15, 5:10] = 1
        >>> result = volseg.measure_mask(image, mask, spacing_mm=(1, 1, 2))
        >>> result.lesions["volume_ml"].tolist()
        [1.0]
    """
    started = time.monotonic()
    for what in ("image", "mask"):
        kind_of(getattr(options, what), what)
    placement = _placement(options, options.image, options.mask)
    settings = settings_of_masks(options)
    scan = as_scan(_as_read(options), placement=placement)
    of_mask = NOWHERE if needs_placement(options.image) else placement
    mask = as_mask(
        options.mask,
        like=scan,
        placement=of_mask,
        max_labels=settings.max_labels,
        threshold=settings.threshold,
    )
    masked = MaskedScan(
        case_id=options.case_id,
        scan=scan.volume,
        mask=mask.volume,
        names=(scan.name, mask.name),
        label_names=settings.label_names or label_names_of(options.mask, scan),
        notes=notes_on_mask(options.mask, scan),
    )
    lesions, remarks = measure_masked(masked, settings)
    measured = MeasuredCase(
        path=_path_of(scan),
        lesions=lesions,
        seconds=time.monotonic() - started,
        sha256=(),
        remarks=remarks,
    )
    return MaskResult(**_content(measured, scan, mask.volume.array))


def _in_unit_of(data: Data, scan: InMemory) -> InMemory:
    """Return a scan in the unit of the model, for which a PET in DICOM is read again."""
    if not isinstance(scan.source, str | PathLike):
        return scan
    path = path_in_unit(Path(scan.source), data)
    return scan if path == Path(scan.source) else as_scan(path)


def _as_read(options: MeasureMaskOptions) -> Any:
    """Return the scan, or the path that says in which unit it is read.

    Raises:
        VolsegError: a scan in memory is to be converted.
    """
    recipe, image = options.recipe, options.image
    is_path = isinstance(image, str | PathLike)
    if not asks_for_suv(options.intensity_unit):
        data = None if recipe is None or options.intensity_unit else as_recipe(recipe).data
        return path_in_unit(Path(image), data) if is_path and data else image
    if is_path:
        return with_mark(Path(image), IN_SUV)
    raise VolsegError(
        "a scan in memory does not say what SUV needs, such as dose and weight",
        fix="give the path of a DICOM series; if it is in SUV already, intensity_unit='SUV'",
        code="E_SUV",
    )


def _content(measured: MeasuredCase, scan: InMemory, mask: np.ndarray) -> dict[str, Any]:
    """Return what both results have."""
    row = done_row(measured, scan.warnings)
    first = next(iter(measured.lesions.largest), None)
    classes = list(probabilities_in(None if first is None else first.class_probabilities))
    return {
        "mask": mask,
        "lesion_ids": measured.lesions.lesion_ids.array,
        "geometry": scan.volume.geometry,
        "lesions": frame_of(LesionMeasurement, measured.lesions, classes=classes),
        "cases": frame_of(CaseRow, [row]),
        "warnings": [f"{code}: {text}" for code, text in warnings_in(row.warnings) if code],
        "source": scan.source,
    }


def _scans(options: SegmentOptions) -> dict[str | None, InMemory]:
    """Return the scans by channel; None stands for the only channel of a model."""
    image = options.image
    images: dict[str | None, Any] = dict(image) if isinstance(image, Mapping) else {None: image}
    names = {name: "image" if name is None else f"image[{name!r}]" for name in images}
    for name, content in images.items():
        kind_of(content, names[name])
    if not images:
        raise VolsegError("image is an empty dict", fix=f"give {ACCEPTED}", code="E_TYPE")
    placement = _placement(options, *images.values())
    return {
        name: as_scan(content, what=names[name], placement=placement)
        for name, content in images.items()
    }


def _placement(options: Placed, *images: Any) -> Placement:
    """Return where arrays lie; refuse a grid for images that bring their own."""
    placement = Placement(affine=options.affine, spacing_mm=options.spacing_mm)
    if placement.is_given and not any(map(needs_placement, images)):
        name = kind_of(images[0]).name
        raise VolsegError(
            f"affine or spacing_mm is given, but a {name} has a grid of its own",
            fix="leave them out, or give the voxels as an array",
            code="E_USAGE",
        )
    return placement


def _by_channel(scans: Mapping[str | None, InMemory], model: LoadedModel) -> dict[str, InMemory]:
    """Return the scans by the channels of the model."""
    channels = model.channels
    if None in scans and len(channels) == 1:
        return {channels[0]: scans[None]}
    unknown = [str(name) for name in scans if name not in channels]
    if unknown:
        given = "one scan" if None in scans else f"channels {unknown}"
        raise ScanError(
            f"image is {given}, but model {model.name!r} takes the channels {list(channels)}",
            fix=f"give image={{{', '.join(f'{name!r}: ...' for name in channels)}}}",
            code="E_CHANNELS",
        )
    return {name: scans[name] for name in channels if name in scans}


def _path_of(scan: InMemory) -> Path | None:
    """Return the file of a scan; None if it is in memory."""
    return Path(scan.source) if isinstance(scan.source, str | PathLike) else None
