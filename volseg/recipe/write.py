"""Write a recipe as TOML, with comments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.items import Comment, Table

from volseg.recipe.load import AnyRecipe


def recipe_text(
    recipe: AnyRecipe,
    heading: Sequence[str] = (),
    comments: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return a recipe as TOML that `load_recipe` reads back as the same recipe.

    Args:
        comments: dotted key, such as `train.batch_size` → lines above it.
    """
    document = tomlkit.document()
    for line in heading:
        document.add(_comment(line))
    _fill(document, recipe.model_dump(mode="json", exclude_none=True), comments or {}, "")
    return tomlkit.dumps(document)


def _fill(
    table: Table | tomlkit.TOMLDocument,
    content: Mapping[str, Any],
    comments: Mapping[str, Sequence[str]],
    prefix: str,
) -> None:
    # In TOML the values of a table come before its tables.
    for key, value in sorted(content.items(), key=lambda item: _is_table(item[1])):
        if value == {}:
            continue
        item = tomlkit.table() if isinstance(value, dict) else tomlkit.item(value)
        above = comments.get(f"{prefix}{key}", ())
        if isinstance(item, Table):
            for line in above:
                item.add(_comment(line))
            _fill(item, value, comments, f"{prefix}{key}.")
        else:
            for line in above:
                table.add(_comment(line))
        table.add(key, item)


def _comment(line: str) -> Comment:
    """Return a comment; TOML allows no control character in it, which a name may hold."""
    return tomlkit.comment(re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", " ", line))


def _is_table(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return isinstance(value, dict) or (is_list and isinstance(value[0], dict))
