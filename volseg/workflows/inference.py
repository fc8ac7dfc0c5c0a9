"""`volseg infer`: scans → masks and a row per lesion."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volseg.errors import ScanError, VolsegError
from volseg.execute.cpu import give_back_large_blocks, keep_freed_memory, total_memory
from volseg.execute.local import Outcome, run_overlapped
from volseg.execute.memory import announcement
from volseg.io.cases import Case, find_scans
from volseg.io.nifti import NiftiHeader, read_header, read_volume
from volseg.postprocess.lesions import CONNECTIVITY
from volseg.recipe import Recipe, parse_recipe
from volseg.report.model_box import ModelBox, model_box
from volseg.store.results import LESION_IDS, MASKS, ResultsFolder
from volseg.volume import Volume
from volseg.workflows.batch import (
    CaseFiles,
    Inputs,
    Progress,
    RunReport,
    about_run,
    amount_of,
    done_row,
    files_of_case,
    input_key,
    run_cases,
    run_description,
    silent,
    write_figure,
    write_mask,
)
from volseg.workflows.pages import source_of, write_page

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.infer.memory import MemoryPlan
    from volseg.segment import CaseResult, Model, OnTile

STAGE, TILES = "Segmenting", "Tiles"


def infer(
    scans: Path | str | Sequence[Path | str],
    *,
    model: Path | str | None = None,
    out: Path | str = "volseg_results",
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    overlap: float | None = None,
    tta: bool = True,
    inside: str | None = None,
    fast: bool = False,
    max_ram: str | int | None = None,
    max_vram: str | int | None = None,
    accept_mismatch: bool = False,
    figures: bool = False,
    pages: bool = True,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda text: None,
) -> RunReport:
    """Scans → masks, lesion ids, a row per lesion and a row per scan.

    Args:
        scans: NIfTI files, folders of them, or tables of cases.
        model: a folder made by `train`; None for the model that ships with volseg.
        backend: auto, torch or openvino. precision: auto, fp32, fp16 or int8 (see `choose_backend`).
        overlap: of tiles, a fraction of a patch; None for the recipe's.
        tta: False turns off the test-time augmentation that the recipe asks for.
        inside: `scan` or `body`, where tiles are run; None for the recipe's choice, which may be the region that a coarse first pass
            finds. Either word leaves that pass out.
        fast: resample linearly where the recipe says cubic.
        max_ram: budget of main memory, such as `4G` or a number of bytes; None for none. A scan that cannot be segmented within it is a
            failed row that says what would do.
        max_vram: the same for the GPU's memory; None for what is free there.
        accept_mismatch: segment scans of another modality than the model's training scans, too. Their rows carry W_MODALITY, and they
            have no density, mass, calcium score or class; without it they are failed rows (E_MODALITY).
        figures: also write a PNG per scan with its largest lesions outlined.
        pages: also write report.html, and a page per scan to look at its lesions.
        progress: is told of the scans, and of the tiles of the one that is being segmented.

    Raises:
        VolsegError: the request is wrong. A scan that cannot be used is a failed row instead.
    """
    started = time.monotonic()
    budget, gpu_budget = amount_of(max_ram, "--max-ram"), amount_of(max_vram, "--max-vram")
    from volseg.bundle import load_bundle, shipped_bundle
    from volseg.infer.memory import limited_gpu
    from volseg.segment import load_model, work_ahead

    out = Path(out)
    folder = shipped_bundle() if model is None else Path(model)
    bundle = load_bundle(folder)
    changes = _changes(bundle.recipe, overlap=overlap, tta=tta, inside=inside, fast=fast)
    bundle = replace(bundle, recipe=_changed(bundle.recipe, changes))
    inputs = [Path(scans)] if isinstance(scans, Path | str) else [Path(scan) for scan in scans]
    data = bundle.recipe.data
    cases = find_scans(inputs, data.channels, may_miss=data.missing == "empty")
    used = [*inputs, folder, *(path for case in cases for path in files_of_case(case))]
    with ResultsFolder(out, "infer", inputs=used) as results:
        loaded = load_model(bundle, device, backend=backend, precision=precision, folder=folder)
        if loaded.device == "cpu" and loaded.segmentation.identity["backend"] == "torch":
            keep_freed_memory()
        else:  # OpenVINO and GPUs gain nothing by it, and masks that hold nothing would take memory
            give_back_large_blocks()
        options = {
            "model_sha256": bundle.sha256,
            "figures": figures,
            **loaded.segmentation.identity,
            **changes,
        }
        options |= {"accept_mismatch": True} if accept_mismatch else {}
        n_cases = results.n_with(case.id for case in cases)
        plans = _plan_memory(cases, n_cases, loaded, budget, gpu_budget, announce)
        known = _known(plans)
        tiles = min(
            (plan.batch_size for plan in known.values()), default=bundle.recipe.infer.batch_size
        )
        if (
            tiles < bundle.recipe.infer.batch_size
        ):  # a network may be made for the batch that it gets
            bundle = replace(bundle, recipe=_changed(bundle.recipe, {"infer.batch_size": tiles}))
            del loaded  # before another one is made
            loaded = load_model(bundle, device, backend=backend, precision=precision, folder=folder)
            announce(f"tiles: {tiles} at a time, to stay within the memory budget")
        half = {name for name, plan in known.items() if plan.half_logits}
        digests = Inputs(of_masks=False)

        def key_of(case: Case) -> str:
            return input_key(
                options | ({"half_logits": True} if case.id in half else {}), digests.of(case)
            )

        def read(case: Case) -> _ReadCase:
            plan = plans[case.id]
            if isinstance(plan, VolsegError):
                raise plan
            return _read(case)

        ahead_of: list[Case] = []  # what is to be done, until the time that it takes was announced

        def before_tiles(case: Case, on_tile: OnTile) -> OnTile:
            """Announce the time for this scan and those after it before the first tile of the first that is not refused."""

            def told(done: int, total: int) -> None:
                if ahead_of:
                    left = ahead_of[ahead_of.index(case) :]
                    shapes = [known[item.id].shape for item in left if item.id in known]
                    announce(work_ahead(loaded, shapes).announcement())
                    ahead_of.clear()
                on_tile(done, total)

            return told

        def segment(case: Case, scan: _ReadCase) -> _SegmentedCase:
            on_tile = before_tiles(case, _tile_progress(case, cases, progress))
            return _segment(
                case,
                scan,
                loaded,
                half_logits=case.id in half,
                accept_mismatch=accept_mismatch,
                on_tile=on_tile,
            )

        def write(case: Case, found: _SegmentedCase) -> None:
            digests.were_read(case, found.sha256)
            _write(case, found, loaded.bundle, box, results, key_of(case), digests.of(case), files)

        def start(todo: Sequence[Case]) -> Iterator[Outcome[Case, None]]:
            ahead_of.extend(todo)
            return run_overlapped(read, segment, write, todo, ahead=ahead)

        box = model_box(bundle.name, bundle.recipe, bundle.fingerprint, bundle.metrics)
        files = CaseFiles((MASKS, LESION_IDS), figures, pages)
        about = about_run("infer", bundle.name) | {"model_box": box.model_dump(mode="json")}
        ahead = all(plan.read_ahead for plan in known.values())
        with limited_gpu(None if loaded.device == "cpu" else gpu_budget):
            report = run_cases(
                cases,
                start,
                key_of,
                results,
                inputs=digests,
                files=files,
                stage=STAGE,
                progress=progress,
                model_name=bundle.name,
                about=about if pages else None,
                max_ram=budget,
                announce=announce,
            )
        results.write_run(
            run_description("infer", options, report, started)
            | about
            | {"recipe_sha256": bundle.recipe.sha256, "connectivity": CONNECTIVITY}
            | {"measure": bundle.recipe.measure.model_dump(mode="json")}
        )
    return replace(
        report, details=dict(report.details) | {"computed_with": dict(loaded.segmentation.identity)}
    )


def _plan_memory(
    cases: Sequence[Case],
    n_cases: int,
    model: Model,
    max_ram: int | None,
    max_vram: int | None,
    announce: Callable[[str], None],
) -> dict[str, MemoryPlan | VolsegError | None]:
    """How each case fits into memory, or why it does not; None where its header cannot be read, which reading will say."""
    from volseg.infer.backends import find_half_type
    from volseg.infer.memory import gpu_memory
    from volseg.segment import patch_bytes, plan_case_memory

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
    known = _known(plans)
    if known:
        largest = max(known, key=lambda name: known[name].footprint.total)
        gpu = max(plan.footprint.gpu for plan in known.values())
        beside = f"; {gpu / 2**30:.2f} GB of the GPU's" if gpu else ""
        announce(announcement(known[largest].footprint, largest) + beside)
        machine = total_memory()
        if max_ram is None and known[largest].footprint.total > machine:
            announce(
                f"memory: this machine has {machine / 2**30:.2f} GB; --max-ram takes as little as it can, and refuses scans that do not fit"
            )
        announce(_cost_of_tiles(known[largest].shape, model))
        if (
            model.segmentation.identity == {"backend": "openvino", "precision": "fp32"}
            and find_half_type()
        ):
            announce(
                "precision: fp32; this CPU has half precision too, which takes about half of the time (--precision fp16)"
            )
    return plans


def _bytes_per_voxel(headers: Sequence[NiftiHeader]) -> int:
    """Of all channels of a case, per voxel of the first; one with another grid is there twice, as stored and on the first's grid."""
    first = headers[0]
    found = float(first.dtype.itemsize)
    for header in headers[1:]:
        share = math.prod(header.geometry.shape) / math.prod(first.geometry.shape)
        found += header.dtype.itemsize * share
        found += 0 if header.geometry.matches(first.geometry) else np.dtype(np.float32).itemsize
    return math.ceil(found)


def _cost_of_tiles(shape: tuple[int, int, int], model: Model) -> str:
    """How often the network is run over a prepared grid of this shape, and how much of that overlap and test-time augmentation are."""
    from volseg.segment import tiling_of

    tiling, axes = tiling_of(model.bundle), model.bundle.recipe.infer.tta_axes
    n, least = tiling.count(shape), replace(tiling, overlap=0).count(shape)
    patch = " × ".join(str(length) for length in tiling.patch_shape)
    coarse = (
        ""
        if model.coarse is None
        else " after a coarse first pass (--inside scan: without it, all of them)"
    )
    parts = [f"tiles: at most {n} of {patch} voxels{coarse}"]
    if least < n:
        parts.append(f"{least} without overlap (--overlap 0)")
    if axes:
        parts.append(
            f"each is run {2 ** len(axes)} times for test-time augmentation over {', '.join(axes)} (--no-tta: once)"
        )
    return "; ".join(parts)


def _known(plans: Mapping[str, MemoryPlan | VolsegError | None]) -> dict[str, MemoryPlan]:
    return {
        name: plan
        for name, plan in plans.items()
        if plan is not None and not isinstance(plan, VolsegError)
    }


def _changes(
    recipe: Recipe, *, overlap: float | None, tta: bool, inside: str | None, fast: bool
) -> dict[str, Any]:
    """What the options change of the recipe; nothing where they say what it says."""
    wanted = {
        "infer.overlap": recipe.infer.overlap if overlap is None else overlap,
        "infer.tta_axes": recipe.infer.tta_axes if tta else (),
        "infer.inside": recipe.infer.inside if inside is None else inside,
        "preprocess.interpolation": "linear" if fast else recipe.preprocess.interpolation,
    }
    found = recipe.model_dump()
    changes = {
        key: value
        for key, value in wanted.items()
        if found[key.split(".")[0]][key.split(".")[1]] != value
    }
    # Who says where tiles are run wants them there, not in what a first pass finds.
    return changes | ({"roi": None} if inside is not None and recipe.roi is not None else {})


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, checked like one from a file."""
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
    seconds: float  # of reading and segmenting
    sha256: tuple[str, ...]  # of the files that were read


def _read(case: Case) -> _ReadCase:
    started = time.monotonic()
    images = {name: read_volume(path) for name, path in case.images.items()}
    return _ReadCase(images, time.monotonic() - started)


def _tile_progress(case: Case, cases: Sequence[Case], progress: Progress) -> OnTile:
    """The tiles of a case as a stage that begins anew with each; those of a scan alone are the share of it that is done."""
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
        write_mask(result.lesion_ids, commit, LESION_IDS, case.id, like=scan_path)
        if files.figures:
            write_figure(scan, result.lesion_ids, result.lesions, case.id, commit, unit=unit)
        row = done_row(
            case,
            scan,
            result.measured,
            path=scan_path,
            unit=unit,
            model=bundle.name,
            seconds=segmented.seconds,
            settings=settings,
            organ_voxels=result.organ_voxels,
            remarks=result.resemblance.remarks,
        )
        if files.pages:
            ids = result.lesion_ids.array
            write_page(row, result.lesions, scan, ids, unit=unit.name, commit=commit, box=box)
        results.commit(
            replace(row, seconds=round(segmented.seconds + time.monotonic() - started, 2)),
            commit,
            key=key,
            inputs=inputs,
            lesions=result.measured,
            source=source_of(scan_path, scan, unit.name, box)
            | {"unit_doubt": unit.doubt, "remarks": list(result.resemblance.remarks)}
            | {"measure": settings.model_dump(mode="json")}
            | {"label_names": {str(value): name for value, name in data.label_names.items()}},
        )
