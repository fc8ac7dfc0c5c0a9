"""The matplotlib names that figures need, imported without MPLBACKEND.

matplotlib reads that variable on its first import and raises an error if it does not know the
backend, such as that of another environment's notebook. Figures are drawn into memory.
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
