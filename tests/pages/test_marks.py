import math

import numpy as np
from hostile_pages import lesion
from laws import oblique
from two_balls import centroid_mm, noisy

from volseg.pages.marks import lesion_colour, lesion_points, point_of
from volseg.pages.preview import make_preview
from volseg.volume import Geometry, Volume


def test_the_point_of_a_lesion_lies_in_it_and_in_the_slice_of_its_long_axis():
    geometry = Geometry((40, 40, 20), oblique((1.0, 1.0, 2.5)))
    ids = np.zeros(geometry.shape, np.uint8)
    ids[5:30, 5:30, 8:14] = 1
    ids[10:30, 10:30, 8:14] = 0  # an angle, whose centroid lies outside
    preview = make_preview(
        Volume(noisy(geometry.shape), geometry), ids, unit="HU", max_bytes=4_000_000
    )
    ends = geometry.to_world_mm(np.array([[5, 29, 12], [9, 5, 12]]))
    centroid = dict(
        zip(("centroid_r_mm", "centroid_a_mm", "centroid_s_mm"), centroid_mm(preview, 1).tolist())
    )
    written = {
        f"long_axis_p{n}_{axis}_mm": round(float(value), 2)
        for n, end in enumerate(ends)
        for axis, value in zip("ras", end, strict=True)
    }
    without = lesion_points(preview.ids, [lesion(lesion_id=1, **centroid)])[1]
    with_axis = lesion_points(preview.ids, [lesion(lesion_id=1, **centroid, **written)])[1]
    for point in (without, with_axis):
        index = np.rint(geometry.to_index(np.array([point]))[0]).astype(int)
        assert ids[tuple(index)] == 1
    assert index[2] == 12
    assert lesion_points(preview.ids, [lesion(lesion_id=7, **centroid)]) == {}


def test_a_point_with_an_unknown_coordinate_is_unknown():
    def bbox_min(*values):
        columns = dict(zip(("bbox_min_r_mm", "bbox_min_a_mm", "bbox_min_s_mm"), values))
        return point_of(lesion(lesion_id=1, **columns), "bbox_min")

    assert bbox_min(12.5, -3.25, 40.0) == (12.5, -3.25, 40.0)
    assert [bbox_min(), bbox_min(1.0, 2.0), bbox_min(math.nan, 1.0, 2.0)] == [None] * 3


def test_colours_of_neighbours_differ():
    colours = np.array([lesion_colour(n) for n in range(1, 60)])
    assert np.abs(np.diff(colours.astype(int), axis=0)).sum(axis=1).min() > 100
