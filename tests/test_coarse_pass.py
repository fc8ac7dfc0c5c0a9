"""The coarse first pass, with hand-made networks whose results are predictable."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import GRIDS, ball, centre_mm, lps, oblique, ras

from volseg.bundle import ModelBundle
from volseg.inference.torch_backend import TorchBackend
from volseg.planning.fingerprint import DatasetFingerprint
from volseg.recipe import parse_recipe
from volseg.segmentation import Model, segment_case
from volseg.volume import AxisOrder, BoundingBox, Geometry, Volume

RECIPE = """
name = "by_hand"
description = "Everything over an intensity is a lesion."
[data]
channels = ["ct"]
intensity_unit = "HU"
labels = { lesion = 2 }
[preprocess]
spacing_mm = [2.0, 2.0, 2.0]
crop = "none"
body_above = -500.0
[preprocess.normalise]
method = "scale"
[network]
name = "unet3d"
[train]
patch_shape = [8, 8, 8]
[infer]
overlap = 0.5
[roi]
spacing_mm = [5.0, 6.0, 4.0]
margin_mm = 10.0
[roi.network]
name = "unet3d"
[roi.train]
patch_shape = [8, 8, 8]
"""
NO_DATA = DatasetFingerprint(n_cases=1, spacings_mm=(), shapes=(), label_voxels={}, foreground={})


class Over:
    """A backend that labels voxels above an intensity and counts its tiles."""

    def __init__(self, level):
        network = torch.nn.Conv3d(1, 2, 1)
        with torch.no_grad():
            network.weight[:] = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
            network.bias[:] = torch.tensor([0.0, -float(level)])
        self.backend, self.tiles = TorchBackend(network, torch.device("cpu")), 0
        self.identity, self.head = self.backend.identity, self.backend.head

    def logits(self, batch):
        self.tiles += len(batch)
        return self.backend.logits(batch)

    def release(self):
        pass


def model(*, fine=50.0, coarse=120.0, margin_mm=10.0, patch=8, overlap=0.5, **sections):
    """Return a hand-made model; without `coarse` it has no first pass."""
    content = tomllib.loads(RECIPE)
    content["roi"]["margin_mm"] = margin_mm
    content["infer"]["overlap"] = overlap
    for name, changes in sections.items():
        content[name] |= changes
    if coarse is None:
        del content["roi"]
    recipe = parse_recipe(content, where="test")
    train = recipe.train.model_copy(update={"patch_shape": (patch,) * 3, "batch_size": 1})
    recipe = recipe.model_copy(update={"train": train})
    weights = {"segmentation": {}, "roi": {}}
    bundle = ModelBundle(recipe=recipe, fingerprint=NO_DATA, weights=weights)
    part = bundle.coarse_bundle
    first = None if part is None else Model(part, Over(coarse), None)
    return Model(bundle, Over(fine), None, coarse=first)


def phantom(affine, shape=(70, 60, 50)):
    """Return tissue in air with a bright ball (150 HU) and a faint one (90 HU) in a corner."""
    geometry = Geometry(shape, affine)
    rng = np.random.default_rng(0)
    array = np.full(shape, -1000.0)
    array[4:-4, 4:-4, 4:-4] = rng.normal(0, 5, tuple(n - 8 for n in shape))
    middle = centre_mm(geometry)
    last = geometry.to_world_mm(np.array([[n - 1 for n in shape]]))[0]
    bright = ball(8, geometry, middle + 0.2 * (last - middle))
    corner = geometry.to_world_mm(np.array([[9, 9, 9]]))[0]
    faint = ball(6, geometry, corner)
    array[bright], array[faint] = 150, 90
    return Volume(np.asfortranarray(array.astype(np.int16)), geometry), bright, faint


def masks(scan, *models):
    return [segment_case({"ct": scan}, model, case_id="a").mask.array for model in models]


@pytest.mark.parametrize("inside", ["scan", "body"])
@pytest.mark.parametrize("crop", ["none", "body"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_the_result_equals_that_of_the_whole_scan_in_the_region_and_is_background_elsewhere(
    grid, crop, inside
):
    scan, bright, faint = phantom(grid((1.5, 1.5, 2.5)))
    sections = {"preprocess": {"crop": crop}, "infer": {"inside": inside}}
    two_pass, without = model(**sections), model(coarse=None, **sections)
    result, expected = masks(scan, two_pass, without)
    region = BoundingBox.around(bright).widened((5, 5, 3), bright.shape)
    np.testing.assert_array_equal(result[region.slices], expected[region.slices])
    assert (result[bright] == 2).mean() > 0.95
    assert (expected[faint] == 2).mean() > 0.8
    assert not result[faint].any()
    assert two_pass.segmentation.tiles < without.segmentation.tiles / 4


@pytest.mark.parametrize(
    "affine", [lps((1.0, 1.5, 3.0)), oblique((2.0, 1.0, 4.0))], ids=["lps", "oblique"]
)
@pytest.mark.parametrize(
    "margin_mm", [0.0, *(pytest.param(mm, marks=pytest.mark.slow) for mm in (12.0, 25.0))]
)
def test_the_margin_is_in_millimetres_for_any_spacing(affine, margin_mm):
    scan, bright, _ = phantom(affine, (90, 84, 40))
    # The fine network finds lesions everywhere, in tiles one voxel apart: the mask is the region.
    everywhere = model(fine=-5000, margin_mm=margin_mm, patch=4, overlap=0.75)
    order = AxisOrder.of(scan.geometry)
    (mask,) = masks(scan, everywhere)
    lesion = BoundingBox.around(order.apply(bright))
    region = BoundingBox.around(order.apply(mask > 0))
    assert (mask > 0).sum() == np.prod(region.shape)
    spacing = [scan.geometry.spacing_mm[axis] for axis in order.axes]
    shape = [scan.geometry.shape[axis] for axis in order.axes]
    for axis, (native, coarse) in enumerate(zip(spacing, (5.0, 6.0, 4.0), strict=True)):
        slack = coarse + 2 * 2.0 + native  # a coarse voxel at the edge, prepared and native ones
        for room, grown in (
            (lesion.start[axis], lesion.start[axis] - region.start[axis]),
            (shape[axis] - lesion.stop[axis], region.stop[axis] - lesion.stop[axis]),
        ):
            expected = min(room * native, margin_mm)
            assert expected - slack <= grown * native <= min(room * native, margin_mm + slack)


def test_the_whole_scan_is_segmented_if_the_first_pass_finds_nothing():
    scan, _, faint = phantom(oblique((1.5, 1.5, 2.5)))
    blind, without = model(coarse=1e6), model(coarse=None)
    first = segment_case({"ct": scan}, blind, case_id="a")
    second = segment_case({"ct": scan}, without, case_id="a")
    np.testing.assert_array_equal(first.mask.array, second.mask.array)
    assert first.lesions == second.lesions
    assert (first.mask.array[faint] == 2).mean() > 0.8
    assert blind.coarse.segmentation.tiles > 0
    assert blind.segmentation.tiles == without.segmentation.tiles


def test_a_region_only_outside_the_body_is_ignored():
    scan, _, _ = phantom(ras((1.5, 1.5, 2.5)))
    array = np.random.default_rng(0).normal(100, 10, scan.array.shape).astype(np.int16)
    array[:40] -= 1100
    array[:12] = -3000  # e.g. padding around the circle of a scan
    scan = scan.with_array(np.asfortranarray(array))
    misled = model(margin_mm=0.0, infer={"inside": "body"})
    network = misled.coarse.segmentation.backend.network
    with torch.no_grad():  # labels only the padding
        network.weight *= -1
        network.bias[1] = -2000.0
    result, expected = masks(scan, misled, model(coarse=None, infer={"inside": "body"}))
    assert expected.any()
    np.testing.assert_array_equal(result, expected)


def test_air_alone_runs_neither_pass():
    scan, _, _ = phantom(ras((1.5, 1.5, 2.5)))
    air = scan.with_array(np.full(scan.array.shape, -1000, np.int16))
    both = model(preprocess={"crop": "body"})
    assert not masks(air, both)[0].any()
    assert both.coarse.segmentation.tiles == both.segmentation.tiles == 0


def test_a_bundle_with_the_weights_has_no_first_pass_where_the_recipe_has_none():
    bundle = model().bundle
    assert bundle.coarse_bundle is not None
    assert bundle.coarse_bundle.segmentation_names == ("roi",)
    assert bundle.segmentation_names == ("segmentation",)
    assert bundle.coarse_bundle.coarse_bundle is None
    one_pass = bundle.recipe.model_copy(update={"roi": None})
    assert replace(bundle, recipe=one_pass).coarse_bundle is None
    assert replace(bundle, weights={"segmentation": {}}).coarse_bundle is None
