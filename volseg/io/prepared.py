"""The prepared folder: one folder per case with memory-mapped arrays and a JSON, and `prepared.json` for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import VolsegError
from volseg.inputs import open_regular, read_json
from volseg.io.files import environment_problem, sync_file

CASE_FILE = "case.json"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """One training case on the prepared grid, memory-mapped.

    Args:
        image: (channels, R, A, S) float32. mask: (R, A, S) uint8, class index, 0 = background.
        foreground: class index → (n, 3) voxels of it, a sample, empty where the case has none.
        slices: (planes, 2, pixels, pixels) float32 for the classifier, or None.
        record: what case.json says: split, class, key of the inputs. folder: that it was read from.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    foreground: Mapping[int, np.ndarray]
    slices: np.ndarray | None
    record: Mapping[str, Any]
    folder: Path | None = None


def write_prepared_case(folder: Path, case: PreparedCase) -> None:
    """Write the files of a case into a folder that is there for them; `case.json` last, without which it is not prepared."""
    (folder / CASE_FILE).unlink(missing_ok=True)
    arrays = {"image": case.image, "mask": case.mask}
    arrays |= {f"foreground_{index}": voxels for index, voxels in case.foreground.items()}
    if case.slices is not None:
        arrays["slices"] = case.slices
    try:
        for name, array in arrays.items():
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                sync_file(file)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.npy"))}
        record = dict(case.record) | {"files": sizes}
        with open(folder / CASE_FILE, "wb") as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
            sync_file(file)
    except OSError as error:
        raise environment_problem(folder, error) from error


def prepared_files(case_id: str, n_labels: int) -> list[str]:
    """Paths in a prepared folder of all files that a case may have."""
    arrays = ["image", "mask", "slices", *(f"foreground_{index}" for index in range(1, n_labels + 1))]
    return [f"cases/{case_id}/{name}" for name in (CASE_FILE, *(f"{array}.npy" for array in arrays))]


def is_prepared(folder: Path, case_id: str, key: str) -> bool:
    """Whether the case was prepared from the inputs that the key stands for, and its files are all there."""
    path = folder / case_id
    try:
        record = read_json(path / CASE_FILE)
        return record["key"] == key and all((path / name).stat().st_size == n for name, n in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_prepared_case(folder: Path, case_id: str) -> PreparedCase:
    """Memory-map one prepared case.

    Raises:
        VolsegError: it is not there or damaged.
    """
    path = folder / case_id
    try:
        record = read_json(path / CASE_FILE)
        if not _is_record(record):
            raise ValueError(f"{CASE_FILE} does not say key, split, patient and class")
        foreground = {
            int(file.stem.removeprefix("foreground_")): _read_array(file)
            for file in sorted(path.glob("foreground_*.npy"))
        }
        slices = _read_array(path / "slices.npy") if (path / "slices.npy").exists() else None
        image, mask = _map_array(path / "image.npy"), _map_array(path / "mask.npy")
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise VolsegError(
            f"{path}: not a prepared case ({error})", fix="run `volseg preprocess` again", code="E_PREPARED"
        ) from error
    return PreparedCase(case_id, image, mask, foreground, slices, record, folder)


def _is_record(content: Any) -> bool:
    """Whether it says of a case what training asks for."""
    if not isinstance(content, dict):
        return False
    texts = [content.get(key) for key in ("key", "split", "patient")]
    return all(isinstance(text, str) for text in texts) and isinstance(content.get("class", 0), str | type(None))


def _read_array(path: Path) -> np.ndarray:
    """Read a .npy file, which may come from a stranger.

    Raises:
        OSError, ValueError: it is no regular file, or no array.
    """
    with open_regular(path) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _map_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file; raises as `_read_array`."""
    open_regular(path).close()  # mapping would wait for a pipe
    return np.lib.format.open_memmap(path, mode="r")
