"""Networks of sequences of slices: one file per network; its name is the name in a recipe.

Such a file has a class `Settings`, a `SequenceSettings`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from volseg.errors import VolsegError
from volseg.registry import check_name, make_row

if TYPE_CHECKING:  # torch takes seconds to import; a recipe needs the names alone
    from volseg.networks.sequence.base import SequenceNetwork

OTHER_FILES = frozenset({"base", "pooling"})  # files of this folder that are no network


class SequenceSettings(ABC):
    """Settings of a network, a frozen dataclass: its fields are the keys under [sequence]."""

    __slots__ = ()

    @abstractmethod
    def build(self, in_features: int) -> SequenceNetwork:
        """Return a network with random weights, for slices of so many features."""


def sequence_names() -> list[str]:
    """Return the names of all networks of sequences."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if name not in OTHER_FILES]


def sequence_settings(name: str, **settings: Any) -> SequenceSettings:
    """Return the settings of the network with this name.

    Raises:
        VolsegError: there is no such file, or it refuses the settings.
    """
    check_name("sequence", name, sequence_names())
    row = getattr(importlib.import_module(f"{__name__}.{name}"), "Settings", None)
    if not (isinstance(row, type) and issubclass(row, SequenceSettings)):
        raise VolsegError(
            f"volseg/networks/sequence/{name}.py has no class Settings, a SequenceSettings",
            fix="write one, as in mean.py",
            code="E_RECIPE",
        )
    return make_row(f"sequence {name!r}", row, settings)


def build_sequence(name: str, *, in_features: int, **settings: Any) -> SequenceNetwork:
    """Return a network with random weights: (N, S, in_features) → (N, out_features).

    Raises:
        VolsegError: as `sequence_settings`.
    """
    return sequence_settings(name, **settings).build(in_features)
