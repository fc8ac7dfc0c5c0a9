"""`volseg infer`: segment scans and measure every lesion."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import (
    RESAMPLE,
    Batch,
    CaseFiles,
    Inputs,
    MeasuredCase,
    as_read,
    case_files,
    input_key,
    run_cases,
    run_description,
    write_case,
    write_mask,
)
from volseg.commands.checking import shipped_model_text
from volseg.commands.dicom_results import DicomResults
from volseg.commands.pages import source_of
from volseg.commands.placing import channel_notes
from volseg.errors import ScanError, VolsegError
from volseg.execution.cpu import (
    keep_freed_memory,
    lazy_zeros,
    release_large_blocks,
    total_memory,
)
from volseg.execution.local import Outcome, run_overlapped
from volseg.execution.memory import announcement
from volseg.inputs import shorten
from volseg.io.cases import Case
from volseg.io.formats import RESULT_SUFFIX, format_of, result_suffix
from volseg.io.header import ScanHeader
from volseg.io.image_cases import looks_like_images
from volseg.io.layouts import find_scans, of_spacing, spacing_remarks
from volseg.io.volumes import read_header, read_volume, write_streamed
from volseg.options import InferOptions, command
from volseg.pages.about import About
from volseg.pages.model_box import ModelBox, model_box
from volseg.postprocessing.lesions import CONNECTIVITY
from volseg.preprocessing.lattice import same_voxels
from volseg.preprocessing.tilt import Straight
from volseg.recipe import Data, Recipe, asks_for_suv, parse_recipe
from volseg.reports import CasesReport
from volseg.store.outputs import RECORDS, Commit
from volseg.store.records import LESION_IDS, MASKS, PROBABILITIES, CaseRecord
from volseg.store.results import ResultsFolder
from volseg.volume import Volume
from volseg.words import format_count, format_sizes

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.inference.memory import MemoryPlan, ScanSize
    from volseg.inference.roles import GateReport
    from volseg.preprocessing.probabilities import ProbabilityMaps
    from volseg.segmentation import CaseResult, Model, OnTile

COPIES = 4  # bytes per voxel of mask and confidence on a second grid
STAGE, TILES = "Segmenting", "Tiles"


@command(InferOptions)
def infer(options: InferOptions) -> CasesReport:
    """Segment scans, or classify images: the model decides.

    Scans get masks, lesion ids, a row per lesion and a row per scan; images a row each.

    Raises:
        VolsegError: the request is wrong. A scan that cannot be used becomes a failed row instead.

    Example:
        >>> import volseg
        >>> scan = "sample_data/images/phantom_15.nii.gz"
        >>> result = volseg.infer(scan, model="model", out="results")
        >>> result.cases["status"].tolist()
        ['done']
        >>> mask = result.mask("phantom_15")
        >>> len(result.lesions) == int(result.lesion_ids("phantom_15").array.max())
        True
    """
    started = time.monotonic()
    _refuse_settings(options)
    from volseg.bundle import load_bundle, shipped_bundle
    from volseg.image_bundle import is_image_model
    from volseg.inference.memory import limited_gpu

    if options.model is not None and is_image_model(options.model):
        from volseg.commands.image_inference import infer_images

        return infer_images(options)
    folder = options.model or shipped_bundle()
    bundle = load_bundle(folder)
    changes = _changes(bundle.recipe, options)
    bundle = replace(bundle, recipe=_changed(bundle.recipe, changes))
    data, remarks = bundle.recipe.data, list[str]()
    cases = [of_spacing(case, options.spacing) for case in _find_scans(options, data, remarks)]
    remarks += spacing_remarks(cases, options.spacing)
    _dicom_results(options, bundle).refuse_others(cases)
    options.warn(*remarks)
    if options.model is None:
        options.announce(shipped_model_text())
    used = [*options.scans, folder, *(path for case in cases for path in case_files(case))]
    cases = [as_read(case, options, data) for case in cases]
    with ResultsFolder(options.out, "infer", inputs=used) as results:
        run = _load_run(bundle, changes, folder, cases, results, options)
        model, bundle = run.model, run.model.bundle
        about = About.now("infer", bundle.name, (run.box,))
        batch = Batch(
            results=results,
            options=options,
            inputs=run.digests,
            key_of=run.key_of,
            files=run.files,
            stage=STAGE,
            about=about,
        )
        with limited_gpu(None if model.device == "cpu" else options.max_vram):
            report = run_cases(cases, run.start, batch)
        run.announce_attached()
        results.write_run(
            run_description(options, run.key_options, report, started)
            | about.as_json()
            | {"recipe_sha256": bundle.recipe.sha256, "connectivity": CONNECTIVITY}
            | {"measure": bundle.recipe.measure.model_dump(mode="json")}
        )
    return replace(
        report,
        warnings=[*remarks, *report.warnings],
        computed_with=model.segmentation.identity,
    )


def _refuse_settings(options: InferOptions) -> None:
    """Refuse a unit other than SUVbw, and what cannot be written on tilted slices.

    Raises:
        VolsegError: one is given.
    """
    unit = options.intensity_unit
    if unit is not None and not asks_for_suv(unit):
        raise VolsegError(
            f"--unit {shorten(unit)}: the model says in which unit its scans are",
            fix="leave it out; only --unit SUVbw, which converts PET, is possible",
            code="E_USAGE",
        )
    others = ["--probabilities"] if options.probabilities else []
    if not format_of(Path(f"mask{result_suffix(options.format)}")).holds_tilt:
        others.append(f"--format {options.format}")
    if others and options.tilt == RESAMPLE:
        raise VolsegError(
            f"{' and '.join(others)}: not possible on tilted slices, so with --tilt resample",
            fix="leave it out, or segment the tilted scans in a folder of their own",
            code="E_USAGE",
        )


def _find_scans(options: InferOptions, data: Data, remarks: list[str]) -> list[Case]:
    """Return the cases to segment.

    Raises:
        VolsegError: the dataset is wrong, or one of images to classify.
    """
    allow_missing = data.missing == "empty"
    try:
        return find_scans(
            options.scans,
            data.channels,
            allow_missing=allow_missing,
            series=options.series,
            spacing=options.spacing,
            remark=remarks.append,
        )
    except VolsegError:
        images = next((path for path in options.scans if looks_like_images(path)), None)
        if images is None:
            raise
        raise VolsegError(
            f"{images}: holds 2D images, but the model segments scans",
            fix="give --model one that classifies images (`volseg train` makes it); for slices of "
            "a scan, --spacing I,J,K in mm",
            code="E_USAGE",
        ) from None


def _dicom_results(options: InferOptions, bundle: ModelBundle) -> DicomResults:
    return DicomResults(
        seg=options.dicom_seg,
        sr=options.dicom_sr,
        model=bundle.name,
        label_names=bundle.recipe.data.label_names,
        organ=bundle.recipe.measure.organ,
    )


def _load_run(
    bundle: ModelBundle,
    changes: Mapping[str, Any],
    folder: Path,
    cases: Sequence[Case],
    results: ResultsFolder,
    options: InferOptions,
) -> _Run:
    """Load the model, with as many tiles at a time as fit into memory."""
    n_cases = results.count_items(case.id for case in cases)
    model, plans = _load_model(bundle, folder, cases, n_cases, options)
    key_options = {"model_sha256": bundle.sha256, "figures": options.figures}
    key_options |= {**model.segmentation.identity, **changes}
    for name in ("accept_mismatch", "probabilities", "dicom_sr"):
        key_options |= {name: True} if getattr(options, name) else {}
    if options.dicom_seg:
        key_options["dicom_seg"] = options.dicom_seg
    if result_suffix(options.format) != RESULT_SUFFIX:
        key_options["format"] = options.format
    bundle = model.bundle
    return _Run(
        options=options,
        cases=cases,
        model=model,
        plans=plans,
        results=results,
        key_options=key_options,
        box=model_box(bundle.name, bundle.recipe, bundle.fingerprint, bundle.metrics),
    )


def _load_model(
    bundle: ModelBundle, folder: Path, cases: Sequence[Case], n_cases: int, options: InferOptions
) -> tuple[Model, _Plans]:
    """Load the networks, compiled for as many tiles at a time as fit into memory."""
    from volseg.segmentation import load_model

    requested = {"backend": options.backend, "precision": options.precision, "folder": folder}
    model = load_model(bundle, options.device, **requested)
    if model.device == "cpu" and model.segmentation.identity["backend"] == "torch":
        keep_freed_memory()
    else:  # keeping memory does not speed up OpenVINO or GPUs; empty masks would take memory
        release_large_blocks()
    plans = _plan_memory(cases, n_cases, model, options)
    batch_size = bundle.recipe.infer.batch_size
    tiles = min((plan.batch_size for plan in plans.fitting.values()), default=batch_size)
    if tiles < batch_size:
        smaller = _changed(bundle.recipe, {"infer.batch_size": tiles})
        del model  # free its memory before loading another
        model = load_model(replace(bundle, recipe=smaller), options.device, **requested)
        options.announce(f"tiles: {tiles} at a time, to stay within the memory budget")
    return model, plans


@dataclass(frozen=True, slots=True)
class _Plans:
    """How cases fit into memory; reading a case without a plan or an error raises its error."""

    fitting: Mapping[str, MemoryPlan]
    refused: Mapping[str, ScanError]


def _plan_memory(
    cases: Sequence[Case], n_cases: int, model: Model, options: InferOptions
) -> _Plans:
    from volseg.inference.memory import MemoryLimits, gpu_memory, plan_memory
    from volseg.segmentation import network_pass

    max_vram = None
    if model.device != "cpu":
        max_vram = gpu_memory() if options.max_vram is None else options.max_vram
    limits, passes = MemoryLimits(ram=options.max_ram, vram=max_vram), network_pass(model)
    fitting: dict[str, MemoryPlan] = {}
    refused: dict[str, ScanError] = {}
    for case in cases:
        try:
            headers = [read_header(path) for path in case.images.values()]
        except VolsegError:
            continue
        try:
            size = _size_of(headers)
            fitting[case.id] = plan_memory(
                size, passes, limits, is_alone=len(cases) == 1, n_cases=n_cases
            )
        except ScanError as error:
            refused[case.id] = error
    if fitting:
        _announce_plans(fitting, model, options)
    return _Plans(fitting, refused)


def _size_of(headers: Sequence[ScanHeader]) -> ScanSize:
    """Return the grid of a scan and its bytes; of a tilted one, that of its right-angled copy.

    Raises:
        ScanError: it is sheared within its slices.
    """
    from volseg.inference.memory import ScanSize

    geometry, itemsize = headers[0].geometry, _bytes_per_voxel(headers)
    if not geometry.is_tilted:
        return ScanSize(geometry=geometry, itemsize=itemsize)
    # The scan, its copy, and mask and confidence on both grids exist at once.
    return ScanSize(geometry=Straight.of(geometry).geometry, itemsize=2 * itemsize + COPIES)


def _announce_plans(plans: Mapping[str, MemoryPlan], model: Model, options: InferOptions) -> None:
    """Announce the peak memory and the number of tiles, and options that lower them."""
    announce = options.announce
    name, largest = max(plans.items(), key=lambda item: item[1].footprint.total)
    gpu = max(plan.footprint.gpu for plan in plans.values())
    gpu_text = f"; {gpu / 2**30:.2f} GB of GPU memory" if gpu else ""
    announce(announcement(largest.footprint, name) + gpu_text)
    machine = total_memory()
    if options.max_ram is None and largest.footprint.total > machine:
        announce(
            f"memory: this machine has {machine / 2**30:.2f} GB; use --max-ram to lower memory "
            "use; scans that still do not fit are skipped with a reason"
        )
    announce(_cost_of_tiles(largest.shape, model))


def _bytes_per_voxel(headers: Sequence[ScanHeader]) -> int:
    """Return the bytes of all channels of a case per voxel of the first channel.

    A channel of other voxels is held twice: as stored, and resampled to the first channel's grid.
    """
    first = headers[0]
    n_bytes = float(first.dtype.itemsize)
    for header in headers[1:]:
        ratio = math.prod(header.geometry.shape) / math.prod(first.geometry.shape)
        n_bytes += header.dtype.itemsize * ratio
        has_same_voxels = same_voxels(header.geometry, first.geometry) is not None
        n_bytes += 0 if has_same_voxels else np.dtype(np.float32).itemsize
    return math.ceil(n_bytes)


def _cost_of_tiles(shape: tuple[int, int, int], model: Model) -> str:
    """Describe the number of tiles of a prepared grid, and the cost of overlap and TTA."""
    from volseg.inference.stream import Tiling

    tiling, axes = Tiling.of(model.bundle.recipe), model.bundle.recipe.infer.tta_axes
    n_tiles, n_without_overlap = tiling.count(shape), replace(tiling, overlap=0).count(shape)
    coarse = ""
    if model.coarse is not None:
        coarse = " after a coarse first pass (--inside scan: all of them, without that pass)"
    parts = [f"tiles: at most {n_tiles} of {format_sizes(tiling.patch_shape)} voxels{coarse}"]
    if n_without_overlap < n_tiles:
        parts.append(f"{n_without_overlap} without overlap (--overlap 0)")
    if axes:
        names = ", ".join(axes)
        parts.append(
            f"each is run {2 ** len(axes)} times for test-time augmentation over {names} "
            "(--no-tta: once)"
        )
    return "; ".join(parts)


def _changes(recipe: Recipe, options: InferOptions) -> dict[str, Any]:
    """Return the recipe values that the options change."""
    infer = recipe.infer
    requested = {
        "infer.overlap": infer.overlap if options.overlap is None else options.overlap,
        "infer.tta_axes": infer.tta_axes if options.tta else (),
        "infer.inside": infer.inside if options.inside is None else options.inside,
        "preprocess.interpolation": "linear" if options.fast else recipe.preprocess.interpolation,
    }
    content = recipe.model_dump()
    changes = {
        key: value
        for key, value in requested.items()
        if content[key.split(".")[0]][key.split(".")[1]] != value
    }
    # --inside overrides the region found by a first pass.
    if options.inside is not None and recipe.roi is not None:
        changes["roi"] = None
    return changes


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with these values changed, validated like one from a file."""
    content = recipe.model_dump()
    for key, value in changes.items():
        *section, name = key.split(".")
        (content[section[0]] if section else content)[name] = value
    return parse_recipe(content, where="the options of infer") if changes else recipe


@dataclass(frozen=True, slots=True, eq=False)
class _ReadCase:
    images: Mapping[str, Volume]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _SegmentedCase:
    scan: Volume
    result: CaseResult
    seconds: float  # for reading and segmenting
    sha256: tuple[str, ...]  # of the image files, as read
    notes: Sequence[str]  # on channels in another axis order
    probabilities: ProbabilityMaps | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """One call: what its cases share, and the steps of each: read, segment, write."""

    options: InferOptions
    cases: Sequence[Case]
    model: Model
    plans: _Plans
    results: ResultsFolder
    key_options: Mapping[str, Any]
    box: ModelBox
    digests: Inputs = field(default_factory=lambda: Inputs(of_masks=False))
    # cases to do; emptied once their expected time is announced
    unannounced: list[Case] = field(default_factory=list)
    gated: list[GateReport] = field(default_factory=list)  # of the cases of this call
    dropped: list[int] = field(default_factory=list)  # lesions that the filter dropped, of these

    @property
    def files(self) -> CaseFiles:
        folders = [MASKS, LESION_IDS]
        if self.options.probabilities:
            folders += [map_folder(value) for value in self._values]
        suffix = result_suffix(self.options.format)
        others = self._dicom.folders
        return CaseFiles(folders, self.options.figures, self.options.pages, suffix, others)

    @property
    def _dicom(self) -> DicomResults:
        return _dicom_results(self.options, self.model.bundle)

    @property
    def _values(self) -> list[int]:
        """Mask value of each output of the network."""
        from volseg.segmentation import output_values

        return output_values(self.model.bundle.recipe.data)

    def start(self, todo: Sequence[Case]) -> Iterator[Outcome[Case, None]]:
        self.unannounced.extend(todo)
        ahead = all(plan.read_ahead for plan in self.plans.fitting.values())
        return run_overlapped(self.read, self.segment, self.write, todo, ahead=ahead)

    def key_of(self, case: Case) -> str:
        logits = {"half_logits": True} if self._has_half_logits(case) else {}
        return input_key({**self.key_options, **logits}, self.digests.of(case))

    def read(self, case: Case) -> _ReadCase:
        if case.id in self.plans.refused:
            raise self.plans.refused[case.id]
        started = time.monotonic()
        images = {name: read_volume(path) for name, path in case.images.items()}
        return _ReadCase(images, time.monotonic() - started)

    def segment(self, case: Case, read: _ReadCase) -> _SegmentedCase:
        from volseg.segmentation import Streaming, segment_case

        started, maps = time.monotonic(), self._new_maps()
        try:
            result = segment_case(
                read.images,
                self.model,
                case_id=case.id,
                streaming=Streaming(half_logits=self._has_half_logits(case), probabilities=maps),
                accept_mismatch=self.options.accept_mismatch,
                on_tile=self._tile_progress(case),
            )
        except BaseException:
            if maps is not None:
                maps.close()
            raise
        self.gated.extend([] if result.gate is None else [result.gate])
        self.dropped.extend([] if result.n_dropped is None else [result.n_dropped])
        scan = read.images[self.model.bundle.recipe.data.channels[0]]
        digests = tuple(image.sha256 for image in read.images.values())
        seconds, notes = read.seconds + time.monotonic() - started, channel_notes(read.images)
        return _SegmentedCase(scan, result, seconds, digests, notes, maps)

    def _new_maps(self) -> ProbabilityMaps | None:
        """Return where the probabilities of the next scan go; None if they are not asked for."""
        if not self.options.probabilities:
            return None
        from volseg.preprocessing.probabilities import ProbabilityMaps

        is_regions = self.model.bundle.recipe.data.regions_class_order is not None
        folder = self.results.path / RECORDS
        return ProbabilityMaps(self._values, folder, regions=is_regions)

    def write(self, case: Case, segmented: _SegmentedCase) -> None:
        started = time.monotonic()
        self.digests.were_read(case, segmented.sha256)
        recipe = self.model.bundle.recipe
        scan_path = case.images[recipe.data.channels[0]]
        scan, result = segmented.scan, segmented.result
        unit = result.resemblance.unit
        with self.results.staged() as commit:
            name, names = self.files.mask_name(MASKS, case.id), recipe.data.label_names
            write_mask(result.mask, commit, name, like=scan_path, label_names=names)
            if segmented.probabilities is not None:
                _write_maps(segmented.probabilities, scan, commit, case.id, like=scan_path)
            notes = self._dicom.write(scan_path, result.mask, result.measured, commit)
            measured = MeasuredCase(
                path=scan_path,
                lesions=result.measured,
                seconds=segmented.seconds + time.monotonic() - started,
                sha256=segmented.sha256,
                model=self.model.bundle.name,
                n_dropped=result.n_dropped,
                slices_skipped=None if result.gate is None else result.gate.ranges or None,
                remarks=(*result.resemblance.remarks, *segmented.notes, *notes),
            )
            source = replace(
                source_of(scan_path, scan, unit.name, self.box),
                unit_doubt=unit.doubt,
                remarks=result.resemblance.remarks,
                measure=recipe.measure,
                label_names=recipe.data.label_names,
            )
            record = CaseRecord(
                case=write_case(measured, self.files, commit, self.box),
                lesions=result.measured,
                key=self.key_of(case),
                inputs=self.digests.of(case),
                source=source,
            )
            self.results.commit(record, commit)

    def announce_attached(self) -> None:
        """Announce what gate and filter did in this call."""
        from volseg.inference.roles import GateReport

        if self.gated:
            self.options.announce(GateReport.total(self.gated).text)
        if self.dropped:
            lesions = format_count(sum(self.dropped), "predicted lesion")
            scans = format_count(len(self.dropped), "scan")
            self.options.announce(f"filter: {lesions} dropped in {scans}")

    def _has_half_logits(self, case: Case) -> bool:
        plan = self.plans.fitting.get(case.id)
        return plan is not None and plan.half_logits

    def _tile_progress(self, case: Case) -> OnTile:
        """Return a callback for tiles, in a stage of their own, or in `STAGE` for one case.

        Before the first tile of the call it announces the expected time.
        """
        is_alone = len(self.cases) == 1
        stage, name = (STAGE, "") if is_alone else (TILES, f"{case.id}: ")

        def show(done: int, total: int) -> None:
            if self.unannounced:
                self._announce_time(self.unannounced[self.unannounced.index(case) :])
                self.unannounced.clear()
            detail = (
                f"{done} of {total} tiles" if done < total else f"{total} tiles done, measuring"
            )
            self.options.progress(stage, done / total, name + detail)

        return show

    def _announce_time(self, cases: Iterable[Case]) -> None:
        from volseg.segmentation import estimate_work

        plans = self.plans.fitting
        shapes = [plans[case.id].shape for case in cases if case.id in plans]
        self.options.announce(estimate_work(self.model, shapes).announcement())


def map_folder(value: int) -> str:
    """Return the folder of the probabilities of the label with a mask value."""
    return f"{PROBABILITIES}/label_{value}"


def _write_maps(
    maps: ProbabilityMaps, scan: Volume, commit: Commit, case_id: str, *, like: Path
) -> None:
    """Write the probabilities of a scan, a file per label, and delete the temporary files."""
    from volseg.preprocessing.probabilities import LEVELS

    # A NIfTI header stores float32; the next smaller one keeps 255 from becoming more than 1.
    slope = float(np.nextafter(np.float32(1 / LEVELS), np.float32(0)))
    grid = Volume(lazy_zeros(scan.geometry.shape, np.uint8), scan.geometry, slope)
    try:
        for value in maps.values:
            path = commit.path(f"{map_folder(value)}/{case_id}{RESULT_SUFFIX}")
            write_streamed(maps.file_of(value), grid, path, like=like)
    finally:
        maps.close()
