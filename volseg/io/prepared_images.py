"""Prepared images: one memory-mapped array of network inputs, and a JSON file of their cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from volseg.errors import VolsegError
from volseg.inputs import read_json
from volseg.io.files import environment_problem, sync_file, write_json_atomic
from volseg.io.npy import map_array

PIXELS_FILE, CASES_FILE = "images.npy", "images.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """What is known of one row of the array.

    Args:
        group: images that must stay in one fold share it: those of a patient, and near duplicates.
        target: index of the class, indices of the labels, or the number; None if unknown.
        measurements: of a lesion, by column, if the recipe fuses them; None what is unknown.
        sha256: of the file that it was made from; with # and a number, of that image in the file.
    """

    id: str
    patient: str
    group: str
    split: str | None = None
    target: int | float | tuple[int, ...] | None = None
    sha256: str = ""
    cells: dict[str, str]
    measurements: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Images as a network takes them, with their cases.

    Args:
        pixels: (N, channels, H, W) float32, (N, planes, channels, H, W) of lesions, or of scans
            (N, S, features + 1), whose last number is 0 in the padding; memory-mapped or in memory.
    """

    pixels: np.ndarray
    cases: Sequence[PreparedImage]

    def __len__(self) -> int:
        return len(self.cases)

    def measurements(self, names: Sequence[str]) -> np.ndarray:
        """Return (N, k) float64 measurements; NaN what is unknown."""
        rows = [[case.measurements.get(name) for name in names] for case in self.cases]
        return np.array(rows, dtype=float).reshape(len(self), len(names))

    def take(self, indices: Sequence[int]) -> ImageSet:
        """Return some of the images, in memory."""
        return ImageSet(self.pixels[list(indices)], [self.cases[index] for index in indices])

    def of_split(self, split: str) -> ImageSet:
        return self.take([n for n, case in enumerate(self.cases) if case.split == split])


def write_prepared_images(
    folder: Path, shape: tuple[int, ...], pixels: Any, header: dict[str, Any]
) -> list[Any]:
    """Write float32 images of one shape one by one; return their cases.

    `images.json`, written last, marks the folder complete.

    Args:
        pixels: yields (image, case) pairs; an image of None is left out.
        header: other content of images.json.
    """
    (folder / CASES_FILE).unlink(missing_ok=True)
    cases = []
    try:
        with open(folder / PIXELS_FILE, "wb") as file:
            start = _write_header(file, 0, shape)
            for image, case in pixels:
                assert image.shape == shape, "images of one prepared folder have one shape"
                file.write(np.ascontiguousarray(image, np.float32).tobytes())
                cases.append(case)
            file.seek(0)
            assert _write_header(file, len(cases), shape) == start
            sync_file(file)
        write_json_atomic(folder / CASES_FILE, header | {"cases": list(map(asdict, cases))})
    except OSError as error:
        raise environment_problem(folder, error) from error
    return cases


def _write_header(file: Any, n: int, shape: tuple[int, ...]) -> int:
    """Write the header of a .npy file and return its end; NumPy leaves room for `n` to grow."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (n, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def read_prepared_images(folder: Path) -> tuple[ImageSet, dict[str, Any]]:
    """Memory-map prepared images; return them and the content of images.json.

    Raises:
        VolsegError: files are missing, damaged or do not fit each other.
    """
    try:
        content = read_json(folder / CASES_FILE)
        cases = [_case(entry) for entry in content["cases"]]
        pixels = map_array(folder / PIXELS_FILE)
        if pixels.ndim not in (3, 4, 5) or pixels.dtype != np.float32 or len(pixels) != len(cases):
            raise ValueError(f"{PIXELS_FILE} is {pixels.dtype} of shape {pixels.shape}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise VolsegError(
            f"{folder}: not a folder of prepared images ({error})",
            fix="run `volseg preprocess` again",
            code="E_PREPARED",
        ) from error
    return ImageSet(pixels, cases), content


def _case(entry: Any) -> PreparedImage:
    names = {item.name for item in fields(PreparedImage)}
    case = PreparedImage(**{name: entry[name] for name in names})
    target = case.target
    texts = (case.id, case.patient, case.group, case.split or "", *case.cells.values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a case holds a value that is no text")
    if isinstance(target, list):
        return PreparedImage(**{**entry, "target": tuple(map(int, target))})
    if not isinstance(target, int | float | None) or isinstance(target, bool):
        raise ValueError(f"target {target!r} of {case.id}")
    return case


def has_prepared_images(folder: Path) -> bool:
    return (folder / CASES_FILE).is_file()
