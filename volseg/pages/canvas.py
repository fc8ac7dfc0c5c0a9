"""Figures drawn into memory by matplotlib, imported without MPLBACKEND.

matplotlib reads that variable on its first import and raises an error if it does not know the
backend, such as that of another environment's notebook.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from volseg.inputs import shorten

VARIABLE = "MPLBACKEND"
MAX_LETTERS = 200  # per text: the width of a figure in memory grows with its longest text


@contextmanager
def _no_backend_named() -> Iterator[None]:
    name = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if name is not None:
            os.environ[VARIABLE] = name


with _no_backend_named():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = ["Axes", "Figure", "new_figure", "png_bytes"]


def new_figure(width: float, height: float, background: str = "white") -> Figure:
    """Return an empty figure; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure, dpi: int = 100) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label named $x$ is not a formula
        text.set_text(shorten(text.get_text().encode(errors="replace").decode(), MAX_LETTERS))
    buffer, colour = io.BytesIO(), figure.get_facecolor()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=colour, metadata={"Software": None})
    return buffer.getvalue()
