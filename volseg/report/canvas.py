"""The matplotlib names that figures need, imported without MPLBACKEND.

matplotlib reads that variable on its first import and raises an error if it names an unknown backend,
such as the notebook of another environment. Figures are drawn into memory and need no backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "MPLBACKEND"


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

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "Text"]
