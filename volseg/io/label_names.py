"""Read the names of mask values from JSON or CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from volseg.errors import VolsegError
from volseg.inputs import MAX_LABEL, MAX_NAME, label_value, read_json, shorten
from volseg.io.tables import read_table

COLUMNS = {
    "label": ("value", "index", "id", "label_value", "label_id"),
    "name": ("label_name", "structure", "organ", "names"),
}


def read_label_names(path: Path | str) -> dict[int, str]:
    """Read value → name from a JSON object or a CSV with columns `label` and `name`.

    The JSON object may map values to names or names to values.

    Raises:
        VolsegError: E_LABELS, the file is not such a list.
    """
    path = Path(path)
    names: dict[int, str] = {}
    try:
        for stated, name in _pairs_in(path):
            value = _label_value(stated)
            if value is None or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
                parts = [json.dumps(part, ensure_ascii=False) for part in (stated, name)]
                raise ValueError(
                    f"{' = '.join(map(shorten, parts))}: a value must be a whole number, "
                    f"a name must have 1 to {MAX_NAME} characters"
                )
            if names.setdefault(value, name) != name:
                raise ValueError(f"{value} is both {names[value]!r} and {name!r}")
        return names
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VolsegError(
            f"{path}: is not a list of label names ({reason})",
            fix='give JSON such as {"1": "spleen"}, or a CSV with columns label and name',
            code="E_LABELS",
        ) from error


def _pairs_in(path: Path) -> Iterable[tuple[object, object]]:
    """Return the stated values and names."""
    if path.suffix.lower() == ".json":
        pairs = read_json(path).items()
        return [(key, item) if key.isdecimal() else (item, key) for key, item in pairs]
    path.stat()  # a missing file raises OSError
    table = read_table(path, COLUMNS)
    label, name = table.columns.index("label"), table.columns.index("name")
    return [(cells[label], cells[name]) for _, cells in table.lines]


def _label_value(stated: object) -> int | None:
    """Return the mask value stated in JSON or a CSV cell; None if it is not a valid value."""
    if isinstance(stated, str):
        return label_value(stated)
    if isinstance(stated, bool) or not isinstance(stated, (int, float)):
        return None
    return int(stated) if 0 <= stated <= MAX_LABEL and stated == int(stated) else None  # 1.0 is 1
