"""Columns that follow from the intensities of lesions: statistics, density, mass, calcium."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np

from volseg.measurement.cells import NOTHING, Cells, joined
from volseg.measurement.density import SCHNEIDER, agatston, density_g_cm3, statistics
from volseg.measurement.lesion_box import LesionBox
from volseg.measurement.peak import intensity_peak
from volseg.measurement.ragged import Ragged
from volseg.measurement.scan import CanonicalScan, SegmentedScan
from volseg.words import format_count

NEEDED = tuple(f"intensity_{name}" for name in ("mean", "sd", "min", "p10", "median", "p90", "max"))

MTV_FRACTION = 0.41  # of SUVmax
UPTAKE = ("tlg_g", "mtv41_ml", "tlg41_g", "mtv_fixed_ml", "tlg_fixed_g")


def intensity_cells(lesions: Sequence[LesionBox]) -> list[Cells]:
    """Return the columns that follow from the intensities of each lesion."""
    view = lesions[0].view
    # The core first, so that the values of a lesion as large as the scan are held only once.
    cores = _core_cells(lesions)
    return value_cells(
        Ragged.of([lesion.values(view.image.array) for lesion in lesions], view.image),
        view,
        cores=cores,
        peaks=map(_peak_cells, lesions) if view.scan.unit.is_suv else repeat(NOTHING),
        calcium=map(_calcium_cells, lesions) if view.scan.is_calcium_scored else repeat(NOTHING),
    )


def value_cells(
    values: Ragged,
    view: CanonicalScan,
    *,
    cores: Iterable[Cells] = repeat(NOTHING),
    peaks: Iterable[Cells] = repeat(NOTHING),
    calcium: Iterable[Cells] = repeat(NOTHING),
) -> list[Cells]:
    """Return the columns that follow from the intensities of each lesion.

    Args:
        cores, peaks, calcium: columns that depend on the places of voxels, if they were measured.
    """
    scan = view.scan
    doubt, need_hu = _unit_cells(scan)
    # Values are sorted: those not finite are at the ends.
    has_lost = ~(np.isfinite(values.first) & np.isfinite(values.last))
    lost = _counts(values, has_lost, lambda part: ~np.isfinite(part))
    density = _density_cells(values, view) if scan.unit.is_hu else repeat(NOTHING)
    uptake = _uptake_cells(values, view) if scan.unit.is_suv else repeat(NOTHING)
    columns = (_statistic_cells(values), cores, density, peaks, uptake, calcium)
    lesions = zip(lost, values.counts.tolist(), *columns)
    return [
        joined((doubt, _lost_cells(n_lost, n_voxels, scan), need_hu))
        if n_lost
        else joined((doubt, need_hu, *cells))
        for n_lost, n_voxels, *cells in lesions
    ]


def withheld(scan: SegmentedScan) -> str:
    """Return a note on the columns left empty because the unit is in doubt; empty if it is not."""
    if not scan.unit.doubt:
        return ""
    calcium, classes = ["calcium"] * scan.settings.calcium, ["class"] * (scan.classes is not None)
    return f"{', '.join(['density', 'mass', *calcium, *classes])}: {scan.unit.doubt}"


def _unit_cells(scan: SegmentedScan) -> tuple[Cells, Cells]:
    """Return notes on columns left empty because the unit is in doubt, or because it is not HU."""
    if scan.unit.doubt or scan.unit.is_hu or not scan.unit.name:
        return Cells({}, withheld(scan)), NOTHING
    columns = "density, mass, calcium" if scan.settings.calcium else "density, mass"
    return NOTHING, Cells({}, f"{columns}: need HU, but the unit is {scan.unit.name}")


def _lost_cells(n_lost: int, n_voxels: int, scan: SegmentedScan) -> Cells:
    """Return the cells of a lesion with voxels that are not finite."""
    names = ["intensity"]
    names += ["mass", "density"] if scan.unit.is_hu else []
    names += ["suv_peak", "mtv", "tlg"] if scan.unit.is_suv else []
    names += ["agatston_score", "calcium"] if scan.is_calcium_scored else []
    note = f"{', '.join(names)}: {n_lost} of {n_voxels} voxels are not finite"
    return Cells(dict.fromkeys(NEEDED, math.nan), note)


def _statistic_cells(values: Ragged) -> Iterator[Cells]:
    with np.errstate(invalid="ignore", divide="ignore"):  # lesions with NaN are left empty
        columns = {f"intensity_{name}": x.tolist() for name, x in statistics(values).items()}
    for numbers in zip(*columns.values(), strict=True):
        row = dict(zip(columns, numbers, strict=True))
        if row["intensity_sd"]:
            yield Cells(row)
            continue
        # The same NaN object, so that equal rows compare equal.
        row |= {"intensity_skewness": math.nan, "intensity_kurtosis": math.nan}
        yield Cells(row, "intensity_skewness and kurtosis: all intensities are equal")


def _core_cells(lesions: Sequence[LesionBox]) -> list[Cells]:
    image = lesions[0].view.image
    cores = Ragged.of([lesion.core_values(image.array) for lesion in lesions], image)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(cores.counts > 0, cores.sum() / cores.counts + 0.0, np.nan).tolist()
    no_core = Cells({}, "intensity_mean_eroded1: no voxel has all its neighbours in the lesion")
    return [
        Cells({"intensity_mean_eroded1": mean}) if count else no_core
        for mean, count in zip(means, cores.counts.tolist(), strict=True)
    ]


def _density_cells(values: Ragged, view: CanonicalScan) -> Iterator[Cells]:
    calibration = view.scan.settings.density_g_cm3 or SCHNEIDER
    (low_hu, _), (high_hu, _) = calibration[0], calibration[-1]
    with np.errstate(invalid="ignore"):
        densities = density_g_cm3(values, calibration).tolist()
    over = _counts(values, values.last > high_hu, lambda part: part > high_hu)
    under = _counts(values, values.first < low_hu, lambda part: part < low_hu)
    numbers = zip(densities, values.counts.tolist(), over, under, strict=True)
    for density, n_voxels, n_over, n_under in numbers:
        notes = [
            f"mass: {format_count(n, 'voxel')} {'is' if n == 1 else 'are'} {side} {end:g} HU, "
            "where the calibration ends"
            for n, side, end in ((n_over, "over", high_hu), (n_under, "under", low_hu))
            if n
        ]
        mass_g = density * n_voxels * view.voxel_mm3 / 1000
        yield Cells({"density_g_cm3": density, "mass_g": mass_g}, "; ".join(notes))


def _peak_cells(lesion: LesionBox) -> Cells:
    peak = intensity_peak(lesion)
    note = "suv_peak: a voxel near each voxel of the lesion is not finite"
    return Cells({"suv_peak": peak}, note if math.isnan(peak) else "")


def _uptake_cells(values: Ragged, view: CanonicalScan) -> Iterator[Cells]:
    """Yield the metabolic volumes and their glycolysis, of each lesion."""
    fixed = view.scan.settings.mtv_threshold_suv
    with np.errstate(invalid="ignore"):
        thresholds = (
            MTV_FRACTION * values.last.astype(np.float64),
            np.full(len(values.counts), fixed),
        )
        totals = [values.sum()]
        for suv in thresholds:
            totals.append(values.sum(lambda part, n, least=suv: np.where(part >= least[n], 1.0, 0)))
            totals.append(
                values.sum(lambda part, n, least=suv: np.where(part >= least[n], part, 0))
            )
    voxel_ml = view.voxel_mm3 / 1000
    for row in zip(*((total * voxel_ml).tolist() for total in totals), strict=True):
        yield Cells(dict(zip(UPTAKE, row, strict=True)))


def _calcium_cells(lesion: LesionBox) -> Cells:
    view, settings = lesion.view, lesion.view.scan.settings
    hu = view.image.intensities(view.image.array[lesion.box])
    inside, threshold_hu = lesion.form.inside, settings.calcium_threshold_hu
    score, counted = agatston(hu, inside, view.matrix, threshold_hu=threshold_hu)
    volume_mm3 = int(counted.sum()) * view.voxel_mm3
    row = {"agatston_score": score, "calcium_volume_mm3": volume_mm3}
    if settings.calcium_mg_per_ml_hu is None:
        return Cells(row, "calcium_mass_mg: the recipe has no calcium_mg_per_ml_hu")
    total_hu = float(np.sort(hu[counted].astype(np.float64)).sum())
    mass_mg = settings.calcium_mg_per_ml_hu * total_hu * view.voxel_mm3 / 1000
    return Cells(row | {"calcium_mass_mg": mass_mg})


def _counts(
    values: Ragged, has_any: np.ndarray, is_counted: Callable[[np.ndarray], np.ndarray]
) -> list[int]:
    """Count the values of each of L lesions that satisfy `is_counted`.

    Args:
        has_any: (L,) bool, whether a lesion has such values; used to skip counting.
    """
    if not has_any.any():
        return [0] * len(has_any)
    counts = values.sum(lambda part, lesion: is_counted(part).astype(np.float64))
    return counts.astype(np.int64).tolist()
