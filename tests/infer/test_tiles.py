import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.infer.tiles import gaussian_window, tile_boxes, tile_starts


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 96), st.floats(0, 0.9))
def test_tiles_cover_the_axis_inside_it_and_overlap_as_asked(length, patch, overlap):
    starts = tile_starts(length, patch, overlap)
    assert starts[0] == 0
    if length <= patch:
        assert starts == [0]
        return
    assert starts[-1] + patch == length
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert gaps.max() <= max(1, patch * (1 - overlap)) + 1


def test_boxes_run_along_s_slowest():
    boxes = tile_boxes((8, 6, 10), (4, 6, 5), 0.0)
    assert [box[2].start for box in boxes] == sorted(box[2].start for box in boxes)
    covered = np.zeros((8, 6, 10), int)
    for box in boxes:
        covered[box] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("patch", [(8, 8, 8), (9, 16, 5), (96, 96, 96)])
def test_the_window_is_symmetric_largest_in_the_centre_and_nowhere_zero(patch):
    window = gaussian_window(patch)
    for axis in range(3):
        np.testing.assert_allclose(window, np.flip(window, axis), rtol=1e-5)
    assert window.max() == 1
    assert window[tuple(n // 2 for n in patch)] == pytest.approx(1, abs=0.2)
    assert window.min() > 0
