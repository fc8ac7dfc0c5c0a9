from dataclasses import replace

import numpy as np
import pytest
from bundles import with_recipe
from conftest import write_dataset
from laws import CountingBackend, oblique, orientations

from volseg.bundle import load_bundle
from volseg.errors import ScanError
from volseg.io.volumes import read_mask, read_volume
from volseg.segmentation import load_model, segment_case
from volseg.volume import Geometry, Volume


@pytest.fixture(scope="module")
def loaded(model):
    return load_model(load_bundle(model), "cpu")


def test_an_unseen_scan_gives_the_ball_measured_on_its_own_grid(loaded, dataset):
    scan = read_volume(dataset / "images" / "scan_7.nii.gz")
    truth = read_mask(dataset / "labels" / "scan_7.nii.gz").array == 3
    result = segment_case({"ct": scan}, loaded, case_id="scan_7")
    assert result.mask.geometry is scan.geometry
    assert set(np.unique(result.mask.array)) == {0, 3}
    lesion = result.lesions[0]
    volume_mm3 = truth.sum() * scan.geometry.voxel_volume_mm3
    assert lesion.volume_mm3 == pytest.approx(volume_mm3, rel=0.25)
    inside = result.lesion_ids.array == 1
    assert lesion.n_voxels == inside.sum()
    assert lesion.intensity_mean == pytest.approx(scan.array[inside].mean())
    assert (lesion.label, lesion.label_name, lesion.intensity_unit) == (3, "lesion", "HU")
    assert 0.5 < lesion.confidence_mean <= 1
    assert lesion.class_name in ("low", "high")
    assert 0.5 <= lesion.class_probability <= 1


def test_all_48_orders_of_a_scan_give_the_same_lesion(loaded, dataset):
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    expected = segment_case({"ct": scan}, loaded, case_id="a")
    pairs = list(zip(orientations(scan), orientations(expected.mask), strict=True))
    for (stored, affine), (mask, _) in pairs[::7]:
        turned = Volume(stored, Geometry(stored.shape, affine))
        result = segment_case({"ct": turned}, loaded, case_id="a")
        assert np.count_nonzero(result.mask.array != mask) <= 0.002 * np.count_nonzero(mask)


def test_tiles_are_counted_up_to_the_announced_total(loaded):
    bundle = loaded.bundle
    # A window that does not clip air, to distinguish it from tissue.
    wide = bundle.recipe.preprocess.normaliser_of("ct").model_copy(update={"low": -1100.0})
    changed = with_recipe(bundle, preprocess={"normalise": wide}, infer={"batch_size": 4})
    counting = CountingBackend(loaded.segmentation)
    array = np.full((60, 48, 40), -1000, np.int16, order="F")
    # Two pieces of tissue with air between them.
    array[8:24, 8:24, 8:24] = array[36:52, 24:40, 16:32] = 30
    scan = Volume(array, Geometry(array.shape, oblique((2, 2, 2))))
    seen = []
    counted = replace(loaded, bundle=changed, segmentation=counting)
    segment_case({"ct": scan}, counted, case_id="a", on_tile=lambda *n: seen.append(n))
    # Patches of 16 with half overlap cover the tissue's box of 44 × 32 × 24 voxels.
    total = 5 * 3 * 2
    assert seen == [(done, total) for done in range(total + 1)]
    assert 0 < counting.tiles < total  # tiles of air are counted but not run


def test_a_scan_without_a_body_has_no_tiles(loaded):
    array = np.full((20, 20, 20), -1000, np.int16, order="F")
    air = Volume(array, Geometry(array.shape, oblique((2, 2, 2))))
    seen = []
    segment_case({"ct": air}, loaded, case_id="a", on_tile=lambda *n: seen.append(n))
    assert seen == []


def test_a_missing_channel_is_named(loaded, dataset):
    scan = read_volume(dataset / "images" / "scan_6.nii.gz")
    with pytest.raises(ScanError, match=r"lacks channels \['ct'\]; it has \['t1'\]"):
        segment_case({"t1": scan}, loaded, case_id="a")


def test_the_balls_of_the_test_dataset_have_their_radius(tmp_path):
    write_dataset(tmp_path, n=8)
    for number in range(8):
        truth = read_mask(tmp_path / "labels" / f"scan_{number}.nii.gz")
        volume_mm3 = np.count_nonzero(truth.array) * truth.geometry.voxel_volume_mm3
        radius = (volume_mm3 * 3 / 4 / np.pi) ** (1 / 3)
        assert radius == pytest.approx(7 + number % 3, rel=0.03)
