"""The measurement of one mask on its scan: files in, the measured lesions out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from volseg.commands.batch import MeasuredCase
from volseg.commands.placing import place_mask
from volseg.commands.remarks import ORGAN
from volseg.errors import ScanError, VolsegError
from volseg.execution.memory import Budget, Peak
from volseg.inputs import label_value, shorten
from volseg.io.cases import Case
from volseg.io.label_table import read_label_table
from volseg.io.volumes import (
    MAX_LABELS,
    mask_notes,
    read_header,
    read_mask,
    read_mask_header,
    read_volume,
)
from volseg.measurement.memory import plan_measuring
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.specks import MeasuredLesions, measure_largest
from volseg.measurement.units import Unit, judge_unit
from volseg.postprocessing.lesions import Objects, label_lesions, remove_organ
from volseg.recipe import Measure
from volseg.volume import Volume

MAX_OBJECTS = 2**20  # values of a mask whose values are the objects


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSettings:
    """How a mask is measured."""

    objects: Objects
    label_names: Mapping[int, str]
    intensity_unit: str | None
    stated_by: str  # `--unit`, the recipe or the model
    unit_doubt: str = ""  # recorded by `infer`
    remarks: tuple[str, ...] = ()  # on similarity to the model's training scans
    measure: Measure
    threshold: float | None = None  # of masks that hold fractions

    @property
    def max_labels(self) -> int:
        """Number of distinct values from which a mask is taken for an image."""
        return MAX_LABELS if self.objects == "components" else MAX_OBJECTS

    def key_options(self, *, figures: bool) -> dict[str, Any]:
        """Return the settings on which a case's files depend, as JSON."""
        names = {str(value): name for value, name in self.label_names.items()}
        options = {"objects": self.objects, "label_names": names}
        options |= {"intensity_unit": self.intensity_unit, "figures": figures}
        options |= {} if self.threshold is None else {"threshold": self.threshold}
        return options | {"measure": self.measure.model_dump(mode="json")}


def measure_mask(case: Case, settings: MaskSettings) -> MeasuredCase:
    """Measure the lesions of a mask, the `reference` of the case."""
    started = time.monotonic()
    path = case.images["image"]
    assert case.reference is not None
    scan = read_volume(path, is_finite=False)
    mask = read_mask(
        case.reference, like=path, max_labels=settings.max_labels, threshold=settings.threshold
    )
    masked = MaskedScan(
        case_id=case.id,
        scan=scan,
        mask=mask,
        names=(str(path), str(case.reference)),
        label_names=settings.label_names or read_label_table(case.reference, path),
        notes=mask_notes(case.reference, path),
    )
    lesions, remarks = measure_masked(masked, settings)
    return MeasuredCase(
        path=path,
        lesions=lesions,
        seconds=time.monotonic() - started,
        sha256=(scan.sha256, mask.sha256),
        remarks=remarks,
    )


def most_labels(objects: str) -> int:
    """Return the most values of a mask: far more if each of them is an object."""
    return MAX_OBJECTS if objects == "labels" else MAX_LABELS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedScan:
    """A scan with its mask.

    Args:
        names: of scan and mask, for messages. label_names: value of the mask → name.
        notes: on how the mask was read, as `W_CODE: sentence`.
    """

    case_id: str
    scan: Volume
    mask: Volume
    names: tuple[str, str]
    label_names: Mapping[int, str]
    notes: Sequence[str] = ()


def measure_masked(masked: MaskedScan, settings: MaskSettings) -> tuple[MeasuredLesions, list[str]]:
    """Return the lesions of a mask, and remarks on unit and organ as `W_CODE: sentence`.

    Raises:
        VolsegError: the mask lies on another grid than its scan, or lacks a stated label.
    """
    scan = masked.scan
    grid_name, mask_name = masked.names
    placed = place_mask(masked.mask, scan.geometry, mask_name=mask_name, grid_name=grid_name)
    masked = replace(masked, mask=placed.mask)
    unit = judge_unit(scan, settings.intensity_unit, by=settings.stated_by)
    if settings.unit_doubt:
        unit = replace(unit, doubt=settings.unit_doubt)
    segmented = _segmented(masked, unit, settings)
    remarks = [*settings.remarks, *masked.notes, *placed.notes]
    if unit.doubt and not any(unit.doubt in text for text in remarks):
        remarks.insert(0, f"W_UNIT: {unit.doubt}")
    if segmented.organ_voxels and not segmented.lesions.labels:
        organ = settings.measure.organ
        remarks.append(f"{ORGAN}: no label but the organ, {organ}, so no lesion was measured")
    return measure_largest(segmented), remarks


def _segmented(masked: MaskedScan, unit: Unit, settings: MaskSettings) -> SegmentedScan:
    """Return what is measured: the lesions without the organ, and their names."""
    scan, (_, mask_name) = masked.scan, masked.names
    names = _Names(masked.label_names)
    array, organ_voxels, measure = masked.mask.array, None, settings.measure
    if measure.organ is not None:
        array, organ_voxels = remove_organ(array, _value_of(measure.organ, names, mask_name))
    node_values = {_value_of(label, names, mask_name) for label in measure.lymph_nodes}
    lesions = label_lesions(array, scan.geometry, objects=settings.objects)
    values = [value for value in dict.fromkeys(lesions.labels) if value in node_values]
    nodes = tuple(names[value] for value in values)
    return SegmentedScan(
        case_id=masked.case_id,
        image=scan,
        lesions=lesions,
        unit=unit,
        label_names=names,
        settings=measure.model_copy(update={"lymph_nodes": nodes}),
        organ_voxels=organ_voxels,
    )


def _value_of(label: str, names: Mapping[int, str], path: str) -> int:
    """Return the value of a label given as a name, `label_7` or `7`; never the background."""
    values = [value for value, name in names.items() if name == label]
    values = values or [label_value(label.removeprefix("label_")) or 0]
    if len(values) == 1 and values[0] > 0:
        return values[0]
    text = f"label {shorten(label)!r}"
    problem = f"has no {text}; it names {', '.join(names.values()) or 'none'}"
    if len(values) > 1:
        problem = f"{text} is the name of {len(values)} values"
    raise VolsegError(
        f"{path}: {problem}",
        fix="give the label's value, 1 or more, or name the values with --label-names",
        code="E_LABELS",
    )


@dataclass(frozen=True, slots=True)
class _Names(Mapping[int, str]):
    """Names of all mask values; a value without a stated name is called `label_<value>`."""

    stated: Mapping[int, str]

    def __getitem__(self, value: int) -> str:
        name = self.stated.get(value)
        return f"label_{value}" if name is None else name

    def __iter__(self) -> Iterator[int]:
        return iter(self.stated)

    def __len__(self) -> int:
        return len(self.stated)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int)


def refused_masks(
    cases: Iterable[tuple[Case, Measure]],
    n_cases: int,
    max_ram: int | None,
    announce: Callable[[str], None],
) -> dict[str, ScanError]:
    """Return errors of the cases that may exceed the memory budget; announce the peak of the rest.

    Args:
        cases: cases with their settings.
        n_cases: number of cases in the folder.
        max_ram: bytes; None for no limit.
    """
    budget = Budget(
        max_ram,
        announce,
        what="measuring this mask",
        otherwise="cut scan and mask to the region that matters",
    )
    plans: dict[str, Peak] = {}
    for case, settings in cases:
        assert case.reference is not None
        with contextlib.suppress(VolsegError):  # reading it raises the error later
            path = case.images["image"]
            scan, mask = read_header(path), read_mask_header(case.reference, path)
            plans[case.id] = plan_measuring(
                max(math.prod(header.geometry.shape) for header in (scan, mask)),
                scan.dtype.itemsize,
                mask.dtype.itemsize,
                settings,
                process=budget.process,
                n_cases=n_cases,
            )
    return budget.refused(plans)
