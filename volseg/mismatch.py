"""Whether a scan is like a model's training scans: modality, spacing, field of view, slices. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from volseg.measure.units import (
    FIELD_OF_VIEW,
    MODALITY,
    SLICES,
    SPACING,
    UNIT,
    Unit,
    judge_unit,
    looks_like_ct,
    robust_range,
)
from volseg.plan import DatasetFingerprint
from volseg.preprocess.crop import AxisOrder, canonical_geometry
from volseg.recipe import ARBITRARY, HU, SUV, Recipe, Scale, Window
from volseg.volume import Geometry, Volume

TOLERANCE = 1.5  # factor beyond the least and the largest value of the training scans
GUESSED = (
    "the unit HU of the model was guessed from its training scans: "
    "train it again with a `modality` column in the dataset, or with a recipe"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resemblance:
    """How a scan compares with the scans that a model was trained on.

    Args:
        unit: of the first channel; doubted where any channel contradicts the model's modality.
        contradictions: sentences; with one of them the scan should not be given to the model.
        warnings: `W_CODE: sentence` for what is unusual, without the contradictions.
    """

    unit: Unit
    contradictions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """All of it for a row of cases.csv, contradictions as `W_MODALITY`."""
        return tuple(f"{MODALITY}: {reason}" for reason in self.contradictions) + self.warnings


def compare_scan(
    images: Mapping[str, Volume], recipe: Recipe, fingerprint: DatasetFingerprint
) -> Resemblance:
    """Compare a scan with what a model's fingerprint says of its training scans.

    Args:
        images: channel name → scan; the first channel of the recipe is one of them.
    """
    first, unit, contradictions = recipe.data.channels[0], Unit(name=recipe.data.intensity_unit), []
    if says_its_unit(recipe, fingerprint):
        unit = judge_unit(images[first], recipe.data.intensity_unit, by="the model")
        contradictions += [f"{first}: {unit.doubt}"] if unit.is_contradicted else []
    for name in (
        recipe.data.channels[1:] if says_its_unit(recipe, fingerprint) else recipe.data.channels
    ):
        reason = _foreign(images[name], name, recipe, fingerprint) if name in images else ""
        contradictions += [f"{name}: {reason}"] if reason else []
    warnings = tuple(_unusual(images[first].geometry, fingerprint))
    doubt = _doubt_of_model(recipe, fingerprint)
    if contradictions:
        unit = Unit(name=unit.name, doubt=f"{MODALITY}: {contradictions[0]}", is_contradicted=True)
    elif doubt:
        unit = Unit(name=unit.name if doubt == GUESSED else ARBITRARY, doubt=doubt)
        warnings = (f"{UNIT}: {doubt}", *warnings)
    return Resemblance(unit=unit, contradictions=tuple(contradictions), warnings=warnings)


def checks_of(recipe: Recipe, fingerprint: DatasetFingerprint) -> list[str]:
    """What a model can tell of a scan before it segments it, a sentence each, for its card."""
    first, says_unit, checks = recipe.data.channels[0], says_its_unit(recipe, fingerprint), []
    if says_unit:
        checks.append(
            f"modality: {first} must be in {recipe.data.intensity_unit}; a scan whose intensities contradict it is refused"
        )
    for name in recipe.data.channels[1:] if says_unit else recipe.data.channels:
        if _is_absolute(recipe, name) and name in fingerprint.foreground:
            checks.append(
                f"modality: the range of {name} must overlap the intensities under the training labels"
            )
        if _never_was_ct(fingerprint, name):
            checks.append(
                f"modality: {name} must not look like a CT in HU; other modalities are not told apart"
            )
    if not checks:
        checks.append("modality: none, as the model does not say what its intensities were")
    sizes = _sizes(fingerprint)
    checks += [
        f"{size.what}: {size.span} in training; a factor of {TOLERANCE} beyond is {size.code}"
        for size in sizes
    ]
    if not sizes:
        checks.append(
            "spacing, field of view, slices: none, as the model does not say what its training scans had"
        )
    return checks


def _foreign(scan: Volume, channel: str, recipe: Recipe, fingerprint: DatasetFingerprint) -> str:
    """Why a channel is of another modality than in training; empty where it may be the same."""
    if _never_was_ct(fingerprint, channel) and looks_like_ct(scan):
        return "it looks like a CT in HU, unlike the scans that the model was trained on"
    statistics = fingerprint.foreground.get(channel)
    if statistics is None or not _is_absolute(recipe, channel):
        return ""
    low, high = robust_range(scan)
    if low <= statistics.p99_5 and statistics.p00_5 <= high:
        return ""
    return (
        f"its intensities go from {low:.4g} to {high:.4g}, those under the training labels from "
        f"{statistics.p00_5:.4g} to {statistics.p99_5:.4g}"
    )


def says_its_unit(recipe: Recipe, fingerprint: DatasetFingerprint) -> bool:
    """Whether the model states a unit that can be contradicted, and its training scans did not."""
    return recipe.data.intensity_unit in (HU, SUV) and 2 * len(fingerprint.doubted_units) < max(
        1, fingerprint.n_cases
    )


def _doubt_of_model(recipe: Recipe, fingerprint: DatasetFingerprint) -> str:
    """Why no number is made of the unit that the model states; empty where it may be."""
    unit = recipe.data.intensity_unit
    if unit in (HU, SUV) and not says_its_unit(recipe, fingerprint):
        share = f"{len(fingerprint.doubted_units)} of its {fingerprint.n_cases} training scans"
        return f"the model states {unit}, but {share} contradict it"
    return GUESSED if recipe.data.unit_guessed else ""


def _is_absolute(recipe: Recipe, channel: str) -> bool:
    """Whether intensities mean the same in every scan: they are not normalised scan by scan."""
    return isinstance(recipe.preprocess.normalise_of(channel), Window | Scale)


def _never_was_ct(fingerprint: DatasetFingerprint, channel: str) -> bool:
    """Whether no training scan looked like a CT.

    Of a fingerprint that did not look: whether no label lay on a negative value.
    """
    if channel in fingerprint.n_ct_like:
        return fingerprint.n_ct_like[channel] == 0
    return channel in fingerprint.foreground and fingerprint.foreground[channel].p00_5 >= 0


def _unusual(geometry: Geometry, fingerprint: DatasetFingerprint) -> Iterator[str]:
    """A warning with both numbers for each size that is beyond those of the training scans."""
    canonical = canonical_geometry(geometry, AxisOrder.of(geometry))
    shape, spacing_mm = np.array([canonical.shape]), np.array([canonical.spacing_mm])
    for size in _sizes(fingerprint):
        values = size.of(shape, spacing_mm)[0]
        if not ((values >= size.low / TOLERANCE) & (values <= size.high * TOLERANCE)).all():
            yield f"{size.code}: {size.what} {_times(values)}{size.unit}, in training {size.span}"


@dataclass(frozen=True, slots=True, eq=False)
class _Size:
    """A size of scans along R, A, S, or along one axis, with its range in training."""

    code: str
    what: str
    unit: str
    of: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (N, 3) voxels, (N, 3) mm → (N, axes)
    low: np.ndarray
    high: np.ndarray

    @property
    def span(self) -> str:
        pairs = zip(self.low, self.high, strict=True)
        return " x ".join(f"{low:.3g} to {high:.3g}" for low, high in pairs) + self.unit


def _sizes(fingerprint: DatasetFingerprint) -> list[_Size]:
    """What is compared of a scan's grid; nothing where the fingerprint has no sizes."""
    if not fingerprint.spacings_mm or len(fingerprint.spacings_mm) != len(fingerprint.shapes):
        return []
    shapes, spacings_mm = np.array(fingerprint.shapes), np.array(fingerprint.spacings_mm)
    medians_mm = np.median(spacings_mm, axis=0)
    # Slices lie along the coarsest axis, or along S where all are alike.
    across = int(np.flatnonzero(medians_mm == medians_mm.max())[-1])
    kinds: tuple[tuple[str, str, str, Callable[[np.ndarray, np.ndarray], np.ndarray]], ...] = (
        (SPACING, "spacing along R, A, S", " mm", lambda n, mm: mm),
        (FIELD_OF_VIEW, "field of view along R, A, S", " mm", lambda n, mm: n * mm),
        (SLICES, f"slices along {'RAS'[across]}", "", lambda n, mm: n[:, [across]]),
    )
    return [
        _Size(code, what, unit, of, values.min(axis=0), values.max(axis=0))
        for code, what, unit, of in kinds
        if (values := of(shapes, spacings_mm)) is not None
    ]


def _times(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers)
