"""The files of a folder that a user sees."""

from __future__ import annotations

from pathlib import Path

from volseg.io.tables import unreadable


def visible_paths(folder: Path) -> list[Path]:
    """Return the sorted paths in a folder without hidden ones; [] if there is no such folder."""
    try:
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
