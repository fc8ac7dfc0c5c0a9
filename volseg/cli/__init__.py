"""The command line: derived from `volseg.options`, prints `volseg.reports`."""

from volseg.cli.app import app, main

__all__ = ["app", "main"]
