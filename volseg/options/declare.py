"""Declare each setting of a command once.

The signature of the Python function, the command line, docs/options.md and run.json derive from the
fields of one frozen class per command. Nothing heavy is imported here, since `volseg --help` needs
all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, dataclass_transform, overload

from volseg.errors import VolsegError

Progress = Callable[[str, float, str], None]  # stage, fraction of it that is done, detail
Announce = Callable[[str], None]
T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")
P = ParamSpec("P")
SETTING = "setting"
BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the command line and the documentation know about a field.

    Args:
        kind: type of its value on the command line; None derives it from the annotation.
        converter: makes the value from what a caller gives; its ValueError is a usage error.
        short: short spelling such as `-o`. flag: full spelling if the name does not give it.
        least, most: bounds, both allowed; below: a bound that is not. unit: of the number.
    """

    help: str
    kind: Any = None
    converter: Callable[[Any], Any] | None = None
    short: str = ""
    flag: str = ""
    least: float | None = None
    most: float | None = None
    below: float | None = None
    unit: str = ""
    is_argument: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the converted value.

        Raises:
            VolsegError: it cannot be converted or is out of bounds.
        """
        shown = name.upper() if self.is_argument else self.flag_of(name)
        try:
            value = value if self.converter is None else self.converter(value)
        except ValueError as error:
            problem, _, fix = str(error).partition("; ")
            raise VolsegError(f"{shown} {problem}", fix=fix, code="E_USAGE") from error
        if self.least is not None and value is not None:
            high = math.inf if self.most is None else self.most
            below = math.inf if self.below is None else self.below
            if not (self.least <= value <= high and value < below):
                rule = f"≥ {self.least:g}" if self.most is None else f"{self.least:g} to {high:g}"
                rule += "" if self.below is None else f" and < {below:g}"
                problem = f"{shown} must be {rule}{self.unit and ' '}{self.unit}, got {value}"
                raise VolsegError(problem, fix="give a number in that range", code="E_USAGE")
        return value

    def flag_of(self, name: str) -> str:
        """Return the full spelling of the option for a field of this name."""
        return self.flag.partition("/")[0] or "--" + name.replace("_", "-")


@overload
def option(
    help: str, *, default: S, converter: Callable[[S], T], short: str = ..., flag: str = ...
) -> T: ...
@overload
def option(help: str, *, converter: Callable[[S], T], short: str = ..., flag: str = ...) -> T: ...
@overload
def option(
    help: str,
    *,
    default: T,
    short: str = ...,
    flag: str = ...,
    kind: Any = ...,
    least: float | None = ...,
    most: float | None = ...,
    below: float | None = ...,
    unit: str = ...,
) -> T: ...
def option(help: str, *, default: Any = MISSING, **facts: Any) -> Any:
    """Declare an option: a keyword of the function, `--name` on the command line."""
    return dataclasses.field(default=default, metadata={SETTING: Setting(help=help, **facts)})


@overload
def argument(
    help: str, *, default: S, converter: Callable[[S], T], kw_only: Literal[False] = False
) -> T: ...
@overload
def argument(help: str, *, converter: Callable[[S], T], kw_only: Literal[False] = False) -> T: ...
def argument(
    help: str, *, default: Any = MISSING, converter: Any, kw_only: Literal[False] = False
) -> Any:
    """Declare a positional argument of the function and of the command line."""
    setting = Setting(help=help, converter=converter, is_argument=True)
    return dataclasses.field(default=default, kw_only=kw_only, metadata={SETTING: setting})


def callback(*, default: T) -> T:
    """Declare a callback of the function, which the command line supplies itself."""
    return dataclasses.field(default=default)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(option, argument, callback)
)
def options(cls: type[T]) -> type[T]:
    """Make a frozen class of settings, which converts and checks them when it is made."""
    return dataclass(frozen=True, kw_only=True)(cls)


class Options:
    """Settings of one call of a command."""

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)):
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))

    def stated(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, as JSON."""
        settings = dict(settings_of(type(self)))
        fields = [field for field in dataclasses.fields(self) if field.name in settings]  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {
            field.name: _as_json(values[field.name])
            for field in fields
            if field.default is MISSING
            or values[field.name] != settings[field.name].check(field.name, field.default)
        }


def settings_of(cls: type[Any]) -> Iterator[tuple[str, Setting]]:
    """Yield name and setting of each field: those of the command first, then shared ones."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
    for name in dict.fromkeys(names):
        if name in fields and SETTING in fields[name].metadata:
            yield name, fields[name].metadata[SETTING]


def command(settings: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Make a function of settings one that takes them as arguments, with their documentation."""

    def decorate(function: Callable[[T], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(settings(*args, **kwargs))

        call.__signature__ = _signature(settings)  # type: ignore[attr-defined]
        call.__doc__ = documentation(settings)  # type: ignore[arg-type]
        call.__options__ = settings  # type: ignore[attr-defined]
        return call

    return decorate


def _signature(cls: Any) -> inspect.Signature:
    """Return the signature of a command, with the shared settings last."""
    parameters = inspect.signature(cls).parameters
    names = [name for name, _ in settings_of(cls)]
    order = [*names, *(name for name in parameters if name not in names)]
    return inspect.Signature([parameters[name] for name in order])


def documentation(cls: type[Any]) -> str:
    """Return the documentation of a command: what it does, and each argument."""
    lines = [f"    {name}: {setting.help}" for name, setting in settings_of(cls)]
    return "\n".join([inspect.getdoc(cls) or "", "", "Args:", *lines])


def path(value: Path | str) -> Path:
    return Path(value)


def optional_path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


def paths(value: Path | str | Sequence[Path | str]) -> tuple[Path, ...]:
    """Return one or several paths as a tuple."""
    given = [value] if isinstance(value, Path | str) else value
    return tuple(map(Path, given))


def names(value: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(value or ())


def listed_names(value: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return names, from a sequence or text such as `0,1,all`."""
    if value is None:
        return None
    return tuple(value.split(",") if isinstance(value, str) else value)


def amount(value: int | str | None) -> int | None:
    """Return bytes of memory, from a number or text such as `4G` or `500M`.

    >>> amount("1.5G"), amount(None)
    (1610612736, None)
    """
    if value is None:
        return value
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)B?", str(value).strip().upper())
    n_bytes = 0 if match is None else round(float(match[1]) * BYTES.get(match[2], 1))
    if not 0 < n_bytes < 2**62:
        raise ValueError(f"must be an amount of memory, got {value!r}; write it as 4G or 500M")
    return n_bytes


def seconds(value: float | str | None) -> float | None:
    """Return seconds, from a number or text such as `90s`, `20m` or `1.5h`.

    >>> seconds("1.5h")
    5400.0
    """
    if value is None:
        return value
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,15})?)\s*([smh]?)", str(value).strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"must be a duration over 0, got {value!r}; write it as 90s, 20m or 1.5h")
    return float(match[1]) * SECONDS[match[2]]


def ignore_progress(stage: str, fraction: float, detail: str) -> None:
    """Ignore progress: the default callback."""


def ignore_text(text: str) -> None:
    """Ignore an announcement: the default callback."""


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value if isinstance(value, Path) else getattr(value, "name", value))
