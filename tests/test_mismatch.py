"""Comparison of scans with a model's training scans: synthetic and shipped fingerprints."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from laws import oblique, orientations, real_data

from volseg.bundle import load_bundle, model_card, shipped_bundle
from volseg.io.volumes import read_volume
from volseg.mismatch import compare_scan, list_checks
from volseg.planning.fingerprint import DatasetFingerprint, IntensityStatistics
from volseg.recipe import parse_recipe
from volseg.volume import Geometry, Volume

SPACING_MM, SHAPE = (1.0, 1.2, 2.5), (40, 36, 20)


def fingerprint(p00_5=-200.0, p99_5=300.0, **fields):
    statistics = IntensityStatistics(mean=50, sd=80, p00_5=p00_5, median=40, p99_5=p99_5)
    facts = {
        "n_cases": 2,
        "spacings_mm": (SPACING_MM, SPACING_MM),
        "shapes": (SHAPE, SHAPE),
        "label_voxels": {1: 100},
        "foreground": {"scan": statistics},
    }
    return DatasetFingerprint(**(facts | fields))


def recipe(tiny_recipe, unit="HU", method="window", **data):
    content = tiny_recipe.model_dump(mode="json")
    normalise = content["preprocess"]["normalise"] if method == "window" else {"method": method}
    preprocess = content["preprocess"] | {"normalise": normalise}
    data = content["data"] | {"intensity_unit": unit, "channels": ["scan"]} | data
    return parse_recipe(content | {"data": data, "preprocess": preprocess}, where="test")


def ct(spacing_mm=SPACING_MM, shape=SHAPE):
    values = np.random.default_rng(0).normal(40, 15, shape)
    values[: shape[0] // 3] -= 940
    return Volume(np.asfortranarray(values), Geometry(shape, oblique(spacing_mm)))


def mr(spacing_mm=SPACING_MM, shape=SHAPE):
    values = np.random.default_rng(0).gamma(3, 100, shape)
    return Volume(np.asfortranarray(values), Geometry(shape, oblique(spacing_mm)))


def codes(resemblance):
    return [remark.partition(":")[0] for remark in resemblance.remarks]


def test_a_scan_like_those_of_training_passes_in_all_48_orders(tiny_recipe):
    scan = ct()
    for stored, affine in orientations(scan):
        turned = Volume(stored, Geometry(stored.shape, affine))
        resemblance = compare_scan({"scan": turned}, recipe(tiny_recipe), fingerprint())
        assert resemblance.remarks == () and resemblance.unit.is_hu


@pytest.mark.parametrize(
    ("unit", "method", "scan", "fields", "is_foreign"),
    [
        ("HU", "window", ct, {}, False),
        ("HU", "window", mr, {}, True),
        ("HU", "zscore", mr, {}, True),
        ("a.u.", "zscore", mr, {"p00_5": 20.0}, False),
        ("a.u.", "zscore", ct, {"p00_5": 20.0}, True),  # no label had a negative value
        ("a.u.", "zscore", ct, {"p00_5": -5.0}, False),  # an older model does not know
        ("a.u.", "zscore", ct, {"p00_5": -5.0, "n_ct_like": {"scan": 0}}, True),
        ("a.u.", "zscore", ct, {"p00_5": 20.0, "n_ct_like": {"scan": 2}}, False),
        # Its intensities do not overlap those of the labels.
        ("a.u.", "window", mr, {"p00_5": 5000.0, "p99_5": 9000.0}, True),
        ("SUV", "zscore", mr, {"p00_5": 0.5}, True),
    ],
)
def test_another_modality_is_a_contradiction(unit, method, scan, fields, is_foreign, tiny_recipe):
    resemblance = compare_scan(
        {"scan": scan()}, recipe(tiny_recipe, unit, method), fingerprint(**fields)
    )
    assert bool(resemblance.contradictions) == is_foreign
    assert codes(resemblance) == ["W_MODALITY"] * is_foreign
    assert ("W_MODALITY" in resemblance.unit.doubt) == is_foreign


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "expected"),
    [
        ((1.0, 1.2, 2.5), (40, 36, 20), []),
        ((1.4, 1.7, 3.5), (40, 36, 20), []),  # within a factor of 1.5
        ((2.0, 2.4, 5.0), (20, 18, 10), ["W_SPACING", "W_SLICES"]),  # the same field of view
        # A whole chest for a model of crops.
        ((1.0, 1.2, 2.5), (160, 144, 80), ["W_FOV", "W_SLICES"]),
        ((1.0, 1.2, 2.5), (80, 36, 20), ["W_FOV"]),
        ((1.0, 1.2, 0.625), (40, 36, 80), ["W_SPACING", "W_SLICES"]),
        ((1.0, 1.2, 2.5), (40, 36, 10), ["W_FOV", "W_SLICES"]),
    ],
)
def test_an_unusual_grid_is_a_warning_with_both_numbers(spacing_mm, shape, expected, tiny_recipe):
    resemblance = compare_scan({"scan": ct(spacing_mm, shape)}, recipe(tiny_recipe), fingerprint())
    assert codes(resemblance) == expected
    assert resemblance.unit.is_hu  # the grid says nothing about the intensities
    text = " ".join(resemblance.remarks)
    if "W_SPACING" in expected:
        assert f"{spacing_mm[2]:.3g} mm" in text and "2.5 to 2.5 mm" in text
    if "W_FOV" in expected:
        assert f"{shape[0] * spacing_mm[0]:.3g} x" in text and "40 to 40" in text
    if "W_SLICES" in expected:
        assert f"slices along S {shape[2]}, in training 20 to 20" in text


def test_a_unit_that_the_model_guessed_gives_no_numbers_but_is_no_contradiction(tiny_recipe):
    guessed = recipe(tiny_recipe, unit_guessed=True)
    resemblance = compare_scan({"scan": ct()}, guessed, fingerprint())
    assert not resemblance.contradictions and not resemblance.unit.is_hu
    assert codes(resemblance) == ["W_UNIT"]
    assert compare_scan({"scan": mr()}, guessed, fingerprint()).contradictions


def test_a_model_whose_training_scans_contradict_its_unit_accepts_them_without_numbers(tiny_recipe):
    doubted = fingerprint(p00_5=0.0, p99_5=900.0, doubted_units={"a": "no air", "b": "no air"})
    resemblance = compare_scan({"scan": mr()}, recipe(tiny_recipe), doubted)
    assert not resemblance.contradictions and codes(resemblance) == ["W_UNIT"]
    assert (resemblance.unit.name, resemblance.unit.is_hu) == ("a.u.", False)


def test_the_card_says_which_checks_a_model_can_make(tiny_recipe):
    full = list_checks(recipe(tiny_recipe), fingerprint())
    assert [check.partition(":")[0] for check in full] == [
        "modality",
        "spacing along R, A, S",
        "field of view along R, A, S",
        "slices along S",
    ]
    bare = fingerprint(p00_5=-5.0, spacings_mm=(), shapes=())
    none = list_checks(recipe(tiny_recipe, "a.u.", "zscore"), bare)
    assert [check.partition(", as")[0] for check in none] == [
        "modality: none",
        "spacing, field of view, slices: none",
    ]
    scan = {"scan": ct((5.0, 5.0, 9.0))}  # which such a model cannot check
    assert compare_scan(scan, recipe(tiny_recipe, "a.u.", "zscore"), bare).remarks == ()
    bundle = load_bundle(shipped_bundle())
    checks = list_checks(bundle.recipe, bundle.fingerprint)
    assert all(check in model_card(bundle) for check in checks)
    assert (shipped_bundle() / "card.md").read_text(encoding="utf-8") == model_card(bundle)


@pytest.mark.slow
def test_the_shipped_model_accepts_every_nodule_and_refuses_every_other_modality():
    bundle = load_bundle(shipped_bundle())
    table = real_data("lidc_nodules/cases.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    nodules = [table.parent / row["image"] for row in rows]
    others = sorted((real_data("sts_sarcoma") / "images").glob("*_[MP][RE]*.nii.gz"))
    assert len(nodules) == 97 and len(others) >= 20

    def compare(path):
        return compare_scan({"ct": read_volume(path)}, bundle.recipe, bundle.fingerprint)

    nodule_results = {path.name: compare(path) for path in nodules}
    assert not [n for n, result in nodule_results.items() if result.remarks]
    assert all(result.unit.is_hu for result in nodule_results.values())
    assert [path.name for path in others if not compare(path).contradictions] == []
    for path in others:  # a resampler pads where it has no value
        scan = read_volume(path)
        values = np.asarray(scan.intensities(), np.float32).copy(order="F")
        values[:3] = -1000
        padded = Volume(values, scan.geometry)
        result = compare_scan({"ct": padded}, bundle.recipe, bundle.fingerprint)
        assert result.contradictions, path.name
    chest = read_volume(real_data("totalseg_example_ct/images/example_ct.nii.gz"))
    resemblance = compare_scan({"ct": chest}, bundle.recipe, bundle.fingerprint)
    assert codes(resemblance) == ["W_SPACING", "W_FOV", "W_SLICES"] and resemblance.unit.is_hu
    shifted = replace(chest, intercept=chest.intercept + 1024)
    assert compare_scan({"ct": shifted}, bundle.recipe, bundle.fingerprint).contradictions
