"""The model box of good, poor and unknown models; test_page.py checks that it is visible."""

import pytest

from volseg.bundle import load_bundle, shipped_bundle
from volseg.measurement.rows import CaseRow
from volseg.pages.model_box import model_box, read_model_box, similarity_of_run, similarity_of_scan


def box_of(metrics, labels=None, **changes):
    bundle = load_bundle(shipped_bundle())
    data = bundle.recipe.data.model_copy(update={"labels": labels or {"nodule": 1}})
    recipe = bundle.recipe.model_copy(update={"data": data} | changes)
    return model_box("lung@1234", recipe, bundle.fingerprint, metrics)


def test_the_box_of_the_shipped_model_has_its_use_limits_cases_and_dice():
    bundle = load_bundle(shipped_bundle())
    box = model_box(bundle.name, bundle.recipe, bundle.fingerprint, bundle.metrics)
    assert "crops of about 3 to 7 cm" in box.intended_use and "whole chest" in box.limits
    assert box.cases_text == "601 cases, validated on 155"
    assert box.dice_text == "nodule 0.82 (no confidence interval)"
    assert box.poor_line == ""
    assert (
        read_model_box(box.model_dump_json()) == read_model_box(box.model_dump(mode="json")) == box
    )


@pytest.mark.parametrize("content", [None, "", "{", [], "[1]", {"name": "a"}, '{"name": 3}'])
def test_invalid_content_has_no_box(content):
    assert read_model_box(content) is None


def test_a_dice_has_its_interval_and_below_a_half_a_warning():
    box = box_of(
        {
            "validation_dice_nodule": 0.49,
            "validation_dice_nodule_95": [0.31, 0.66],
            "training_cases": 12,
        }
    )
    assert box.dice_text == "nodule 0.49 (95 % CI 0.31 to 0.66)"
    assert box.poor_line.startswith("Poor model: validation Dice below 0.5: nodule 0.49.")
    assert box_of({"validation_dice_nodule": 0.5}).poor_line == ""
    many = {f"organ_{n}": n for n in range(1, 25)}
    box = box_of({f"validation_dice_{name}": n / 25 for name, n in many.items()}, labels=many)
    assert "organ_1 0.04, organ_2 0.08" in box.poor_line and "and 4 more labels" in box.poor_line
    assert box.dice_text.startswith("mean of 24 labels 0.50; lowest: organ_1 0.04")


def test_an_unknown_dice_gives_a_caution_and_nnunet_models_the_mean_of_their_folds():
    assert "with caution" in box_of({}).dice_text
    assert box_of(
        {"nnunet_validation_dice_fold_0": 0.4, "nnunet_validation_dice_fold_1": 0.2}
    ).poor_line


def test_how_many_scans_resemble_those_of_training():
    unlike = "W_BORDER: a lesion touches; W_FOV: field of view 300"
    rows = [
        CaseRow(case_id="a", status="done", model="m"),
        CaseRow(case_id="b", status="done", model="m", warnings=unlike),
        CaseRow(case_id="c", status="failed", model="m", reason="E_MODALITY: no CT"),
        CaseRow(case_id="d", status="failed", model="m", reason="E_TRUNCATED: cut off"),
        CaseRow(case_id="e", status="done", model="another"),
    ]
    similarity = similarity_of_run(rows, "m")
    assert (
        similarity.text.startswith("1 of 3 scans resemble")
        and "1 of another modality were refused" in similarity.text
    )
    assert not similarity.is_like
    assert similarity_of_scan("W_CLIP: 20% of the voxels").is_like
    assert not similarity_of_scan("W_MODALITY: x").is_like
