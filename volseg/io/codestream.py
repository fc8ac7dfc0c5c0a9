"""The size that a JPEG or JPEG 2000 stream states, before a decoder takes memory for it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

JPEG_2000_START = b"\xff\x4f\xff\x51"  # SOC and SIZ: ISO/IEC 15444-1, A.4.1 and A.5.1
JPEG_START = b"\xff\xd8"
SEARCHED_BYTES = 4096  # boxes of a JP2 file may come before its stream
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF of ITU-T T.81 and T.87


@dataclass(frozen=True, slots=True)
class StreamSize:
    """Size of an image as its stream states it."""

    rows: int
    columns: int
    components: int


def size_of_stream(stream: bytes) -> StreamSize | None:
    """Return the size in the header of a JPEG, JPEG-LS or JPEG 2000 stream; None without one."""
    if stream.startswith(JPEG_START):
        return _size_of_jpeg(stream)
    start = stream.find(JPEG_2000_START, 0, SEARCHED_BYTES)
    content = stream[start + len(JPEG_2000_START) :][:38]
    if start < 0 or len(content) < 38:
        return None
    _, _, right, bottom, left, top, *_, components = struct.unpack(">2H8LH", content)
    return StreamSize(bottom - top, right - left, components)


def _size_of_jpeg(stream: bytes) -> StreamSize | None:
    """Follow the segments up to the one that starts the frame."""
    place = len(JPEG_START)
    while place + 4 <= len(stream) and stream[place] == 0xFF:
        marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4])
        if marker == 0xFF:  # a byte of padding
            place += 1
            continue
        if marker in FRAME_MARKERS and place + 10 <= len(stream):
            rows, columns, components = struct.unpack(">HHB", stream[place + 5 : place + 10])
            return StreamSize(rows, columns, components)
        place += 2 + length
    return None
