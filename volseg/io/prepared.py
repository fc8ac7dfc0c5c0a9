"""The prepared folder: one folder per case with memory-mapped arrays and a JSON, and `dataset.json` for all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import VolsegError

DATASET_FILE = "dataset.json"
CASE_FILE = "case.json"


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """One training case on the prepared grid, memory-mapped.

    Args:
        image: (channels, R, A, S) float32. mask: (R, A, S) uint8, class index, 0 = background.
        foreground: class index → (n, 3) voxels of it, a sample, empty where the case has none.
        slices: (planes, 2, pixels, pixels) float32 for the classifier, or None.
        record: what case.json says: split, class, key of the inputs.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    foreground: Mapping[int, np.ndarray]
    slices: np.ndarray | None
    record: Mapping[str, Any]


def write_prepared_case(folder: Path, case: PreparedCase) -> None:
    """Write the case's folder, whole or not at all."""
    arrays = {"image": case.image, "mask": case.mask}
    arrays |= {f"foreground_{index}": voxels for index, voxels in case.foreground.items()}
    if case.slices is not None:
        arrays["slices"] = case.slices
    target = folder / case.id
    temporary = folder / f".tmp-{case.id}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        (temporary / CASE_FILE).write_text(json.dumps(dict(case.record), indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_case_record(folder: Path, case_id: str) -> dict[str, Any] | None:
    """What `case.json` says, or None where the case is not prepared."""
    try:
        return json.loads((folder / case_id / CASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_prepared_case(folder: Path, case_id: str) -> PreparedCase:
    """Memory-map one prepared case.

    Raises:
        VolsegError: it is not there or damaged.
    """
    path = folder / case_id
    try:
        record = json.loads((path / CASE_FILE).read_text(encoding="utf-8"))
        foreground = {
            int(file.stem.removeprefix("foreground_")): np.load(file) for file in sorted(path.glob("foreground_*.npy"))
        }
        slices = np.load(path / "slices.npy") if (path / "slices.npy").exists() else None
        image, mask = np.load(path / "image.npy", mmap_mode="r"), np.load(path / "mask.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise VolsegError(
            f"{path}: not a prepared case ({error})", fix="run `volseg preprocess` again", code="E_PREPARED"
        ) from error
    return PreparedCase(case_id, image, mask, foreground, slices, record)
