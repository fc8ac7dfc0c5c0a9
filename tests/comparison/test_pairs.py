"""Two masks of a patient through `measure` and `compare`: crumbs, and tilted scans."""

from __future__ import annotations

import numpy as np
import pytest
from laws import GRIDS, ball, centre_mm, grid_around, oblique, orientations, ras
from segmented_scans import segmented

from volseg.comparison.changes import lesion_changes
from volseg.comparison.pairs import MeasuredScan, pair_scans, unpaired_scan
from volseg.comparison.response import judge_response
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.sections import tilt_deg
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Geometry, Rigid, Volume

SPACING_MM = (1.0, 1.2, 1.5)
NODES = ("node",)


def measured(mask, geometry, case="p", name="tumour", objects="components"):
    names = {1: name, 2: "cyst"}
    lesions = label_lesions(mask.astype(np.uint8), geometry, objects=objects)
    image = Volume(np.where(mask > 0, 60, 20).astype(np.int16), geometry)
    rows = measure_lesions(segmented(image, lesions, case_id=case, label_names=names))
    return MeasuredScan(case, Volume(lesions.ids, geometry), rows)


def compared(before, after, moved=None, nodes=(), **options):
    """Compare two measured scans; return the row of the patient and those of the lesions."""
    moved = Rigid.identity() if moved is None else Rigid(moved)
    pair = pair_scans(before, after, transform=moved, **options)
    options = {"patient": "p", "lymph_nodes": nodes}
    return judge_response([pair], **options), lesion_changes([pair], **options)


def statuses(rows):
    return sorted(
        (row.status, row.baseline_lesion_id or 0, row.followup_lesion_id or 0) for row in rows
    )


def counts(row):
    return {name: getattr(row, f"n_{name}") for name in ONE}


ONE = {"matched": 1, "new": 0, "gone": 0, "merged": 0, "split": 0, "regrouped": 0}
GRID = grid_around(24, ras(SPACING_MM))


def balls(*places, geometry=GRID):
    """Return a mask of balls (offset from the middle, radius) in mm."""
    mask = np.zeros(geometry.shape, bool)
    for offset, radius in places:
        mask |= ball(radius, geometry, centre_mm(geometry) + offset)
    return mask


def without_plane(mask, axis, depth=1):
    """Cut off a fringe of the mask: remove the plane `depth` voxels below its surface."""
    index = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
    cut = mask.copy()
    cut[(slice(None),) * axis + (index[-1 - depth],)] = False
    return cut


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_fringe_that_missing_voxels_cut_off_belongs_to_its_lesion_at_either_time(make, axis):
    geometry = grid_around(15, make(SPACING_MM))
    whole = balls(((0, 0, 0), 12.4), geometry=geometry)
    cut = without_plane(whole, axis)
    assert measured(cut, geometry).lesions[1].n_voxels > 1  # the fringe is numbered as a lesion
    scans = {"whole": measured(whole, geometry), "cut": measured(cut, geometry)}
    for before, after, n_crumbs in (("whole", "cut", 1), ("cut", "whole", 1), ("cut", "cut", 2)):
        row, rows = compared(scans[before], scans[after])
        assert (row.response, row.volume_response) == ("SD", "SD")
        assert (row.n_crumbs, counts(row)) == (n_crumbs, ONE)
        assert abs(row.change_sum_percent) < 1  # measured across the missing voxels
        assert (row.targets, row.n_baseline, row.n_followup) == ("1", 1, 1)
        volumes_ml = [lesion.volume_ml for lesion in scans[after].lesions]
        assert row.followup_volume_ml == pytest.approx(sum(volumes_ml))
        assert row.warnings.count("W_CRUMB") == n_crumbs
        assert sorted(change.status for change in rows) == ["crumb"] * n_crumbs + ["matched"]
        assert len({change.group for change in rows}) == 1
        crumb = next(change for change in rows if change.status == "crumb")
        assert crumb.followup_volume_ml is crumb.followup_long_axis_mm is None
        assert crumb.is_target is False
        assert "beside lesion 1" in crumb.notes


def test_several_crumbs_and_crumbs_of_crumbs_belong_to_one_lesion():
    whole = balls(((0, 0, 0), 14))
    cut = whole.copy()
    for axis in range(3):
        cut &= without_plane(whole, axis)
    cut &= without_plane(whole, 0, depth=3)  # two fringes, one behind the other
    assert len(measured(cut, GRID).lesions) > 4
    row, rows = compared(measured(whole, GRID), measured(cut, GRID))
    assert (row.response, counts(row), row.n_crumbs) == ("SD", ONE, len(rows) - 1)
    assert abs(row.change_sum_percent) < 1


def test_a_crumb_of_a_non_target_lesion_is_not_a_new_lesion():
    """It lies outside the earlier lesion, so nothing matches it."""
    target, other = ((-10, 0, 0), 9), ((14, 0, 0), 4)
    before = measured(balls(target, other), GRID)
    grown = balls(target, other) | without_plane(balls(((14, 0, 0), 6.2)), 0)
    row, rows = compared(before, measured(grown, GRID))
    assert row.response == "SD"
    assert counts(row) == ONE | {"matched": 2}
    assert statuses(rows) == [("crumb", 0, 3), ("matched", 1, 1), ("matched", 2, 2)]
    crumb = next(change for change in rows if change.status == "crumb")
    assert crumb.group == rows[1].group
    # A crumb at baseline that is gone is not a lesion that is gone.
    row, rows = compared(measured(grown, GRID), before)
    assert (row.response, counts(row)) == ("SD", ONE | {"matched": 2})
    assert statuses(rows) == [("crumb", 3, 0), ("matched", 1, 1), ("matched", 2, 2)]


def test_a_long_new_piece_beside_a_lesion_is_left_to_a_reader():
    """A plate of 24 mm, one voxel thick, appears beside a lesion, where there was nothing."""
    target = balls(((0, 0, 0), 14))
    plate = np.zeros_like(target)
    middle, top = np.array(GRID.shape) // 2, np.flatnonzero(target.any(axis=(1, 2)))[-1]
    plate[top + 2, middle[1] - 10 : middle[1] + 10, middle[2]] = True
    row, rows = compared(measured(target, GRID), measured(target | plate, GRID))
    assert row.response is None
    assert row.target_response == ("SD" if row.change_sum_percent < 20 else "PD")
    assert "is new: decide whether it is new disease or a part of that lesion" in row.response_rule
    assert (row.n_crumbs, row.n_new) == (1, 0)
    assert statuses(rows)[0] == ("crumb", 0, 2)


@pytest.mark.parametrize(
    ("place", "radius_mm", "expected"),
    [
        ((24.0, 0, 0), 3.0, "PD"),  # small, but 7 mm away from the lesion
        ((21.0, 0, 0), 6.5, "PD"),  # beside it, but 13 mm long
        ((18.0, 0, 0), 3.0, "SD"),  # beside it, and small
    ],
)
def test_what_is_a_crumb_and_what_a_new_lesion(place, radius_mm, expected):
    geometry = grid_around(34, ras((1.0, 1.0, 1.0)))
    lesion = balls(((0, 0, 0), 13), geometry=geometry)
    both = lesion | balls((place, radius_mm), geometry=geometry)
    after = measured(both, geometry)
    assert len(after.lesions) == 2
    row, _ = compared(measured(lesion, geometry), after)
    is_new = expected == "PD"
    assert (row.response, row.n_new, row.n_crumbs) == (expected, int(is_new), int(not is_new))


def test_a_lesion_that_shrank_beside_another_is_still_itself():
    """It is small and near enough to be a crumb, but was a separate lesion at baseline."""
    geometry = grid_around(34, ras((1.0, 1.0, 1.0)))
    large = ((-8, 0, 0), 12)
    before = measured(balls(large, ((14, 0, 0), 8), geometry=geometry), geometry)
    after = measured(balls(large, ((8.5, 0, 0), 2.5), geometry=geometry), geometry)
    assert compared(after, after)[0].n_crumbs == 2
    for pair in ((before, after), (after, before)):
        row, rows = compared(*pair)
        assert statuses(rows) == [("matched", 1, 1), ("matched", 2, 2)]
        assert row.n_crumbs == 0


def test_crumbs_of_lymph_nodes_count_with_the_node():
    whole = balls(((0, 0, 0), 10))
    before, after = (measured(mask, GRID, name="node") for mask in (whole, without_plane(whole, 1)))
    for pair in ((before, after), (after, before)):
        row, _ = compared(*pair, nodes=NODES)
        assert (row.response, counts(row), row.n_crumbs) == ("SD", ONE, 1)
        assert abs(row.change_sum_percent) < 1e-6
    # A cut node of normal size is neither new disease nor a larger node.
    small = balls(((0, 0, 0), 4.4))
    cut = measured(without_plane(small, 1), GRID, name="node")
    row, _ = compared(measured(small, GRID, name="node"), cut, nodes=NODES)
    assert (row.response, row.n_new) == ("NE", 0)


def test_a_small_lesion_of_another_label_is_not_a_crumb():
    target = balls(((0, 0, 0), 12))
    other = balls(((15, 0, 0), 2)) & ~target
    row, rows = compared(measured(target, GRID), measured(target + 2 * other, GRID))
    assert (row.n_crumbs, row.n_new, row.response) == (0, 1, "PD")
    assert {change.label_name for change in rows} == {"tumour", "cyst"}


def test_a_crumb_whose_lesion_is_gone_is_a_lesion():
    cut = without_plane(balls(((0, 0, 0), 12.4)), 0)
    before = measured(cut, GRID)
    left = measured(before.ids.array == 2, GRID)
    row, rows = compared(before, left)
    assert (row.response, row.n_crumbs, counts(row)) == ("PR", 0, ONE | {"gone": 1})
    assert statuses(rows) == [("gone", 1, 0), ("matched", 2, 1)]


def test_crumbs_are_the_same_in_all_axis_orders():
    geometry = grid_around(15, oblique(SPACING_MM))
    whole = balls(((0, 0, 0), 12.4), geometry=geometry)
    cut = Volume(without_plane(whole, 2).astype(np.uint8), geometry)
    before = measured(whole, geometry)
    expected, _ = compared(before, measured(cut.array, geometry))
    for array, affine in list(orientations(cut))[::5]:
        row, _ = compared(before, measured(array, Geometry(array.shape, affine)))
        assert (row.n_crumbs, row.response) == (1, "SD")
        assert row.followup_sum_mm == pytest.approx(expected.followup_sum_mm)


def test_a_scan_without_a_partner_and_one_of_several_have_crumbs_too():
    whole = balls(((0, 0, 0), 12.4))
    cut = without_plane(whole, 0)
    before, after = measured(whole, GRID, "chest"), measured(cut, GRID, "chest")
    chest = pair_scans(before, after, transform=Rigid.identity())
    alone = unpaired_scan(measured(cut, GRID, "abdomen"), None)
    row = judge_response([chest, alone], patient="p")
    assert (row.targets, row.response) == ("chest:1;abdomen:1", "NE")
    assert (row.n_crumbs, row.n_outside) == (2, 1)
    assert "W_CRUMB: abdomen:2" in row.warnings
    rows = lesion_changes([chest, alone], patient="p")
    assert [(change.status, change.baseline_case, change.group) for change in rows] == [
        ("matched", "chest", 1),
        ("crumb", "chest", 1),
        ("outside", "abdomen", 2),
        ("crumb", "abdomen", 2),
    ]
    # In a region scanned at follow-up only, the crumb is not a second new lesion.
    row = judge_response([unpaired_scan(None, measured(cut, GRID, "legs"))], patient="p")
    assert row.response_rule.startswith("PD: new lesion 1 (")


def test_crumbs_that_touch_the_border_make_the_size_a_lower_bound():
    mask = np.zeros((30, 30, 30), bool)
    mask[6:26, 6:26, 4:24] = True
    geometry = Geometry(mask.shape, ras((1.0, 1.0, 1.0)))
    cut = mask.copy()
    cut[:, :, 24:] = cut[:, :, 23:24]
    cut[:, :, 25] = cut[:, :, 28] = False
    cut[:, :, 26:28] = False
    row, _ = compared(measured(mask, geometry), measured(cut, geometry))
    assert row.n_crumbs == 0 or row.response == "NE"


# ---- tilted scans


def rotation(angle_deg, axis=(1.0, 0.2, 0.1)):
    """Return a rotation (4, 4) about the origin."""
    u = np.array(axis) / np.linalg.norm(axis)
    cross = np.cross(np.eye(3), u)
    a = np.deg2rad(angle_deg)
    matrix = np.eye(4)
    matrix[:3, :3] = np.cos(a) * np.eye(3) - np.sin(a) * cross + (1 - np.cos(a)) * np.outer(u, u)
    return matrix


def ellipsoid(geometry, radii_mm, moved, centre=(0.0, 0.0, 0.0)):
    """Return the voxels of an ellipsoid about the origin, in a patient who moved."""
    index = np.moveaxis(np.indices(geometry.shape), 0, -1).reshape(-1, 3)
    points = geometry.to_world_mm(index)
    back = np.linalg.inv(moved)
    points = points @ back[:3, :3].T + back[:3, 3] - centre
    return (np.linalg.norm(points / np.array(radii_mm), axis=1) <= 1).reshape(geometry.shape)


def about_origin(affine, radius_mm=32):
    geometry = grid_around(radius_mm, affine)
    affine = geometry.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(geometry.shape) - 1) / 2)
    return Geometry(geometry.shape, affine)


LONG_AND_THIN = (9.3, 26.2, 5.0)  # mm along R, A and S


@pytest.mark.parametrize("angle_deg", [3, 8, 14, 20, 40])
@pytest.mark.parametrize("make", [ras, oblique], ids=["ras", "oblique"])
def test_a_head_that_tilts_keeps_its_diameters(angle_deg, make):
    grid, other = about_origin(ras((1.0, 1.0, 1.2))), about_origin(make((0.9, 1.1, 1.3)))
    moved = rotation(angle_deg)
    before = measured(ellipsoid(grid, LONG_AND_THIN, np.eye(4)), grid)
    after = measured(ellipsoid(other, LONG_AND_THIN, moved), other)
    row, (lesion,) = compared(before, after, moved)
    assert row.response == "SD"
    assert abs(row.change_sum_percent) < 4
    assert lesion.followup_short_axis_mm == pytest.approx(lesion.baseline_short_axis_mm, abs=1.2)
    if angle_deg >= 14:  # in its own slices, the response would be PR
        lengths_mm = [scan.lesions[0].long_axis_mm for scan in (before, after)]
        assert lengths_mm[1] < 0.7 * lengths_mm[0] or make is oblique
    if make is ras:
        assert row.tilt_deg == pytest.approx(tilt_deg(grid, other, Rigid(moved)))
        assert f"in the axial planes of the baseline, {row.tilt_deg:.1f}°" in lesion.notes
    # As a lymph node, by its short axis.
    nodes = [
        measured(scan.ids.array > 0, scan.ids.geometry, name="node") for scan in (before, after)
    ]
    row, _ = compared(*nodes, moved, nodes=NODES)
    assert (row.response, row.baseline_sum_mm) == ("SD", lesion.baseline_short_axis_mm)


def test_grids_that_are_tilted_while_the_patient_is_not_are_measured_in_one_plane():
    grids = [about_origin(tilt @ ras((1.0, 1.0, 1.0))) for tilt in (np.eye(4), rotation(16))]
    before, after = (measured(ellipsoid(g, LONG_AND_THIN, np.eye(4)), g) for g in grids)
    for pair in ((before, after), (after, before)):
        row, _ = compared(*pair)
        assert (row.response, round(row.tilt_deg)) == ("SD", 16)
        assert abs(row.change_sum_percent) < 4
    assert abs(after.lesions[0].long_axis_mm / before.lesions[0].long_axis_mm - 1) > 0.25
    # A rotation within the slices is not a tilt: diameters are not measured again.
    rotated = about_origin(rotation(30, axis=(0, 0, 1)) @ ras((1.0, 1.0, 1.0)))
    scan = measured(ellipsoid(rotated, LONG_AND_THIN, np.eye(4)), rotated)
    row, (lesion,) = compared(before, scan)
    assert row.tilt_deg == pytest.approx(0, abs=1e-6)
    assert lesion.followup_long_axis_mm == scan.lesions[0].long_axis_mm


def test_an_uncertain_registration_does_not_change_the_planes():
    grid = about_origin(ras((1.0, 1.0, 1.0)))
    scan = measured(ellipsoid(grid, LONG_AND_THIN, np.eye(4)), grid)
    row, (lesion, *_) = compared(scan, scan, rotation(14), doubt="registration is uncertain")
    assert (row.response, row.tilt_deg) == (None, None)
    assert lesion.baseline_long_axis_mm == scan.lesions[0].long_axis_mm


def test_a_crumb_of_a_tilted_lesion_is_measured_with_it():
    grid = about_origin(ras((1.0, 1.0, 1.0)))
    moved = rotation(14)
    before = measured(ellipsoid(grid, LONG_AND_THIN, np.eye(4)), grid)
    after = measured(without_plane(ellipsoid(grid, LONG_AND_THIN, moved), 1), grid)
    row, _ = compared(before, after, moved)
    assert (row.response, row.n_crumbs) == ("SD", 1)
    assert abs(row.change_sum_percent) < 4


def test_diameters_that_were_not_measured_stay_unknown_in_any_plane():
    from dataclasses import replace

    grid = about_origin(ras((1.0, 1.0, 1.0)))
    scan = measured(ellipsoid(grid, LONG_AND_THIN, np.eye(4)), grid)
    unknown = [
        replace(row, long_axis_mm=None, short_axis_mm=None, recist_measurable=None)
        for row in scan.lesions
    ]
    _, (lesion,) = compared(scan, MeasuredScan("p", scan.ids, unknown), rotation(5))
    assert (lesion.followup_long_axis_mm, lesion.change_long_axis_mm) == (None, None)
