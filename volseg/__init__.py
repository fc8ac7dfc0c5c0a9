"""Segmentation and measurement of lesions in 3D CT and MRI scans.

The commands of the command line are functions here: `plan`, `preprocess`, `train`, `infer`,
`measure`, `evaluate`, `compare`, `report`, `quantise`, `check` and `import_nnunet`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "check",
    "compare",
    "evaluate",
    "import_nnunet",
    "infer",
    "measure",
    "plan",
    "preprocess",
    "quantise",
    "report",
    "train",
]

if TYPE_CHECKING:
    from volseg.workflows import (
        check,
        compare,
        evaluate,
        import_nnunet,
        infer,
        measure,
        plan,
        preprocess,
        quantise,
        report,
        train,
    )


class _Workflow:
    """A function of `volseg.workflows`, loaded on first use so that `import volseg` is instant.

    Some workflows share their name with a package or module. Importing such a package sets it as an
    attribute here; `__set__` ignores that, so `volseg.infer` is always the function.
    `from volseg.infer.tiles import …` does not use the attribute.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Callable[..., Any]:
        from volseg import workflows

        return getattr(workflows, self.name)

    def __set__(self, module: Any, value: Any) -> None:
        pass


class _Package(ModuleType):
    (
        check,
        compare,
        evaluate,
        import_nnunet,
        infer,
        measure,
        plan,
        preprocess,
        quantise,
        report,
        train,
    ) = (_Workflow() for _ in range(11))


sys.modules[__name__].__class__ = _Package
