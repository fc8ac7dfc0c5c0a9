"""The prepared folder: memory-mapped arrays and a JSON per case, and one `prepared.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import VolsegError
from volseg.inputs import open_regular, read_json
from volseg.io.files import environment_problem, sync_file
from volseg.io.npy import map_array, read_array

CASE_FILE = "case.json"
IGNORED = 255  # class index of voxels excluded from training and evaluation


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """One training case on the prepared grid, memory-mapped.

    Args:
        image: (channels, R, A, S) float32. mask: (R, A, S) uint8, class index, 0 = background.
        foreground: class index of each label → (n, 3) sample of its voxels, empty if the case
            has none.
        slices: (planes, 2, pixels, pixels) float32 for the classifier, or None.
        record: content of case.json: split, class, key of the inputs. folder: where it was read.
    """

    id: str
    image: np.ndarray
    mask: np.ndarray
    foreground: Mapping[int, np.ndarray]
    slices: np.ndarray | None
    record: Mapping[str, Any]
    folder: Path | None = None

    def check(self) -> None:
        """Check all voxels of the case, which is untrusted input.

        Raises:
            VolsegError: an intensity is not finite, or a class index has no label.
        """
        self.check_classes(self.mask)
        if not all(np.isfinite(plane).all() for channel in self.image for plane in channel):
            raise _not_prepared(self.path, "image.npy holds values that are not finite")

    def check_classes(self, mask: np.ndarray) -> None:
        """Check the class indices of any part of the mask; raise as `check` does."""
        n_labels = max(self.foreground, default=IGNORED - 1)
        if mask.max(initial=0) > n_labels and ((mask > n_labels) & (mask != IGNORED)).any():
            highest = int(mask[mask != IGNORED].max())
            raise _not_prepared(self.path, f"mask.npy holds class {highest} of {n_labels}")

    @property
    def path(self) -> Path:
        return Path(self.id) if self.folder is None else self.folder / self.id


def write_prepared_case(folder: Path, case: PreparedCase) -> None:
    """Write a case into an existing folder; `case.json`, written last, marks it complete."""
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
    """Return the paths in a prepared folder of all files that a case may have."""
    arrays = ["image", "mask", "slices", *(f"foreground_{n}" for n in range(1, n_labels + 1))]
    names = (CASE_FILE, *(f"{array}.npy" for array in arrays))
    return [f"cases/{case_id}/{name}" for name in names]


def is_prepared(folder: Path, case_id: str, key: str) -> bool:
    """Check whether the case was prepared from the inputs with this key and is complete."""
    path = folder / case_id
    try:
        record = read_json(path / CASE_FILE)
        return record["key"] == key and all(
            (path / name).stat().st_size == n for name, n in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_prepared_case(folder: Path, case_id: str) -> PreparedCase:
    """Memory-map one prepared case.

    Raises:
        VolsegError: the case is missing or damaged.
    """
    path = folder / case_id
    try:
        record = read_json(path / CASE_FILE)
        if not _is_record(record):
            raise ValueError(f"{CASE_FILE} lacks a valid key, split, patient or class")
        foreground = {
            int(file.stem.removeprefix("foreground_")): _read_array(file)
            for file in sorted(path.glob("foreground_*.npy"))
        }
        slices = _read_array(path / "slices.npy") if (path / "slices.npy").exists() else None
        image, mask = map_array(path / "image.npy"), map_array(path / "mask.npy")
        for problem in _array_problems(image, mask, foreground, slices):
            raise ValueError(problem)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise _not_prepared(path, error) from error
    return PreparedCase(case_id, image, mask, foreground, slices, record, folder)


def _not_prepared(path: Path, problem: object) -> VolsegError:
    return VolsegError(
        f"{path}: not a prepared case ({problem})",
        fix="run `volseg preprocess` again",
        code="E_PREPARED",
    )


def _array_problems(
    image: np.ndarray,
    mask: np.ndarray,
    foreground: Mapping[int, np.ndarray],
    slices: np.ndarray | None,
) -> Iterator[str]:
    """Yield the mistakes in shapes and types of arrays; for voxels see `PreparedCase.check`."""
    if image.ndim != 4 or image.dtype != np.float32 or not image.size:
        yield f"image.npy is {image.dtype} of shape {image.shape}, not float32 of 4 dimensions"
    if mask.shape != image.shape[1:] or mask.dtype != np.uint8:
        yield f"mask.npy is {mask.dtype} of shape {mask.shape}, not uint8 of {image.shape[1:]}"
    yield from _foreground_problems(foreground, mask.shape)
    if slices is None:
        return
    if slices.ndim != 4 or slices.dtype != np.float32 or not np.isfinite(slices).all():
        layout = f"{slices.dtype} of shape {slices.shape}"
        yield f"slices.npy is {layout}, not finite float32 of 4 dimensions"


def _foreground_problems(
    foreground: Mapping[int, np.ndarray], shape: tuple[int, ...]
) -> Iterator[str]:
    if sorted(foreground) != list(range(1, len(foreground) + 1)):
        classes = ", ".join(map(str, sorted(foreground)))
        yield f"foreground files must number the classes from 1 without gaps, got {classes}"
    for index, voxels in foreground.items():
        name, layout = f"foreground_{index}.npy", f"{voxels.dtype} of shape {voxels.shape}"
        if voxels.dtype.kind not in "iu" or voxels.ndim != 2 or voxels.shape[1] != 3:
            yield f"{name} is {layout}, not whole numbers of shape (n, 3)"
        elif ((voxels < 0) | (voxels >= shape)).any():
            yield f"{name} holds voxels outside the case"


def _is_record(content: Any) -> bool:
    """Check whether case.json holds the key, split, patient and class that training needs."""
    if not isinstance(content, dict):
        return False
    texts = [content.get(key) for key in ("key", "split", "patient")]
    has_class = isinstance(content.get("class", 0), str | type(None))
    return has_class and all(isinstance(text, str) for text in texts)


def _read_array(path: Path) -> np.ndarray:
    """Read an untrusted .npy file.

    Raises:
        OSError, ValueError: not a regular file, or not an array.
    """
    with open_regular(path) as file:
        return read_array(file)
