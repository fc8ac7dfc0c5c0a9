"""The model box: what a model is for, its limits, its training data and its validation Dice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.measurement.rows import CaseRow
from volseg.measurement.units import UNLIKE
from volseg.recipe import Recipe
from volseg.words import format_count, format_list

if TYPE_CHECKING:  # this import loads torch, which takes seconds
    from volseg.planning.fingerprint import DatasetFingerprint

POOR_DICE = 0.5  # validation Dice below which training warns and the model box says "poor model"
MAX_LABELS = 8  # labels listed with their Dice; of more, those with the lowest Dice
NOT_STATED = "not stated"


class LabelDice(BaseModel):
    """Validation Dice of one label, with its 95 % confidence interval if the model has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        if self.low is None:
            return f"{self.label} {self.mean:.2f} (no confidence interval)"
        return f"{self.label} {self.mean:.2f} (95 % CI {self.low:.2f} to {self.high:.2f})"


class ModelBox(BaseModel):
    """The model box of the pages and of run.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str  # as in the column `model`
    intended_use: str
    limits: str
    training_cases: int
    validation_cases: int | None = None
    dice: tuple[LabelDice, ...] = ()
    checks: tuple[str, ...] = ()  # how volseg compares a scan with the training scans

    @property
    def poor_line(self) -> str:
        """Warning that names the labels with a validation Dice below 0.5; empty without any."""
        poor = [score for score in self._ascending if score.mean < POOR_DICE]
        if not poor:
            return ""
        scores = [f"{score.label} {score.mean:.2f}" for score in poor]
        names = format_list(scores, MAX_LABELS, "label")
        warning = f"Poor model: validation Dice below {POOR_DICE}: {names}."
        return f"{warning} Do not rely on these masks and numbers."

    @property
    def dice_text(self) -> str:
        """Validation Dice in words, or a caution if it is unknown."""
        if not self.dice:
            return "unknown: not stored with the model, so treat its masks with caution"
        if len(self.dice) <= MAX_LABELS:
            return "; ".join(score.text for score in self.dice)
        lowest = "; ".join(score.text for score in self._ascending[:MAX_LABELS])
        mean = math.fsum(score.mean for score in self.dice) / len(self.dice)
        return f"mean of {len(self.dice)} labels {mean:.2f}; lowest: {lowest}"

    @property
    def cases_text(self) -> str:
        cases = format_count(self.training_cases, "case")
        if self.validation_cases is None:
            return cases
        return f"{cases}, validated on {self.validation_cases}"

    @property
    def _ascending(self) -> list[LabelDice]:
        return sorted(self.dice, key=lambda score: score.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Verdict for the model box: do the scans resemble the model's training scans?"""

    text: str
    is_like: bool


def model_box(
    name: str, recipe: Recipe, fingerprint: DatasetFingerprint, metrics: Mapping[str, Any]
) -> ModelBox:
    """Return the box of a model from the contents of its bundle."""
    from volseg.mismatch import list_checks

    return ModelBox(
        name=name,
        intended_use=recipe.intended_use or NOT_STATED,
        limits=recipe.limits or NOT_STATED,
        training_cases=metrics.get("training_cases", fingerprint.n_cases),
        validation_cases=metrics.get("validation_cases"),
        dice=tuple(_dice(recipe, metrics)),
        checks=tuple(list_checks(recipe, fingerprint)),
    )


def read_model_box(content: Any) -> ModelBox | None:
    """Parse the box in a record (text) or in run.json (parsed); return None if it is invalid."""
    is_text = isinstance(content, str)
    try:
        return (ModelBox.model_validate_json if is_text else ModelBox.model_validate)(content)
    except ValidationError:
        return None


def similarity_of_scan(warnings: str) -> Similarity:
    """Judge one scan by its warnings in cases.csv."""
    text = "These checks found no difference between this scan and the training scans."
    codes = [code for code in UNLIKE if f"{code}:" in warnings]
    if codes:
        text = f"This scan does not resemble the training scans: {', '.join(codes)}."
    return Similarity(text=text, is_like=not codes)


def similarity_of_run(cases: Iterable[CaseRow], model: str) -> Similarity:
    """Judge the scans that this model segmented or refused."""
    cases = [case for case in cases if case.model == model]
    done = [case for case in cases if case.status == "done"]
    n_refused = sum(case.reason.startswith("E_MODALITY") for case in cases)
    n_like = sum(similarity_of_scan(case.warnings).is_like for case in done)
    n_scans = len(done) + n_refused
    text = f"{n_like} of {n_scans} scans resemble the training scans in all checks"
    if n_refused:
        text += f"; {n_refused} of another modality were refused"
    return Similarity(text=f"{text}.", is_like=n_like == n_scans)


def _dice(recipe: Recipe, metrics: Mapping[str, Any]) -> list[LabelDice]:
    from volseg.bundle import DICE, NNUNET_DICE

    scores = []
    for label in dict.fromkeys((*recipe.data.labels, *(recipe.data.regions or ()))):
        mean, interval = metrics.get(f"{DICE}{label}"), metrics.get(f"{DICE}{label}_95")
        if isinstance(mean, int | float):
            low = high = None
            if isinstance(interval, list | tuple) and len(interval) == 2:
                low, high = interval
            scores.append(LabelDice(label=label, mean=mean, low=low, high=high))
    folds = [value for name, value in metrics.items() if name.startswith(NNUNET_DICE)]
    if not scores and folds:
        scores.append(LabelDice(label="all labels", mean=math.fsum(folds) / len(folds)))
    return scores
