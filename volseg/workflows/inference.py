"""`volseg infer`: scans → masks and a row per lesion."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from volseg.execute.cpu import keep_freed_memory
from volseg.execute.local import run_overlapped
from volseg.io.cases import Case, find_scans
from volseg.io.nifti import read_volume
from volseg.report.results import ResultsFolder
from volseg.volume import Volume
from volseg.workflows.batch import (
    Progress,
    RunReport,
    case_key,
    done_row,
    run_cases,
    run_description,
    silent,
    write_figure,
    write_mask,
)

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.bundle import ModelBundle
    from volseg.segment import CaseResult, Model


def infer(
    scans: Path | str | Sequence[Path | str],
    *,
    model: Path | str | None = None,
    out: Path | str = "volseg_results",
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    figures: bool = False,
    progress: Progress = silent,
) -> RunReport:
    """Scans → masks, lesion ids, a row per lesion and a row per scan.

    Args:
        scans: NIfTI files, folders of them, or tables of cases.
        model: a folder made by `train`; None for the model that ships with volseg.
        backend: auto, torch or openvino. precision: auto, fp32, fp16 or int8 (see `choose_backend`).
        figures: also write a PNG per scan with its largest lesions outlined.

    Raises:
        VolsegError: the request is wrong. A scan that cannot be used is a failed row instead.
    """
    started = time.monotonic()
    keep_freed_memory()
    from volseg.bundle import load_bundle, shipped_bundle
    from volseg.segment import load_model

    out = Path(out)
    folder = shipped_bundle() if model is None else Path(model)
    bundle = load_bundle(folder)
    inputs = [Path(scans)] if isinstance(scans, Path | str) else [Path(scan) for scan in scans]
    cases = find_scans(inputs, bundle.recipe.data.channels)
    with ResultsFolder(out) as results:
        loaded = load_model(bundle, device, backend=backend, precision=precision, folder=folder)
        options = {"model_sha256": bundle.sha256, "figures": figures, **loaded.segmentation.identity}

        def segment(case: Case, scan: _ReadCase) -> _SegmentedCase:
            return _segment(case, scan, loaded)

        def write(case: Case, found: _SegmentedCase) -> None:
            _write(case, found, loaded.bundle, results, case_key(options, case), figures)

        report = run_cases(
            cases,
            lambda todo: run_overlapped(_read, segment, write, todo),
            lambda case: case_key(options, case),
            results,
            model_name_of(bundle),
            "Segmenting",
            progress,
        )
        results.write_run(
            run_description("infer", options, report, started)
            | {"model": model_name_of(bundle), "recipe_sha256": bundle.recipe.sha256, "connectivity": 26}
        )
    return replace(report, details=dict(report.details) | {"computed_with": dict(loaded.segmentation.identity)})


@dataclass(frozen=True, slots=True, eq=False)
class _ReadCase:
    images: Mapping[str, Volume]
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _SegmentedCase:
    scan: Volume
    result: CaseResult
    seconds: float  # of reading and segmenting


def _read(case: Case) -> _ReadCase:
    started = time.monotonic()
    images = {name: read_volume(path) for name, path in case.images.items()}
    return _ReadCase(images, time.monotonic() - started)


def _segment(case: Case, read: _ReadCase, model: Model) -> _SegmentedCase:
    from volseg.segment import segment_case

    started = time.monotonic()
    result = segment_case(read.images, model, case_id=case.id)
    scan = read.images[model.bundle.recipe.data.channels[0]]
    return _SegmentedCase(scan, result, read.seconds + time.monotonic() - started)


def _write(
    case: Case, found: _SegmentedCase, bundle: ModelBundle, results: ResultsFolder, key: str, figures: bool
) -> None:
    started = time.monotonic()
    scan_path = case.images[bundle.recipe.data.channels[0]]
    result = found.result
    files = [
        write_mask(result.mask, results.path / "masks" / f"{case.id}.nii.gz", like=scan_path),
        write_mask(result.lesion_ids, results.path / "lesion_ids" / f"{case.id}.nii.gz", like=scan_path),
    ]
    if figures:
        files.append(write_figure(found.scan, result.lesion_ids, result.lesions, case.id, results.path))
    row = done_row(
        case,
        found.scan,
        result.lesions,
        path=scan_path,
        unit=bundle.recipe.data.intensity_unit,
        model=model_name_of(bundle),
        seconds=found.seconds + time.monotonic() - started,
    )
    results.commit(row, key=key, lesions=result.lesions, files=files)


def model_name_of(bundle: ModelBundle) -> str:
    return f"{bundle.recipe.name}@{bundle.sha256[:12]}"
