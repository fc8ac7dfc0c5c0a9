import itertools

import numpy as np
import pytest
from laws import GRIDS, ball, grid_around, oblique, orientations, ras

from volseg.comparison.matching import MAX_DISTANCE_MM, match_lesions
from volseg.comparison.overlap import NumberedLesions
from volseg.volume import Geometry, Rigid, Volume

CENTRE = np.array([5.0, -8.0, 12.0])


def grid(spacing, make=ras, radius_mm=34):
    """Return a grid with its middle at CENTRE."""
    shape = grid_around(radius_mm, make(spacing)).shape
    affine = make(spacing)
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def scene(geometry, balls):
    """Draw lesion n as the n-th ball (offset from CENTRE, radius) in mm, over earlier ones."""
    ids = np.zeros(geometry.shape, np.uint16)
    for number, (offset, radius) in enumerate(balls, start=1):
        ids[ball(radius, geometry, CENTRE + offset)] = number
    return Volume(ids, geometry)


def matched(before, after, *, labels=(None, None), **options):
    """Match the lesions of two scans, all of one label unless given."""
    scans = [
        NumberedLesions(ids, ["a"] * int(ids.array.max()) if of_scan is None else of_scan)
        for ids, of_scan in zip((before, after), labels, strict=True)
    ]
    return match_lesions(*scans, **options)


def statuses(matches):
    return {(match.status, match.baseline, match.followup) for match in matches}


FIVE = [
    ((-20, 0, 0), 9),
    ((16, 10, 0), 7),
    ((0, -20, 8), 5),
    ((0, 20, -12), 4),
    ((20, -14, -10), 3),
]
EXCHANGED = {"merged": "split", "split": "merged", "new": "gone", "gone": "new"}


def test_a_scan_compared_with_itself_is_all_pairs_without_any_distance():
    scan = scene(grid((1.5, 1.5, 2.0), oblique), FIVE)
    matches = matched(scan, scan)
    assert statuses(matches) == {("matched", n, n) for n in range(1, 6)}
    assert all((match.dice, match.distance_mm) == (1.0, 0.0) for match in matches)
    volumes_mm3 = np.bincount(scan.array.ravel())[1:] * scan.geometry.voxel_volume_mm3
    np.testing.assert_allclose([match.overlap_mm3 for match in matches], volumes_mm3)


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("factor", [0.6, 1.2])
def test_lesions_that_grow_or_shrink_are_matched_on_any_grid(make, factor):
    before = scene(grid((1.5, 1.5, 2.0)), FIVE)
    scaled = [(offset, radius * factor) for offset, radius in FIVE]
    after = scene(grid((2.1, 1.2, 1.7), make), scaled)
    matches = matched(before, after)
    assert statuses(matches) == {("matched", n, n) for n in range(1, 6)}
    # Concentric balls: the overlap is the smaller one.
    small = min(factor, 1.0) ** 3
    np.testing.assert_allclose([m.dice for m in matches], 2 * small / (1 + factor**3), atol=0.12)
    assert max(match.distance_mm for match in matches) < 1.0  # under half a voxel's diagonal


def test_the_overlap_on_a_common_grid_is_that_of_the_voxels():
    geometry = grid((1.2, 1.4, 1.9), oblique)
    before, after = scene(geometry, [((0, 0, 0), 10)]), scene(geometry, [((6, 0, 0), 8)])
    (match,) = matched(before, after)
    a, b = before.array > 0, after.array > 0
    assert match.overlap_mm3 == pytest.approx((a & b).sum() * geometry.voxel_volume_mm3)
    assert match.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_other_numbers_of_the_same_lesions_change_nothing_but_the_numbers():
    before = scene(grid((2, 2, 2)), FIVE)
    after = scene(grid((2, 1.8, 2.2), oblique), FIVE[1:] + [((-8, 26, 10), 3)])
    order = np.random.default_rng(3).permutation(5)  # old number n + 1 becomes order[n] + 1
    renamed = np.concatenate([[0], order + 1]).astype(np.uint16)
    expected = {
        (status, b, None if f is None else int(renamed[f]))
        for status, b, f in statuses(matched(before, after))
    }
    assert statuses(matched(before, after.with_array(renamed[after.array]))) == expected
    assert {status for status, _, _ in expected} == {"matched", "gone", "new"}


def test_all_48_axis_orders_of_either_scan_give_the_same_matches():
    before = scene(grid((2, 2.5, 3)), FIVE)
    # Shifted by half a voxel: points of one grid lie half-way between those of the other.
    affine = before.geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [0.5, 0.5, 0.5]
    after = scene(Geometry(before.geometry.shape, affine), [FIVE[1], FIVE[0], *FIVE[3:]])
    expected = matched(before, after)
    for array, affine in orientations(after):
        assert matched(before, Volume(array, Geometry(array.shape, affine))) == expected
    for array, affine in list(orientations(before))[::7]:
        assert matched(Volume(array, Geometry(array.shape, affine)), after) == expected


TWO, ONE = [((-6, 0, 0), 5), ((6, 0, 0), 4)], [((0, 0, 0), 14)]


def test_lesions_merge_and_split_and_exchanged_scans_exchange_what_happened():
    away = [((0, 0, 26), 4)]
    before = scene(grid((1.5, 1.5, 1.5)), [*TWO, ((0, 24, 0), 5), *away])
    after = scene(grid((2, 1.5, 1.3), oblique), [*ONE, ((0, -24, 0), 5), *away])
    forward = matched(before, after)
    assert statuses(forward) == {
        ("merged", 1, 1), ("merged", 2, 1), ("gone", 3, None), ("matched", 4, 3), ("new", None, 2),
    }  # fmt: skip
    merged = {(m.baseline, m.is_first) for m in forward if m.status == "merged"}
    assert merged == {(1, True), (2, False)}
    assert [m.group for m in forward] == [1, 1, 2, 3, 4]
    backward = matched(after, before)
    exchanged = {(EXCHANGED.get(status, status), f, b) for status, b, f in statuses(forward)}
    assert statuses(backward) == exchanged
    pairs = {
        (m.baseline, m.followup): (m.dice, m.distance_mm, m.is_first)
        for m in forward
        if m.baseline and m.followup
    }
    for match in backward:
        if match.baseline and match.followup:
            dice, distance, is_first = pairs[match.followup, match.baseline]
            assert (match.dice, match.distance_mm) == pytest.approx((dice, distance))
            assert match.is_first is is_first


def test_what_merged_and_split_at_once_is_regrouped_either_way():
    # The large lesion of each time overlaps both lesions of the other time.
    before = scene(grid((1.5, 1.5, 1.5)), [((-10, 0, 0), 11), ((9, 0, 0), 4)])
    after = scene(grid((1.5, 1.5, 1.5)), [((-17, 8, 0), 3), ((0, 0, 0), 12)])
    forward = matched(before, after)
    assert {match.status for match in forward} == {"regrouped"}
    assert statuses(forward) == {("regrouped", 1, 2), ("regrouped", 1, 1), ("regrouped", 2, 2)}
    assert statuses(matched(after, before)) == {
        (status, f, b) for status, b, f in statuses(forward)
    }


def test_a_row_of_lesions_that_shifted_onto_each_others_places_does_not_merge():
    row = [((12 * n - 24, 0, 0), 6) for n in range(4)]
    shifted = [((x + 5.4, y, z), r) for (x, y, z), r in row]
    matches = matched(scene(grid((1, 1, 1)), row), scene(grid((1, 1, 1)), shifted))
    assert statuses(matches) == {("matched", n, n) for n in range(1, 5)}


def test_neighbours_that_barely_touch_stay_two():
    before = scene(grid((1, 1, 1)), [((-7, 0, 0), 6), ((7, 0, 0), 6)])
    after = scene(grid((1, 1, 1)), [((-6, 0, 0), 7.6)])  # reaches 0.6 mm into the second
    assert statuses(matched(before, after)) == {("matched", 1, 1), ("gone", 2, None)}


def points(geometry, places_mm):
    """Draw lesions of one voxel."""
    ids = np.zeros(geometry.shape, np.uint16)
    index = np.rint(geometry.to_index(CENTRE + np.array(places_mm))).astype(int)
    ids[tuple(index.T)] = np.arange(1, len(index) + 1)
    return Volume(ids, geometry)


def test_without_overlap_the_nearest_pairs_are_those_with_the_smallest_sum():
    geometry = grid((1, 1, 1))
    before = points(geometry, [(0, 0, 0), (6, 0, 0)])
    after = points(geometry, [(5, 0, 0), (8, 0, 0)])
    matches = matched(before, after)
    # 5 + 2 mm; pairing the nearest two first, 1 mm, would leave 8 mm.
    assert [(m.status, m.baseline, m.followup, m.distance_mm) for m in matches] == [
        ("matched", 1, 1, pytest.approx(5)),
        ("matched", 2, 2, pytest.approx(2)),
    ]
    assert {match.how for match in matches} == {"distance"}


def test_pairs_by_distance_are_the_best_of_all_assignments():
    geometry = grid((1, 1, 1), radius_mm=14)
    for seed in range(25):
        rng = np.random.default_rng(seed)
        cells = rng.choice(6**3, 7, replace=False)
        places = np.stack(np.unravel_index(cells, (6, 6, 6)), axis=1) * 4.0 - 10
        before, after = places[:3], places[3:]
        matches = matched(points(geometry, before), points(geometry, after))
        distances = np.linalg.norm(before[:, None] - after[None], axis=-1)

        def cost(pairs, distances=distances):
            return sum(distances[pair] for pair in pairs) + MAX_DISTANCE_MM * (3 - len(pairs))

        allowed = (
            [(b, f) for b, f in enumerate(partners) if distances[b, f] <= MAX_DISTANCE_MM]
            for partners in itertools.permutations(range(4), 3)
        )
        pairs = [(m.baseline - 1, m.followup - 1) for m in matches if m.status == "matched"]
        assert cost(pairs) == pytest.approx(min(map(cost, allowed)))


def test_beyond_the_limit_a_lesion_is_gone_and_another_new():
    geometry = grid((1, 1, 1))
    before = scene(geometry, [((0, 0, 0), 2)])
    cases = ((9, 10, "matched"), (11, 10, "gone"), (11, 12, "matched"), (9, 5, "gone"))
    for shift, limit, expected in cases:
        after = scene(geometry, [((shift, 0, 0), 2)])
        matches = matched(before, after, max_distance_mm=limit)
        assert matches[0].status == expected
        assert len(matches) == (1 if expected == "matched" else 2)


def test_where_the_other_scan_does_not_reach_nothing_is_gone_or_new():
    before = scene(grid((2, 2, 2)), FIVE)
    whole = grid((2, 2, 2))
    # The follow-up ends 8 mm to the right of the middle, and reaches further to the left.
    affine = whole.affine.copy()
    affine[0, 3] -= 24
    after = scene(Geometry(whole.shape, affine), [FIVE[0], ((-50, 0, 0), 4)])
    assert statuses(matched(before, after)) == {
        ("matched", 1, 1), ("outside", 2, None), ("gone", 3, None), ("gone", 4, None),
        ("outside", 5, None), ("outside", None, 2),
    }  # fmt: skip


def test_a_patient_who_moved_has_the_same_matches_as_one_who_did_not():
    first_grid, second_grid = grid((1.5, 1.5, 2.0)), grid((1.7, 1.4, 1.8), oblique)
    before = scene(first_grid, [*TWO, *FIVE[:1], ((0, 24, 0), 5)])
    still = scene(second_grid, [*ONE, *FIVE[:1], ((0, -24, 0), 5)])
    angle = np.deg2rad(25)
    rotation = np.eye(3)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    transform = Rigid.about(np.zeros(3), rotation, np.array((400.0, -30.0, 120.0)))
    # The patient and the grid moved: the same voxels, elsewhere in the world.
    elsewhere = Volume(
        still.array, Geometry(still.geometry.shape, transform.matrix @ still.geometry.affine)
    )
    matrix = first_grid.index_matrix(elsewhere.geometry, transform)
    np.testing.assert_allclose(matrix, first_grid.index_matrix(second_grid), atol=1e-9)
    expected = matched(before, still)
    matches = matched(before, elsewhere, transform=transform)
    assert statuses(matches) == statuses(expected)
    for match, other in zip(matches, expected, strict=True):
        assert match.dice == pytest.approx(other.dice)
        assert match.distance_mm == pytest.approx(other.distance_mm)
    assert {status for status, _, _ in statuses(matched(before, elsewhere))} == {"outside"}


def test_lesions_of_different_labels_are_never_a_pair_and_each_says_so():
    scan = scene(grid((2, 2, 2)), FIVE[:2])
    matches = matched(scan, scan, labels=(["cyst", "tumour"], ["tumour", "tumour"]))
    assert statuses(matches) == {("gone", 1, None), ("matched", 2, 2), ("new", None, 1)}
    assert [match.relabelled for match in matches] == [(1,), (), (1,)]


def test_scans_without_lesions_have_no_matches_and_one_of_them_only_new_or_gone():
    empty, full = scene(grid((2, 2, 2)), []), scene(grid((2, 2, 2)), FIVE)
    assert matched(empty, empty) == []
    assert statuses(matched(full, empty)) == {("gone", n, None) for n in range(1, 6)}
    assert statuses(matched(empty, full)) == {("new", None, n) for n in range(1, 6)}


def test_numbers_without_a_label_or_a_voxel_are_refused():
    scan = scene(grid((2, 2, 2)), FIVE)
    with pytest.raises(ValueError, match="go up to 5, but there are 4 labels"):
        matched(scan, scan, labels=(["a"] * 4, None))
    with pytest.raises(ValueError, match="skip a number"):
        matched(scan, scan, labels=(None, ["a"] * 6))
