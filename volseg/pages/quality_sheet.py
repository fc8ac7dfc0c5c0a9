"""Sheets of thumbnails: the middle slice of each scan of a dataset, with its name and flags."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from volseg.pages.windows import Window, sampled, whole_window
from volseg.preprocessing.planes import PLANES
from volseg.quality.rows import QualityRow
from volseg.volume import Volume

TILE, CAPTION, MARGIN = 200, 60, 4  # pixels: edge of a picture, height of its text, space
COLUMNS, ROWS = 8, 6
PER_SHEET, MAX_SHEETS = COLUMNS * ROWS, 10
CT_WINDOW: Window = (-1000.0, 400.0)  # shows lung, air and soft tissue, where scans go wrong
FONT_SIZE, MAX_LINES = 13, 3
GREY, AMBER, RED = "#b8b8b8", "#ffc34d", "#ff7a6b"  # sound, flagged, failed


@dataclass(frozen=True, slots=True)
class Tile:
    """A scan of a sheet: its row, and its picture as JPEG; None if it could not be read."""

    row: QualityRow
    picture: bytes | None


def thumbnail(scan: Volume, row: QualityRow) -> bytes:
    """Draw the middle slice of a scan as JPEG, at most 200 × 200 pixels, in true proportions.

    Radiological convention: the patient's right or front is on the left. The window is -1000 to
    400 for a CT, otherwise it holds 98 % of the voxels.
    """
    canonical = scan.canonical()
    plane = next(plane for plane in PLANES if "RAS"[plane.through] == row.slice_axis)
    stored = plane.slice_of(canonical.array, canonical.array.shape[plane.through] // 2)
    values = np.nan_to_num(canonical.intensities(stored).astype(np.float32)).T[::-1, ::-1]
    low, high = CT_WINDOW
    if not row.looks_like_ct:
        low, high = whole_window(np.asarray(scan.intensities(sampled(scan.array)), np.float64))
    grey = np.clip((values - low) / (high - low), 0, 1) * 255
    spacing = canonical.geometry.spacing_mm
    mm = values.shape[1] * spacing[plane.across], values.shape[0] * spacing[plane.up]
    size = [max(1, round(TILE * length / max(mm))) for length in mm]
    picture = Image.fromarray(grey.astype(np.uint8)).resize((size[0], size[1]))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def quality_sheets(tiles: Sequence[Tile]) -> list[bytes]:
    """Draw up to ten sheets of 48 scans each as PNG.

    Of more scans, those that failed or are flagged come first, then the others in their order.
    """
    if len(tiles) > PER_SHEET * MAX_SHEETS:
        tiles = sorted(tiles, key=lambda tile: tile.row.status == "done" and not tile.row.flags)
    tiles = tiles[: PER_SHEET * MAX_SHEETS]
    starts = range(0, len(tiles), PER_SHEET)
    return [_sheet(tiles[start : start + PER_SHEET]) for start in starts]


def _sheet(tiles: Sequence[Tile]) -> bytes:
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = TILE + 2 * MARGIN, TILE + CAPTION + 2 * MARGIN
    sheet = Image.new("RGB", (columns * width, rows * height))
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = number % columns * width + MARGIN, number // columns * height + MARGIN
        if tile.picture is not None:
            with Image.open(io.BytesIO(tile.picture)) as picture:
                space = (TILE - picture.width) // 2, (TILE - picture.height) // 2
                sheet.paste(picture, (left + space[0], top + space[1]))
        _write(draw, (left, top + TILE + MARGIN), tile.row)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], row: QualityRow) -> None:
    """Write name and flags below a picture."""
    colour = RED if row.status == "failed" else AMBER if row.flags else GREY
    words = row.reason.partition(":")[0] if row.status == "failed" else row.flags
    font = ImageFont.load_default(FONT_SIZE)
    lines = [row.name, *_wrapped(words.replace("W_", ""), draw, font)][:MAX_LINES]
    for number, line in enumerate(lines):
        while draw.textlength(line, font) > TILE and len(line) > 1:
            line = line[:-2] + "…"
        fill = "white" if number == 0 else colour
        draw.text((place[0], place[1] + number * (FONT_SIZE + MARGIN)), line, fill, font)


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Iterator[str]:
    """Yield the words of a text in lines that fit below a picture."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > TILE:
            yield line
            longer = word
        line = longer
    yield line
