"""Real scans in other file formats: SimpleITK converts them, and nothing may change."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from laws import real_data

import volseg
from volseg.io.volumes import read_mask, read_volume, write_volume

MAX_CORNER_MM = 1e-5
SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
SCANS = (
    "msd_hippocampus/images/hippocampus_001.nii.gz",
    "msd_hippocampus/images/hippocampus_003.nii.gz",
    "msd_hippocampus/images/hippocampus_015.nii.gz",
    "lidc_nodules/images/LIDC-IDRI-0001_R_1.nii.gz",
    "lidc_nodules/images/LIDC-IDRI-0003_R_4.nii.gz",
    "lidc_nodules/images/LIDC-IDRI-0007_R_1.nii.gz",
    "sts_sarcoma/images/STS_002_CT.nii.gz",
    "sts_sarcoma/images/STS_002_MR_T1.nii.gz",
    "sts_sarcoma/images/STS_002_PET.nii.gz",
    "sts_sarcoma/images/STS_008_MR_T1.nii.gz",
    "openkbp_headneck_ct/images/pt_002.nii.gz",
    "openkbp_headneck_ct/images/pt_016.nii.gz",
    "msd_spleen_ct/images/spleen2.nii.gz",
    "pyradiomics_cases/images/brain1.nii.gz",
    "totalseg_example_ct/images/example_ct_sm.nii.gz",
    "nifti_zoo/nibabel__anatomical.nii",
    "nifti_zoo/nibabel__someones_epi.nii.gz",  # oblique
    "nifti_zoo/niivue_d__lesion.nii.gz",  # oblique
    "nifti_zoo/orientations48/niivue_t__AIL.nii.gz",
    "nifti_zoo/orientations48/niivue_t__PSR.nii.gz",
    "nifti_zoo/orientations48/niivue_t__SLP.nii.gz",
)
PAIRS = ("msd_hippocampus/{}/hippocampus_001", "lidc_nodules/{}/LIDC-IDRI-0001_R_1")


@pytest.mark.parametrize("name", SCANS)
def test_a_twin_has_the_same_voxels_in_the_same_place(name, tmp_path):
    path = real_data(name)
    original = read_volume(path)
    # A twin of a scaled scan holds intensities as SimpleITK rounds them.
    rtol = 1e-6 if original.is_scaled else 0
    image, corners = sitk.ReadImage(str(path)), original.geometry.corners()
    for suffix in SUFFIXES:
        for is_compressed in (False, True):
            sitk.WriteImage(image, str(tmp_path / f"twin{suffix}"), is_compressed)
            twin = read_volume(tmp_path / f"twin{suffix}")
            np.testing.assert_allclose(
                twin.array, original.intensities(), rtol=rtol, atol=1e-5 * rtol
            )
            offset = twin.geometry.to_world_mm(corners) - original.geometry.to_world_mm(corners)
            assert np.abs(offset).max() <= MAX_CORNER_MM
            assert twin.geometry.axis_codes == original.geometry.axis_codes
            if not original.is_scaled:
                assert twin.array.dtype == original.array.dtype


@pytest.mark.parametrize("name", SCANS[:1] + SCANS[3:4] + SCANS[15:19])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_copy_of_volseg_is_read_back_by_volseg_and_simpleitk(name, suffix, tmp_path):
    original = read_volume(real_data(name))
    stored = original.with_array(original.array)
    write_volume(stored, tmp_path / f"copy{suffix}")
    copy, image = (
        read_volume(tmp_path / f"copy{suffix}"),
        sitk.ReadImage(str(tmp_path / f"copy{suffix}")),
    )
    np.testing.assert_array_equal(copy.array, stored.array)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, stored.array)
    assert copy.array.dtype == stored.array.dtype
    corners = stored.geometry.corners()
    expected = stored.geometry.to_world_mm(corners)
    assert np.abs(copy.geometry.to_world_mm(corners) - expected).max() <= MAX_CORNER_MM
    points = [image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners.tolist()]
    np.testing.assert_allclose(np.array(points) * (-1, -1, 1), expected, atol=1e-9)


@pytest.mark.parametrize("pair", PAIRS)
def test_measurements_of_a_twin_are_identical(pair, tmp_path):
    scan, mask = (real_data(f"{pair.format(kind)}.nii.gz") for kind in ("images", "labels"))
    rows = {}
    for suffix in (".nii.gz", *SUFFIXES):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        for name, path in (("scan", scan), ("mask", mask)):
            sitk.WriteImage(sitk.ReadImage(str(path)), str(folder / f"{name}{suffix}"), True)
        rows[suffix] = measured(folder / f"scan{suffix}", folder / f"mask{suffix}", folder / "out")
    assert rows[".nii.gz"]
    for suffix in SUFFIXES:
        assert rows[suffix] == rows[".nii.gz"], suffix
    mixed = measured(tmp_path / "mha/scan.mha", tmp_path / "nrrd/mask.nrrd", tmp_path / "out")
    assert mixed == rows[".nii.gz"]
    np.testing.assert_array_equal(read_mask(tmp_path / "mhd/mask.mhd").array, read_mask(mask).array)


def measured(scan: Path, mask: Path, out: Path) -> list[dict[str, str]]:
    """Return the rows of all lesions."""
    report = volseg.measure(image=scan, mask=mask, out=out, intensity_unit="HU", pages=False)
    assert report.exit_code == 0
    with (out / "lesions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
