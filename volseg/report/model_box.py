"""What a reader must know of a model: what it is for, its limits, how good it was, on what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.measure.units import UNLIKE
from volseg.recipe import Recipe

if TYPE_CHECKING:  # torch takes seconds to import; only a workflow that needs it pays
    from volseg.plan import DatasetFingerprint

POOR_DICE = (
    0.5  # of validation, under which training warns and a model says that it is not to be relied on
)
MOST_LABELS = 8  # whose Dice is listed; of more the worst
NOT_STATED = "not stated by the recipe"


class LabelDice(BaseModel):
    """Validation Dice of one label, with its 95 % interval where the model holds one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    label: str
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        interval = (
            "no interval is stored"
            if self.low is None
            else f"95 % interval {self.low:.2f} to {self.high:.2f}"
        )
        return f"{self.label} {self.mean:.2f} ({interval})"


class ModelBox(BaseModel):
    """The model box of the pages and of run.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str  # as in the column `model`
    intended_use: str
    limits: str
    training_cases: int
    validation_cases: int | None = None
    dice: tuple[LabelDice, ...] = ()
    checks: tuple[str, ...] = ()  # what it can tell of a scan

    @property
    def poor_line(self) -> str:
        """A warning for a label with a validation Dice under 0.5; empty without one."""
        poor = sorted(
            (score for score in self.dice if score.mean < POOR_DICE), key=lambda score: score.mean
        )
        if not poor:
            return ""
        names = ", ".join(f"{score.label} {score.mean:.2f}" for score in poor[:MOST_LABELS])
        more = f" and {len(poor) - MOST_LABELS} more labels" if len(poor) > MOST_LABELS else ""
        return f"Poor model: validation Dice under {POOR_DICE}: {names}{more}. Do not rely on these masks and numbers."

    @property
    def dice_text(self) -> str:
        """The validation Dice in words; lower confidence where none is known."""
        if not self.dice:
            return "unknown: the model holds none, so trust its masks less"
        shown = (
            sorted(self.dice, key=lambda score: score.mean)[:MOST_LABELS]
            if self._is_long
            else self.dice
        )
        listed = "; ".join(score.text for score in shown)
        if not self._is_long:
            return listed
        mean = math.fsum(score.mean for score in self.dice) / len(self.dice)
        return f"mean of {len(self.dice)} labels {mean:.2f}; the worst: {listed}"

    @property
    def cases_text(self) -> str:
        validated = (
            "" if self.validation_cases is None else f", validated on {self.validation_cases}"
        )
        return f"{self.training_cases} cases{validated}"

    @property
    def _is_long(self) -> bool:
        return len(self.dice) > MOST_LABELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Whether scans resemble those that a model was trained on, for its box."""

    text: str
    is_like: bool


def model_box(
    name: str, recipe: Recipe, fingerprint: DatasetFingerprint, metrics: Mapping[str, Any]
) -> ModelBox:
    """The box of a model, from what its bundle holds."""
    from volseg.mismatch import checks_of

    return ModelBox(
        name=name,
        intended_use=recipe.intended_use or NOT_STATED,
        limits=recipe.limits or NOT_STATED,
        training_cases=metrics.get("training_cases", fingerprint.n_cases),
        validation_cases=metrics.get("validation_cases"),
        dice=tuple(_dice(recipe, metrics)),
        checks=tuple(checks_of(recipe, fingerprint)),
    )


def read_model_box(content: Any) -> ModelBox | None:
    """The box that a record (as text) or run.json (parsed) holds; None where it is none."""
    try:
        return (
            ModelBox.model_validate_json(content)
            if isinstance(content, str)
            else ModelBox.model_validate(content)
        )
    except ValidationError:
        return None


def likeness_of_scan(warnings: str) -> Likeness:
    """Of one scan, from its warnings in cases.csv."""
    codes = [code for code in UNLIKE if f"{code}:" in warnings]
    if not codes:
        return Likeness(
            text="These checks found no difference between this scan and the training scans.",
            is_like=True,
        )
    return Likeness(
        text=f"This scan does not resemble the training scans: {', '.join(codes)}.", is_like=False
    )


def likeness_of_run(rows: list[Mapping[str, Any]], model: str) -> Likeness:
    """Of the scans of a run that were given to this model, from their rows of cases.csv."""
    done = [row for row in rows if row.get("status") == "done" and row.get("model") == model]
    refused = sum(
        (row.get("reason") or "").startswith("E_MODALITY")
        for row in rows
        if row.get("model") == model
    )
    like = sum(likeness_of_scan(row.get("warnings") or "").is_like for row in done)
    total = len(done) + refused
    beside = f"; {refused} of another modality were refused" if refused else ""
    text = f"{like} of {total} scans resemble the training scans by these checks{beside}."
    return Likeness(text=text, is_like=like == total)


def _dice(recipe: Recipe, metrics: Mapping[str, Any]) -> list[LabelDice]:
    from volseg.bundle import DICE, NNUNET_DICE

    scores = []
    for label in dict.fromkeys((*recipe.data.labels, *(recipe.data.regions or ()))):
        mean, interval = metrics.get(f"{DICE}{label}"), metrics.get(f"{DICE}{label}_95")
        if isinstance(mean, int | float):
            low, high = (
                interval
                if isinstance(interval, list | tuple) and len(interval) == 2
                else (None, None)
            )
            scores.append(LabelDice(label=label, mean=mean, low=low, high=high))
    folds = [value for name, value in metrics.items() if name.startswith(NNUNET_DICE)]
    if not scores and folds:
        scores.append(LabelDice(label="all labels", mean=math.fsum(folds) / len(folds)))
    return scores
