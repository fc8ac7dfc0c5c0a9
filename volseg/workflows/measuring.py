"""`volseg measure`: any masks on their scans → a row per lesion, without a model."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

from volseg.errors import VolsegError
from volseg.execute.local import run
from volseg.io.cases import Case, find_cases, find_scans
from volseg.io.nifti import read_mask, read_volume
from volseg.measure.lesions import measure_lesions
from volseg.postprocess.lesions import Objects, label_lesions
from volseg.report.results import ResultsFolder
from volseg.volume import Volume
from volseg.workflows.batch import (
    Progress,
    RunReport,
    about_run,
    case_key,
    check_pair,
    done_row,
    run_cases,
    run_description,
    silent,
    write_figure,
    write_mask,
)
from volseg.workflows.pages import source_of, write_page


def measure(
    *,
    image: Path | str | None = None,
    mask: Path | str | None = None,
    cases: Path | str | None = None,
    out: Path | str = "volseg_results",
    objects: str = "components",
    label_names: Mapping[int, str] | None = None,
    intensity_unit: str | None = None,
    figures: bool = False,
    pages: bool = True,
    progress: Progress = silent,
) -> RunReport:
    """Measure any masks on their scans, without a model: one pair, or a table of cases.

    Args:
        objects: `components`, each connected part is a lesion; `labels`, each value of the mask is one.
        label_names: value → name; a value without one is `label_<value>`.
        intensity_unit: of the scans; None: HU where the scan looks like CT in HU, else a.u.
        pages: also write report.html, and a page per scan to look at its lesions.

    Raises:
        VolsegError: the request is wrong. A pair that cannot be used is a failed row instead.
    """
    started = time.monotonic()
    if objects not in get_args(Objects):
        raise VolsegError(f"objects {objects!r} is unknown", fix="use components or labels", code="E_USAGE")
    found = _pairs(image, mask, cases)
    options = {"objects": objects, "label_names": {str(k): v for k, v in (label_names or {}).items()}}
    options |= {"intensity_unit": intensity_unit, "figures": figures}
    about = about_run("measure", "")
    with ResultsFolder(Path(out)) as results:

        def task(case: Case) -> None:
            _measure_case(
                case, results, case_key(options, case), objects, label_names or {}, intensity_unit, figures, pages
            )

        report = run_cases(
            found,
            lambda todo: run(task, todo),
            lambda case: case_key(options, case),
            results,
            "",
            "Measuring",
            progress,
            objects,
            about if pages else None,
        )
        results.write_run(
            run_description("measure", options, report, started)
            | about
            | {"connectivity": 26 if objects == "components" else None}
        )
    return report


def _pairs(image: Path | str | None, mask: Path | str | None, cases: Path | str | None) -> list[Case]:
    if cases is not None and image is None and mask is None:
        found = find_cases(Path(cases), ("image",))
        without = [case.id for case in found if case.reference is None]
        if without:
            raise VolsegError(
                f"{cases}: {len(without)} cases have no mask, first {without[0]!r}",
                fix="fill the `label` column",
                code="E_DATASET",
            )
        return found
    if image is None or mask is None or cases is not None:
        raise VolsegError(
            "measure needs a scan and its mask, or a table of cases",
            fix="give --image and --mask, or --cases",
            code="E_USAGE",
        )
    found = find_scans([Path(image)], ("image",))
    if Path(image).is_dir() or len(found) != 1:
        raise VolsegError(f"{image}: is not one scan", fix="give one file, or --cases for several", code="E_USAGE")
    return [replace(found[0], reference=Path(mask))]


def _measure_case(
    case: Case,
    results: ResultsFolder,
    key: str,
    objects: str,
    label_names: Mapping[int, str],
    intensity_unit: str | None,
    figures: bool,
    pages: bool,
) -> None:
    started = time.monotonic()
    path = case.images["image"]
    assert case.reference is not None
    scan, mask = read_volume(path), read_mask(case.reference)
    check_pair(scan, mask, str(path), str(case.reference))
    unit = intensity_unit or _guess_unit(scan)
    lesions = label_lesions(mask.array, scan.geometry, objects=cast(Objects, objects))
    rows = measure_lesions(
        scan,
        lesions.ids,
        lesions.labels,
        case_id=case.id,
        label_names={value: label_names.get(value, f"label_{value}") for value in lesions.labels},
        intensity_unit=unit,
    )
    ids = scan.with_array(lesions.ids)
    files = [write_mask(ids, results.path / "lesion_ids" / f"{case.id}.nii.gz", like=path)]
    if figures:
        files.append(write_figure(scan, ids, rows, case.id, results.path))
    row = done_row(case, scan, rows, path=path, unit=unit, model="", seconds=time.monotonic() - started)
    if pages:
        files += write_page(row, rows, scan, lesions.ids, unit=unit, out=results.path)
    row = replace(row, seconds=round(time.monotonic() - started, 2))
    results.commit(row, key=key, lesions=rows, files=files, source=source_of(path, unit))


def _guess_unit(scan: Volume) -> str:
    """HU for a scan that reaches below −200, as air and lung do on a CT and nothing does on MRI or PET."""
    return "HU" if float(scan.intensities(scan.array.min())) < -200 else "a.u."


def read_label_names(path: Path | str) -> dict[int, str]:
    """Value → name from a JSON object (either way round) or a CSV with columns `label` and `name`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            pairs = json.loads(text).items()
            return dict((int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in pairs)
        return {int(row["label"]): row["name"] for row in csv.DictReader(text.splitlines())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolsegError(
            f"{path}: not a list of label names ({error})",
            fix='give JSON such as {"1": "spleen"}, or a CSV with columns label and name',
            code="E_LABELS",
        ) from error
