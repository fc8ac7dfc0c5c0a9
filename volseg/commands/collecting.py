"""`volseg candidates`: predicted lesions, matched or false, as a dataset to train a filter on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from volseg.commands.batch import failure_reason, write_mask
from volseg.commands.placing import place_mask
from volseg.errors import ScanError, VolsegError
from volseg.evaluation.detection import match_lesions
from volseg.execution.local import run
from volseg.io.cases import Case, dataset_error
from volseg.io.csv_text import write_csv
from volseg.io.folders import scans_in
from volseg.io.formats import RESULT_SUFFIX, stem_of
from volseg.io.layouts import survey_cases
from volseg.io.volumes import read_mask, read_volume
from volseg.options import CandidatesOptions, command
from volseg.postprocessing.lesions import MANY, Lesions, label_lesions
from volseg.reports import CandidatesReport
from volseg.store.outputs import Commit, OutputFolder
from volseg.store.records import MASKS
from volseg.volume import Volume

TABLE, LABELS = "cases.csv", "labels"
MATCHED, FALSE = "matched", "false"  # as in detections.csv
# Without a partner, but on a lesion that has another: true tissue, which no filter should learn to
# drop. Training leaves out a case whose cell is empty.
PARTIAL = ""
COLUMNS = ("subject", "patient", "image", "label", "split", "status")
Line = Mapping[str, str]


@command(CandidatesOptions)
def candidates(options: CandidatesOptions) -> CandidatesReport:
    """Write every predicted lesion as a case of its own, with whether the reference has it.

    A second prediction on one reference lesion is neither: its status stays empty.

    Raises:
        VolsegError: no case of the dataset was predicted, or one was predicted twice. A case whose
            masks cannot be compared becomes a failure instead.

    Example:
        >>> import volseg
        >>> scan = "sample_data/images/phantom_15.nii.gz"
        >>> held_out = volseg.infer(scan, model="model", out="held_out")
        >>> result = volseg.candidates("sample_data", "held_out", out="candidates")
        >>> (result.out / "cases.csv").is_file()
        True
    """
    cases = _cases(options.dataset)
    predicted = _predicted(options.folders, cases)
    lines, failed = list[Line](), dict[str, str]()
    with OutputFolder(options.out, "candidates", inputs=_inputs(options)) as outputs:
        names = [f"{LABELS}/{case_id}_1{RESULT_SUFFIX}" for case_id in predicted]
        outputs.check_overwrites([TABLE, *names])
        with outputs.staged() as commit:
            write = partial(_write_lesions, predicted=predicted, commit=commit, options=options)
            todo = [cases[case_id] for case_id in predicted]
            for count, outcome in enumerate(run(write, todo), start=1):
                name = outcome.item.id
                if outcome.error is not None:
                    failed[name] = failure_reason(outputs, name, outcome.error)
                lines += outcome.value or []
                options.progress("Comparing", count / len(todo), name)
            if not lines and failed:
                raise dataset_error(list(failed.values()), str(options.dataset))
            commit.write(TABLE, partial(write_csv, rows=[COLUMNS, *map(_cells, lines)]))
            commit.finish(last=TABLE)
    numbers = Counter(line["status"] for line in lines)
    return CandidatesReport(
        out=options.out,
        done=[name for name in predicted if name not in failed],
        failed=failed,
        n_matched=numbers[MATCHED],
        n_false=numbers[FALSE],
        n_partial=numbers[PARTIAL],
    )


def _inputs(options: CandidatesOptions) -> list[Path]:
    return [options.dataset, *options.folders]


def _cells(line: Line) -> list[str]:
    return [line[name] for name in COLUMNS]


def _cases(dataset: Path) -> dict[str, Case]:
    """Return the cases of a dataset that have a reference mask, by id."""
    survey = survey_cases(dataset, None)
    if survey.mistakes:
        raise dataset_error(survey.mistakes, str(dataset))
    return {case.id: case for case in survey.cases if case.reference is not None}


def _predicted(results: Sequence[Path], cases: Mapping[str, Case]) -> dict[str, Path]:
    """Return case id → predicted mask.

    Raises:
        VolsegError: there is none, or a case has several.
    """
    predicted: dict[str, Path] = {}
    for folder in results:
        masks = folder / MASKS
        if not masks.is_dir():
            raise VolsegError(
                f"{folder}: holds no {MASKS}/",
                fix="give results folders of `volseg infer`",
                code="E_DATASET",
            )
        for path in scans_in(masks):
            case_id = stem_of(path)
            if case_id in predicted:
                raise VolsegError(
                    f"case {case_id!r} was predicted in {predicted[case_id].parent} and {masks}",
                    fix="give one results folder for each case",
                    code="E_DATASET",
                )
            if case_id in cases:
                predicted[case_id] = path
    if not predicted:
        raise VolsegError(
            f"no mask of {', '.join(map(str, results))} has the name of a case with a reference",
            fix="give the dataset on which the results were predicted",
            code="E_DATASET",
        )
    return predicted


def _write_lesions(
    case: Case, *, predicted: Mapping[str, Path], commit: Commit, options: CandidatesOptions
) -> list[Line]:
    """Write a mask per predicted lesion of a case; return their lines of the table."""
    path = next(iter(case.images.values()))
    scan = read_volume(path)
    assert case.reference is not None
    truth, _ = _lesions(case.reference, path, scan)
    guess, mask = _lesions(predicted[case.id], path, scan)
    _, partners = match_lesions(truth, guess, min_iou=options.min_iou)
    lines = []
    pairs = zip(partners.numbers.tolist(), partners.n_over.tolist(), strict=True)
    for number, (partner, n_over) in enumerate(pairs, start=1):
        name = f"{LABELS}/{case.id}_{number}{RESULT_SUFFIX}"
        lesion = mask.with_array((guess.ids == number).astype("uint8"))
        write_mask(lesion, commit, name, like=path)
        lines.append(
            {
                "subject": f"{case.id}_{number}",
                "patient": case.patient or case.id,
                "image": Path(os.path.relpath(path, options.out)).as_posix(),
                "label": name,
                "split": case.split or "",
                "status": MATCHED if partner else PARTIAL if n_over else FALSE,
            }
        )
    return lines


def _lesions(path: Path, scan_path: Path, scan: Volume) -> tuple[Lesions, Volume]:
    """Return the lesions of a mask on the grid of its scan, and the mask."""
    names = {"mask_name": str(path), "grid_name": str(scan_path)}
    mask = place_mask(read_mask(path, like=scan_path), scan.geometry, **names).mask
    lesions = label_lesions(mask.array, mask.geometry)
    if len(lesions.labels) > MANY:
        raise ScanError(
            f"{path}: has {len(lesions.labels)} lesions, so it looks like noise",
            fix="leave out this case",
            code="W_SPECKS",
        )
    return lesions, mask
