"""The images that a classifier was trained on: a table in its folder, by which others know them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from volseg.errors import VolsegError
from volseg.io.csv_text import iterate_csv, write_csv
from volseg.words import format_count, format_list

SEEN = "training_images.csv"
COLUMN = "sha256"  # of the file; with # and a number, of that image in the file
MOST_LISTED = 3  # names in a message


def image_key(digest: str, index: int | None) -> str:
    """Return what tells an image from all others: the hash of its file, and its place in there."""
    return digest if index is None else f"{digest}#{index}"


def write_seen(file: BinaryIO, keys: Iterable[str]) -> None:
    """Write the table of the images that the networks of a model learned from."""
    write_csv(file, [[COLUMN], *([key] for key in sorted(set(keys)))])


def read_seen(model: Path) -> frozenset[str]:
    """Return the keys of the images that a model learned from; none if its folder does not say.

    Raises:
        VolsegError: the table is damaged.
    """
    path = model / SEEN
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(row[COLUMN] for row in iterate_csv(path))
    except (OSError, ValueError, KeyError) as error:
        raise VolsegError(
            f"{path}: cannot be read ({error})",
            fix="copy the model again, or delete this file",
            code="E_MODEL",
        ) from error


def seen_warning(names: Sequence[str]) -> str:
    """Return the warning that a model looks better on these images than it is."""
    return (
        f"W_TRAINING: the model learned from {format_count(len(names), 'image')} of these, and "
        f"looks better on them than it is ({format_list(list(names), MOST_LISTED)})"
    )
