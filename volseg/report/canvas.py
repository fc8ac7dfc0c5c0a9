"""What pictures need of matplotlib. They are drawn into memory, so the backend for windows that MPLBACKEND names has no say.

matplotlib reads that variable when it is first imported, and refuses to be imported where it does not know the name, such as that of
another environment's notebook. Modules that draw import these names from here.
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
