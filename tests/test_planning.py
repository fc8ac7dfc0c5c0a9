import numpy as np
import pytest
from laws import lps, oblique, orientations, ras

from volseg.errors import VolsegError
from volseg.planning import (
    CaseFingerprint,
    DatasetFingerprint,
    Plan,
    combine_fingerprints,
    fingerprint_case,
    make_plan,
)
from volseg.preprocessing.normalise import Window, ZScore
from volseg.recipe import load_recipe
from volseg.sizing import LEAST_STEPS, Budget
from volseg.volume import Geometry, Volume

SHAPE = (20, 22, 12)


def case(spacing_mm=(1.0, 1.0, 1.0), samples=(1.0, 2.0, 3.0)):
    return CaseFingerprint(
        spacing_mm=spacing_mm, shape=SHAPE, label_voxels={1: 3}, samples={"ct": samples}
    )


def recipe(**preprocess):
    loaded = load_recipe("lung_nodule_ct")
    content = loaded.preprocess.model_dump() | preprocess
    return loaded.model_copy(update={"preprocess": type(loaded.preprocess).model_validate(content)})


AUTO = {"spacing_mm": "auto", "normalise": {"method": "window"}}


def test_all_48_orders_have_the_same_fingerprint():
    rng = np.random.default_rng(0)
    scan = Volume(
        rng.integers(-100, 100, SHAPE).astype(np.int16), Geometry(SHAPE, lps((0.7, 0.9, 2.5)))
    )
    mask = scan.with_array((rng.random(SHAPE) < 0.2).astype(np.uint8) * 4)
    expected = fingerprint_case({"ct": scan}, mask, np.random.default_rng(0))
    assert expected.spacing_mm == pytest.approx((0.7, 0.9, 2.5))
    for (array, affine), (labels, _) in zip(orientations(scan), orientations(mask), strict=True):
        geometry = Geometry(array.shape, affine)
        fingerprint = fingerprint_case(
            {"ct": Volume(array, geometry)}, Volume(labels, geometry), np.random.default_rng(0)
        )
        assert fingerprint.spacing_mm == pytest.approx(expected.spacing_mm)
        assert fingerprint.shape == expected.shape
        assert fingerprint.label_voxels == expected.label_voxels
        assert fingerprint.label_voxels == {4: int((mask.array == 4).sum())}
        assert sorted(fingerprint.samples["ct"]) == sorted(expected.samples["ct"])


def test_samples_are_scaled_intensities_under_the_mask_only():
    array = np.zeros(SHAPE, np.int16)
    mask = np.zeros(SHAPE, np.uint8)
    array[3, 4, 5], mask[3, 4, 5] = 100, 1
    geometry = Geometry(SHAPE, oblique((1, 1, 2)))
    scan = Volume(array, geometry, slope=2, intercept=-50)
    rng = np.random.default_rng(0)
    fingerprint = fingerprint_case({"ct": scan}, Volume(mask, geometry), rng)
    assert fingerprint.samples["ct"] == (150.0,)


def test_the_plan_takes_the_median_spacing_and_the_statistics_under_the_labels():
    values = tuple(np.linspace(0, 100, 1001))
    spacings = [(0.6, 0.6, 1.0), (0.7, 0.7, 1.25), (0.9, 0.9, 2.0)]
    cases = [case(spacing, values) for spacing in spacings]
    plan = make_plan(combine_fingerprints(cases), recipe(**AUTO))
    assert plan.spacing_mm == (0.7, 0.7, 1.25)
    window = plan.windows["ct"]
    assert (window.low, window.high, window.mean) == pytest.approx((0.5, 99.5, 50.0))
    assert window.sd == pytest.approx(100 / np.sqrt(12), rel=0.01)


def test_a_strongly_anisotropic_axis_takes_a_low_percentile_but_no_finer_than_the_others():
    cases = [case((0.7, 0.7, z)) for z in (1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)]
    spacing = make_plan(combine_fingerprints(cases), recipe(**AUTO)).spacing_mm
    assert spacing[:2] == (0.7, 0.7)
    assert spacing[2] == pytest.approx(np.percentile([1.0] + [5.0] * 10, 10))
    finest = make_plan(
        combine_fingerprints([case((0.7, 0.7, z)) for z in (0.2, 0.2, 5, 5, 5)]), recipe(**AUTO)
    )
    assert finest.spacing_mm[2] == 0.7


def test_what_the_recipe_states_stays():
    stated = {"spacing_mm": (2, 3, 4), "normalise": {"method": "window", "low": -7, "mean": 3}}
    plan = make_plan(combine_fingerprints([case(samples=(0.0, 10.0))]), recipe(**stated))
    assert plan.spacing_mm == (2, 3, 4)
    assert (plan.windows["ct"].low, plan.windows["ct"].mean) == (-7, 3)
    assert plan.windows["ct"].high == pytest.approx(9.95)


def test_a_plan_survives_json_and_makes_the_normaliser_it_says():
    plan = make_plan(combine_fingerprints([case()]), recipe(**AUTO))
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    (normaliser,) = again.prepare_settings(recipe(**AUTO).preprocess, ["ct"]).normalisers
    window = plan.windows["ct"]
    assert normaliser == Window(low=window.low, high=window.high, mean=window.mean, sd=window.sd)


def test_a_dataset_without_a_labelled_voxel_is_refused():
    empty = CaseFingerprint(spacing_mm=(1, 1, 1), shape=SHAPE, label_voxels={}, samples={"ct": ()})
    with pytest.raises(VolsegError, match="no training mask"):
        combine_fingerprints([empty])


def test_channels_may_be_normalised_in_different_ways():
    loaded = recipe(
        normalise={"method": "zscore"},
        normalise_channels={"ct": {"method": "window"}},
        spacing_mm=(1, 1, 1),
    )
    data = loaded.data.model_copy(update={"channels": ("t1", "ct")})
    both = CaseFingerprint(
        spacing_mm=(1, 1, 1),
        shape=SHAPE,
        label_voxels={1: 2},
        samples={"ct": (0.0, 8.0), "t1": (1.0, 2.0)},
    )
    plan = make_plan(combine_fingerprints([both]), loaded.model_copy(update={"data": data}))
    assert list(plan.windows) == ["ct"]
    t1, ct = plan.prepare_settings(loaded.preprocess, ["t1", "ct"]).normalisers
    assert t1 == ZScore()
    assert (ct.mean, ct.sd) == (4, 4)


def test_recipes_that_can_only_be_run_are_not_planned():
    fingerprint = combine_fingerprints([case()])
    regions = recipe(**AUTO)
    data = regions.data.model_copy(update={"regions_class_order": (1,)})
    with pytest.raises(VolsegError, match="does not say of which labels"):
        make_plan(fingerprint, regions.model_copy(update={"data": data}))
    with pytest.raises(VolsegError, match="other axes than R, A, S"):
        make_plan(fingerprint, recipe(**AUTO, transpose=(2, 0, 1)))
    stored = recipe(**AUTO | {"spacing_mm": (3, 1, 1)}, axes="stored")
    assert make_plan(fingerprint, stored).spacing_mm == (3, 1, 1)


def test_a_recipe_overrules_a_plan_that_is_passed_back_and_the_lines_say_so():
    values = tuple(np.linspace(0, 100, 1001))
    plan = make_plan(combine_fingerprints([case(samples=values)]), recipe(**AUTO))
    edited = plan.model_copy(update={"spacing_mm": (2.0, 2.0, 3.0), "batch_size": 7})
    same = edited.overruled_by(recipe(**AUTO))
    assert same.spacing_mm == (2.0, 2.0, 3.0)
    assert same.batch_size == recipe().train.batch_size  # stated by that recipe
    lines = {line.setting: line for line in same.lines}
    assert lines["spacing"].value == "2 × 2 × 3 mm"
    assert lines["spacing"].reason == "from the plan that was given"
    assert lines["batch"].value == str(same.batch_size)
    stated = edited.overruled_by(
        recipe(spacing_mm=(1.0, 1.0, 1.0), normalise={"method": "window", "low": -5.0})
    )
    assert stated.spacing_mm == (1.0, 1.0, 1.0)
    assert (stated.windows["ct"].low, stated.windows["ct"].high) == (-5.0, plan.windows["ct"].high)
    scored = edited.overruled_by(recipe(normalise={"method": "zscore"}))
    assert scored.windows == {}
    preprocess = recipe(normalise={"method": "zscore"}).preprocess
    (normaliser,) = scored.prepare_settings(preprocess, ["ct"]).normalisers
    assert isinstance(normaliser, ZScore)
    with pytest.raises(VolsegError, match="the plan has no intensity window for channel 'ct'"):
        scored.overruled_by(recipe(**AUTO))


def test_a_plan_with_numbers_that_cannot_be_is_refused():
    plan = make_plan(combine_fingerprints([case()]), recipe(**AUTO)).model_dump()
    layers = {"features": (4, 8), "strides": ((1, 1, 1), (2, 2, 2)), "kernels": ((3, 3, 3),) * 2}
    for wrong in (
        {"batch_size": 0},
        {"spacing_mm": (0, 1, 1)},
        {"patch_shape": (8, -8, 8)},
        {"network": layers},
    ):
        with pytest.raises(ValueError):
            Plan.model_validate(plan | wrong)


def test_a_window_for_a_channel_that_no_training_case_has_cannot_be_found():
    fingerprint = combine_fingerprints([case().model_copy(update={"samples": {"pet": (1.0, 2.0)}})])
    with pytest.raises(VolsegError, match="no training case has channel 'ct'"):
        make_plan(fingerprint, recipe(**AUTO))


def boxes(spacing_mm, lengths_mm, affine=ras):
    """Return a mask with boxes of these lengths (R, A, S, mm) in a row along R."""
    geometry = Geometry((90, 40, 30), affine(spacing_mm))
    array, start = np.zeros(geometry.shape, np.uint8), 1
    for lengths in lengths_mm:
        r, a, s = (round(length / mm) for length, mm in zip(lengths, spacing_mm, strict=True))
        array[start : start + r, 1 : 1 + a, 1 : 1 + s] = 1
        start += r + 2
    return Volume(np.asfortranarray(array), geometry)


def test_the_median_lesion_is_measured_per_axis_in_all_48_orders():
    lengths = [(8, 12, 9), (16, 20, 15), (24, 16, 12), (2, 2, 1.5)]
    mask = boxes((1.0, 2.0, 1.5), lengths)
    for array, affine in orientations(mask):
        volume = Volume(array, Geometry(array.shape, affine))
        extents = fingerprint_case(
            {"ct": volume}, volume, np.random.default_rng(0)
        ).lesion_extents_mm
        assert np.median(extents[:3], axis=0) == pytest.approx((16, 16, 12))
        assert len(extents) == 3  # the crumb does not count


def test_a_patch_is_never_smaller_than_the_median_lesion():
    mask = boxes((1.0, 1.0, 1.0), [(30, 26, 20), (26, 30, 22)])
    case = fingerprint_case({"ct": mask}, mask, np.random.default_rng(0))
    fingerprint = combine_fingerprints([case])
    assert fingerprint.lesion_extent_mm == (28, 28, 21)
    network = type(recipe().network)(name="unet3d", features="auto", strides="auto", kernels="auto")
    train = recipe().train.model_copy(update={"patch_shape": "auto", "batch_size": "auto"})
    open_recipe = recipe(**AUTO).model_copy(update={"network": network, "train": train})
    for flops in (1e18, 1e15, 1e14, 1e13, 3e12):
        plan = make_plan(fingerprint, open_recipe, Budget(memory=8 << 30, flops=flops))
        assert all(p >= n for p, n in zip(plan.patch_shape, (28, 28, 21), strict=True))
        values = {line.setting: line.value for line in plan.lines}
        assert "28 × 28 × 21" in values["median lesion"]
    with pytest.raises(VolsegError, match=f"fewer than {LEAST_STEPS} steps"):
        make_plan(fingerprint, open_recipe, Budget(memory=8 << 30, flops=1e11))


def test_a_fingerprint_of_before_lesions_were_measured_is_read():
    mask = boxes((1.0, 1.0, 1.0), [(30, 26, 20)])
    case = fingerprint_case({"ct": mask}, mask, np.random.default_rng(0))
    content = combine_fingerprints([case]).model_dump(mode="json")
    del content["lesion_extent_mm"]
    assert make_plan(DatasetFingerprint.model_validate(content), recipe()).patch_shape
