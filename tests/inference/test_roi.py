import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.inference.roi import find_region
from volseg.inference.stream import ArrayPlanes, Tiling
from volseg.inference.torch_backend import TorchBackend
from volseg.preprocessing.crop import scaled_box
from volseg.volume import BoundingBox


def over(level):
    """Make a network that assigns voxels over a level to class 1."""
    network = torch.nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
        network.bias[:] = torch.tensor([0.0, -float(level)])
    return TorchBackend(network, torch.device("cpu"))


class TurnedPlanes:
    """The planes of an array along any axis."""

    def __init__(self, array, axis):
        self.array, self.axis, self.shape = array, axis, array.shape[1:]

    def read(self, start, stop):
        return np.take(self.array, range(start, stop), 1 + self.axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_region_is_the_box_of_class_1_along_any_axis_of_planes(axis):
    rng = np.random.default_rng(axis)
    array = rng.normal(size=(1, 21, 17, 26)).astype(np.float32)
    array[0, rng.integers(3, 18, 4), rng.integers(2, 15, 4), rng.integers(4, 22, 4)] = 9
    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5)
    planes = TurnedPlanes(array, axis)
    assert find_region(planes, over(6), tiling) == BoundingBox.around(array[0] > 6)
    assert find_region(planes, over(10), tiling) is None


def test_a_volume_smaller_than_a_patch_has_no_region_beyond_its_faces():
    array = np.full((1, 3, 5, 4), 7, np.float32)
    tiling = Tiling(patch_shape=(8, 8, 8), overlap=0.5)
    assert find_region(ArrayPlanes(array), over(6), tiling) == BoundingBox.whole((3, 5, 4))


SIZES = st.tuples(*[st.integers(1, 40)] * 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_scaled_box_covers_the_same_part_of_the_field_of_view_and_no_voxel_more(data):
    shape, target = data.draw(SIZES), data.draw(SIZES)
    ends = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in shape
    ]
    box = BoundingBox(tuple(a for a, _ in ends), tuple(b for _, b in ends))
    margin = data.draw(st.tuples(*[st.floats(0, 5)] * 3))
    scaled = scaled_box(box, shape, target, margin)
    for axis, (n, m) in enumerate(zip(shape, target, strict=True)):
        start, stop = box.start[axis] / n * m - margin[axis], box.stop[axis] / n * m + margin[axis]
        assert scaled.start[axis] == 0 or start - 1 - 1e-9 < scaled.start[axis] <= start + 1e-9
        assert scaled.stop[axis] == m or stop - 1e-9 <= scaled.stop[axis] < stop + 1 + 1e-9
    assert scaled_box(BoundingBox.whole(shape), shape, target) == BoundingBox.whole(target)
