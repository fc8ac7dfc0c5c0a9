"""NumPy's files from strangers: no more is read than a header may need."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from numpy.lib import format as npy

from volseg.io.npy import MAX_HEADER, array_header, map_array, read_array

ARRAY = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


class Counted(io.BytesIO):
    """A file that notes the most bytes that were asked for at once."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        self.most = max(self.most, size or 0)
        return super().read(size)


def stored(version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    npy.write_array(file, ARRAY, version=version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_comes_back(version, tmp_path):
    file = io.BytesIO(stored(version))
    assert array_header(file) == (ARRAY.shape, ARRAY.dtype)
    assert np.array_equal(np.frombuffer(file.read(), np.int16), ARRAY.ravel())
    assert np.array_equal(read_array(io.BytesIO(stored(version))), ARRAY)
    (tmp_path / "a.npy").write_bytes(stored(version))
    assert np.array_equal(map_array(tmp_path / "a.npy"), ARRAY)


@pytest.mark.parametrize("version", [b"\x02\x00", b"\x03\x00", b"\x2c\x20", b"\x01\x01"])
def test_a_header_that_asks_for_gigabytes_is_refused_unread(version, tmp_path):
    content = npy.MAGIC_PREFIX + version + struct.pack("<I", 2**32 - 1) + stored((1, 0))[10:]
    for read in (array_header, read_array):
        file = Counted(content)
        with pytest.raises(ValueError, match=r"too long|unknown"):
            read(file)
        assert file.most <= MAX_HEADER
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"too long|unknown"):
        map_array(tmp_path / "a.npy")


def test_objects_are_never_unpickled():
    file = io.BytesIO()
    npy.write_array(file, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays"):
        read_array(io.BytesIO(file.getvalue()))
