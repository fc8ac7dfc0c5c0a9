"""Comparison of a scan with a model's training scans: modality, spacing, field of view, slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from volseg.measurement.units import (
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
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import ARBITRARY, HU, SUV, Recipe, Scale, Window
from volseg.volume import Geometry, Volume

TOLERANCE = 1.5  # factor outside the range of the training scans
GUESSED = (
    "the unit HU of the model was guessed from its training scans: "
    "train it again with a `modality` column in the dataset, or with a recipe"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resemblance:
    """The comparison of a scan with the training scans of a model.

    Args:
        unit: of the first channel; doubted if any channel contradicts the model's modality.
        contradictions: sentences; a scan with any should not be given to the model.
        warnings: `W_CODE: sentence` for everything else that is unusual.
    """

    unit: Unit
    contradictions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Contradictions (as `W_MODALITY`) and warnings, for a row of cases.csv."""
        return tuple(f"{MODALITY}: {reason}" for reason in self.contradictions) + self.warnings


def compare_scan(
    images: Mapping[str, Volume], recipe: Recipe, fingerprint: DatasetFingerprint
) -> Resemblance:
    """Compare a scan with the fingerprint of a model's training scans.

    Args:
        images: channel name → scan; must contain the first channel of the recipe.
    """
    first, unit, contradictions = recipe.data.channels[0], Unit(name=recipe.data.intensity_unit), []
    unjudged = recipe.data.channels
    if has_trusted_unit(recipe, fingerprint):
        unit = judge_unit(images[first], recipe.data.intensity_unit, by="the model")
        contradictions += [f"{first}: {unit.doubt}"] if unit.is_contradicted else []
        unjudged = unjudged[1:]
    elif images[first].unit:
        unit = judge_unit(images[first], None)
    for name in unjudged:
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


def list_checks(recipe: Recipe, fingerprint: DatasetFingerprint) -> list[str]:
    """List the checks that a model can make before it segments a scan, for its card."""
    first, says_unit, checks = recipe.data.channels[0], has_trusted_unit(recipe, fingerprint), []
    if says_unit:
        unit = recipe.data.intensity_unit
        checks.append(f"modality: {first} must be in {unit}; scans that contradict it are refused")
    for name in recipe.data.channels[1:] if says_unit else recipe.data.channels:
        if _is_absolute(recipe, name) and name in fingerprint.foreground:
            overlap = f"the range of {name} must overlap the intensities of the training labels"
            checks.append(f"modality: {overlap}")
        if _never_was_ct(fingerprint, name):
            limit = "other modalities are not distinguished"
            checks.append(f"modality: {name} must not look like a CT in HU; {limit}")
    if not checks:
        checks.append("modality: none, as the model does not state its intensities")
    sizes = _sizes(fingerprint)
    checks += [
        f"{size.quantity}: {size.span} in training; {size.code} if more than {TOLERANCE} × beyond"
        for size in sizes
    ]
    if not sizes:
        reason = "as the model does not state those of its training scans"
        checks.append(f"spacing, field of view, slices: none, {reason}")
    return checks


def _foreign(scan: Volume, channel: str, recipe: Recipe, fingerprint: DatasetFingerprint) -> str:
    """Explain why a channel has another modality than in training; empty if it may not."""
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


def has_trusted_unit(recipe: Recipe, fingerprint: DatasetFingerprint) -> bool:
    """Check whether the model states a checkable unit that most training scans agree with."""
    is_checkable = recipe.data.intensity_unit in (HU, SUV)
    return is_checkable and 2 * len(fingerprint.doubted_units) < max(1, fingerprint.n_cases)


def _doubt_of_model(recipe: Recipe, fingerprint: DatasetFingerprint) -> str:
    """Explain why the model's unit must not be relied on; empty if it may be."""
    unit = recipe.data.intensity_unit
    if unit in (HU, SUV) and not has_trusted_unit(recipe, fingerprint):
        scans = f"{len(fingerprint.doubted_units)} of its {fingerprint.n_cases} training scans"
        return f"the model states {unit}, but {scans} contradict it"
    return GUESSED if recipe.data.unit_guessed else ""


def _is_absolute(recipe: Recipe, channel: str) -> bool:
    """Check whether normalisation is the same for every scan."""
    return isinstance(recipe.preprocess.normaliser_of(channel), Window | Scale)


def _never_was_ct(fingerprint: DatasetFingerprint, channel: str) -> bool:
    """Check whether no training scan looked like a CT.

    An older fingerprint does not know; then check whether no label had a negative intensity.
    """
    if channel in fingerprint.n_ct_like:
        return fingerprint.n_ct_like[channel] == 0
    return channel in fingerprint.foreground and fingerprint.foreground[channel].p00_5 >= 0


def _unusual(geometry: Geometry, fingerprint: DatasetFingerprint) -> Iterator[str]:
    """Yield a warning, with both ranges, for each size outside that of the training scans."""
    canonical = geometry.canonical()
    shape, spacing_mm = np.array([canonical.shape]), np.array([canonical.spacing_mm])
    for size in _sizes(fingerprint):
        values = size.of(shape, spacing_mm)[0]
        if not ((values >= size.low / TOLERANCE) & (values <= size.high * TOLERANCE)).all():
            spans = f"{_times(values)}{size.unit}, in training {size.span}"
            yield f"{size.code}: {size.quantity} {spans}"


@dataclass(frozen=True, slots=True, eq=False)
class _Size:
    """A size of a scan's grid, along R, A, S or one axis, with its range in training."""

    code: str
    quantity: str
    unit: str
    of: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (N, 3) voxels, (N, 3) mm → (N, axes)
    low: np.ndarray
    high: np.ndarray

    @property
    def span(self) -> str:
        pairs = zip(self.low, self.high, strict=True)
        return " x ".join(f"{low:.3g} to {high:.3g}" for low, high in pairs) + self.unit


def _sizes(fingerprint: DatasetFingerprint) -> list[_Size]:
    """List the sizes of a scan's grid to compare; none if the fingerprint has no sizes."""
    if not fingerprint.spacings_mm or len(fingerprint.spacings_mm) != len(fingerprint.shapes):
        return []
    shapes, spacings_mm = np.array(fingerprint.shapes), np.array(fingerprint.spacings_mm)
    medians_mm = np.median(spacings_mm, axis=0)
    # Slices are stacked along the coarsest axis, or along S if all are equal.
    across = int(np.flatnonzero(medians_mm == medians_mm.max())[-1])
    kinds: tuple[tuple[str, str, str, Callable[[np.ndarray, np.ndarray], np.ndarray]], ...] = (
        (SPACING, "spacing along R, A, S", " mm", lambda n, mm: mm),
        (FIELD_OF_VIEW, "field of view along R, A, S", " mm", lambda n, mm: n * mm),
        (SLICES, f"slices along {'RAS'[across]}", "", lambda n, mm: n[:, [across]]),
    )
    return [
        _Size(code, quantity, unit, of, values.min(axis=0), values.max(axis=0))
        for code, quantity, unit, of in kinds
        if (values := of(shapes, spacings_mm)) is not None
    ]


def _times(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers)
