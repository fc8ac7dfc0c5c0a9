"""What the baselines of a model predict beside it: the rows of baselines.csv."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.evaluation.class_rows import BASELINES, BaselineRow
from volseg.io.files import sha256_of
from volseg.recipe.classification import NUMBER, Target
from volseg.store.tables import read_baseline_rows
from volseg.training.baselines import FILE, Baseline, load_baselines
from volseg.training.image_features import first_planes, image_features

CaseRows = tuple[BaselineRow, ...]  # of one case: of each baseline and class


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """The baselines that a model has, and what they predict.

    Args:
        fitted: those that training had time and data for.
        classes: names in the order of the outputs; empty for a number.
        key: part of the key of a case, by which a later call knows the baselines; empty without.
    """

    fitted: Sequence[Baseline]
    classes: Sequence[str]
    key: str

    @classmethod
    def of(cls, model: Path, data: Target) -> Beside:
        """Read the baselines of a model folder, which may have none.

        Raises:
            VolsegError: they are damaged.
        """
        classes = () if data.kind == NUMBER else data.names
        if not (model / f"{FILE}.json").is_file():
            return cls((), classes, "")
        fitted = [baseline for baseline in load_baselines(model) if not baseline.reason]
        digests = [sha256_of(model / f"{FILE}{suffix}") for suffix in (".json", ".safetensors")]
        return cls(fitted, classes, "+" + "+".join(digest[:16] for digest in digests))

    @property
    def names(self) -> list[str]:
        return [baseline.name for baseline in self.fitted]

    def rows(self, case_ids: Sequence[str], images: np.ndarray) -> dict[str, CaseRows]:
        """Return the rows of some cases.

        Args:
            images: (n, C, H, W), or (n, planes, C, H, W) of lesions.
        """
        if not self.fitted:
            return {}
        features = image_features(first_planes(images))
        predicted = {one.name: one.predict_features(features) for one in self.fitted}
        return {
            case_id: tuple(
                row
                for name, table in predicted.items()
                for row in self._rows_of(case_id, name, table[number])
            )
            for number, case_id in enumerate(case_ids)
        }

    def _rows_of(self, case_id: str, name: str, predicted: np.ndarray) -> list[BaselineRow]:
        if not self.classes:
            return [BaselineRow(case_id=case_id, baseline=name, value=float(predicted))]
        return [
            BaselineRow(case_id=case_id, baseline=name, class_name=class_name, probability=p)
            for class_name, p in zip(self.classes, predicted.tolist(), strict=True)
        ]


def earlier_rows(out: Path, beside: Beside) -> Mapping[str, CaseRows]:
    """Return the rows of the cases for which an earlier call wrote all of them."""
    rows: dict[str, list[BaselineRow]] = defaultdict(list)
    try:
        for row in read_baseline_rows(out / BASELINES):
            rows[row.case_id].append(row)
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    expected = [(name, one) for name in beside.names for one in beside.classes or (None,)]
    return {
        name: tuple(lines)
        for name, lines in rows.items()
        if [(line.baseline, line.class_name) for line in lines] == expected
    }
