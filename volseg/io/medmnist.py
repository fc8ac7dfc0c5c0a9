"""MedMNIST files: one `.npz` with images and labels of the splits train, val and test."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import numpy as np

from volseg.errors import ScanError
from volseg.inputs import shorten
from volseg.io.gzip_stream import COPY_AGAIN, GZIP_MAX_RATIO, opened_raw, refusal
from volseg.io.npy import array_header, read_array

SUFFIX = ".npz"
SPLITS = ("train", "val", "test")
MAX_BYTES = 16 * 2**30  # of an array
ERRORS = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError),
    *(ValueError, LookupError, RuntimeError, SyntaxError, TokenError),
)


class ImageArrays:
    """The images of a MedMNIST file, in the order of its splits; read when a row is asked for.

    Args:
        path: holds `{train,val,test}_images` (N, H, W), (N, H, W, 1) or (N, H, W, 3) of numbers
            or booleans, and `…_labels` (N,) or (N, L), of one or more splits.

    Raises:
        ScanError: the file is missing, damaged or too large, or holds no such arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened_archive(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            self.splits = [split for split in SPLITS if f"{split}_images" in names]
            if not self.splits:
                shown = shorten(", ".join(sorted(names)) or "nothing")
                problem = f"has no array train_images, val_images or test_images; it has {shown}"
                raise refusal(path, "E_NOTIMAGE", problem, "name the arrays as MedMNIST does")
            shapes = [_image_shape(archive, f"{split}_images", path) for split in self.splits]
        self.counts = [shape[0] for shape in shapes]
        self._loaded: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    def row(self, index: int) -> np.ndarray:
        """Return image `index` of all splits one after another: (H, W) or (H, W, 3).

        Booleans become 0 and 255.
        """
        for split, n in zip(self.splits, self.counts, strict=True):
            if index < n:
                if split not in self._loaded:
                    self._loaded[split] = _array(self.path, f"{split}_images")
                row = self._loaded[split][index]
                row = row[..., 0] if row.shape[2:] == (1,) else row
                return np.where(row, 255, 0).astype(np.uint8) if row.dtype.kind == "b" else row
            index -= n
        raise IndexError(f"{self.path.name} has {len(self)} images")

    def labels(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Return split and labels of each image; no labels if the file has none.

        Raises:
            ScanError: a split has another number of labels than of images, or they are no numbers.
        """
        rows: list[tuple[str, tuple[int, ...]]] = []
        for split, n in zip(self.splits, self.counts, strict=True):
            rows += [(split, numbers) for numbers in self._labels_of(split, n)]
        return rows

    def _labels_of(self, split: str, n: int) -> list[tuple[int, ...]]:
        try:
            array = _array(self.path, f"{split}_labels")
        except ScanError as error:
            if error.code != "E_NOTIMAGE":
                raise
            return [()] * n
        if len(array) != n or array.ndim > 2 or array.dtype.kind not in "iub":
            problem = f"{split}_labels has shape {array.shape} and type {array.dtype}"
            fix = f"give {n} rows of whole numbers, one for each image"
            raise refusal(self.path, "E_LABELS", problem, fix)
        rows = array[:, None] if array.ndim == 1 else array
        return [tuple(map(int, row)) for row in rows]


def _array(path: Path, name: str) -> np.ndarray:
    """Return an array of numbers of the file; bounded in size, and never pickled objects."""
    with opened_archive(path) as archive:
        _shape(archive, name, path)
        with archive.open(f"{name}.npy") as file:
            array = read_array(file)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _image_shape(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """Return the shape of an array of images, one or more pixels each."""
    shape = _shape(archive, name, path)
    if len(shape) != 3 and not (len(shape) == 4 and shape[-1] in (1, 3)):
        problem = f"{name} has shape {shape}, not (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        raise refusal(path, "E_NDIM", problem, "give 2D images, channels last")
    if 0 in shape[1:]:
        raise refusal(path, "E_EMPTY", f"{name} has shape {shape}", COPY_AGAIN)
    return shape


def _shape(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """Return the shape of an array from its header; its type and size are checked."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        problem = f"has no array {name}"
        raise refusal(path, "E_NOTIMAGE", problem, "name the arrays as MedMNIST does") from error
    with archive.open(member) as file:
        shape, dtype = array_header(file)
    if dtype.kind not in "iubf":
        raise refusal(path, "E_DTYPE", f"{name} is of type {dtype}", "store numbers")
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= int(size)
    if n_bytes > MAX_BYTES:
        problem = f"{name} asks for {n_bytes:,} bytes, above the limit of {MAX_BYTES:,}"
        raise refusal(path, "E_TOOBIG", problem, "split the file")
    if n_bytes > min(member.file_size, member.compress_size * GZIP_MAX_RATIO):
        problem = f"{name} holds {member.file_size:,} of {n_bytes:,} bytes"
        raise refusal(path, "E_TRUNCATED", problem, COPY_AGAIN)
    return shape


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive of arrays; what reading it raises on damage becomes a ScanError."""
    with opened_raw(path):  # refuses what is no file, and says why
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ScanError:
        raise
    except ERRORS as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 100)
        problem = f"cannot be read as NumPy archive ({reason})"
        raise refusal(path, "E_DAMAGED", problem, COPY_AGAIN) from error
