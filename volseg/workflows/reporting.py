"""`volseg report`: the pages of a results folder, made again."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.inputs import read_json, read_text
from volseg.report.results import RECORDS, ResultsFolder
from volseg.workflows.batch import Progress, RunReport, silent
from volseg.workflows.pages import has_page, remake_page, write_report


def report(results: Path | str, *, progress: Progress = silent) -> RunReport:
    """Make report.html and the viewer page of every scan of a results folder again.

    A scan that is no longer where it was keeps its earlier page, and report.html says so. The tables are left as they are.

    Raises:
        VolsegError: it is no results folder.
    """
    out = Path(results)
    if not (out / RECORDS).is_dir():
        raise VolsegError(
            f"{out}: is no results folder",
            fix="give the --out folder of volseg infer or volseg measure",
            code="E_USAGE",
        )
    remade, kept = [], {}
    with ResultsFolder(out) as folder:
        done = {name: record for name, record in folder.records().items() if record["case"]["status"] == "done"}
        progress("Pages", 0.0, f"{len(done)} scans")
        for count, (name, record) in enumerate(done.items(), start=1):
            reason = remake_page(folder, name, record)
            if reason:
                earlier = "; the earlier page stays" if has_page(folder, name) else ", so it has no page"
                kept[name] = reason + earlier
            else:
                remade.append(name)
            progress("Pages", count / len(done), name)
        remarks = [f"The page of {name} could not be made again: {reason}." for name, reason in kept.items()]
        write_report(folder, _about(out), _pending(out, set(folder.records())), remarks, is_anew=True)
    return RunReport(
        out=out, done=remade, kept=list(kept), details={"warnings": remarks, "page": str(out / "report.html")}
    )


def _about(out: Path) -> dict[str, Any]:
    """What run.json says of the run; nothing where an interrupted run left none."""
    try:
        found = read_json(out / "run.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _pending(out: Path, known: set[str]) -> list[dict[str, Any]]:
    """Rows of cases.csv that were not reached and have no record."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(out / "cases.csv"), newline="")))
    except (OSError, ValueError, csv.Error):
        return []
    return [
        {"case_id": row["case_id"], "status": "pending", "image": row.get("image")}
        for row in rows
        if row.get("status") == "pending" and row.get("case_id") not in known
    ]
