import io

import matplotlib.image
import numpy as np
import pytest
from laws import ball, centre_mm, lps
from two_balls import noisy

from volseg.pages.marks import lesion_colour
from volseg.pages.montage import montage_jpeg, smaller_jpeg
from volseg.volume import Geometry, Volume


def test_the_montage_shows_the_right_on_the_left_outlines_and_a_true_scale():
    geometry = Geometry((80, 80, 80), lps((1, 1, 1)))
    centre = centre_mm(geometry)
    right = ball(6, geometry, centre + [25, 0, 0])
    ids = ball(10, geometry, centre).astype(np.uint8)
    scan = Volume(np.where(right, 1000, np.where(ids, 0, -500)).astype(np.int16), geometry)
    jpeg = montage_jpeg(
        scan, ids, window=(-500.0, 500.0), point_mm=tuple(centre), extent_mm=20, pixels=320
    )
    picture = matplotlib.image.imread(io.BytesIO(jpeg), format="jpeg").astype(int)
    assert picture.shape == (320, 960, 3)
    axial = picture[:, :320]
    # Without the scale bar and its text at the bottom.
    bright = np.argwhere((axial.min(axis=2) > 200) & (np.arange(320)[:, None] < 280))
    scale = 320 / 50  # pixels per mm: 2.2 × 20 mm is less than the minimum of 50 mm
    # The near edge of the ball is 25 − 6 mm to the right.
    assert abs(160 - bright[:, 1].max() - 19 * scale) < 3
    colour = np.array(lesion_colour(1))
    outline = np.argwhere(np.abs(axial - colour).max(axis=2) < 60)
    assert np.ptp(outline[:, 1]) == pytest.approx(20 * scale, abs=scale + 2)
    bar = np.flatnonzero(axial[311].min(axis=1) > 230)
    assert len(bar) == pytest.approx(10 * scale, abs=3)
    small = matplotlib.image.imread(io.BytesIO(smaller_jpeg(jpeg, 40)), format="jpeg")
    assert small.shape == (40, 120, 3)


@pytest.mark.slow
def test_the_montage_of_noise_can_be_written_as_jpeg():
    shape, pixels = (150, 150, 150), 150
    ids = np.random.default_rng(0).integers(1, 5000, shape).astype(np.uint16)
    scan = Volume(noisy(shape), Geometry(shape, np.diag([-1.0, -1.0, 1.0, 1.0])))
    jpeg = montage_jpeg(scan, ids, window=(-100, 100), point_mm=None, extent_mm=0.0, pixels=pixels)
    assert len(jpeg) > 3 * pixels**2
    assert matplotlib.image.imread(io.BytesIO(jpeg), format="jpeg").shape == (pixels, 3 * pixels, 3)
    assert matplotlib.image.imread(io.BytesIO(smaller_jpeg(jpeg, 96)), format="jpeg").shape[0] == 96
