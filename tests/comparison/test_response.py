import math
from dataclasses import replace

import numpy as np
import pytest

from volseg.comparison.changes import lesion_changes
from volseg.comparison.groups import ScanLesions, ScanPair
from volseg.comparison.matching import Match
from volseg.comparison.response import judge_response
from volseg.comparison.targets import choose_targets, is_lymph_node
from volseg.measurement.rows import LesionMeasurement


def lesion(
    number, long_mm=None, *, short_mm=None, label="liver", volume_ml=None, measurable=None, **others
):
    """Return a ball with this long axis; `volume_ml` and `measurable` override its values."""
    node = label == "lymph_node"
    size = short_mm if node else long_mm
    if measurable is None and size is not None:
        measurable = size >= (15 if node else 10)
    if volume_ml is None:
        volume_ml = math.pi * (long_mm or short_mm or 5.0) ** 3 / 6000
    values = {"label": 1, "label_name": label, "n_voxels": 100}
    values |= {"volume_mm3": 1000 * volume_ml, "volume_ml": volume_ml}
    statistics = ("mean", "sd", "min", "p10", "median", "p90", "max")
    values |= {f"intensity_{name}": 40.0 for name in statistics}
    values |= {"centroid_r_mm": 1.0, "centroid_a_mm": 2.0, "centroid_s_mm": 3.0}
    unknown = ("confidence_mean", "confidence_p10", "class_name", "class_probability")
    values |= {"touches_border": False} | dict.fromkeys(unknown)
    values |= {"case_id": "c", "intensity_unit": "HU", "class_probabilities": None, "notes": ""}
    values |= {"long_axis_mm": long_mm, "short_axis_mm": short_mm, "recist_measurable": measurable}
    return LesionMeasurement(lesion_id=number, **values | others)


def pairs(*rows):
    """Return matches from (status, baseline, followup, group)."""
    seen = set()
    matches = []
    for status, b, f, group in rows:
        is_first = group not in seen
        matches.append(Match(status=status, baseline=b, followup=f, group=group, is_first=is_first))
        seen.add(group)
    return matches


def one_to_one(n, start=1):
    return [("matched", number, number, number) for number in range(start, n + 1)]


def scans(matches, before, after, case="a", doubt=""):
    """Return a scan of each time, both called `case`."""
    before, after = ([replace(row, case_id=case) for row in rows] for rows in (before, after))
    return ScanPair(
        baseline=ScanLesions(case, before),
        followup=ScanLesions(case, after),
        matches=matches,
        doubt=doubt,
    )


def judged(rows, before, after):
    pair = scans(pairs(*rows), before, after)
    return judge_response([pair], patient="p", lymph_nodes=["lymph_node"])


def changed(rows, before, after):
    return lesion_changes([scans(pairs(*rows), before, after)], patient="p")


@pytest.mark.parametrize(
    ("before_mm", "after_mm", "expected"),
    [
        (30, 30, "SD"),
        (30, 36, "PD"),  # exactly +20 %, +6 mm
        (30, 35.99, "SD"),
        (20, 24, "SD"),  # +20 %, but +4 mm
        (20, 25, "PD"),  # exactly +5 mm
        (20, 24.99, "SD"),
        (60, 66, "SD"),  # +6 mm, but 10 %
        (10, 7, "PR"),  # exactly −30 %
        (10, 7.01, "SD"),
        (10.1, 7.07, "PR"),  # exactly −30 %, but less in floating point
        (25.1, 30.12, "PD"),  # exactly +20 %, but less in floating point
        (30, 1, "PR"),
    ],
)
def test_the_limits_of_partial_response_and_progression(before_mm, after_mm, expected):
    row = judged(one_to_one(1), [lesion(1, before_mm)], [lesion(1, after_mm)])
    assert (row.response, row.target_response) == (expected, expected)
    sums = f"{before_mm:.1f} mm → {after_mm:.1f} mm"
    assert row.response_rule.startswith(f"{expected}: sum of target diameters {sums}")
    assert (row.baseline_sum_mm, row.nadir_sum_mm) == (before_mm, before_mm)
    assert row.followup_sum_mm == after_mm
    assert row.change_sum_percent == pytest.approx(100 * (after_mm / before_mm - 1))
    nadir = "nadir, which is the baseline, as there are two time points"
    assert (nadir in row.response_rule) is (expected != "PR")


TARGET = {
    "CR": ("gone", None),
    "PR": ("matched", 10),
    "SD": ("matched", 20),
    "PD": ("matched", 40),
    "NE": ("outside", None),
}
OTHER = {"CR": "gone", "Non-CR/Non-PD": "matched", "NE": "outside", None: None}


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    ("target", "other", "expected"),
    [
        ("CR", "CR", "CR"),
        ("CR", None, "CR"),
        ("CR", "Non-CR/Non-PD", "PR"),
        ("CR", "NE", "PR"),
        ("PR", "CR", "PR"),
        ("PR", "Non-CR/Non-PD", "PR"),
        ("PR", "NE", "PR"),
        ("SD", "Non-CR/Non-PD", "SD"),
        ("SD", "NE", "SD"),
        ("NE", "Non-CR/Non-PD", "NE"),
        ("PD", "CR", "PD"),
        ("PD", "NE", "PD"),
        (None, "CR", "CR"),
        (None, "Non-CR/Non-PD", "Non-CR/Non-PD"),
        (None, "NE", "NE"),
    ],
)
def test_the_tables_of_overall_response(target, other, expected, new):
    """Tables 1 (with targets) and 2 (without) of RECIST 1.1, without unequivocal progression."""
    before, after, rows = [], [], []
    if target is not None:
        status, size = TARGET[target]
        before.append(lesion(1, 20))
        after += [] if size is None else [lesion(1, size)]
        rows.append((status, 1, None if size is None else 1, 1))
    if other is not None:
        before.append(lesion(2, 6))
        after += [lesion(2, 6)] if other == "Non-CR/Non-PD" else []
        rows.append((OTHER[other], 2, 2 if other == "Non-CR/Non-PD" else None, 2))
    if new:
        after.append(lesion(3, 12))
        rows.append(("new", None, 3, 3))
    row = judged(rows, before, after)
    assert row.response == ("PD" if new else expected)
    assert (row.target_response, row.non_target_response) == (target, other)
    assert row.response_rule.startswith("PD: new lesion 3" if new else f"{expected}: ")


def test_targets_are_the_five_largest_measurable_and_two_per_label():
    sizes = [("liver", 50), ("liver", 40), ("liver", 30), ("lung", 12), ("lung", 11)]
    sizes += [("kidney", 9.9), ("kidney", 14), ("bone", 13), ("skin", 10.5)]
    lesions = [lesion(n, mm, label=label) for n, (label, mm) in enumerate(sizes, start=1)]
    targets = choose_targets(lesions)
    expected = [("liver", 50), ("liver", 40), ("lung", 12), ("kidney", 14), ("bone", 13)]
    assert [(target.label_name, target.long_axis_mm) for target in targets] == expected
    assert judged(one_to_one(9), lesions, lesions).baseline_sum_mm == 50 + 40 + 12 + 14 + 13
    shuffled = [lesions[n] for n in np.random.default_rng(0).permutation(9)]
    ids = sorted(target.lesion_id for target in choose_targets(shuffled))
    assert ids == [target.lesion_id for target in targets]


def test_lymph_nodes_count_by_their_short_axis_and_are_normal_below_10_mm():
    node, other = lesion(1, 40, short_mm=20, label="lymph_node"), lesion(2, 20)
    shrunken = replace(node, short_axis_mm=14.0, volume_ml=0.7**3 * node.volume_ml)
    row = judged(one_to_one(2), [node, other], [shrunken, lesion(2, 14)])
    assert (row.baseline_sum_mm, row.followup_sum_mm, row.response) == (40, 28, "PR")
    # In complete response, the sum of a node is not 0 mm.
    rows = [("matched", 1, 1, 1), ("gone", 2, None, 2)]
    row = judged(rows, [node, other], [replace(node, short_axis_mm=9.9)])
    assert (row.followup_sum_mm, row.response) == (9.9, "CR")
    row = judged(rows, [node, other], [replace(node, short_axis_mm=10.0)])
    assert row.response == "PR"
    # A normal node is not disease, neither at baseline nor as a new node.
    small = lesion(2, 15, short_mm=8, label="lymph_node")
    row = judged([("gone", 1, None, 1), ("matched", 2, 2, 2)], [lesion(1, 20), small], [small])
    assert (row.response, row.non_target_response) == ("CR", None)
    rows = [("matched", 1, 1, 1), ("new", None, 2, 2)]
    row = judged(rows, [lesion(1, 20)], [lesion(1, 20), small])
    assert (row.response, row.n_new) == ("SD", 1)
    # Only labels given as lymph nodes, by name or value, are lymph nodes.
    assert is_lymph_node(node, ["lymph_node"]) and is_lymph_node(node, ["1"])
    assert not is_lymph_node(node, ["other"]) and not is_lymph_node(node, ())
    names = {"Lymph nodes": True, "node": True, "lung_nodule": False, "anode": False}
    for name, is_warned in names.items():
        row = judged(one_to_one(1), [lesion(1, 20, label=name)], [lesion(1, 20, label=name)])
        assert (row.baseline_sum_mm, "W_NODE" in row.warnings) == (20, is_warned)


def test_pieces_of_a_target_are_added_and_targets_that_merged_count_once():
    rows = [("split", 1, 1, 1), ("split", 1, 2, 1)]
    row = judged(rows, [lesion(1, 30)], [lesion(1, 36), lesion(2, 18)])
    assert (row.followup_sum_mm, row.response, row.n_split, row.n_new) == (54, "PD", 1, 0)
    two = [lesion(1, 30), lesion(2, 20)]
    whole = lesion(1, 44, volume_ml=two[0].volume_ml + two[1].volume_ml)
    rows = [("merged", 1, 1, 1), ("merged", 2, 1, 1)]
    row = judged(rows, two, [whole])
    assert (row.baseline_sum_mm, row.followup_sum_mm) == (50, 44)
    assert (row.response, row.n_merged) == ("SD", 2)
    row = judged(rows, [lesion(1, 30), lesion(2, 6)], [lesion(1, 35)])
    assert (row.followup_sum_mm, row.non_target_response) == (35, None)
    assert "W_MERGED: a target merged with lesions 2" in row.warnings


@pytest.mark.parametrize(
    ("rows", "before", "after", "classes"),
    [
        # Two parts with half of the volume, but longer together.
        ([("split", 1, 1, 1), ("split", 1, 2, 1)], [(30, 14)], [(20, 4), (18, 3)], ("PD", "SD")),
        # An unchanged lesion, cut by a tilted slice.
        (one_to_one(1), [(40, 14)], [(27.8, 14)], ("PR", "SD")),
        (one_to_one(1), [(27.8, 14)], [(40, 14)], ("PD", "SD")),
        (one_to_one(1), [(30, 14)], [(31, 28)], ("SD", "PD")),
        (one_to_one(1), [(30, 14)], [(29, 4)], ("SD", "PR")),
    ],
)
def test_diameters_and_volumes_that_disagree_give_no_response(rows, before, after, classes):
    before, after = (
        [lesion(n, mm, volume_ml=ml) for n, (mm, ml) in enumerate(sizes, start=1)]
        for sizes in (before, after)
    )
    row = judged(rows, before, after)
    assert (row.response, row.target_response, row.volume_response) == (None, *classes)
    text = f"the targets are {classes[0]} by their diameters"
    assert f"W_DISAGREE: {text}" in row.warnings
    assert row.response_rule.startswith(text)
    assert f" and {classes[1]} by their volumes" in row.response_rule
    # A new lesion is progression whatever the targets are.
    row = judged([*rows, ("new", None, 3, 9)], before, [*after, lesion(3, 12)])
    assert (row.response, "W_DISAGREE" in row.warnings) == ("PD", True)


def test_a_small_target_that_is_gone_weighs_less_in_a_sum_of_volumes():
    """Diameters −33 %, volume −11 %: no disagreement, as each diameter fits its volume."""
    rows = [("matched", 1, 1, 1), ("gone", 2, None, 2)]
    row = judged(rows, [lesion(1, 40), lesion(2, 20)], [lesion(1, 40)])
    assert (row.response, row.volume_response) == ("PR", "SD")
    assert "W_VOLUME: the sum of volumes alone would be SD (−11.1 %)" in row.warnings
    # The least rise of 5 mm applies to diameters only.
    row = judged(one_to_one(1), [lesion(1, 20)], [lesion(1, 24.5)])
    assert (row.response, row.volume_response, row.warnings) == ("SD", "PD", "")


def test_targets_that_were_not_seen_leave_progression_only():
    """The guideline's example: a sum of 50 mm over three targets, then 80 mm over two of them."""
    before = [lesion(1, 20), lesion(2, 15, label="lung"), lesion(3, 15, label="lung")]
    rows = [*one_to_one(2), ("outside", 3, None, 3)]
    row = judged(rows, before, [lesion(1, 45), lesion(2, 35, label="lung")])
    assert (row.response, row.followup_sum_mm, row.change_sum_mm) == ("PD", None, None)
    assert "at least 80.0 mm" in row.response_rule
    row = judged(rows, before, [lesion(1, 10), lesion(2, 5, label="lung")])
    assert (row.response, row.change_volume_ml, row.n_outside) == ("NE", None, 1)
    row = judged(one_to_one(1), [lesion(1, 20)], [lesion(1, None)])
    assert (row.response, row.followup_sum_mm) == ("NE", None)


def test_a_target_cut_off_by_a_border_has_a_lower_bound_only():
    """Its visible part can only show that it grew, or that it was larger."""
    cut = {"touches_border": True}
    whole, parts = [lesion(1, 20)], {mm: [lesion(1, mm, **cut)] for mm in (10, 20, 30)}
    for mm, expected in ((10, "NE"), (20, "NE"), (30, "PD")):
        row = judged(one_to_one(1), whole, parts[mm])
        assert (row.response, row.followup_sum_mm) == (expected, None)
    for mm, expected in ((10, "PR"), (20, "NE"), (30, "NE")):
        row = judged(one_to_one(1), parts[20], [lesion(1, mm)])
        assert (row.response, row.change_sum_mm) == (expected, None)
        assert "at least 20.0 mm" in row.response_rule
    assert judged([("gone", 1, None, 1)], parts[20], []).response == "CR"


def test_a_lesion_outside_the_baseline_field_of_view_is_new():
    """RECIST 1.1, section 4.3.5."""
    row = judged([("gone", 1, None, 1), ("outside", None, 1, 2)], [lesion(1, 20)], [lesion(1, 30)])
    assert (row.response, row.n_new, row.n_outside) == ("PD", 0, 1)
    assert row.response_rule.startswith("PD: new lesion 1")


def test_questions_for_a_reader_leave_the_response_open_except_for_progression():
    small, grown = (lesion(2, 25, short_mm=mm, label="lymph_node") for mm in (8, 20))
    gone = ("gone", 1, None, 1)
    row = judged([gone, ("matched", 2, 2, 2)], [lesion(1, 20), small], [grown])
    assert (row.response, row.volume_response, row.target_response) == (None, None, "CR")
    assert "lymph node 2 was normal at baseline and no longer is" in row.response_rule
    row = judged([*one_to_one(2)], [lesion(1, 20), small], [lesion(1, 40), grown])
    assert row.response == "PD"
    renamed = replace(pairs(("new", None, 3, 2))[0], relabelled=(1,))
    for after_mm, expected in ((20, None), (40, "PD")):
        matches = [*pairs(*one_to_one(1)), renamed]
        after = [lesion(1, after_mm), lesion(3, 12, label="cyst")]
        row = judge_response([scans(matches, [lesion(1, 20)], after)], patient="p")
        assert row.response == expected
    row = judge_response([scans([renamed], [], [lesion(3, 12)])], patient="p")
    assert "lesion 3 is new or had another label" in row.response_rule


def test_matches_that_cannot_be_trusted_give_no_response():
    rows = pairs(("gone", 1, None, 1), ("new", None, 1, 2))
    doubt = "registration is uncertain"
    pair = scans(rows, [lesion(1, 20)], [lesion(1, 20)], doubt=doubt)
    row = judge_response([pair], patient="p")
    assert (row.response, row.volume_response, row.response_rule) == (None, None, doubt)
    # If one of the scans has no lesion, there is nothing to match.
    pair = scans(rows[:1], [lesion(1, 20)], [], doubt=doubt)
    row = judge_response([pair], patient="p")
    assert row.response == "CR"


def test_nodes_that_were_not_measured_as_such_are_measurable_by_their_short_axis():
    thin = lesion(1, 20, short_mm=9, measurable=True, label="lymph_node")
    assert choose_targets([thin]) == [thin]
    assert choose_targets([thin], ["lymph_node"]) == []
    thick = lesion(1, 12, short_mm=9, measurable=False, spacing_s_mm=5.0)
    assert choose_targets([thick]) == [thick]
    assert choose_targets([replace(thick, spacing_s_mm=7.0)]) == []  # two slices are 14 mm
    sagittal = replace(thick, spacing_s_mm=0.5, spacing_r_mm=7.0)
    assert choose_targets([sagittal]) == []
    for name in ("lymph_node", "1", "label_1"):
        assert is_lymph_node(thin, [name])


def test_without_diameters_only_responses_that_need_none_are_given():
    before, after = [lesion(1), lesion(2)], [lesion(1), lesion(2)]
    row = judged(one_to_one(2), before, after)
    assert row.response is row.target_response is row.non_target_response is row.targets is None
    assert row.baseline_sum_mm is row.followup_sum_mm is row.volume_response is None
    assert "diameters were not measured" in row.response_rule
    assert row.change_volume_percent == 0
    assert judged([("gone", 1, None, 1), ("gone", 2, None, 2)], before, []).response == "CR"
    row = judged([*one_to_one(2), ("new", None, 3, 3)], before, [*after, lesion(3)])
    assert row.response == "PD"
    changes = changed(one_to_one(2), before, after)
    values = {(c.is_target, c.change_long_axis_mm, c.change_volume_ml) for c in changes}
    assert values == {(None, None, 0.0)}
    assert all("long axis: not measured" in change.notes for change in changes)


def test_without_lesions_nothing_is_evaluable_and_a_first_lesion_is_progression():
    row = judged([], [], [])
    assert (row.response, row.n_baseline, row.baseline_volume_ml) == ("NE", 0, 0)
    assert row.change_volume_percent is None
    assert "nothing can respond" in row.response_rule
    row = judged([("new", None, 1, 1)], [], [lesion(1, 7.5)])
    assert (row.response, row.targets, row.change_volume_percent) == ("PD", None, None)
    assert row.response_rule == "PD: new lesion 1 (0.221 mL, 7.5 mm)"
    assert "W_NEW" in row.warnings
    assert "W_NEW" not in judged([("new", None, 1, 1)], [], [lesion(1, 10)]).warnings


@pytest.mark.parametrize("factor", [0.2, 0.69, 0.71, 1.0, 1.19, 1.21, 2.0])
def test_volume_and_diameter_of_balls_give_the_same_response(factor):
    """Sizes stay away from the least rise of 5 mm, which does not apply to volumes."""
    sizes = (30, 24, 18)
    before = [lesion(n, size, label=f"organ_{n}") for n, size in enumerate(sizes, start=1)]
    after = [lesion(n, size * factor, label=f"organ_{n}") for n, size in enumerate(sizes, start=1)]
    row = judged(one_to_one(3), before, after)
    assert row.volume_response == row.response
    assert row.change_target_volume_percent == pytest.approx(100 * (factor**3 - 1))


def test_the_change_of_a_group_is_in_one_of_its_rows():
    before = [
        lesion(1, 30, volume_ml=6.0, n_voxels=600, intensity_mean=10.0),
        lesion(2, 20, volume_ml=2.0, n_voxels=200, intensity_mean=50.0),
    ]
    after = [lesion(1, 45, volume_ml=12.0, intensity_mean=30.0)]
    rows = changed([("merged", 1, 1, 1), ("merged", 2, 1, 1)], before, after)
    changes_ml = [(row.change_volume_ml, row.change_volume_percent) for row in rows]
    assert changes_ml == [(4.0, 50.0), (None, None)]
    changes = [(row.change_long_axis_mm, row.change_intensity_mean) for row in rows]
    assert changes == [(-5.0, 10.0), (None, None)]
    assert "in the row of lesion 1 at baseline and 1 at follow-up" in rows[1].notes
    volumes_ml = [(row.baseline_volume_ml, row.followup_volume_ml) for row in rows]
    assert volumes_ml == [(6.0, 12.0), (2.0, 12.0)]


def test_sizes_at_the_other_time_are_zero_if_absent_and_empty_if_outside():
    rows = changed(
        [("gone", 1, None, 1), ("outside", 2, None, 2), ("new", None, 1, 3)],
        [lesion(1, 20, volume_ml=4.0), lesion(2, 12)],
        [lesion(1, 8, volume_ml=0.5)],
    )
    gone, outside, new = rows
    assert (gone.followup_volume_ml, gone.change_volume_percent) == (0, -100)
    assert gone.change_long_axis_mm == -20
    assert (new.baseline_volume_ml, new.change_volume_ml) == (0, 0.5)
    assert new.change_volume_percent is None
    assert "nothing at baseline" in new.notes
    assert (outside.followup_volume_ml, outside.change_volume_ml) == (None, None)
    assert "outside the field of view of the other scan" in outside.notes
    assert {row.change_intensity_mean for row in rows} == {None}
    assert [row.is_target for row in rows] == [True, True, False]


def test_intensities_of_different_units_have_no_difference():
    (row,) = changed(one_to_one(1), [lesion(1, 20)], [lesion(1, 20, intensity_unit="a.u.")])
    assert (row.change_intensity_mean, row.intensity_unit) == (None, None)
    assert "unit differs" in row.notes
    (row,) = changed(one_to_one(1), [lesion(1, 20)], [lesion(1, 20, intensity_mean=math.nan)])
    assert row.change_intensity_mean is None
    assert "intensity: not measured" in row.notes


def two_scans(chest, abdomen, *, places=((0.0, 0.0, 300.0), (0.0, 0.0, 0.0)), doubts=("", "")):
    """Return two scan pairs from (matches, before, after) each; lesions lie 40 mm apart."""

    def placed(lesions, r, a, s):
        return [
            replace(x, centroid_r_mm=r + 40 * x.lesion_id, centroid_a_mm=a, centroid_s_mm=s)
            for x in lesions
        ]

    parts = zip(("chest", "abdomen"), (chest, abdomen), places, doubts, strict=True)
    return [
        scans(pairs(*rows), placed(before, *place), placed(after, *place), name, doubt)
        for name, (rows, before, after), place, doubt in parts
    ]


def both(*of_patient):
    return judge_response(two_scans(*of_patient), patient="p", lymph_nodes=["lymph_node"])


@pytest.mark.parametrize(
    ("chest_mm", "abdomen_mm", "expected"),
    [
        ((20, 28), (80, 80), "SD"),  # +40 % in the chest alone, +8 % over both
        ((20, 28), (80, 60), "SD"),
        ((20, 10), (40, 30), "PR"),  # −50 % and −25 %: −33 % over both
        ((20, 20), (40, 52), "PD"),  # 0 % and +30 %: exactly +20 % over both
        ((20, 0), (40, 0), "CR"),
        ((20, 0), (40, 40), "PR"),  # −33 %
    ],
)
def test_a_patient_with_several_scans_is_judged_by_one_sum(chest_mm, abdomen_mm, expected):
    def part(before_mm, after_mm, label):
        before = [lesion(1, before_mm, label=label)]
        if not after_mm:
            return [("gone", 1, None, 1)], before, []
        return one_to_one(1), before, [lesion(1, after_mm, label=label)]

    chest, abdomen = part(*chest_mm, "lung"), part(*abdomen_mm, "liver")
    row = both(chest, abdomen)
    assert (row.response, row.target_response) == (expected, expected)
    assert row.targets == "chest:1;abdomen:1"
    assert (row.baseline_case, row.followup_case) == ("chest;abdomen", "chest;abdomen")
    assert row.baseline_sum_mm == chest_mm[0] + abdomen_mm[0]
    assert row.followup_sum_mm == chest_mm[1] + abdomen_mm[1]
    # The same as if all lesions were in one scan, and in any order of scans.
    swapped = judge_response(two_scans(chest, abdomen)[::-1], patient="p")
    rows = [(*abdomen[0][0][:1], *(None if n is None else 2 for n in abdomen[0][0][1:3]), 2)]
    lesions = ([*c, *(replace(x, lesion_id=2) for x in a)] for c, a in zip(chest[1:], abdomen[1:]))
    joined = judged([*chest[0], *rows], *lesions)
    for other in (swapped, joined):
        assert (other.response, other.volume_response) == (row.response, row.volume_response)
        assert other.followup_sum_mm == pytest.approx(row.followup_sum_mm)
        assert other.change_volume_percent == pytest.approx(row.change_volume_percent)


def test_targets_are_five_and_two_per_label_over_all_scans():
    def part(label, *sizes_mm):
        lesions = [lesion(n, mm, label=label) for n, mm in enumerate(sizes_mm, start=1)]
        return one_to_one(len(lesions)), lesions, lesions

    assert both(part("liver", 40, 12, 30), part("liver", 35, 50)).targets == "chest:1;abdomen:2"
    scan_pairs = two_scans(part("liver", 40, 12), part("spleen", 15, 50))
    assert judge_response(scan_pairs, patient="p").targets == "chest:1;chest:2;abdomen:1;abdomen:2"
    changes = lesion_changes(scan_pairs, patient="p")
    rows = [(row.baseline_case, row.baseline_lesion_id, row.group) for row in changes]
    assert rows == [("chest", 1, 1), ("chest", 2, 2), ("abdomen", 1, 3), ("abdomen", 2, 4)]
    assert all(row.is_target for row in changes)
    scan_pairs = two_scans(part("liver", 40, 12, 30), part("liver", 35, 50))
    changes = lesion_changes(scan_pairs, patient="p")
    assert [row.is_target for row in changes] == [True, False, False, False, True]


def test_a_new_lesion_in_one_scan_is_progression_despite_doubts_in_another():
    chest = ([*one_to_one(1), ("new", None, 2, 2)], [lesion(1, 20)], [lesion(1, 20), lesion(2, 12)])
    abdomen = (one_to_one(1), [lesion(1, 30)], [lesion(1, 10)])
    row = both(chest, abdomen)
    assert row.response == "PD"
    assert row.response_rule == "PD: new lesion chest:2 (0.905 mL, 12.0 mm)"
    row = judge_response(two_scans(chest, abdomen, doubts=("", "registration failed")), patient="p")
    assert (row.response, row.volume_response) == ("PD", "PD")
    row = judge_response(two_scans(chest, abdomen, doubts=("registration failed", "")), patient="p")
    assert (row.response, row.response_rule) == (None, "chest: registration failed")


def test_a_region_that_was_scanned_once_is_not_evaluable_before_and_new_after():
    chest = (one_to_one(1), [lesion(1, 20)], [lesion(1, 10)])
    once = [("outside", 1, None, 1)]
    row = both(chest, (once, [lesion(1, 30)], []))
    assert (row.response, row.n_outside, row.change_volume_ml) == ("NE", 1, None)
    assert "W_OUTSIDE" in row.warnings
    later = ([("outside", None, 1, 1)], [], [lesion(1, 30)])
    row = both(chest, later)
    assert row.response == "PD"
    assert row.response_rule == "PD: new lesion abdomen:1 (14.1 mL, 30.0 mm)"
    # It may not be new if another scan shows it too, or may have shown it before.
    scan_pairs = two_scans(chest, later, places=((0.0, 0.0, 0.0), (0.0, 0.0, 3.0)))
    seen = judge_response(scan_pairs, patient="p")
    lost = both((once, [lesion(1, 20)], []), later)
    for row in (seen, lost):
        assert row.response is None
        question = "lesion abdomen:1 is new, or another scan of the patient shows it too"
        assert question in row.response_rule
    other = (once, [lesion(1, 20, label="kidney")], [])
    assert both(other, later).response == "PD"


def test_without_diameters_in_all_scans_there_are_no_targets():
    unmeasured = (one_to_one(1), [lesion(1)], [lesion(1)])
    row = both(unmeasured, (one_to_one(1), [lesion(1, 20)], [lesion(1, 10)]))
    assert (row.response, row.targets) == (None, None)
    assert "diameters were not measured" in row.response_rule


def test_a_twin_is_found_beside_a_nearer_lesion_of_another_label():
    part = (one_to_one(1), [lesion(1, 20)], [lesion(1, 10)])
    near = lesion(2, 12, label="cyst", centroid_r_mm=40.0)
    first, second = two_scans(part, part, places=((0.0, 0.0, 0.0), (0.0, 0.0, 5.0)))
    matches = [*second.matches, *pairs(("gone", 2, None, 2))]
    baseline = ScanLesions("abdomen", [*second.baseline.lesions, near])
    second = replace(second, baseline=baseline, matches=matches)
    row = judge_response([first, second], patient="p")
    assert "W_TWICE: at baseline chest:1 and abdomen:1" in row.warnings


def test_a_lesion_that_two_scans_of_the_same_time_show_gives_a_warning():
    part = (one_to_one(1), [lesion(1, 20)], [lesion(1, 10)])
    assert "W_TWICE" not in both(part, part).warnings
    for apart_mm, expected in ((9.9, 2), (10.1, 0)):
        scan_pairs = two_scans(part, part, places=((0.0, 0.0, 0.0), (0.0, 0.0, apart_mm)))
        warnings = judge_response(scan_pairs, patient="p").warnings
        assert warnings.count("W_TWICE") == expected
        text = "at baseline chest:1 and abdomen:1 lie at the same place"
        assert (text in warnings) is bool(expected)
