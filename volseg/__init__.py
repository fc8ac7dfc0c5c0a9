"""volseg turns 3D CT, MR and PET scans into lesions, and lesions into numbers for a study.

The commands of the command line are functions here: `cases`, `plan`, `preprocess`, `train`,
`pretrain`, `candidates`, `attach`, `infer`, `explain`, `measure`, `evaluate`, `compare`, `report`,
`methods`, `quantise`, `check` and `import_nnunet`.
`segment` and `measure_mask` do the same with a scan in memory and write no file; `load_model` loads
a model once. `read_table` reads tables as data frames, `read_volume`, `read_mask` and
`write_volume` scans and masks. A problem that you can fix is a `VolsegError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Geometry",
    "VolsegError",
    "Volume",
    "__version__",
    "attach",
    "candidates",
    "cases",
    "check",
    "compare",
    "evaluate",
    "explain",
    "import_nnunet",
    "infer",
    "load_model",
    "measure",
    "measure_mask",
    "methods",
    "plan",
    "preprocess",
    "pretrain",
    "quantise",
    "read_mask",
    "read_table",
    "read_volume",
    "report",
    "segment",
    "train",
    "write_volume",
]

if TYPE_CHECKING:
    from volseg.commands import (
        Geometry,
        VolsegError,
        Volume,
        attach,
        candidates,
        cases,
        check,
        compare,
        evaluate,
        explain,
        import_nnunet,
        infer,
        load_model,
        measure,
        measure_mask,
        methods,
        plan,
        preprocess,
        pretrain,
        quantise,
        read_mask,
        read_table,
        read_volume,
        report,
        segment,
        train,
        write_volume,
    )


def __getattr__(name: str) -> Any:
    """Load the commands on first use, so that `import volseg` is instant."""
    if name not in __all__:
        raise AttributeError(f"module 'volseg' has no attribute {name!r}")
    from volseg import commands

    return getattr(commands, name)


def __dir__() -> list[str]:
    return __all__
