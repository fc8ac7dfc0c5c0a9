import numpy as np

from volseg.preprocessing.crop import body_threshold
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
    return BoundingBox.where(lambda part: array[part] > threshold, array)
