"""The probability of every label on the scan's grid, streamed into files."""

import numpy as np
import pytest
import torch
from laws import GRIDS, grid_around, orientations

from volseg.preprocessing.prepare import prepare
from volseg.preprocessing.probabilities import LEVELS, ProbabilityMaps
from volseg.preprocessing.restore import MaskRestorer
from volseg.recipe import Preprocess, Window
from volseg.volume import Geometry, Volume

SETTINGS = Preprocess(
    spacing_mm=(1.3, 1.1, 1.7), normalise=Window(low=-1, high=1, mean=0, sd=1), crop="none"
)


def smooth_logits(n, shape, seed=0):
    """Return logits (n, R, A, S) of every certainty, from all but 0 to all but 1."""
    rng = torch.Generator().manual_seed(seed)
    coarse = 8 * torch.randn((1, n, 5, 5, 5), generator=rng)
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]


def restored(scan, n, folder, *, regions=False, axis=2, step=3):
    """Return mask, confidence and the map of each label, fed `step` planes at a time."""
    trail = prepare({"ct": scan}, SETTINGS).trail
    values = list(range(1, n + 1))
    logits = smooth_logits(n if regions else n + 1, trail.shape)
    restorer = MaskRestorer(trail, values, axis=axis, regions=regions)
    maps = ProbabilityMaps(values, folder, regions=regions)
    maps.begin(trail)
    restorer.on_logits = maps.add
    for part in logits.split(step, dim=1 + axis):
        restorer.add(part)
    shape = scan.geometry.shape
    arrays = []
    for value in values:
        file = maps.file_of(value)
        file.seek(0)
        arrays.append(np.frombuffer(file.read(), np.uint8).reshape(shape, order="F"))
    maps.close()
    return *restorer.result(), np.stack(arrays).astype(int)


def scan_on(geometry):
    noise = np.random.default_rng(0).normal(0, 1, geometry.shape).astype(np.float32)
    return Volume(noise, geometry)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("axis", [0, 2])
def test_the_mask_is_the_likeliest_label_and_the_confidence_its_probability(grid, axis, tmp_path):
    scan = scan_on(grid_around(11, grid((0.8, 1.0, 2.0)), margin=2))
    mask, confidence, maps = restored(scan, 3, tmp_path, axis=axis)
    background = LEVELS - maps.sum(axis=0)
    assert background.min() >= -2  # three rounded numbers
    by_class = np.stack([background, *maps])
    ranked = np.sort(by_class, axis=0)
    is_clear = ranked[-1] - ranked[-2] > 6
    np.testing.assert_array_equal(by_class.argmax(axis=0)[is_clear], mask[is_clear])
    inside = mask > 0
    of_label = np.take_along_axis(by_class, mask[None].astype(int), axis=0)[0]
    assert np.abs(of_label - confidence)[inside].max() <= 2
    assert (maps[:, ~inside] > 0).any()  # a label that lost has its probability too


def test_regions_have_a_probability_each_and_may_overlap(tmp_path):
    scan = scan_on(grid_around(11, GRIDS["oblique"]((0.8, 1.0, 2.0)), margin=2))
    mask, _, maps = restored(scan, 2, tmp_path, regions=True)
    assert (maps.sum(axis=0) > 1.5 * LEVELS).any()
    is_clear = np.abs(maps - LEVELS / 2).min(axis=0) > 3
    last = np.where(maps[1] > LEVELS / 2, 2, np.where(maps[0] > LEVELS / 2, 1, 0))
    np.testing.assert_array_equal(last[is_clear], mask[is_clear])


def test_axis_orders_and_slabs_do_not_matter(tmp_path):
    scan = scan_on(grid_around(9, GRIDS["ras"]((0.8, 1.0, 2.0)), margin=2))
    expected = restored(scan, 2, tmp_path)[2]
    for step in (1, 100):
        np.testing.assert_allclose(restored(scan, 2, tmp_path, step=step)[2], expected, atol=1)
    for stored, affine in list(orientations(scan))[::11]:
        maps = restored(Volume(stored, Geometry(stored.shape, affine)), 2, tmp_path)[2]
        order = next(
            Volume(numbers, Geometry(stored.shape, affine)).canonical().array
            for numbers in [maps[0]]
        )
        np.testing.assert_allclose(order, scan.with_array(expected[0]).canonical().array, atol=1)


def test_the_files_leave_nothing_behind(tmp_path):
    restored(scan_on(Geometry((8, 9, 7), np.diag([1.0, 1.0, 2.0, 1.0]))), 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_said_before_work_starts(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    from volseg.errors import EnvironmentProblem
    from volseg.preprocessing import probabilities

    monkeypatch.setattr(probabilities, "_reserve", full)  # a real full disk needs root
    scan = scan_on(Geometry((8, 9, 7), np.diag([1.0, 1.0, 2.0, 1.0])))
    with pytest.raises(EnvironmentProblem, match="no room for the probabilities"):
        restored(scan, 2, tmp_path)
