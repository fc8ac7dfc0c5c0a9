from importlib.util import find_spec

import numpy as np
import pytest
from laws import ras
from two_times import CENTRE, draw, grid, movement

from volseg.errors import ScanError
from volseg.preprocess.register import Registration, register, transformed
from volseg.volume import Geometry, Volume

pytestmark = pytest.mark.skipif(not find_spec("SimpleITK"), reason="SimpleITK is not installed")
BALLS = [((25, 5, 10), 9), ((-22, 8, -10), 7), ((20, 12, -14), 6)]
PLACES = CENTRE + np.array([offset for offset, _ in BALLS])


@pytest.mark.parametrize(
    "frame_mm", [(0, 0, 0), (180, -90, 400)], ids=["same frame", "another frame"]
)
def test_a_patient_who_turned_and_shifted_is_found_to_a_millimetre(frame_mm):
    """7° and 12 mm; on another day the coordinates may have nothing in common."""
    moved = movement(7, (8.0, -6.0, 6.6))
    before, _ = draw(grid("RAS"), BALLS)
    after, _ = draw(grid("PSR", (1.6, 1.8, 2.0), tilt_deg=9), BALLS, moved, seed=1)
    affine = after.geometry.affine.copy()
    affine[:3, 3] += frame_mm
    moved[:3, 3] += frame_mm
    found = register(before, Volume(after.array, Geometry(after.geometry.shape, affine)))
    error = np.linalg.norm(transformed(found.moved, PLACES) - transformed(moved, PLACES), axis=1)
    assert error.max() < 1.0
    assert found.turned_deg == pytest.approx(7, abs=0.7)
    assert found.is_better
    assert found.disagreement_mm(PLACES).max() < 2.0
    # Where headers place the scans there is nothing in common in another frame.
    assert (found.similarity_before is None) is any(frame_mm)


def test_scans_that_have_nothing_in_common_are_refused_or_disagree():
    geometry = Geometry((40, 40, 24), ras((2.0, 2.0, 3.0)))
    noise = [
        Volume(np.random.default_rng(n).normal(size=geometry.shape).astype(np.float32), geometry)
        for n in (0, 1)
    ]
    found = register(*noise)
    corner = geometry.to_world_mm(np.array([[0, 0, 0], [39, 39, 23]]))
    assert not found.is_better or found.disagreement_mm(corner).max() > 3
    flat = Volume(np.zeros(geometry.shape, np.float32), geometry)
    with pytest.raises(ScanError, match="do not overlap or do not resemble"):
        register(noise[0], flat)


def test_angles_shifts_and_disagreement_are_those_of_the_matrices():
    moved, other = movement(33, (5, 0, 0)), movement(33, (5, 4, 0))
    found = Registration(moved, other, 0.5, 0.4)
    assert found.turned_deg == pytest.approx(33)
    np.testing.assert_allclose(found.shift_mm(CENTRE[None]), [5])
    np.testing.assert_allclose(found.disagreement_mm(PLACES), [4, 4, 4])
    assert not found.is_better
    assert Registration(moved, None, None, 0.4).is_better
    assert Registration(moved, None, None, 0.4).disagreement_mm(PLACES) is None
