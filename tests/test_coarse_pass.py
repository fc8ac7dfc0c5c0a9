"""The coarse first pass, with networks made by hand so that what they find is known."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import GRIDS, ball, centre_mm, lps, oblique, ras

from volseg.bundle import ModelBundle
from volseg.infer.backends import TorchBackend
from volseg.plan import DatasetFingerprint, Plan
from volseg.preprocess.crop import AxisOrder, to_canonical
from volseg.recipe import parse_recipe
from volseg.segment import Model, segment_case
from volseg.volume import BoundingBox, Geometry, Volume

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
    """A network of one convolution of 1 × 1 × 1 that takes voxels over an intensity for the label, and how often it ran."""

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
    """The hand-made model; without `coarse` it has no first pass."""
    content = tomllib.loads(RECIPE)
    content["roi"]["margin_mm"] = margin_mm
    content["infer"]["overlap"] = overlap
    for name, changes in sections.items():
        content[name] |= changes
    if coarse is None:
        del content["roi"]
    recipe = parse_recipe(content, where="test")
    plan = Plan(
        spacing_mm=recipe.preprocess.spacing_mm, patch_shape=(patch,) * 3, batch_size=1, windows={}
    )
    bundle = ModelBundle(
        recipe=recipe, plan=plan, fingerprint=NO_DATA, weights={"segmentation": {}, "roi": {}}
    )
    first = None if bundle.coarse is None else Model(bundle.coarse, Over(coarse), None)
    return Model(bundle, Over(fine), None, coarse=first)


def phantom(affine, shape=(70, 60, 50)):
    """Tissue of 0 HU in air with a bright ball (150 HU) off centre and a faint one (90 HU) in a far corner."""
    geometry = Geometry(shape, affine)
    rng = np.random.default_rng(0)
    array = np.full(shape, -1000.0)
    array[4:-4, 4:-4, 4:-4] = rng.normal(0, 5, tuple(n - 8 for n in shape))
    middle = centre_mm(geometry)
    bright = ball(
        8,
        geometry,
        middle + 0.2 * (geometry.to_world_mm(np.array([[n - 1 for n in shape]]))[0] - middle),
    )
    corner = geometry.to_world_mm(np.array([[9, 9, 9]]))[0]
    faint = ball(6, geometry, corner)
    array[bright], array[faint] = 150, 90
    return Volume(np.asfortranarray(array.astype(np.int16)), geometry), bright, faint


def masks(scan, *models):
    return [segment_case({"ct": scan}, each, case_id="a").mask.array for each in models]


@pytest.mark.parametrize("inside", ["scan", "body"])
@pytest.mark.parametrize("crop", ["none", "body"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_the_result_is_that_of_the_whole_scan_in_the_region_and_background_elsewhere(
    grid, crop, inside
):
    scan, bright, faint = phantom(grid((1.5, 1.5, 2.5)))
    sections = {"preprocess": {"crop": crop}, "infer": {"inside": inside}}
    with_it, without = model(**sections), model(coarse=None, **sections)
    found, expected = masks(scan, with_it, without)
    region = BoundingBox.around(bright, margin=(5, 5, 3))
    np.testing.assert_array_equal(found[region.slices], expected[region.slices])
    assert (found[bright] == 2).mean() > 0.95
    assert (expected[faint] == 2).mean() > 0.8
    assert not found[faint].any()
    assert with_it.segmentation.tiles < without.segmentation.tiles / 4


@pytest.mark.parametrize(
    "affine", [lps((1.0, 1.5, 3.0)), oblique((2.0, 1.0, 4.0))], ids=["lps", "oblique"]
)
@pytest.mark.parametrize("margin_mm", [0.0, 12.0, 25.0])
def test_the_margin_is_in_millimetres_whatever_the_spacing(affine, margin_mm):
    scan, bright, _ = phantom(affine, (90, 84, 40))
    # The fine network finds a lesion everywhere, in tiles that come voxel by voxel: the mask is the region, no voxel more.
    everywhere = model(fine=-5000, margin_mm=margin_mm, patch=4, overlap=0.75)
    order = AxisOrder.of(scan.geometry)
    (mask,) = masks(scan, everywhere)
    boxes = [BoundingBox.around(to_canonical(each, order)) for each in (bright, mask > 0)]
    assert (mask > 0).sum() == np.prod(boxes[1].shape)
    spacing = [scan.geometry.spacing_mm[axis] for axis in order.axes]
    shape = [scan.geometry.shape[axis] for axis in order.axes]
    for axis, (own, coarse) in enumerate(zip(spacing, (5.0, 6.0, 4.0), strict=True)):
        slack = (
            coarse + 2 * 2.0 + own
        )  # a coarse voxel at the rim of what is found; whole prepared and native voxels
        for room, grown in (
            (boxes[0].start[axis], boxes[0].start[axis] - boxes[1].start[axis]),
            (shape[axis] - boxes[0].stop[axis], boxes[1].stop[axis] - boxes[0].stop[axis]),
        ):
            wanted = min(room * own, margin_mm)
            assert wanted - slack <= grown * own <= min(room * own, margin_mm + slack)


def test_where_the_first_pass_finds_nothing_the_whole_scan_is_looked_at():
    scan, _, faint = phantom(oblique((1.5, 1.5, 2.5)))
    blind, without = model(coarse=1e6), model(coarse=None)
    first, second = (segment_case({"ct": scan}, each, case_id="a") for each in (blind, without))
    np.testing.assert_array_equal(first.mask.array, second.mask.array)
    assert first.lesions == second.lesions
    assert (first.mask.array[faint] == 2).mean() > 0.8
    assert blind.coarse.segmentation.tiles > 0
    assert blind.segmentation.tiles == without.segmentation.tiles


def test_what_is_found_outside_the_body_alone_leaves_nothing_out():
    scan, _, _ = phantom(ras((1.5, 1.5, 2.5)))
    array = np.random.default_rng(0).normal(100, 10, scan.array.shape).astype(np.int16)
    array[:40] -= 1100
    array[:12] = -3000  # such as the padding round a scan's circle
    scan = scan.with_array(np.asfortranarray(array))
    misled = model(margin_mm=0.0, infer={"inside": "body"})
    network = misled.coarse.segmentation.backend.network
    with torch.no_grad():  # takes the padding, and only that, for the label
        network.weight *= -1
        network.bias[1] = -2000.0
    found, expected = masks(scan, misled, model(coarse=None, infer={"inside": "body"}))
    assert expected.any()
    np.testing.assert_array_equal(found, expected)


def test_air_alone_runs_neither_pass():
    scan, _, _ = phantom(ras((1.5, 1.5, 2.5)))
    air = scan.with_array(np.full(scan.array.shape, -1000, np.int16))
    both = model(preprocess={"crop": "body"})
    assert not masks(air, both)[0].any()
    assert both.coarse.segmentation.tiles == both.segmentation.tiles == 0


def test_a_bundle_with_the_weights_has_no_first_pass_where_the_recipe_has_none():
    bundle = model().bundle
    assert bundle.coarse is not None
    assert bundle.coarse.members == ("roi",)
    assert bundle.members == ("segmentation",)
    assert bundle.coarse.coarse is None
    assert replace(bundle, recipe=bundle.recipe.model_copy(update={"roi": None})).coarse is None
    assert replace(bundle, weights={"segmentation": {}}).coarse is None
