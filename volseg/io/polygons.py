"""Polygons as masks: a pixel is inside if its centre is, by the number of edges beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DIGITS = 6  # of a coordinate in pixels: a centre within rounding of an edge is on the edge


def fill_polygons(
    polygons: Sequence[np.ndarray], shape: tuple[int, int]
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return the box of some closed polygons within an image, and the pixels inside them in it.

    A pixel is inside if its centre lies within an odd number of the polygons, so that a polygon
    within another one is a hole. Of a centre on an edge the side towards larger indices counts, so
    that it belongs to one of two polygons that share the edge.

    Args:
        polygons: (N, 2) corners each, in pixels; a whole number is the centre of a pixel.
        shape: of the image; what lies outside it is cut off.

    Returns:
        The box as slices, and (rows, columns) bool of its shape.

    Source: Shimrat, Algorithm 112: position of point relative to polygon. CACM 5(8), 1962.
    """
    points = [np.round(polygon, DIGITS) for polygon in polygons]
    low, high = _bounds(points, shape)
    n_rows, n_columns = (high - low).tolist()
    box = slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))
    crossings = np.zeros((n_rows, n_columns + 1), np.int32)
    for polygon in points:
        rows, columns = _crossings(polygon - low, n_rows)
        np.add.at(crossings, (rows, np.clip(columns, 0, n_columns)), 1)
    return box, (crossings.cumsum(axis=1)[:, :n_columns] & 1).astype(bool)


def _bounds(points: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pixel (2,) of the box of all polygons, and the one behind its last."""
    size = np.array(shape)
    corners = np.concatenate([np.zeros((0, 2)), *points])
    if not len(corners):
        return np.zeros(2, int), np.zeros(2, int)
    low = np.clip(np.ceil(corners.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.floor(corners.max(axis=0)) + 1, low, size).astype(int)
    return low, high


def _crossings(polygon: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and first column behind each place where an edge crosses a line of centres."""
    ends = np.roll(polygon, -1, axis=0)
    is_down = polygon[:, 0] <= ends[:, 0]
    first, last = (np.where(is_down[:, None], *pair) for pair in ((polygon, ends), (ends, polygon)))
    # An edge crosses the rows from its upper end to before its lower end, so that no corner
    # is counted twice.
    start, stop = (np.clip(np.ceil(end[:, 0]), 0, n_rows).astype(int) for end in (first, last))
    n = stop - start
    edges = np.repeat(np.arange(len(polygon)), n)
    rows = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + np.repeat(start, n)
    (row, column), (row_end, column_end) = first[edges].T, last[edges].T
    places = column + (rows - row) / (row_end - row) * (column_end - column)
    return rows, np.ceil(np.round(places, DIGITS)).astype(int)
