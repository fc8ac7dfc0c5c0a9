"""Files of text headers with random damage: each is read, or refused with a typed error."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
from text_headers import metaimage_header, nrrd_header

from volseg.errors import ScanError
from volseg.io.volumes import read_mask, read_volume

SHAPE = (8, 9, 4)
VOXELS = np.random.default_rng(0).integers(0, 90, SHAPE).astype(np.int16).tobytes(order="F")
PIECES = (
    *(b"\n", b"\n\n", b"\r", b"\0", b":", b":=", b"=", b"(", b")", b",", b" ", b"#", b'"'),
    *(b"none", b"nan", b"inf", b"-1", b"0", b"1e999", b"9" * 30, b"1_0", b"\xff\xfe", b"LIST"),
    *(b"../../etc/hostname", b"/dev/zero", b"%d", b"x" * 3000, "²".encode()),
)


def nrrd(encoding: str, **fields) -> bytes:
    data = gzip.compress(VOXELS, 1, mtime=0) if encoding == "gzip" else VOXELS
    return nrrd_header(sizes="8 9 4", encoding=encoding, **fields).encode() + data


def metaimage(**fields) -> bytes:
    data = zlib.compress(VOXELS, 1) if fields.get("CompressedData") == "True" else VOXELS
    return metaimage_header(DimSize="8 9 4", **fields).encode() + data


def segmentation() -> bytes:
    """Return two layers of two segments, with values that are mostly those of labels."""
    header = nrrd_header(type="uint8", encoding="gzip", dimension="4", sizes="2 8 9 4")
    header = header.replace("space directions: ", "space directions: none ")
    segments = (
        f"Segment{n}_ID:=s{n}\nSegment{n}_LabelValue:={n + 1}\nSegment{n}_Layer:={n}\n"
        for n in range(2)
    )
    layers = np.zeros((2, 8, 9, 4), np.uint8)
    layers[0, :3], layers[1, 4:] = 1, 2
    return (header[:-1] + "".join(segments) + "\n").encode() + gzip.compress(layers.tobytes("F"), 1)


FILES = {
    "scan.seg.nrrd": (segmentation(), segmentation()),
    "scan.nrrd": (nrrd("raw"), nrrd("gzip", byte_skip="0", space_units='"mm" "mm" "mm"')),
    "scan.nhdr": (
        nrrd_header(sizes="8 9 4", data_file="scan.raw").encode(),
        nrrd_header(sizes="8 9 4", data_file="scan.gz", encoding="gzip").encode(),
    ),
    "scan.mha": (metaimage(), metaimage(CompressedData="True")),
    "scan.mhd": (
        metaimage_header(DimSize="8 9 4", ElementDataFile="scan.raw", HeaderSize="0").encode(),
        metaimage_header(DimSize="8 9 4", ElementDataFile="scan.z", CompressedData="True").encode(),
    ),
}


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the file after one to three random edits, most of them in its header."""
    text = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        end = len(text) if rng.random() < 0.2 else min(len(text), 700)
        at = int(rng.integers(0, max(1, end)))
        kind = rng.integers(0, 6)
        if kind == 0 and text:
            text[at % len(text)] = rng.integers(0, 256)
        elif kind == 1:
            text[at:at] = PIECES[rng.integers(0, len(PIECES))]
        elif kind == 2:
            del text[at : at + int(rng.integers(1, 40))]
        elif kind == 3:  # a line twice, or moved
            lines = bytes(text).split(b"\n")
            first, second = rng.integers(0, len(lines), 2)
            lines.insert(int(first), lines[second])
            text = bytearray(b"\n".join(lines))
        elif kind == 4:
            piece = PIECES[rng.integers(0, len(PIECES))]
            text[at : at + len(piece)] = piece
        else:
            del text[at if rng.random() < 0.1 else len(text) :]
    return bytes(text)


def read_all(name: str, n: int, seed: int, folder: Path) -> tuple[int, int]:
    """Read mutated files; return how many were read and refused."""
    (folder / "scan.raw").write_bytes(VOXELS)
    (folder / "scan.gz").write_bytes(gzip.compress(VOXELS, 1, mtime=0))
    (folder / "scan.z").write_bytes(zlib.compress(VOXELS, 1))
    rng, path, n_read, codes = np.random.default_rng(seed), folder / name, 0, set()
    readers = (read_mask,) if name.endswith(".seg.nrrd") else (read_volume, read_mask)
    for number in range(n):
        path.write_bytes(mutated(FILES[name][number % 2], rng))
        try:
            volume = readers[number // 2 % len(readers)](path)
        except ScanError as error:
            codes.add(error.code)
            assert error.code.startswith("E_") and error.fix and "\n" not in str(error)
        else:
            n_read += 1
            assert volume.array.size < 10_000 and np.isfinite(volume.geometry.affine).all()
    return n_read, len(codes)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    n_read, n_codes = read_all(name, 250, 0, tmp_path)
    assert 10 < n_read < 230 and n_codes >= 6  # the mutations reach both


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_mutated_files_are_read_or_refused(name, tmp_path):
    read_all(name, 20_000, 1, tmp_path)
