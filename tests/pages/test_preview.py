import tracemalloc

import numpy as np
import pytest
from laws import (
    GRIDS,
    ball_volume_mm3,
    lps,
    oblique,
    orientations,
    ras,
)
from two_balls import centroid_mm, noisy, two_balls

from volseg.io.volumes import read_volume
from volseg.pages import blocks as blocks_module
from volseg.pages.montage import montage_jpeg
from volseg.pages.preview import make_preview
from volseg.volume import Geometry, Volume

PLENTY = 4_000_000


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


@pytest.mark.parametrize("n", [20, 200])
def test_lesions_that_spread_over_the_scan_are_kept_in_one_pass_however_many(n, monkeypatch):
    shape = (40, 41, 30)
    rng = np.random.default_rng(0)
    ids = (rng.integers(1, n + 1, shape) * (rng.random(shape) < 0.05)).astype(np.uint8)
    scan = Volume(
        rng.normal(0, 100, shape).astype(np.int16), Geometry(shape, oblique((0.5, 0.6, 0.7)))
    )
    calls, slabs = [], blocks_module.Blocks.slabs
    # A lesion has fewer voxels than a piece, but its box has more.
    monkeypatch.setattr(blocks_module, "PIECE_VOXELS", 5000)
    monkeypatch.setattr(
        blocks_module.Blocks, "slabs", lambda *part: calls.append(part[0]) or slabs(*part)
    )
    preview = make_preview(scan, ids, unit="a.u.", max_bytes=9000)
    assert max(preview.factors) > 1
    assert len(calls) <= 3 * len(set(calls))  # image, ids, redrawn lesions
    drawn = np.unique(preview.ids.array)
    assert len(drawn) - 1 == n - preview.not_drawn
    assert preview.not_drawn < n / 10
