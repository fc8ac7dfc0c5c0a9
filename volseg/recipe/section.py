"""What the sections of a recipe share: frozen models, and numbers within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from volseg.inputs import MAX_NAME, shorten
from volseg.words import format_sizes

AUTO = "auto"
Auto = Literal["auto"]
Triple = tuple[float, float, float]
IntTriple = tuple[int, int, int]
MAX_PATCH_VOXELS = 2**28  # 645 along each axis
MAX_SETTINGS = 1000  # most values under a name, such as [network]

# The bounds lie far beyond sensible values, but within what arrays, float32 and a day of work can
# hold: a recipe may come from a stranger.
Positive = Annotated[float, Field(gt=0, le=1e39)]
PositiveInt = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e39, le=1e39)]  # float32 ends at 3.4e38
StandardDeviation = Annotated[float, Field(ge=1e-12, le=1e39)]  # of intensities; a divisor
SpacingMm = Annotated[float, Field(ge=0.01, le=100)]  # the limits for scans, too
Factor = Annotated[float, Field(ge=0.01, le=100)]
Degrees = Annotated[int, Field(ge=0, le=360)]
Millimetres = Annotated[float, Field(ge=0, le=10_000)]
Edge = Annotated[int, Field(ge=1, le=4096)]  # voxels of a patch along one axis
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Repeats = Annotated[int, Field(ge=1, le=1_000_000)]
LabelValue = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # `Data` checks the range of labels
Name = Annotated[str, Field(max_length=MAX_NAME)]
Text = Annotated[str, Field(max_length=20_000)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(Section):
    """A section that names a file or a row of a table, to which all other keys are passed."""

    model_config = ConfigDict(extra="allow")
    largest: ClassVar[float]  # number allowed in it

    @model_validator(mode="after")
    def _settings_are_plain(self) -> Self:
        refuse(oversized(self.settings, self.largest))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


T = TypeVar("T")


def closed(value: T | Auto) -> T:
    """Return a value that a plan has filled in, or the recipe stated."""
    assert value != AUTO, "only a closed recipe can be used"
    return cast(T, value)


def refuse_empty_window(low: float | Auto, high: float | Auto) -> None:
    """Raise a ValueError if both ends of a window are stated, and leave nothing between them."""
    if isinstance(low, float) and isinstance(high, float) and low >= high:
        raise ValueError(
            f"the window from {low:g} to {high:g} is empty: low must be less than high"
        )


def join(names: Iterable[str | None]) -> str:
    return ", ".join(sorted(map(str, names)))


def refuse(mistakes: Iterable[str]) -> None:
    """Raise one ValueError with all mistakes, one per line, if there are any."""
    lines = list(mistakes)
    if lines:
        raise ValueError("\n".join(lines))


def open_keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys whose value is "auto"."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from open_keys(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value == AUTO:
            yield f"{prefix}{key}"


def oversized_patch(shape: tuple[int, int, int]) -> Iterator[str]:
    """Yield a mistake if a patch has more voxels than any machine can hold."""
    n, edges = math.prod(shape), format_sizes(shape)
    if n > MAX_PATCH_VOXELS:
        yield f"a patch of {edges} has {n:,} voxels, more than {MAX_PATCH_VOXELS:,}"


def oversized(settings: dict[str, Any], largest: float) -> Iterator[str]:
    """Yield mistakes for numbers that are too large, and for too many values.

    The names and types of these settings are only checked later.
    """
    values: list[Any] = list(settings.values())
    count = 0
    while values and count <= MAX_SETTINGS:
        value = values.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int | float) and not abs(value) <= largest:
            yield f"holds {shorten(str(value))}; the largest number is {largest:g}"
    if values:
        yield f"holds more than {MAX_SETTINGS} values"
