"""Read the names of mask values from JSON or CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from volseg.errors import VolsegError
from volseg.inputs import MAX_LABEL, MAX_NAME, label_value, read_json, shorten
from volseg.io.tables import read_table

COLUMNS = {
    "label": ("value", "index", "id", "label_value", "label_id"),
    "name": ("label_name", "structure", "organ", "names"),
}


def read_label_names(names_or_path: Mapping[Any, Any] | Path | str) -> dict[int, str]:
    """Read value → name from a mapping, a JSON object or a CSV with columns `label` and `name`.

    A mapping or JSON object may map values to names or names to values.

    Raises:
        VolsegError: E_LABELS, the file or mapping is not such a list.
    """
    if isinstance(names_or_path, str | PathLike):
        where, read = str(names_or_path), lambda: _pairs_in(Path(names_or_path))
    else:
        where, read = "label_names", lambda: _pairs_of(names_or_path)
    names: dict[int, str] = {}
    try:
        for stated, name in read():
            value = _label_value(stated)
            if value is None or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                raise ValueError(
                    f"{_shown(stated)} = {_shown(name)}: a value must be a whole number, "
                    f"a name must have 1 to {MAX_NAME} characters"
                )
            if names.setdefault(value, name) != name:
                raise ValueError(f"{value} is both {names[value]!r} and {name!r}")
        return names
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VolsegError(
            f"{where}: is not a list of label names ({reason})",
            fix='give JSON such as {"1": "spleen"}, or a CSV with columns label and name',
            code="E_LABELS",
        ) from error


def _pairs_in(path: Path) -> Iterable[tuple[object, object]]:
    """Return the stated values and names."""
    if path.suffix.lower() == ".json":
        return _pairs_of(read_json(path))
    path.stat()  # a missing file raises OSError
    table = read_table(path, COLUMNS)
    label, name = table.columns.index("label"), table.columns.index("name")
    return [(cells[label], cells[name]) for _, cells in table.lines]


def _pairs_of(names: Mapping[Any, Any]) -> Iterable[tuple[object, object]]:
    """Return the stated values and names of a mapping in either direction."""
    pairs = ((_plain(key), _plain(item)) for key, item in names.items())
    return [
        (item, key) if isinstance(key, str) and not key.isdecimal() else (key, item)
        for key, item in pairs
    ]


def _shown(part: object) -> str:
    return shorten(json.dumps(part, ensure_ascii=False, default=repr))


def _plain(stated: Any) -> object:
    """Return a Python number for a scalar of NumPy."""
    return stated.item() if hasattr(stated, "dtype") and hasattr(stated, "item") else stated


def _label_value(stated: object) -> int | None:
    """Return the mask value stated in JSON or a CSV cell; None if it is not a valid value."""
    if isinstance(stated, str):
        return label_value(stated)
    if isinstance(stated, bool) or not isinstance(stated, (int, float)):
        return None
    return int(stated) if 0 <= stated <= MAX_LABEL and stated == int(stated) else None  # 1.0 is 1
