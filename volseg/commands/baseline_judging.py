"""Baselines beside judged classes or numbers: read, and paired with the same cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volseg.commands.class_tables import TruthTable
from volseg.evaluation.class_intervals import Judged
from volseg.evaluation.class_rows import BASELINES
from volseg.evaluation.classes import ClassPredictions
from volseg.evaluation.regression import NumberPredictions
from volseg.store.tables import read_baseline_rows
from volseg.words import format_count

Outputs = Mapping[str, float | None]  # class name → probability, or "" → number


@dataclass(frozen=True, slots=True, eq=False)
class Baselines:
    """The simple models beside a model.

    Args:
        judged: what each predicts for the cases that are judged, with its name as model.
        remarks: why there are none, although the results hold their table.
    """

    judged: Sequence[Judged]
    remarks: Sequence[str] = ()

    @classmethod
    def of(cls, truth: TruthTable) -> Baselines:
        """Read baselines.csv beside the table of predictions; only complete ones are judged."""
        path = truth.predicted.path.parent / BASELINES
        if not path.is_file():
            return cls(())
        outputs: dict[str, dict[str, dict[str, float | None]]] = defaultdict(dict)
        try:
            for row in read_baseline_rows(path):
                value = row.value if row.class_name is None else row.probability
                cases = outputs[row.baseline]
                cases.setdefault(row.case_id, {})[row.class_name or ""] = value
            return cls(*_paired(truth, outputs))
        except (OSError, ValueError, TypeError, KeyError) as error:
            return cls((), [f"W_BASELINES: {path}: cannot be used ({error})"])


def _paired(
    truth: TruthTable, outputs: Mapping[str, Mapping[str, Outputs]]
) -> tuple[list[Judged], list[str]]:
    """Return the baselines that predicted every judged case, and a remark on each other one."""
    columns = list(truth.predicted.classes) or [""]
    judged, remarks = list[Judged](), list[str]()
    for name, cases in outputs.items():
        rows = [[cases.get(case, {}).get(one) for one in columns] for case in truth.names]
        n_missing = sum(None in row for row in rows)
        if n_missing:
            missing = format_count(n_missing, "judged case")
            remarks.append(f"W_BASELINES: {name} did not predict {missing}, and is left out")
            continue
        table = np.array(rows, dtype=np.float64)
        if truth.predicted.kind == "numbers":
            predictions = NumberPredictions(table[:, 0], truth.truths)
        else:
            predictions = ClassPredictions(table, truth.truths, truth.predicted.classes)
        judged.append(Judged(predictions, truth.patients, name))
    return judged, remarks
