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
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, dataclass_transform, overload

from volseg.errors import VolsegError, missing_path
from volseg.inputs import MAX_SPACING_MM, MIN_SPACING_MM, shorten

Progress = Callable[[str, float, str], None]  # stage, fraction of it that is done, detail
Announce = Callable[[str], None]
T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")
P = ParamSpec("P")
SETTING, CALLBACK = "setting", "callback"  # keys in the metadata of a field
BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
AMOUNT = re.compile(r"(.{1,30}?)\s*([KMGT]?)B?")
DURATION = re.compile(r"(.{1,30}?)\s*([SMH]?)")
SECONDS = {"": 1, "S": 1, "M": 60, "H": 3600}
# annotation of a field without a converter → types of its values, and what they are called
KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a number"),
    "float": ((int, float), "a number"),
    "str": (str, "text"),
    "bool": (bool, "True or False"),
}
NOT_A_PATH = "give a path; volseg.segment and volseg.measure_mask take scans in memory"


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers of a setting: from `least` to `most`, which may be infinite, but `below`."""

    least: float
    most: float = math.inf
    below: float = math.inf
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value < self.below

    def __str__(self) -> str:
        rule = f"≥ {self.least:g}" if self.most == math.inf else f"{self.least} to {self.most}"
        rule += "" if self.below == math.inf else f" and < {self.below:g}"
        finite = " and finite" if self.most == self.below == math.inf else ""
        return f"{rule}{self.unit and ' '}{self.unit}{finite}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the command line and the documentation know about a field.

    Args:
        kind: type of its value on the command line; None derives it from the annotation.
        converter: makes the value from what a caller gives, or raises ValueError(problem, fix).
        short: short spelling such as `-o`. flag: full spelling if the name does not give it.
        values: those that are allowed; empty: all.
    """

    help: str
    kind: Any = None
    converter: Callable[[Any], Any] | None = None
    short: str = ""
    flag: str = ""
    values: Range | tuple[str, ...] = ()
    is_argument: bool = False

    def check(self, name: str, annotation: str, value: Any) -> Any:
        """Return the converted value of a field with this annotation.

        Raises:
            VolsegError: it cannot be converted or is not allowed.
        """
        shown = name.upper() if self.is_argument else self.flag_of(name)
        try:
            value = self._converted(annotation, _plain(value))
        except (TypeError, ValueError) as error:
            problem, fix = (
                error.args if len(error.args) == 2 else (f"cannot be {_shown(value)}", self.help)
            )
            raise VolsegError(f"{shown} {problem}", fix=fix, code="E_USAGE") from error
        if self.values and value is not None and value not in self.values:
            rule, fix = str(self.values), "give a number in that range"
            if isinstance(self.values, tuple):
                *others, last = self.values
                rule, fix = f"{', '.join(others)} or {last}", "give one of them"
            raise VolsegError(f"{shown} must be {rule}, got {value!r}", fix=fix, code="E_USAGE")
        return value

    def _converted(self, annotation: str, value: Any) -> Any:
        if self.converter is not None:
            return self.converter(value)
        if value is None and annotation.endswith("None"):
            return value
        kinds, what = KINDS.get(annotation.removesuffix(" | None"), (object, ""))
        is_bool = isinstance(value, bool) and kinds not in (bool, object)
        if is_bool or not isinstance(value, kinds):
            raise ValueError(f"must be {what}, got {_shown(value)}", f"give {what}")
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
    values: Range | tuple[str, ...] = ...,
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


def callback(help: str, *, default: T) -> T:
    """Declare an argument of the function that the command line supplies itself."""
    return dataclasses.field(default=default, metadata={CALLBACK: help})


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(option, argument, callback)
)
def options(cls: type[T]) -> type[T]:
    """Make a frozen class of settings, which converts and checks them when it is made."""
    return dataclass(frozen=True, kw_only=True)(cls)


class Options:
    """Settings of one call of a command."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        for name, setting in settings_of(type(self)):
            value = setting.check(name, str(types[name]), getattr(self, name))
            object.__setattr__(self, name, value)
        for field in dataclasses.fields(cls):
            value = getattr(self, field.name)
            if CALLBACK in field.metadata and callable(field.default) and not callable(value):
                problem = f"{field.name} must be a function, got {_shown(value)}"
                raise VolsegError(problem, fix=field.metadata[CALLBACK], code="E_USAGE")

    def refuse_missing_inputs(self) -> None:
        """Check that the files and folders to read exist, before anything is loaded.

        Raises:
            VolsegError: one does not (`E_MISSING`).
        """
        for name, setting in settings_of(type(self)):
            if setting.converter in INPUT_CONVERTERS:
                value = getattr(self, name)
                for given in value if isinstance(value, tuple) else (value,):
                    if given is not None and not _exists(given):
                        raise missing_path(given)

    def refuse_stated(self, names: Iterable[str], reason: str) -> None:
        """Refuse options that a request cannot honour, if they differ from their defaults.

        Raises:
            VolsegError: one does; `reason` follows its spelling in the message.
        """
        settings, stated = dict(settings_of(type(self))), self.stated()
        flags = [settings[name].flag_of(name) for name in names if name in stated]
        if flags:
            raise VolsegError(
                f"{', '.join(flags)}: {reason}",
                fix="leave it out" if len(flags) == 1 else "leave them out",
                code="E_USAGE",
            )

    def stated(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, as JSON."""
        settings = dict(settings_of(type(self)))
        cls: Any = type(self)
        fields = [field for field in dataclasses.fields(cls) if field.name in settings]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {
            field.name: _as_json(values[field.name])
            for field in fields
            if field.default is MISSING
            or values[field.name]
            != settings[field.name].check(field.name, str(field.type), field.default)
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
        returned = inspect.get_annotations(function).get("return", inspect.Signature.empty)
        signature = _signature(settings, returned)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                hint = _spelling_of(kwargs.keys() - signature.parameters.keys(), settings)
                raise TypeError(f"{call.__name__}() {error}{hint}") from None
            options: Any = settings(*args, **kwargs)
            options.refuse_missing_inputs()
            return function(options)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {
            name: parameter.annotation for name, parameter in signature.parameters.items()
        } | {"return": returned}
        call.__doc__ = documentation(settings, inspect.getdoc(function) or "")
        return call

    return decorate


def _spelling_of(unknown: Iterable[str], cls: Any) -> str:
    """Return a hint for an argument that is spelled as on the command line, such as `unit`."""
    spellings = {setting.flag_of(name): name for name, setting in settings_of(cls)}
    for name in unknown:
        if field := spellings.get("--" + name.replace("_", "-")):
            return f"; did you mean {field!r}?"
    return ""


def _signature(cls: Any, returned: Any) -> inspect.Signature:
    """Return the signature of a command, with the shared settings last and the types it accepts."""
    parameters = dict(inspect.signature(cls).parameters)
    for name, setting in settings_of(cls):
        if setting.converter is not None:
            (accepted,) = list(inspect.signature(setting.converter).parameters.values())
            parameters[name] = parameters[name].replace(annotation=accepted.annotation)
    names = [name for name, _ in settings_of(cls)]
    order = [*names, *(name for name in parameters if name not in names)]
    return inspect.Signature([parameters[name] for name in order], return_annotation=returned)


def documentation(cls: Any, of_function: str) -> str:
    """Return the documentation of a command: what it does, its arguments, what it raises."""
    lines = [f"    {name}: {setting.help}" for name, setting in settings_of(cls)]
    for field in dataclasses.fields(cls):
        if CALLBACK in field.metadata:
            lines.append(f"    {field.name}: {field.metadata[CALLBACK]}")
    sections = re.split(r"\n(?=(?:Raises|Example):\n)", of_function)[1:]
    tail = [line for section in sections for line in ("", section.rstrip())]
    return "\n".join([inspect.getdoc(cls) or "", "", "Args:", *lines, *tail])


def path(value: PathLike[str] | str) -> Path:
    """Return a path.

    Raises:
        ValueError: the value is of another type, such as an image in memory.
    """
    if isinstance(value, str | PathLike):
        return Path(value)
    raise ValueError(f"must be a path, got {_shown(value)}", NOT_A_PATH)


def _shown(value: Any) -> str:
    """Return a value on one short line: that of a library by its type."""
    kind = type(value)
    if kind.__module__ == "builtins":
        return shorten(repr(value))
    return f"a {kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def optional_path(value: PathLike[str] | str | None) -> Path | None:
    return None if value is None else path(value)


def paths(value: PathLike[str] | str | Sequence[PathLike[str] | str]) -> tuple[Path, ...]:
    """Return one or several paths as a tuple."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str | PathLike | Mapping)
    is_list &= not hasattr(value, "shape")  # an image in memory
    return tuple(map(path, value)) if is_list else (path(value),)  # type: ignore[arg-type]


def input_path(value: PathLike[str] | str) -> Path:
    """Return a path; a command that is called with it refuses to start if nothing is there."""
    return path(value)


def optional_input_path(value: PathLike[str] | str | None) -> Path | None:
    return None if value is None else input_path(value)


def input_paths(value: PathLike[str] | str | Sequence[PathLike[str] | str]) -> tuple[Path, ...]:
    """Return one or several such paths as a tuple."""
    return tuple(map(input_path, paths(value)))


def more_input_paths(
    value: PathLike[str] | str | Sequence[PathLike[str] | str] | None,
) -> tuple[Path, ...]:
    """Return any number of such paths as a tuple."""
    return () if value is None or value == () else input_paths(value)


def _exists(given: Path) -> bool:
    """Check whether a path is there, or the file of which it names a part, as in `RS.dcm#GTV`."""
    return os.path.exists(given) or os.path.isfile(str(given).rpartition("#")[0])


INPUT_CONVERTERS = (input_path, optional_input_path, input_paths, more_input_paths)


def names(value: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return one or several names as a tuple."""
    return optional_names(value) or ()


def optional_names(value: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return one or several names as a tuple; None stays None, which differs from no names."""
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def optional_label(value: int | str | None) -> str | None:
    """Return a label, given by its name or value, as text."""
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise ValueError(f"must be a label, got {_shown(value)}", "give its name or value")


def listed_names(value: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return names, from a sequence or text such as `0,1,all`."""
    return optional_names(value.split(",") if isinstance(value, str) else value)


def label_pairs(value: Mapping[int, int] | Sequence[str] | str | None) -> tuple[str, ...]:
    """Return pairs of label values such as `255=1` as a tuple.

    >>> label_pairs({255: 1}), label_pairs("4=3")
    (('255=1',), ('4=3',))
    """
    if isinstance(value, Mapping):
        value = [f"{old}={new}" for old, new in value.items()]
    pairs = optional_names(value) or ()
    for pair in pairs:
        if not re.fullmatch(r"[0-9]{1,9}=[0-9]{1,9}", pair):
            raise ValueError(f"must be two label values, got {pair!r}", "write it as 255=1")
    if len({pair.partition("=")[0] for pair in pairs}) < len(pairs):
        raise ValueError(f"gives a value twice: {', '.join(pairs)}", "give each value once")
    return pairs


def amount(value: float | str | None) -> int | None:
    """Return bytes of memory, from a number or text such as `4G` or `500M`.

    >>> amount("1.5G"), amount(None)
    (1610612736, None)
    """
    if value is None:
        return value
    n_bytes = _scaled(value, AMOUNT, BYTES)
    if not 1024 <= n_bytes < 2**62:  # 4 is hardly meant as 4 bytes
        raise ValueError(f"must be an amount of memory, got {value!r}", "write it as 4G or 500M")
    return round(n_bytes)


def voxel_spacing(value: Sequence[float] | str | None) -> tuple[float, float, float] | None:
    """Return three lengths in mm, from numbers or text such as `0.8,0.8,2.5`.

    >>> voxel_spacing("0.8,0.8,2.5"), voxel_spacing(None)
    ((0.8, 0.8, 2.5), None)
    """
    if value is None:
        return value
    try:
        parts = value.split(",") if isinstance(value, str) else list(value)
        i, j, k = (float(part) for part in parts)
    except (TypeError, ValueError):
        i = j = k = math.nan
    if not all(MIN_SPACING_MM <= mm <= MAX_SPACING_MM for mm in (i, j, k)):
        limits = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm"
        problem = f"must be three lengths of {limits}, got {_shown(value)}"
        raise ValueError(problem, "write them as I,J,K, such as 0.8,0.8,2.5")
    return i, j, k


def seconds(value: float | str | None) -> float | None:
    """Return seconds, from a number or text such as `90s`, `20m` or `1.5h`.

    >>> seconds("1.5h")
    5400.0
    """
    if value is None:
        return value
    n_seconds = _scaled(value, DURATION, SECONDS)
    if not 0 < n_seconds < math.inf:
        problem = f"must be a duration over 0, got {value!r}"
        raise ValueError(problem, "write it as 90s, 20m or 1.5h")
    return n_seconds


def _scaled(value: float | str, pattern: re.Pattern[str], units: Mapping[str, float]) -> float:
    """Return a number, or text of a number and a unit, times that unit; NaN for other text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = pattern.fullmatch(str(value).strip().upper())
    try:
        return math.nan if match is None else float(match[1]) * units[match[2]]
    except ValueError:
        return math.nan


def ignore_progress(stage: str, fraction: float, detail: str) -> None:
    """Ignore progress: the default callback."""


def ignore_text(text: str) -> None:
    """Ignore an announcement: the default callback."""


def _plain(value: Any) -> Any:
    """Return a Python number for a scalar of an array library."""
    is_scalar = getattr(value, "shape", None) == () and callable(getattr(value, "item", None))
    return value.item() if is_scalar else value


def _as_json(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value if isinstance(value, Path) else getattr(value, "name", value))
