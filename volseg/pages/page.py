"""The frame of a page: one file that runs only its own scripts and makes no network request."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from volseg import __version__

CONTENT_BYTES = 6_000_000 - 300_000  # of a page, without style, script, text and one picture


def render_page(
    template: str, *, scripts: Sequence[str], allowed: Sequence[str] = (), **values: Any
) -> str:
    """Fill a template, which escapes each value that is not Markup.

    Args:
        scripts: files in `templates`, joined into the script of the page.
        allowed: texts of the other scripts that the page may run.
    """
    style = asset("templates", "style.css")
    script = "\n".join(asset("templates", name) for name in scripts)
    runs = (script, *allowed) if scripts else allowed
    values |= {"version": __version__, "policy": _policy(runs, style)}
    values |= {"style": Markup(style), "script": Markup(script)}  # noqa: S704 package files
    return _environment().get_template(template).render(**values)


@cache
def asset(folder: str, name: str, *, is_packed: bool = False) -> str:
    """Read a file of this package that is inserted into a page: unchanged, or `is_packed`."""
    text = resources.files("volseg.pages").joinpath(folder, name).read_text(encoding="utf-8")
    # Closing tags in a packed file do no harm.
    assert is_packed or not re.search(r"</(script|style)|<!--", text, re.IGNORECASE), name
    return text


def json_size(content: Any) -> int:
    """Return the size in bytes of the content as HTML-escaped JSON."""
    options = _environment().policies["json.dumps_kwargs"]
    return len(htmlsafe_json_dumps(content, **options).encode())


def json_value(value: Any) -> Any:
    """Convert a value for JSON: non-finite to null, floats to the digits of the CSV files."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return round(value, 4) if abs(value) >= 1 else float(f"{value:.6g}")


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _policy(scripts: Sequence[str], style: str) -> str:
    """Return a content security policy that allows only these scripts and this style."""
    hashes = " ".join(_hash(script) for script in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{as_base64(hashlib.sha256(text.encode()).digest())}'"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("volseg.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    return environment
