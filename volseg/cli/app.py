"""The command line, derived from the settings that each command declares."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from volseg import __version__
from volseg.cli.announcer import Announcer
from volseg.cli.progress import progress_on_stderr
from volseg.cli.show import (
    announce,
    print_json,
    show,
    show_checks,
    show_columns,
    show_files,
    show_problems,
)
from volseg.errors import VolsegError, severity_of
from volseg.execution.time_budget import process_age
from volseg.options import COMMANDS
from volseg.options.declare import (
    MISSING,
    Range,
    Setting,
    amount,
    listed_names,
    seconds,
    settings_of,
    voxel_spacing,
)
from volseg.reports import RunReport
from volseg.terminal import one_line, printing, problem_of

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
# What the parser raises; typer has no public name for it, and brings its own copy of click.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
JSON = typer.Option("--json", help="Print one JSON object on stdout instead of text.")
# annotation of a field, without None → type on the command line
KINDS: Mapping[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Path": Path,
    "tuple[Path, ...]": list[Path],
    "tuple[str, ...]": list[str],
    "tuple[float, float, float]": str,
}
AS_TEXT = (
    amount,
    seconds,
    listed_names,
    voxel_spacing,
)  # converters of text such as 4G, 20m or 0,1


def main() -> None:
    """Run the command that `sys.argv` names."""
    try:
        with printing():
            _run()
    except VolsegError as error:  # from stdout itself
        _fail(error)


def _run() -> None:
    """Run the command; report an error in one line and exit with its code."""
    try:
        sys.exit(app(standalone_mode=False))
    except VolsegError as error:
        _fail(error)
    except UsageError as error:
        _fail(_misuse(error))
    except (OSError, MemoryError) as error:
        _fail(problem_of(error))


def _misuse(error: Any) -> VolsegError:
    """Return a mistake in the command line in the words of every other refusal."""
    command = error.ctx.command_path if error.ctx else "volseg"
    text = " ".join(error.format_message().split()).rstrip(".")
    return VolsegError(
        f"{command}: {text[:1].lower()}{text[1:]}",
        fix=f"see `{command} --help`",
        code="E_USAGE",
    )


def _fail(error: VolsegError) -> None:
    with suppress(OSError):  # stderr may be full too
        typer.echo(one_line(f"error: {error.code}: {error}"), err=True)
    sys.exit(error.exit_code)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def volseg(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Segment and measure lesions in CT, MR and PET scans; classify medical images.

    Start with `volseg infer scan.nii.gz`, which uses the model that ships with volseg, or train
    your own with `volseg train DATASET --out MODEL`. `volseg COMMAND --help` explains a command.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _typer_function(name: str, settings: type[Any]) -> Callable[..., None]:
    """Return a function that typer reads as the command with these settings."""
    takes = {field.name for field in fields(settings)}

    def call(**values: Any) -> None:
        as_json = values.pop("as_json")
        announcer = Announcer()
        with progress_on_stderr("Starting" if name == "train" else "") as progress:
            from volseg import commands  # takes seconds, so `progress` must already be running

            given: dict[str, Any] = {"progress": progress, "announce": announcer}
            given["spent_seconds"] = process_age()
            values |= {key: value for key, value in given.items() if key in takes}
            report = getattr(commands, name)(**values)
        if report.is_silent:
            return
        announcer.finish(report)
        _finish(report, as_json)

    parameters = [_parameter(settings, *named) for named in settings_of(settings)]
    parameters.append(_keyword("as_json", Annotated[bool, JSON], False))
    call.__name__, call.__doc__ = name, inspect.getdoc(settings)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(settings: type[Any], name: str, setting: Setting) -> inspect.Parameter:
    """Return the parameter from which typer makes an argument or an option."""
    (field,) = (field for field in fields(settings) if field.name == name)
    kind = setting.kind or KINDS[str(field.type).removesuffix(" | None")]
    if setting.converter in AS_TEXT:
        kind = str
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if default in (None, ()):
        kind, default = kind | None, None
    if setting.is_argument:
        return _keyword(name, Annotated[kind, typer.Argument(help=setting.help)], default)
    flags = filter(None, (setting.flag or setting.flag_of(name), setting.short))
    least = most = None
    # Only whole numbers: for others typer's message of several lines would hide our own.
    if isinstance(setting.values, Range) and kind in (int, int | None):
        least, most = setting.values.least, setting.values.most
    option = typer.Option(*flags, help=setting.help, min=least, max=most)
    return _keyword(name, Annotated[kind, option], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _finish(report: RunReport, as_json: bool) -> None:
    """Print the report, and exit with its exit code."""
    if as_json:
        print_json(report.as_json())
    else:
        show(report)
    if report.remark:
        announce(report.remark)
    raise typer.Exit(report.exit_code)


for _name, _settings in COMMANDS.items():
    app.command(_name.replace("_", "-"))(_typer_function(_name, _settings))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Dataset, scan, recipe or model folder.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Also check that the dataset has the channels and label values of this recipe."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Also judge the quality of scans: folder for quality.csv (facts and flags of each "
            "scan), quality.png (their middle slices) and quality.html (both on a page). It is "
            "created if missing.",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            help="Voxel spacing I,J,K in mm of NPY and NPZ arrays, TIFF files and folders of "
            "pictures, which state none."
        ),
    ] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """List all problems of a dataset, scan, recipe or model.

    Each problem comes with its fix. With --out, scans are also searched for missing slices, cut
    fields of view, wrong HU, duplicates and so on. The exit code is 0 if it can be used, 2 if
    something must be fixed.
    """
    with progress_on_stderr() as progress:
        from volseg import commands

        problems = commands.check(path, recipe, out=out, spacing=spacing, progress=progress)
    is_wrong = any(severity_of(problem["code"]) == "error" for problem in problems)
    if as_json:
        place = {} if out is None else {"out": str(out)}
        print_json({"path": str(path), "problems": problems} | place)
    else:
        show_problems(path, problems)
        if out is not None:
            show_files(out, ("quality.csv", "quality.png", "quality.html"))
    raise typer.Exit(2 if is_wrong else 0)


@app.command()
def columns(as_json: Annotated[bool, JSON] = False) -> None:
    """List every column of the tables that volseg writes.

    Each column has a unit, a meaning and, if it is not volseg's own, the source of its definition.
    """
    from volseg import commands

    tables = commands.table_columns()
    if not as_json:
        show_columns(tables)
        return
    keys = ("name", "unit", "meaning", "source")
    print_json({name: [dict(zip(keys, line)) for line in lines] for name, lines in tables.items()})


@app.command()
def selftest(as_json: Annotated[bool, JSON] = False) -> None:
    """Check measurements against objects of known size.

    These are the IBSI digital phantom, balls, rods and a calcified plaque. The exit code is 0 if
    every number is within its tolerance, else 1: then do not trust the measurements of this
    installation.
    """
    from volseg import commands

    checks = commands.selftest()
    n_failed = sum(not check.is_passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.is_passed} for check in checks]
        print_json({"failed": n_failed, "checks": rows})
    else:
        show_checks(checks)
    raise typer.Exit(1 if n_failed else 0)
