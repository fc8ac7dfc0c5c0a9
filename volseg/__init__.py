"""volseg turns 3D CT, MR and PET scans into lesions, and lesions into numbers for a study.

The commands of the command line are functions here: `cases`, `plan`, `preprocess`, `train`,
`infer`, `measure`, `evaluate`, `compare`, `report`, `quantise`, `check` and `import_nnunet`.
`read_table` reads their tables as data frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "cases",
    "check",
    "compare",
    "evaluate",
    "import_nnunet",
    "infer",
    "measure",
    "plan",
    "preprocess",
    "quantise",
    "read_table",
    "report",
    "train",
]

if TYPE_CHECKING:
    from volseg.commands import (
        cases,
        check,
        compare,
        evaluate,
        import_nnunet,
        infer,
        measure,
        plan,
        preprocess,
        quantise,
        read_table,
        report,
        train,
    )


def __getattr__(name: str) -> Any:
    """Load the commands on first use, so that `import volseg` is instant."""
    if name not in __all__:
        raise AttributeError(f"module 'volseg' has no attribute {name!r}")
    from volseg import commands

    return getattr(commands, name)


def __dir__() -> list[str]:
    return __all__
