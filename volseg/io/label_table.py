"""Read the names that a mask holds: the label table in a NIfTI extension is untrusted text."""

from __future__ import annotations

import html
import re
from pathlib import Path

from volseg.io.formats import mask_format_of
from volseg.io.gzip_stream import fill, opened
from volseg.io.volumes import read_mask_header
from volseg.volume import Geometry

MAX_DIGITS = 10  # of a label value; masks hold no larger ones
_KEY = re.compile(rf"""\bKey=["']([0-9]{{1,{MAX_DIGITS}}})["']""")
_NOT_SPACE = re.compile(r"\S")
_CDATA, _CDATA_END = "<![CDATA[", "]]>"


def read_label_table(path: Path | str, like: Path | Geometry | None = None) -> dict[int, str]:
    """Return value → name of a mask whose file holds names; {} if it holds none.

    NIfTI holds them in a label table between header and voxels.

    Args:
        like: as in `read_mask`.

    Raises:
        ScanError: as `read_header`.

    Source: the CARET extension of NIfTI-1, an XML element `Label` with a `Key` for each value.
    """
    header, read_names = read_mask_header(path, like), mask_format_of(Path(path)).read_names
    if read_names is not None:
        return read_names(header)
    if header.data_path is None or header.data_offset is None or header.part.encoding is not None:
        return {}  # a header of text has no extension
    block = bytearray(header.data_offset)
    with opened(header.data_path) as stream:
        del block[fill(stream, memoryview(block)) :]
    return parse_label_table(block.decode("utf-8", "replace"))


def read_region_names(path: Path, like: Path | Geometry | None = None) -> dict[int, str]:
    """Return value → name of a mask whose format numbers regions file by file; {} for others.

    Their names say which regions of two files are the same, and their values do not.

    Args:
        like: as in `read_mask`.

    Raises:
        ScanError: as `read_header`.
    """
    read_names = mask_format_of(path).read_names
    return {} if read_names is None else read_names(read_mask_header(path, like))


def parse_label_table(text: str) -> dict[int, str]:
    """Return value → name from the XML elements `Label` with an attribute `Key`; {} if none.

    Time is linear in the length of the text, whatever it holds: each step continues where the
    last one ended. The background, 0, and labels without a name are left out.

    >>> parse_label_table('<Label Key="2" Red="1"><![CDATA[left kidney]]></Label>')
    {2: 'left kidney'}
    """
    names: dict[int, str] = {}
    position = 0
    while (start := text.find("<Label", position)) >= 0:
        tag_end = text.find(">", start)
        if tag_end < 0:
            break
        position = tag_end + 1
        tag = text[start:tag_end]
        key = _KEY.search(tag)
        if key is None or not tag[6].isspace():
            continue
        name, position = _content(text, position)
        if name is None:
            break
        if int(key[1]) and name:
            names[int(key[1])] = name
    return names


def _content(text: str, start: int) -> tuple[str | None, int]:
    """Return the name that starts at `start`, None if it has no end, and where its element ends."""
    first = _NOT_SPACE.search(text, start)
    closing_from = start
    if first is not None and text.startswith(_CDATA, first.start()):
        closing_from = text.find(_CDATA_END, first.start())
        if closing_from < 0:
            return None, len(text)
    end = text.find("</Label>", closing_from)
    if end < 0:
        return None, len(text)
    name = text[start:end].strip()
    if name.startswith(_CDATA) and name.endswith(_CDATA_END):
        name = name[len(_CDATA) : -len(_CDATA_END)]
    return _unescaped(name).strip(), end + len("</Label>")


def _unescaped(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a character number of thousands of digits
        return text
