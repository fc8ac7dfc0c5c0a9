"""`volseg infer`: segment scans and measure every lesion."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.commands.batch import (
    Batch,
    CaseFiles,
    Inputs,
    MeasuredCase,
    case_files,
    input_key,
    run_cases,
    run_description,
    write_case,
    write_mask,
)
from volseg.commands.checking import shipped_model_text
from volseg.commands.pages import source_of
from volseg.errors import ScanError, VolsegError
from volseg.execution.cpu import keep_freed_memory, release_large_blocks, total_memory
from volseg.execution.local import Outcome, run_overlapped
from volseg.execution.memory import announcement
from volseg.io.cases import Case, find_scans
from volseg.io.nifti import read_volume
from volseg.io.nifti_header import NiftiHeader, read_header
from volseg.options import InferOptions, Progress, command
from volseg.pages.about import About
from volseg.pages.model_box import ModelBox, model_box
from volseg.postprocessing.lesions import CONNECTIVITY
from volseg.recipe import Recipe, parse_recipe
from volseg.reports import CasesReport
from volseg.store.records import LESION_IDS, MASKS, CaseRecord
from volseg.store.results import ResultsFolder
from volseg.volume import Volume

if TYPE_CHECKING:  # torch takes seconds to import; only a command that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.inference.memory import MemoryPlan
    from volseg.segment import CaseResult, Model, OnTile

STAGE, TILES = "Segmenting", "Tiles"


@command(InferOptions)
def infer(options: InferOptions) -> CasesReport:
    """Segment scans; write masks, lesion ids, a row per lesion and a row per scan.

    Raises:
        VolsegError: the request is wrong. A scan that cannot be used becomes a failed row instead.
    """
    started = time.monotonic()
    out, progress, announce = options.out, options.progress, options.announce
    from volseg.bundle import load_bundle, shipped_bundle
    from volseg.inference.memory import limited_gpu
    from volseg.segment import estimate_work, load_model

    if options.model is None:
        announce(shipped_model_text())
    folder = options.model or shipped_bundle()
    bundle = load_bundle(folder)
    changes = _changes(bundle.recipe, options)
    bundle = replace(bundle, recipe=_changed(bundle.recipe, changes))
    inputs = options.scans
    data = bundle.recipe.data
    cases = find_scans(inputs, data.channels, allow_missing=data.missing == "empty")
    used = [*inputs, folder, *(path for case in cases for path in case_files(case))]
    with ResultsFolder(out, "infer", inputs=used) as results:
        load = partial(
            load_model,
            device=options.device,
            backend=options.backend,
            precision=options.precision,
            folder=folder,
        )
        loaded = load(bundle)
        if loaded.device == "cpu" and loaded.segmentation.identity["backend"] == "torch":
            keep_freed_memory()
        else:  # keeping memory does not speed up OpenVINO or GPUs; empty masks would take memory
            release_large_blocks()
        key_options = {
            "model_sha256": bundle.sha256,
            "figures": options.figures,
            **loaded.segmentation.identity,
            **changes,
        }
        key_options |= {"accept_mismatch": True} if options.accept_mismatch else {}
        n_cases = results.count_items(case.id for case in cases)
        plans = _plan_memory(cases, n_cases, loaded, options)
        fitting = _fitting(plans)
        batch_size = bundle.recipe.infer.batch_size
        tiles = min((plan.batch_size for plan in fitting.values()), default=batch_size)
        if tiles < batch_size:  # a network may be compiled for its batch size
            bundle = replace(bundle, recipe=_changed(bundle.recipe, {"infer.batch_size": tiles}))
            del loaded  # free its memory before loading another
            loaded = load(bundle)
            announce(f"tiles: {tiles} at a time, to stay within the memory budget")
        half = {name for name, plan in fitting.items() if plan.half_logits}
        digests = Inputs(of_masks=False)

        def key_of(case: Case) -> str:
            logits = {"half_logits": True} if case.id in half else {}
            return input_key(key_options | logits, digests.of(case))

        def read(case: Case) -> _ReadCase:
            plan = plans[case.id]
            if isinstance(plan, VolsegError):
                raise plan
            return _read(case)

        unannounced: list[Case] = []  # cases to do; emptied once their expected time is announced

        def announcing_time(case: Case, on_tile: OnTile) -> OnTile:
            """Wrap `on_tile` to announce the expected time once, before the first tile."""

            def on_tile_announced(done: int, total: int) -> None:
                if unannounced:
                    left = unannounced[unannounced.index(case) :]
                    shapes = [fitting[item.id].shape for item in left if item.id in fitting]
                    announce(estimate_work(loaded, shapes).announcement())
                    unannounced.clear()
                on_tile(done, total)

            return on_tile_announced

        def segment(case: Case, scan: _ReadCase) -> _SegmentedCase:
            on_tile = announcing_time(case, _tile_progress(case, cases, progress))
            return _segment(
                case,
                scan,
                loaded,
                half_logits=case.id in half,
                accept_mismatch=options.accept_mismatch,
                on_tile=on_tile,
            )

        def write(case: Case, segmented: _SegmentedCase) -> None:
            digests.were_read(case, segmented.sha256)
            key, inputs = key_of(case), digests.of(case)
            _write(case, segmented, loaded.bundle, box, results, key, inputs, files)

        def start(todo: Sequence[Case]) -> Iterator[Outcome[Case, None]]:
            unannounced.extend(todo)
            return run_overlapped(read, segment, write, todo, ahead=ahead)

        box = model_box(bundle.name, bundle.recipe, bundle.fingerprint, bundle.metrics)
        files = CaseFiles((MASKS, LESION_IDS), options.figures, options.pages)
        about = About.now("infer", bundle.name, (box,))
        ahead = all(plan.read_ahead for plan in fitting.values())
        with limited_gpu(None if loaded.device == "cpu" else options.max_vram):
            batch = Batch(
                results=results,
                options=options,
                inputs=digests,
                key_of=key_of,
                files=files,
                stage=STAGE,
                about=about,
            )
            report = run_cases(cases, start, batch)
        results.write_run(
            run_description(options, key_options, report, started)
            | about.as_json()
            | {"recipe_sha256": bundle.recipe.sha256, "connectivity": CONNECTIVITY}
            | {"measure": bundle.recipe.measure.model_dump(mode="json")}
        )
    return replace(report, computed_with=loaded.segmentation.identity)


def _plan_memory(
    cases: Sequence[Case],
    n_cases: int,
    model: Model,
    options: InferOptions,
) -> dict[str, MemoryPlan | VolsegError | None]:
    """Plan the memory of each case; an error if it does not fit, None if its header is unreadable.

    Reading an unreadable case raises its error later.
    """
    from volseg.inference.memory import gpu_memory
    from volseg.inference.openvino_backend import find_half_type
    from volseg.segment import patch_bytes, plan_case_memory

    max_ram, max_vram, announce = options.max_ram, options.max_vram, options.announce
    if model.device == "cpu":
        max_vram = None
    elif max_vram is None:
        max_vram = gpu_memory()

    needed = patch_bytes(model)
    coarse_needed = 0 if model.coarse is None else patch_bytes(model.coarse)
    plans: dict[str, MemoryPlan | VolsegError | None] = {}
    for case in cases:
        try:
            headers = [read_header(path) for path in case.images.values()]
        except VolsegError:
            plans[case.id] = None
            continue
        itemsize = _bytes_per_voxel(headers)
        try:
            plans[case.id] = plan_case_memory(
                headers[0].geometry,
                itemsize,
                model,
                needed,
                max_ram,
                max_vram=max_vram,
                coarse_needed=coarse_needed,
                is_alone=len(cases) == 1,
                n_cases=n_cases,
            )
        except ScanError as error:
            plans[case.id] = error
    fitting = _fitting(plans)
    if fitting:
        largest = max(fitting, key=lambda name: fitting[name].footprint.total)
        gpu = max(plan.footprint.gpu for plan in fitting.values())
        gpu_text = f"; {gpu / 2**30:.2f} GB of GPU memory" if gpu else ""
        announce(announcement(fitting[largest].footprint, largest) + gpu_text)
        machine = total_memory()
        if max_ram is None and fitting[largest].footprint.total > machine:
            announce(
                f"memory: this machine has {machine / 2**30:.2f} GB; use --max-ram to lower memory "
                "use; scans that still do not fit are skipped with a reason"
            )
        announce(_cost_of_tiles(fitting[largest].shape, model))
        is_fp32 = model.segmentation.identity == {"backend": "openvino", "precision": "fp32"}
        if is_fp32 and find_half_type():
            announce("precision: fp32; --precision fp16 takes about half the time on this CPU")
    return plans


def _bytes_per_voxel(headers: Sequence[NiftiHeader]) -> int:
    """Return the bytes of all channels of a case per voxel of the first channel.

    A channel on another grid is held twice: as stored, and resampled to the first channel's grid.
    """
    first = headers[0]
    n_bytes = float(first.dtype.itemsize)
    for header in headers[1:]:
        ratio = math.prod(header.geometry.shape) / math.prod(first.geometry.shape)
        n_bytes += header.dtype.itemsize * ratio
        n_bytes += 0 if header.geometry.matches(first.geometry) else np.dtype(np.float32).itemsize
    return math.ceil(n_bytes)


def _cost_of_tiles(shape: tuple[int, int, int], model: Model) -> str:
    """Describe the number of tiles of a prepared grid, and the cost of overlap and TTA."""
    from volseg.segment import tiling_of

    tiling, axes = tiling_of(model.bundle), model.bundle.recipe.infer.tta_axes
    n_tiles, n_without_overlap = tiling.count(shape), replace(tiling, overlap=0).count(shape)
    patch = " × ".join(str(length) for length in tiling.patch_shape)
    coarse = ""
    if model.coarse is not None:
        coarse = " after a coarse first pass (--inside scan: all of them, without that pass)"
    parts = [f"tiles: at most {n_tiles} of {patch} voxels{coarse}"]
    if n_without_overlap < n_tiles:
        parts.append(f"{n_without_overlap} without overlap (--overlap 0)")
    if axes:
        names = ", ".join(axes)
        parts.append(
            f"each is run {2 ** len(axes)} times for test-time augmentation over {names} "
            "(--no-tta: once)"
        )
    return "; ".join(parts)


def _fitting(plans: Mapping[str, MemoryPlan | VolsegError | None]) -> dict[str, MemoryPlan]:
    """Return the plans of the cases that fit into memory."""
    return {
        name: plan
        for name, plan in plans.items()
        if plan is not None and not isinstance(plan, VolsegError)
    }


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


def _read(case: Case) -> _ReadCase:
    started = time.monotonic()
    images = {name: read_volume(path) for name, path in case.images.items()}
    return _ReadCase(images, time.monotonic() - started)


def _tile_progress(case: Case, cases: Sequence[Case], progress: Progress) -> OnTile:
    """Return a callback that reports tiles: in a stage of their own, or in `STAGE` for one case."""
    stage, name = (STAGE, "") if len(cases) == 1 else (TILES, f"{case.id}: ")

    def show(done: int, total: int) -> None:
        detail = f"{done} of {total} tiles" if done < total else f"{total} tiles done, measuring"
        progress(stage, done / total, name + detail)

    return show


def _segment(
    case: Case,
    read: _ReadCase,
    model: Model,
    *,
    half_logits: bool,
    accept_mismatch: bool,
    on_tile: OnTile,
) -> _SegmentedCase:
    from volseg.segment import segment_case

    started = time.monotonic()
    result = segment_case(
        read.images,
        model,
        case_id=case.id,
        half_logits=half_logits,
        accept_mismatch=accept_mismatch,
        on_tile=on_tile,
    )
    scan = read.images[model.bundle.recipe.data.channels[0]]
    digests = tuple(image.sha256 for image in read.images.values())
    return _SegmentedCase(scan, result, read.seconds + time.monotonic() - started, digests)


def _write(
    case: Case,
    segmented: _SegmentedCase,
    bundle: ModelBundle,
    box: ModelBox,
    results: ResultsFolder,
    key: str,
    inputs: Sequence[str],
    files: CaseFiles,
) -> None:
    started = time.monotonic()
    data, settings = bundle.recipe.data, bundle.recipe.measure
    scan_path = case.images[data.channels[0]]
    scan, result = segmented.scan, segmented.result
    unit = result.resemblance.unit
    with results.staged() as commit:
        write_mask(result.mask, commit, MASKS, case.id, like=scan_path)
        measured = MeasuredCase(
            path=scan_path,
            lesions=result.measured,
            seconds=segmented.seconds + time.monotonic() - started,
            sha256=segmented.sha256,
            model=bundle.name,
            remarks=result.resemblance.remarks,
        )
        source = replace(
            source_of(scan_path, scan, unit.name, box),
            unit_doubt=unit.doubt,
            remarks=result.resemblance.remarks,
            measure=settings,
            label_names=data.label_names,
        )
        record = CaseRecord(
            case=write_case(measured, files, commit, box),
            lesions=result.measured,
            key=key,
            inputs=inputs,
            source=source,
        )
        results.commit(record, commit)
