"""Write docs/api.md from the docstrings of the package; a test compares the two."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import volseg
from volseg import commands, reports

HEAD = """# Python

Generated from the docstrings by `make docs`; every example is run by the tests. The arguments of a
command mean the same as its options in [options.md](options.md), and the columns of all tables are
in [columns.md](columns.md). Two notebooks show them at work:
[measure and compare](measure_and_compare.ipynb), and [train and infer](train_and_infer.ipynb).

Arrays are (I, J, K) and affines map voxel index → RAS mm, as in nibabel. An image of SimpleITK
(LPS, arrays in the order K, J, I) and a MetaTensor of MONAI (with a channel axis) are converted on
the way in, and by `result.like_input()` on the way out.
"""
GROUPS = {
    "Scans in memory": ("segment", "measure_mask", "load_model"),
    "Commands": (
        "infer", "explain", "measure", "evaluate", "compare", "report", "methods", "cases", "check",
        "plan", "preprocess", "train", "pretrain", "quantise", "candidates", "attach",
        "import_nnunet",
    ),
    "Files": ("read_table", "read_volume", "read_mask", "write_volume"),
}  # fmt: skip
TYPES = {
    "Results in memory": (commands.SegmentResult, commands.MaskResult, commands.LoadedModel),
    "Results of commands": (
        reports.CasesReport, reports.ExplainReport, reports.EvaluateReport, reports.CompareReport,
        reports.TrainReport,
        reports.PlanReport, reports.PreprocessReport, reports.QuantiseReport,
        reports.ImportReport, reports.ListingReport, reports.PagesReport,
        reports.MethodsReport,
    ),
    "Values": (volseg.Volume, volseg.Geometry, volseg.VolsegError),
}  # fmt: skip
SECTION = re.compile(r"^(Args|Returns|Raises|Example|Yields|Memory|Source):(.*)$")


def api_page() -> str:
    """Return the page: a section per function and per type of result."""
    parts = [HEAD]
    for group, names in GROUPS.items():
        parts += [f"## {group}\n", *(_function(getattr(volseg, name), name) for name in names)]
    for group, types in TYPES.items():
        parts += [f"## {group}\n", *(_type(kind) for kind in types)]
    return "\n".join(parts)


def _function(function: Any, name: str) -> str:
    lines = [f"### volseg.{name}", "", "```py", _signature(function, name), "```", ""]
    return "\n".join([*lines, *_markdown(inspect.getdoc(function) or ""), ""])


def _signature(function: Any, name: str) -> str:
    """Return the call with an argument per line, if there are several."""
    signature, parameters = inspect.signature(function), []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(_parameter(parameter))
    inside = ", ".join(parameters)
    if len(inside) > 60:
        inside = "".join(f"\n    {parameter}," for parameter in parameters) + "\n"
    return f"{name}({inside}) -> {_plain(signature.return_annotation)}"


def _parameter(parameter: inspect.Parameter) -> str:
    text, default = parameter.name, parameter.default
    if parameter.annotation is not parameter.empty:
        text += f": {_plain(parameter.annotation)}"
    if default is parameter.empty:
        return text
    shown = default.__name__ if inspect.isfunction(default) else repr(default)
    return f"{text} = {shown}" if ":" in text else f"{text}={shown}"


def _plain(annotation: Any) -> str:
    """Return an annotation without modules."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return re.sub(r"\b(?:[a-z_]+\.)+(\w+)", r"\1", text or str(annotation))


def _markdown(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring with its sections as lists and its example as a block."""
    section, example = "", []
    for line in docstring.splitlines():
        heading = SECTION.match(line)
        if heading:
            section = heading[1]
            yield from () if section == "Example" else (f"**{section}**{heading[2]}", "")
        elif section == "Example":
            example.append(line.removeprefix("    "))
        elif section and re.match(r"    \S", line):
            name, colon, text = line.strip().partition(":")
            yield f"- `{name}`:{text}" if colon and section == "Args" else f"- {line.strip()}"
        else:
            yield line.strip() if not section else f"  {line.strip()}".rstrip()
    if example:
        yield from ("```pycon", *"\n".join(example).strip().splitlines(), "```")


def _type(kind: type) -> str:
    lines = [f"### {kind.__name__}", "", *_markdown(inspect.getdoc(kind) or ""), ""]
    members = [item for item in map(_member, *_members(kind)) if item]
    if members:
        lines += ["| | |", "|---|---|", *members, ""]
    return "\n".join(lines)


def _members(kind: type) -> tuple[list[str], list[Any]]:
    """Return names and values of what a type and its bases in volseg define."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("volseg")]
    members: dict[str, Any] = {}
    for base in bases:
        for name, value in vars(base).items():
            if not name.startswith("_") or name == "__call__":
                members.setdefault(name, value)
    return list(members), list(members.values())


def _member(name: str, value: Any) -> str:
    """Return the row of a property or method with a docstring; empty for anything else."""
    if isinstance(value, classmethod | staticmethod) or not (
        isinstance(value, property) or inspect.isfunction(value)
    ):
        return ""
    text = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    if not text:
        return ""
    if isinstance(value, property):
        return f"| `{name}` | {text} |"
    parameters = list(inspect.signature(value).parameters.values())[1:]
    inside = ", ".join(map(_parameter, parameters)).replace("|", "\\|")
    shown = "" if name == "__call__" else f".{name}"
    return f"| `{shown}({inside})` | {text} |"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(api_page(), encoding="utf-8")
