import numpy as np
import pytest
from laws import ras
from two_times import CENTRE, draw, grid, movement

from volseg.errors import ScanError
from volseg.preprocessing.register import Registration, register
from volseg.volume import Geometry, Rigid, Volume

BALLS = [((25, 5, 10), 9), ((-22, 8, -10), 7), ((20, 12, -14), 6)]
POINTS_MM = CENTRE + np.array([offset for offset, _ in BALLS])


@pytest.mark.parametrize(
    "frame_mm", [(0, 0, 0), (180, -90, 400)], ids=["same frame", "another frame"]
)
def test_rotation_and_translation_are_recovered_to_a_millimetre(frame_mm):
    """7° and 12 mm; the coordinates of another day may be unrelated."""
    moved = movement(7, (8.0, -6.0, 6.6))
    before, _ = draw(grid("RAS"), BALLS)
    after, _ = draw(grid("PSR", (1.6, 1.8, 2.0), tilt_deg=9), BALLS, moved, seed=1)
    affine = after.geometry.affine.copy()
    affine[:3, 3] += frame_mm
    frame = Rigid.about(np.zeros(3), np.eye(3), np.array(frame_mm))
    result = register(before, Volume(after.array, Geometry(after.geometry.shape, affine)))
    expected_mm = frame.apply(moved.apply(POINTS_MM))
    difference = result.transform.apply(POINTS_MM) - expected_mm
    assert np.linalg.norm(difference, axis=1).max() < 1.0
    assert result.transform.angle_deg == pytest.approx(7, abs=0.7)
    assert result.is_better
    assert result.disagreement_mm(POINTS_MM).max() < 2.0
    # In another frame the scans do not overlap at the positions in their headers.
    assert (result.similarity_before is None) is any(frame_mm)


def test_unrelated_scans_are_refused_or_disagree():
    geometry = Geometry((40, 40, 24), ras((2.0, 2.0, 3.0)))
    noise = [
        Volume(np.random.default_rng(n).normal(size=geometry.shape).astype(np.float32), geometry)
        for n in (0, 1)
    ]
    result = register(*noise)
    corners_mm = geometry.to_world_mm(np.array([[0, 0, 0], [39, 39, 23]]))
    assert not result.is_better or result.disagreement_mm(corners_mm).max() > 3
    flat = Volume(np.zeros(geometry.shape, np.float32), geometry)
    with pytest.raises(ScanError, match="do not overlap or do not resemble"):
        register(noise[0], flat)


def test_shifts_and_disagreement_follow_from_the_transforms():
    moved, other = movement(33, (5, 0, 0)), movement(33, (5, 4, 0))
    result = Registration(moved, other, 0.5, 0.4)
    np.testing.assert_allclose(result.shift_mm(CENTRE[None]), [5])
    np.testing.assert_allclose(result.disagreement_mm(POINTS_MM), [4, 4, 4])
    assert not result.is_better
    assert Registration(moved, None, None, 0.4).is_better
    assert Registration(moved, None, None, 0.4).disagreement_mm(POINTS_MM) is None
