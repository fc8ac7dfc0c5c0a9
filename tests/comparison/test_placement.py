import numpy as np
import pytest
from two_times import CENTRE, movement

from volseg.comparison.placement import trusted_placement
from volseg.preprocessing.register import Registration

MOVE, LONG_MOVE = movement(5, (9, 0, 0)), movement(5, (60, 0, 0))
TURN, TILT = movement(25, (0, 0, 0)), movement(12, (9, 0, 0), axis=(1, 0, 0))


@pytest.mark.parametrize(
    ("forward", "backward", "similarity", "expected", "warning"),
    [
        (MOVE, movement(5, (9, 1, 0)), (0.5, 0.9), "rigid", ""),
        (MOVE, movement(5, (9, 4, 0)), (0.5, 0.9), "rigid", "is uncertain by 4.0 mm"),
        (MOVE, None, (0.5, 0.9), "rigid", "worked in one direction only"),
        (MOVE, TILT, (0.5, 0.9), "rigid", "about the axial plane"),
        (MOVE, movement(40, (9, 0, 0), axis=(0, 0, 1)), (0.5, 0.9), "rigid", ""),
        (LONG_MOVE, LONG_MOVE, (None, 0.9), "rigid", "W_MOVED: registration moved a lesion by 60"),
        (TURN, TURN, (0.5, 0.9), "rigid", "turned the scan by 25°"),
        (MOVE, MOVE, (0.9, 0.8), "none", "nowhere more alike"),
        (movement(0, (1, 0, 0)), movement(0, (1, 0, 0)), (0.9, 0.8), "none", ""),
    ],
)
def test_how_far_a_registration_is_trusted(forward, backward, similarity, expected, warning):
    registration = Registration(forward, backward, *similarity)
    placed = trusted_placement(registration, CENTRE[None], normal=np.array([0.0, 0.0, 1.0]))
    assert placed.columns["registration"] == expected
    np.testing.assert_array_equal(
        placed.transform.matrix, registration.transform.matrix if expected == "rigid" else np.eye(4)
    )
    assert warning in "; ".join(placed.warnings)
    assert bool(placed.warnings) is bool(warning)
    assert bool(placed.doubt) is ("W_REGISTRATION" in "; ".join(placed.warnings))
