"""The section [data]: the images of a case and the meaning of the mask's values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from volseg.recipe.section import LabelValue, Name, Section, refuse
from volseg.recipe.units import IntensityUnit

MOST_LABELS = 254  # 255 marks unannotated voxels


class Data(Section):
    """The images of a case and the meaning of the mask's values."""

    channels: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]
    # name = value in the mask; any other value but 0 is an error
    labels: Annotated[dict[Name, LabelValue], Field(min_length=1, max_length=1000)]
    intensity_unit: IntensityUnit  # of the first channel, on which lesions are measured
    # Guessed from the training scans: then no density, mass or calcium score is computed.
    unit_guessed: bool = False
    # Overlapping regions: the mask value of each output channel, written where its sigmoid is over
    # 0.5; later channels overwrite earlier ones. None: channel 0 is the background, the labels
    # follow, and the largest logit wins.
    regions_class_order: Annotated[tuple[LabelValue, ...], Field(max_length=1000)] | None = None
    # To train such regions: name = the mask values it consists of, one entry per output channel.
    regions: Annotated[dict[Name, tuple[LabelValue, ...]], Field(max_length=1000)] | None = None
    # Mask value of unannotated voxels, which are neither trained on nor evaluated.
    ignore: LabelValue | None = None
    # Channels on different grids are an error, or are resampled to the grid of the first by world
    # coordinates; `rigid` also registers them, for patients who moved between the scans.
    grids: Literal["same", "first"] = "same"
    align: Literal["none", "rigid"] = "none"
    # A missing channel is an error, or is 0 after normalisation (`empty`); the first is required.
    missing: Literal["error", "empty"] = "error"

    @model_validator(mode="after")
    def _labels_are_distinct_and_not_background(self) -> Data:
        refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        yield from self._wrong_labels()
        if self.align != "none" and self.grids == "same":
            yield 'align = "rigid" needs grids = "first"'
        yield from self._wrong_regions()

    def _wrong_labels(self) -> Iterator[str]:
        values = list(self.labels.values())
        if len(set(values)) < len(values):
            yield "two labels share one value"
        if min(values) < 1 or max(values) > 65535:
            yield (
                "label values must be whole numbers from 1 to 65535 (0 is the background), "
                f"got {min(values)} to {max(values)}"
            )
        if self.ignore is not None and self.ignore in (0, *values):
            yield f"ignore = {self.ignore} is also the background or a label: use another value"
        if len(values) > MOST_LABELS:
            yield f"{len(values)} labels exceed the {MOST_LABELS} that a prepared mask can hold"

    def _wrong_regions(self) -> Iterator[str]:
        values, order = list(self.labels.values()), self.regions_class_order
        if order is not None and sorted(order) != sorted(values):
            yield "regions_class_order must hold the value of each label once"
        if self.regions is None:
            return
        if order is None or len(order) != len(self.regions):
            yield "regions need regions_class_order, with one mask value per region"
        used = {value for region in self.regions.values() for value in region}
        if used - set(values) or not all(self.regions.values()):
            yield "every region must consist of the values of one or more labels"

    @property
    def label_names(self) -> dict[int, str]:
        """Label names by ascending mask value, like output channels 1, 2, … without regions."""
        by_value = sorted(self.labels.items(), key=lambda item: item[1])
        return {value: name for name, value in by_value}

    @property
    def region_classes(self) -> tuple[tuple[int, ...], ...] | None:
        """Classes (1 = smallest mask value, …) of each output channel; None without regions."""
        if self.regions is None:
            return None
        index = {value: number for number, value in enumerate(self.label_names, start=1)}
        return tuple(
            tuple(sorted(index[value] for value in values)) for values in self.regions.values()
        )

    @property
    def n_outputs(self) -> int:
        """Number of output channels: one per region, or the background and each label."""
        order = self.regions_class_order
        return 1 + len(self.labels) if order is None else len(order)
