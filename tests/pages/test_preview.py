import io
import json
import tracemalloc

import matplotlib.image
import numpy as np
import pytest
from hostile_pages import lesion
from laws import (
    GRIDS,
    ball,
    ball_volume_mm3,
    centre_mm,
    grid_around,
    lps,
    oblique,
    orientations,
    ras,
)

from volseg.io.nifti import read_volume
from volseg.pages import preview as preview_module
from volseg.pages.preview import (
    lesion_colour,
    lesion_points,
    make_preview,
    montage_jpeg,
    point_of,
    smaller_jpeg,
)
from volseg.volume import Geometry, Volume

PLENTY = 4_000_000


def noisy(shape, seed=0, low=-100, high=100):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def two_balls(affine, margin=6):
    geometry = grid_around(24, affine, margin)
    centre = centre_mm(geometry)
    ids = ball(8, geometry, centre - [10, 3, 0]) * 1 + ball(4, geometry, centre + [12, 4, 5]) * 2
    return geometry, ids.astype(np.uint16), (centre - [10, 3, 0], centre + [12, 4, 5])


def centroid_mm(preview, number):
    return preview.ids.geometry.to_world_mm(np.argwhere(preview.ids.array == number)).mean(axis=0)


@pytest.mark.parametrize("grid", ["ras", "lps", "oblique"])  # sheared ones are not read
@pytest.mark.parametrize("max_bytes", [PLENTY, 12_000])
def test_a_point_of_the_patient_has_its_intensity_and_its_lesion_in_the_preview(grid, max_bytes):
    """With a linear intensity field, a block's mean is the value at its centre, on any grid."""
    geometry, ids, centres = two_balls(GRIDS[grid]((0.8, 0.9, 1.6)))
    field = np.array([1.0, -2.0, 3.0])
    world = geometry.to_world_mm(np.indices(geometry.shape).reshape(3, -1).T)
    scan = Volume((world @ field).reshape(geometry.shape).astype(np.float32), geometry)
    preview = make_preview(scan, ids, unit="a.u.", max_bytes=max_bytes)
    assert (max(preview.factors) > 1) == (max_bytes < PLENTY)
    image = preview.image
    inner = np.argwhere(np.ones(image.array.shape))
    # Blocks at the end may be smaller.
    inner = inner[((inner > 0) & (inner < np.array(image.array.shape) - 1)).all(axis=1)]
    stored = image.array[tuple(inner.T)]
    inside = (stored > 0) & (stored < 255)  # the others are clipped
    assert inside.mean() > 0.9
    expected = image.geometry.to_world_mm(inner) @ field
    np.testing.assert_allclose(
        image.intensities(stored)[inside], expected[inside], atol=0.51 * image.slope
    )
    for number, centre in enumerate(centres, start=1):
        assert (
            np.linalg.norm(centroid_mm(preview, number) - centre)
            < max(image.geometry.spacing_mm) / 2
        )
        volume = np.count_nonzero(preview.ids.array == number) * image.geometry.voxel_volume_mm3
        assert volume == pytest.approx(ball_volume_mm3((8, 4)[number - 1]), rel=0.2)


@pytest.mark.parametrize("max_bytes", [PLENTY, 6000])
def test_all_48_axis_orders_give_the_same_preview(max_bytes):
    geometry, ids, _ = two_balls(oblique((1.1, 0.9, 1.7)), margin=2)
    scan = Volume(noisy(geometry.shape) + ids.astype(np.int16) * 100, geometry)
    expected = make_preview(scan, ids, unit="HU", max_bytes=max_bytes)
    for (stored, affine), (numbers, _) in zip(
        orientations(scan), orientations(scan.with_array(ids)), strict=True
    ):
        turned = Volume(stored, Geometry(stored.shape, affine))
        preview = make_preview(turned, numbers, unit="HU", max_bytes=max_bytes)
        np.testing.assert_array_equal(preview.ids.array, expected.ids.array)
        np.testing.assert_allclose(
            preview.image.geometry.affine, expected.image.geometry.affine, atol=1e-9
        )
        # A float32 sum in another order may round a half the other way.
        assert np.abs(preview.image.array.astype(int) - expected.image.array).max() <= 1
        assert preview.window == pytest.approx(expected.window)


def test_packed_volumes_read_back_unchanged(tmp_path):
    geometry, ids, _ = two_balls(lps((0.7, 0.7, 2.5)))
    preview = make_preview(
        Volume(noisy(geometry.shape), geometry), ids, unit="HU", max_bytes=PLENTY
    )
    for packed, volume in (
        (preview.packed_image, preview.image),
        (preview.packed_ids, preview.ids),
    ):
        (tmp_path / "a.nii.gz").write_bytes(packed)
        unpacked = read_volume(tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(unpacked.array, volume.array)
        np.testing.assert_allclose(unpacked.geometry.affine, volume.geometry.affine, atol=1e-4)
        assert (unpacked.slope, unpacked.intercept) == (volume.slope, volume.intercept)


def test_the_preview_of_a_large_scan_is_small_and_needs_little_memory():
    shape = (512, 512, 200)  # noise hardly compresses
    array = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape))), np.int8).reshape(
        shape, order="F"
    )
    ids = np.zeros(shape, np.uint16, order="F")
    for n, corner in enumerate([(150, 170, 10), (350, 330, 190), (256, 256, 100)], start=1):
        ids[tuple(slice(i - 4 + n, i + 4) for i in corner)] = n
    scan = Volume(array, Geometry(shape, lps((0.7, 0.7, 1.2))))
    tracemalloc.start()
    preview = make_preview(scan, ids, unit="HU", max_bytes=3_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(preview.packed_image) + len(preview.packed_ids) <= 3_000_000
    assert max(preview.image.geometry.spacing_mm) <= 2.0
    assert set(np.unique(preview.ids.array)) == {0, 1, 2, 3}
    assert preview.part.startswith("the lesions and")
    assert peak < 45e6  # the scan takes 52 MB, in float64 419 MB


def test_full_resolution_stays_round_a_lesion_where_the_body_is_too_large():
    shape = (200, 200, 200)
    array = noisy(shape)
    ids = np.zeros(shape, np.uint8)
    ids[100:104, 90:95, 97:103] = 1
    scan = Volume(array, Geometry(shape, ras((1.5, 1.5, 1.5))))
    preview = make_preview(scan, ids, unit="HU", max_bytes=1_000_000)
    assert preview.factors == (1, 1, 1)
    lengths_mm = np.array(preview.image.array.shape) * 1.5
    assert (lengths_mm >= np.array([4, 5, 6]) * 1.5 + 100).all()
    assert (lengths_mm < 200).all()


def test_lesions_of_a_single_voxel_do_not_vanish():
    geometry = Geometry((60, 60, 60), oblique((0.5, 0.5, 0.5)))
    rng = np.random.default_rng(1)
    ids = np.zeros(geometry.shape, np.uint16)
    places = rng.choice(20**3, 300, replace=False)  # at most one in each 3 × 3 × 3 voxels
    for n, place in enumerate(places, start=1):
        ids[tuple(np.array(np.unravel_index(place, (20, 20, 20))) * 3 + rng.integers(0, 3, 3))] = n
    scan = Volume(noisy(geometry.shape), geometry)
    preview = make_preview(scan, ids, unit="HU", max_bytes=12_000)
    assert min(preview.factors) >= 3
    assert preview.ids.array.dtype == np.uint16
    present = set(np.unique(preview.ids.array)) - {0}
    assert len(present) + preview.not_drawn == 300
    assert len(present) > 290 if max(preview.factors) == 3 else len(present) > 150
    for number in list(present)[:20]:
        true = geometry.to_world_mm(np.argwhere(ids == number))[0]
        offset = np.abs(
            preview.ids.geometry.to_index(np.vstack([true, centroid_mm(preview, number)]))
        )
        assert np.abs(offset[0] - offset[1]).max() <= 0.5 + 1e-6


def test_the_window_holds_lesions_and_their_surroundings():
    geometry, ids, _ = two_balls(ras((1, 1, 2)))
    lung = noisy(geometry.shape, low=-900, high=-800) + (ids > 0) * 850
    low, high = make_preview(
        Volume(lung.astype(np.int16), geometry), ids, unit="HU", max_bytes=PLENTY
    ).window
    assert low < -850 < 0 < high < 400
    soft = noisy(geometry.shape, low=35, high=45) + (ids > 0) * 20
    low, high = make_preview(
        Volume(soft.astype(np.int16), geometry), ids, unit="HU", max_bytes=PLENTY
    ).window
    assert high - low == pytest.approx(200)
    assert low < 40 < 60 < high
    magnetic = noisy(geometry.shape, low=0, high=500).astype(np.float32)
    magnetic[ids == 2] = 5000  # less than a hundredth of the voxels
    low, high = make_preview(Volume(magnetic, geometry), ids, unit="a.u.", max_bytes=PLENTY).window
    assert (low < 20, high) == (True, 5000)


def test_non_finite_and_constant_voxels_are_handled():
    geometry, ids, _ = two_balls(ras((1, 1, 2)))
    holes = noisy(geometry.shape).astype(np.float32)
    holes[ids == 1] = np.nan
    for unit in ("HU", "a.u."):
        preview = make_preview(Volume(holes, geometry), ids, unit=unit, max_bytes=PLENTY)
        assert all(map(np.isfinite, preview.window))
        montage_jpeg(
            Volume(holes, geometry), ids, window=preview.window, point_mm=None, extent_mm=0
        )
    for shape in ((2, 2, 2), (40, 2, 3)):
        flat = Volume(np.zeros(shape, np.int16), Geometry(shape, ras((1, 1, 1))))
        low, high = make_preview(
            flat, np.ones(shape, np.uint8), unit="a.u.", max_bytes=PLENTY
        ).window
        assert low < high


def test_the_point_of_a_lesion_lies_in_it_and_in_the_slice_of_its_long_axis():
    geometry = Geometry((40, 40, 20), oblique((1.0, 1.0, 2.5)))
    ids = np.zeros(geometry.shape, np.uint8)
    ids[5:30, 5:30, 8:14] = 1
    ids[10:30, 10:30, 8:14] = 0  # an angle, whose centroid lies outside
    preview = make_preview(
        Volume(noisy(geometry.shape), geometry), ids, unit="HU", max_bytes=PLENTY
    )
    ends = geometry.to_world_mm(np.array([[5, 29, 12], [9, 5, 12]]))
    centroid = dict(
        zip(("centroid_r_mm", "centroid_a_mm", "centroid_s_mm"), centroid_mm(preview, 1).tolist())
    )
    written = {
        f"long_axis_p{n}_ras": json.dumps([round(float(v), 2) for v in end])
        for n, end in enumerate(ends)
    }
    without = lesion_points(preview, [lesion(lesion_id=1, **centroid)])[1]
    with_axis = lesion_points(preview, [lesion(lesion_id=1, **centroid, **written)])[1]
    for point in (without, with_axis):
        index = np.rint(geometry.to_index(np.array([point]))[0]).astype(int)
        assert ids[tuple(index)] == 1
    assert index[2] == 12
    assert lesion_points(preview, [lesion(lesion_id=7, **centroid)]) == {}


def test_points_are_read_as_the_tables_write_them():
    assert point_of("[12.5, -3.25, 40]") == (12.5, -3.25, 40.0)
    assert [point_of(text) for text in (None, "", "[1, 2]", "a b c", "[NaN, 1, 2]")] == [None] * 5


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


def test_colours_of_neighbours_differ():
    colours = np.array([lesion_colour(n) for n in range(1, 60)])
    assert np.abs(np.diff(colours.astype(int), axis=0)).sum(axis=1).min() > 100


@pytest.mark.parametrize("n", [20, 200])
def test_lesions_that_spread_over_the_scan_are_kept_in_one_pass_however_many(n, monkeypatch):
    shape = (40, 41, 30)
    rng = np.random.default_rng(0)
    ids = (rng.integers(1, n + 1, shape) * (rng.random(shape) < 0.05)).astype(np.uint8)
    scan = Volume(
        rng.normal(0, 100, shape).astype(np.int16), Geometry(shape, oblique((0.5, 0.6, 0.7)))
    )
    calls, slabs = [], preview_module._slabs
    # A lesion has fewer voxels than a piece, but its box has more.
    monkeypatch.setattr(preview_module, "PIECE_VOXELS", 5000)
    monkeypatch.setattr(preview_module, "_slabs", lambda *part: calls.append(part) or slabs(*part))
    preview = make_preview(scan, ids, unit="a.u.", max_bytes=9000)
    assert max(preview.factors) > 1
    n_previews = len({part[:2] for part in calls})
    assert len(calls) <= 2 * n_previews
    drawn = np.unique(preview.ids.array)
    assert len(drawn) - 1 == n - preview.not_drawn
    assert preview.not_drawn < n / 10


def test_the_montage_of_noise_can_be_written_as_jpeg():
    shape, pixels = (150, 150, 150), 150
    ids = np.random.default_rng(0).integers(1, 5000, shape).astype(np.uint16)
    scan = Volume(noisy(shape), Geometry(shape, np.diag([-1.0, -1.0, 1.0, 1.0])))
    jpeg = montage_jpeg(scan, ids, window=(-100, 100), point_mm=None, extent_mm=0.0, pixels=pixels)
    assert len(jpeg) > 3 * pixels**2
    assert matplotlib.image.imread(io.BytesIO(jpeg), format="jpeg").shape == (pixels, 3 * pixels, 3)
    assert matplotlib.image.imread(io.BytesIO(smaller_jpeg(jpeg, 96)), format="jpeg").shape[0] == 96
