"""volseg turns 3D CT and MRI scans into lesions, and lesions into numbers that a study can defend.

The workflows of the command line are functions here: `volseg.preprocess`, `train`, `infer`, `measure`, `evaluate`, `check`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "check", "evaluate", "infer", "measure", "preprocess", "train"]

if TYPE_CHECKING:
    from volseg.workflows import check, evaluate, infer, measure, preprocess, train


def __getattr__(name: str) -> Any:
    """Load the workflows on first use, so that `import volseg` is instant."""
    if name in __all__:
        from volseg import workflows

        return getattr(workflows, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
