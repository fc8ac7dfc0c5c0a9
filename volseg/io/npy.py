"""NumPy's .npy files, whose header is checked before NumPy reads as much as it asks for."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from volseg.inputs import open_regular

MAX_HEADER = 10_000  # characters that describe an array
VERSIONS = ((1, 0), (2, 0), (3, 0))


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of an array; the file is then at its first value.

    Raises:
        ValueError, EOFError: it is damaged, or a header longer than `MAX_HEADER` is asked for.
    """
    version = npy.read_magic(file)
    if version not in VERSIONS:
        raise ValueError(f"version {version[0]}.{version[1]} of the format is unknown")
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(file, max_header_size=MAX_HEADER)
        return shape, dtype
    place, stated = file.tell(), file.read(4)
    if len(stated) == 4 and struct.unpack("<I", stated)[0] > MAX_HEADER:
        raise ValueError("its header is too long")
    file.seek(place)
    shape, _, dtype = npy.read_array_header_2_0(file, max_header_size=MAX_HEADER)
    return shape, dtype


def read_array(file: IO[bytes]) -> np.ndarray:
    """Read an array of numbers from the start of a file; never pickled objects.

    Raises:
        ValueError, EOFError: as `array_header`; or values are missing.
    """
    array_header(file)
    file.seek(0)
    return npy.read_array(file, allow_pickle=False, max_header_size=MAX_HEADER)


def map_array(path: Path) -> np.ndarray:
    """Memory-map a file for reading.

    Raises:
        OSError, ValueError, EOFError: not a regular file, or not an array.
    """
    with open_regular(path) as file:  # mapping a pipe would block
        array_header(file)
    return npy.open_memmap(path, mode="r", max_header_size=MAX_HEADER)
