import sys

import numpy as np
import pytest

from volseg.preprocessing.crop import body_threshold, box_where
from volseg.volume import BoundingBox

SHAPE = (6, 7, 8)


def test_the_body_of_an_mri_is_found_at_any_intensity_scale():
    rng = np.random.default_rng(0)
    scan = np.abs(rng.normal(0, 0.02, (40, 40, 40)))
    scan[10:30, 8:32, 5:35] += 1
    for scale in (1e-3, 1.0, 1e6):
        box = _box_above(scan * scale, body_threshold(scan * scale))
        assert box == BoundingBox((10, 8, 5), (30, 32, 35))


def test_a_scan_of_air_has_no_body():
    assert _box_above(np.full(SHAPE, -1000), -500) is None


def _box_above(array, threshold):
    return box_where(lambda part: array[part] > threshold, array)


@pytest.mark.parametrize("layout", ["C", "F"])
def test_the_box_of_slabs_is_the_box_of_the_whole_array(layout, monkeypatch):
    monkeypatch.setattr(sys.modules["volseg.volume"], "SLAB_VOXELS", 40)
    rng = np.random.default_rng(0)
    for _ in range(20):
        array = np.asarray(rng.random((9, 8, 7)) > 0.99, order=layout)
        assert box_where(lambda part, array=array: array[part], array) == BoundingBox.around(array)
