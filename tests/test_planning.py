import json

import numpy as np
import pytest
from laws import lps, oblique, orientations, ras

from volseg.errors import VolsegError
from volseg.planning.close import Closed, close, fill
from volseg.planning.fingerprint import CaseFingerprint, combine_fingerprints, fingerprint_case
from volseg.recipe import ZScore, load_recipe
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


def open_recipe():
    network = type(recipe().network)(name="unet3d", features="auto", strides="auto", kernels="auto")
    train = recipe().train.model_copy(update={"patch_shape": "auto", "batch_size": "auto"})
    return recipe(**AUTO).model_copy(update={"network": network, "train": train})


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
    closed, _ = close(recipe(**AUTO), combine_fingerprints(cases))
    assert closed.spacing_mm == (0.7, 0.7, 1.25)
    window = closed.preprocess.normaliser_of("ct")
    assert (window.low, window.high, window.mean) == pytest.approx((0.5, 99.5, 50.0))
    assert window.sd == pytest.approx(100 / np.sqrt(12), rel=0.01)


def test_a_strongly_anisotropic_axis_takes_a_low_percentile_but_no_finer_than_the_others():
    cases = [case((0.7, 0.7, z)) for z in (1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)]
    spacing = close(recipe(**AUTO), combine_fingerprints(cases)).recipe.spacing_mm
    assert spacing[:2] == (0.7, 0.7)
    assert spacing[2] == pytest.approx(np.percentile([1.0] + [5.0] * 10, 10))
    thin = combine_fingerprints([case((0.7, 0.7, z)) for z in (0.2, 0.2, 5, 5, 5)])
    assert close(recipe(**AUTO), thin).recipe.spacing_mm[2] == 0.7


def test_what_the_recipe_states_stays():
    stated = {"spacing_mm": (2, 3, 4), "normalise": {"method": "window", "low": -7, "mean": 3}}
    closed, _ = close(recipe(**stated), combine_fingerprints([case(samples=(0.0, 10.0))]))
    assert closed.spacing_mm == (2, 3, 4)
    window = closed.preprocess.normaliser_of("ct")
    assert (window.low, window.mean) == (-7, 3)
    assert window.high == pytest.approx(9.95)


def test_a_plan_is_a_recipe_without_auto_and_survives_json():
    given = open_recipe()
    plan = close(given, combine_fingerprints([case()]))
    assert given.open_keys and plan.recipe.open_keys == []
    assert Closed.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    assert close(plan.recipe, combine_fingerprints([case((9, 9, 9))])).recipe == plan.recipe
    with pytest.raises(ValueError, match=r"preprocess\.spacing_mm"):
        Closed.from_json(plan.as_json() | {"recipe": given.model_dump(mode="json")})


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
    closed, _ = close(loaded.model_copy(update={"data": data}), combine_fingerprints([both]))
    t1, ct = map(closed.preprocess.normaliser_of, ("t1", "ct"))
    assert t1 == ZScore()
    assert (ct.mean, ct.sd) == (4, 4)


def test_recipes_that_can_only_be_run_are_not_planned():
    fingerprint = combine_fingerprints([case()])
    regions = recipe(**AUTO)
    data = regions.data.model_copy(update={"regions_class_order": (1,)})
    with pytest.raises(VolsegError, match="does not say of which labels"):
        close(regions.model_copy(update={"data": data}), fingerprint)
    with pytest.raises(VolsegError, match="other axes than R, A, S"):
        close(recipe(**AUTO, transpose=(2, 0, 1)), fingerprint)
    stored = recipe(**AUTO | {"spacing_mm": (3, 1, 1)}, axes="stored")
    assert close(stored, fingerprint).recipe.spacing_mm == (3, 1, 1)


def test_a_plan_fills_what_another_recipe_leaves_open_and_the_reasons_say_so():
    values = tuple(np.linspace(0, 100, 1001))
    plan = close(recipe(**AUTO), combine_fingerprints([case(samples=values)]))
    same = fill(recipe(**AUTO), plan)
    assert same == plan
    stated, reasons = fill(
        recipe(spacing_mm=(2.0, 2.0, 3.0), normalise={"method": "window", "low": -5.0}), plan
    )
    assert stated.spacing_mm == (2.0, 2.0, 3.0)
    window, planned = (r.preprocess.normaliser_of("ct") for r in (stated, plan.recipe))
    assert (window.low, window.high) == (-5.0, planned.high)
    lines = {line.setting: line for line in reasons}
    assert lines["spacing"].value == "2 × 2 × 3 mm"
    assert lines["spacing"].reason == "stated by the recipe"
    scored = fill(recipe(normalise={"method": "zscore"}), plan)
    assert scored.recipe.preprocess.normaliser_of("ct") == ZScore()
    with pytest.raises(VolsegError, match="no value for the intensity window of channel 'ct'"):
        fill(recipe(**AUTO), scored)
    with pytest.raises(VolsegError, match=r"no value for network\.kernels"):
        fill(open_recipe(), plan)  # the shipped recipe states its network, without kernels


def test_a_window_for_a_channel_that_no_training_case_has_cannot_be_found():
    fingerprint = combine_fingerprints([case().model_copy(update={"samples": {"pet": (1.0, 2.0)}})])
    with pytest.raises(VolsegError, match="no training case has channel 'ct'"):
        close(recipe(**AUTO), fingerprint)


def test_a_window_of_a_channel_that_is_constant_under_the_labels_cannot_be_planned():
    fingerprint = combine_fingerprints([case(samples=(1.0, 1.0))])
    with pytest.raises(VolsegError, match="'ct' has the same intensity under all labels"):
        close(recipe(**AUTO), fingerprint)


def test_a_planned_end_that_contradicts_a_stated_one_is_named():
    fingerprint = combine_fingerprints([case(samples=(1.0, 2.0, 50.0))])
    stated = recipe(spacing_mm="auto", normalise={"method": "window", "low": 100.0})
    with pytest.raises(VolsegError, match="of channel 'ct' under the labels give high 49"):
        close(stated, fingerprint)


def test_the_reason_of_a_window_names_what_was_planned():
    stated = recipe(spacing_mm="auto", normalise={"method": "window", "low": 0.0, "high": 9.0})
    reasons = close(stated, combine_fingerprints([case()])).reasons
    (reason,) = [line.reason for line in reasons if line.setting.startswith("intensities")]
    assert reason == "mean, standard deviation under the training labels"


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
    rng = np.random.default_rng(0)
    scan = mask.with_array(np.asfortranarray(rng.integers(0, 99, mask.array.shape)))
    fingerprint = combine_fingerprints([fingerprint_case({"ct": scan}, mask, rng)])
    assert fingerprint.lesion_extent_mm == (28, 28, 21)
    for flops in (1e18, 1e15, 1e14, 1e13, 3e12):
        closed, reasons = close(open_recipe(), fingerprint, Budget(memory=8 << 30, flops=flops))
        assert all(p >= n for p, n in zip(closed.patch_shape, (28, 28, 21), strict=True))
        values = {line.setting: line.value for line in reasons}
        assert "28 × 28 × 21" in values["median lesion"]
    with pytest.raises(VolsegError, match=f"fewer than {LEAST_STEPS} steps"):
        close(open_recipe(), fingerprint, Budget(memory=8 << 30, flops=1e11))
