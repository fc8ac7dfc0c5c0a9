"""Each flag has a fault that raises it and no other; sound scans raise none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from laws import ball
from quality_phantoms import Patient, dataset, with_array

from volseg.quality.compare import compare_scans, run_warnings
from volseg.quality.flags import FLAGS
from volseg.quality.prints import print_of_scan
from volseg.quality.scan import judge_scan
from volseg.volume import Volume

FAULTY = 3  # number of the scan that gets the fault


def repeated_slice(scan: Volume) -> Volume:
    return with_array(scan, np.insert(scan.array, 12, scan.array[:, :, 12], axis=2))


def without_slices(scan: Volume) -> Volume:
    taller = Patient(seed=FAULTY, shape=(52, 46, 36)).scan()
    return with_array(scan, np.delete(taller.array, range(14, 20), axis=2))


def blank(scan: Volume) -> Volume:
    noise = np.random.default_rng(0).integers(-1000, 100, scan.array.shape)
    return with_array(scan, np.where(ball(22, scan.geometry), noise, -1000).astype(np.int16))


def mask(scan: Volume) -> Volume:
    array = (scan.array > -500).astype(np.uint8) + (scan.array > 60)
    return with_array(scan, array)


def saturated(scan: Volume) -> Volume:
    return with_array(scan, np.where(ball(50, scan.geometry), 1500, scan.array).astype(np.int16))


def too_bright(scan: Volume) -> Volume:
    bright = scan.array + np.int16(6000)
    return with_array(scan, np.where(ball(40, scan.geometry), bright, scan.array))


def warm_air(scan: Volume) -> Volume:
    return with_array(scan, np.where(scan.array < -900, scan.array + 120, scan.array))


def without_intercept(scan: Volume) -> Volume:
    return with_array(scan, scan.array + np.int16(1024))


def cut(scan: Volume) -> Volume:
    return Patient(seed=FAULTY, centre=(0.2, 0.5)).scan()


def mr(scan: Volume) -> Volume:
    return Patient(seed=FAULTY, is_ct=False).scan()


def thick(scan: Volume) -> Volume:
    return Patient(seed=FAULTY, spacing_mm=(4.0, 4.0, 10.0)).scan()


def tall(scan: Volume) -> Volume:
    return Patient(seed=FAULTY, shape=(52, 46, 70)).scan()


def noisy(scan: Volume) -> Volume:
    return Patient(seed=FAULTY, noise=80).scan()


def same(scan: Volume) -> Volume:
    other = dataset()[5]
    return Volume(other.array.astype(np.float32), other.geometry)


def similar(scan: Volume) -> Volume:
    other = dataset()[5]
    noise = np.random.default_rng(1).normal(0, 3, other.array.shape)
    return with_array(other, np.rint(other.array[1:] + noise[1:]).astype(np.int16))


FAULTS = {
    "W_EQUAL_SLICES": repeated_slice,
    "W_SLICE_JUMP": without_slices,
    "W_FLAT": blank,
    "W_DRAWING": mask,
    "W_CLIP": saturated,
    "W_HU_STATED": mr,
    "W_HU_RANGE": too_bright,
    "W_HU_AIR": warm_air,
    "W_HU_OFFSET": without_intercept,
    "W_CUT": cut,
    "W_MIXED": mr,
    "W_ODD_SPACING": thick,
    "W_ODD_SIZE": tall,
    "W_ODD_NOISE": noisy,
    "W_SAME": same,
    "W_SIMILAR": similar,
}


def flags_of(scans, modalities=None, **names):
    """Return the codes of each scan."""
    facts = []
    for number, scan in enumerate(scans):
        modality = (modalities or {}).get(number, "")
        judged = judge_scan(scan, case_id=f"p{number}", modality=modality, **names)
        facts.append(replace(judged, print=print_of_scan(scan)))
    return [row.flags for row, _ in compare_scans(facts)]


@pytest.fixture(scope="module")
def sound() -> tuple[Volume, ...]:
    return dataset()


@pytest.mark.parametrize("is_ct", [True, False])
def test_sound_scans_have_no_flag(is_ct):
    assert flags_of(dataset(is_ct=is_ct)) == [""] * 10


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.code)
def test_each_flag_has_a_fault_that_raises_it_alone(flag, sound):
    scans = list(sound)
    scans[FAULTY] = FAULTS[flag.code](sound[FAULTY])
    modalities = {FAULTY: "CT"} if flag.code == "W_HU_STATED" else {}
    codes = flags_of(scans, modalities)
    assert codes[FAULTY] == flag.code
    partner = {"W_SAME": 5, "W_SIMILAR": 5}.get(flag.code)
    others = {code for n, code in enumerate(codes) if n not in (FAULTY, partner)}
    assert others == {""}
    assert partner is None or codes[partner] == flag.code


def test_every_flag_says_when_it_is_raised_and_what_to_do(sound):
    codes = [flag.code for flag in FLAGS]
    assert len(set(codes)) == len(codes) and codes == list(FAULTS)
    scans = list(sound)
    scans[FAULTY] = cut(sound[FAULTY])
    facts = [judge_scan(scan, case_id=str(n)) for n, scan in enumerate(scans)]
    row, (raised,) = compare_scans(facts)[FAULTY]
    assert row.warnings == f"W_CUT: {raised.text}; to fix: {raised.flag.fix}"
    assert "sides L" in raised.text and row.cut_sides == "L"
    for flag in FLAGS:
        assert flag.code.startswith("W_") and flag.rule and flag.fix
        assert "\n" not in flag.rule + flag.fix


def test_a_dataset_of_crops_has_no_cut_scans():
    scans = [Patient(seed=seed, centre=(0.2, 0.5)).scan() for seed in range(10)]
    assert flags_of(scans) == [""] * 10


def test_two_groups_of_spacings_are_no_outliers():
    thick = [Patient(seed=seed, spacing_mm=(4.0, 4.0, 10.0)).scan() for seed in range(4)]
    assert flags_of([*dataset(6), *[with_array(scan, scan.array) for scan in thick]]) == [""] * 10


def test_headers_that_state_another_modality_are_named(sound):
    modalities = dict.fromkeys(range(10), "CT") | {FAULTY: "MR"}
    codes = flags_of(sound, modalities)
    assert codes[FAULTY] == "W_MIXED" and set(codes) == {"", "W_MIXED"}


def test_channels_are_compared_with_themselves_alone(sound):
    facts = [judge_scan(scan, case_id=str(n), channel="ct") for n, scan in enumerate(sound)]
    facts += [
        judge_scan(scan, case_id=str(n), channel="mr")
        for n, scan in enumerate(dataset(is_ct=False))
    ]
    assert {row.flags for row, _ in compare_scans(facts)} == {""}


def test_scans_of_one_patient_may_be_similar_but_not_the_same(sound):
    twins = [sound[5], similar(sound[FAULTY])]
    facts = [
        replace(judge_scan(scan, case_id=str(n)), print=print_of_scan(scan), patient="p")
        for n, scan in enumerate(twins)
    ]
    assert [row.flags for row, _ in compare_scans(facts)] == ["", ""]
    facts[1] = replace(facts[1], print=facts[0].print)
    assert [row.same_as for row, _ in compare_scans(facts)] == ["1", "0"]


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.in_runs], ids=lambda flag: flag.code)
def test_runs_warn_of_what_puts_volumes_or_hu_in_doubt(flag, sound):
    assert list(run_warnings(sound[FAULTY], is_hu=True)) == []
    (warning,) = run_warnings(FAULTS[flag.code](sound[FAULTY]), is_hu=True)
    assert warning.startswith(f"{flag.code}: ") and warning.endswith(flag.fix)
