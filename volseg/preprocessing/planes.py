"""The axial, coronal and sagittal planes of a scan along R, A and S."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Plane:
    """A plane as radiologists draw it: R or A at the left, S or A at the top.

    Args:
        across, up, through: canonical axes; 0 is R, 1 is A, 2 is S.
    """

    name: str
    across: int
    up: int
    through: int

    @property
    def letters(self) -> str:
        """Directions at the left and at the right edge."""
        return ("RL", "AP")[self.across]

    def slice_of(self, array: np.ndarray, index: int) -> np.ndarray:
        """Return a slice (across, up) of (R, A, S) as a view; `np.take` copies."""
        return array[(slice(None),) * self.through + (index,)]


PLANES = (Plane("axial", 0, 1, 2), Plane("coronal", 0, 2, 1), Plane("sagittal", 1, 2, 0))
