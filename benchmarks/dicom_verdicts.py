"""What readers of DICOM make of real series, sound ones and faulty ones, beside a careful verdict.

    python benchmarks/dicom_verdicts.py shared/data/dicom --peers PYTHON --dcm2niix PATH

PYTHON is an environment with SimpleITK, highdicom, dicom2nifti, nibabel and pydicom. Every reader
gets the DICOM files of each folder in a process of its own and says which volumes of two or more
slices it makes of them, with shape, spacing and mean intensity. SOUND and FAULTY are what the
folders hold by the judgement beside the data. A volume is right if its shape, its spacing (1 %) and
its mean (1 %, of volseg's volume) are; several time points in a 4-D volume are right where a series
holds them. What dcm2niix calls tilted or made even in the name of its file is resampled, and said:
it is counted apart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 120
SOUND: dict[str, list[tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "ct_3slice_seg": [((512, 512, 3), (0.8105, 0.8105, 1.0))],
    "ct_oblique_axes": [((100, 50, 3), (2.5001, 3.4999, 4.5))],
    "ct_philips_study": [((512, 512, 4), (0.4512, 0.4512, 5.0))],
    "d2n_failing_slicecount_001": [((256, 256, 2), (1.0, 1.0, 1.0))],
    "d2n_generic_anatomical_001": [((256, 256, 4), (1.0, 1.0, 1.0))],
    "d2n_generic_compressed_j2k_001": [((256, 256, 4), (1.0, 1.0, 1.0))],
    "d2n_generic_compressed_jpegls_001": [((256, 256, 4), (1.0, 1.0, 1.0))],
    "d2n_generic_compressed_rle_001": [((256, 256, 4), (1.0, 1.0, 1.0))],
    "d2n_hitachi_anatomical_001": [((64, 64, 4), (2.3436, 2.3438, 4.0))],
    "d2n_philips_enhanced_anatomical_001": [((256, 256, 8), (1.0, 1.0, 1.2))],
    "mr_enhanced_philips_fieldmap": [((64, 64, 32), (4.0, 4.0, 4.0))] * 2,
    "orientation_phantom": [((32, 48, 64), (2.0, 2.0, 2.0))],
    "pet_raw_ge": [((128, 128, 60), (4.6875, 4.6875, 3.2686))],
    "rtstruct_rtutils": [((512, 512, 2), (0.4883, 0.4883, 5.0))],
    "seg_23x38x3": [((23, 38, 3), (0.7, 0.7, 2.5))] * 2,
    "sts002_ct": [((161, 143, 48), (0.9766, 0.9766, 3.27))],
    "sts002_mr_t1": [((115, 90, 35), (0.9766, 0.9766, 3.27))],
    "sts002_pet": [((30, 27, 48), (5.4688, 5.4688, 3.27))],
}
FAULTY = {  # what no volume can be made of without guessing
    "d2n_failing_gantrytilting_001": "tilt of 14°",
    "d2n_failing_sliceincrement_002": "tilt of 15.5°, and a missing slice",
    "d2n_ge_fmri_001": "4-D: two time points",
    "d2n_generic_rgb_001": "colours",
    **{
        f"pydicom_emri_small{end}": "no geometry"
        for end in ("", "_jpeg_2k_lossless", "_jpeg_ls_lossless", "_rle")
    },
    "pydicom_liver": "a segmentation alone",
    "sr_tid1500_example": "a report and a segmentation",
}
# Left out: JPEG lossless, whose decoder is under the GPL, and a mosaic, of which dcm2niix makes the
# volume (80, 80, 64) by a vendor's private header, dicom2nifti (80, 80, 50), and volseg none.
READERS = ("volseg", "SimpleITK", "highdicom", "dicom2nifti", "dcm2niix")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--dcm2niix", required=True)
    parser.add_argument(
        "--reader", choices=READERS, help="print what this reader makes of a folder"
    )
    arguments = parser.parse_args()
    if arguments.reader:
        reader = {"dcm2niix": lambda folder: of_dcm2niix(folder, arguments.dcm2niix)}
        volumes = reader.get(arguments.reader, globals()["of_" + arguments.reader.lower()])
        sys.stdout.write("\n" + json.dumps(volumes(arguments.data)))
        return
    counts: dict[str, Counter[str]] = {name: Counter() for name in READERS}
    with tempfile.TemporaryDirectory() as name:
        compare(arguments, Path(name), counts)
    for kind in ("accepted wrongly", "refused wrongly", "resampled, and said"):
        numbers = [str(counts[name][kind]) for name in READERS]
        print(f"| **{kind}** | " + " | ".join(numbers) + " |")


def compare(arguments: Any, work: Path, counts: dict[str, Counter[str]]) -> None:
    from volseg.io.dicom_frames import is_dicom

    print("| folder | " + " | ".join(READERS) + " |")
    print("|---|" + "---|" * len(READERS))
    for folder in (*SOUND, *FAULTY):
        for path in (arguments.data / folder).rglob("*"):
            if path.is_file() and is_dicom(path):  # there are twins in other formats beside them
                copy = work / folder / path.relative_to(arguments.data / folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        answers = {name: answer(arguments, name, work / folder) for name in READERS}
        cells = []
        for name in READERS:
            verdicts = judged(folder, answers[name], answers["volseg"])
            counts[name].update(verdicts)
            cells.append(", ".join(sorted(set(verdicts))))
        print(f"| {folder} | " + " | ".join(cells) + " |")


def answer(arguments: Any, reader: str, folder: Path) -> list[dict[str, Any]]:
    """Return the volumes that a reader makes of a folder."""
    python = sys.executable if reader == "volseg" else str(arguments.peers)
    command = [python, __file__, str(folder), "--reader", reader]
    command += ["--peers", str(arguments.peers), "--dcm2niix", arguments.dcm2niix]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return json.loads(done.stdout.rpartition("\n")[2])
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return []


def judged(folder: str, volumes: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[str]:
    """Return a verdict on each volume, and on each that is missing."""
    verdicts, missing = [], list(SOUND.get(folder, []))
    means = [volume["mean"] for volume in ours]
    for volume in volumes:
        if volume["resampled"]:
            verdicts.append("resampled, and said")
            continue
        match = next((sound for sound in missing if is_same(volume, sound)), None)
        if match is None:
            is_right = FAULTY.get(folder, "").startswith("4-D") and len(volume["shape"]) == 4
            verdicts.append("right" if is_right else "accepted wrongly")
            continue
        missing.remove(match)
        is_equal = any(np.isclose(volume["mean"], mean, rtol=0.01, atol=0.01) for mean in means)
        verdicts.append("right" if is_equal else "accepted wrongly")
    verdicts += ["refused wrongly"] * len(missing)
    return verdicts or ["right"]


def is_same(volume: dict[str, Any], sound: tuple[tuple[int, ...], tuple[float, ...]]) -> bool:
    """Compare shape and spacing, whatever the order of the axes."""
    if len(volume["shape"]) != 3:
        return False
    one, other = (
        sorted(zip(shape, spacing, strict=True))
        for shape, spacing in ((volume["shape"], volume["spacing"]), sound)
    )
    return all(n == m and abs(a - b) <= 0.01 * b for (n, a), (m, b) in zip(one, other, strict=True))


def row(shape: Any, spacing: Any, mean: float, name: str = "") -> dict[str, Any]:
    is_resampled = "_Tilt" in name or "_Eq" in name
    sizes = [int(n) for n in shape if n > 1]
    return {
        "shape": sizes,
        "spacing": [float(mm) for mm in spacing][: len(sizes)],
        "mean": float(mean),
        "resampled": is_resampled,
    }


def slabs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out single slices, such as localizers, which no reader takes for a volume."""
    return [volume for volume in rows if len(volume["shape"]) > 2]


def of_volseg(folder: Path) -> list[dict[str, Any]]:
    from volseg.errors import VolsegError
    from volseg.io.layouts import find_scans
    from volseg.io.volumes import read_volume

    rows = []
    try:
        cases = find_scans([folder])
    except VolsegError:
        return []
    for case in cases:
        try:
            volume = read_volume(case.images["image"])
        except VolsegError:
            continue
        mean = volume.intensities(volume.array).mean()
        rows.append(row(volume.geometry.shape, volume.geometry.spacing_mm, mean))
    return slabs(rows)


def of_simpleitk(folder: Path) -> list[dict[str, Any]]:
    import SimpleITK as sitk

    rows = []
    for place in {path.parent for path in folder.rglob("*") if path.is_file()}:
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(place)):
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(place), uid))
            try:
                image = reader.Execute()
            except RuntimeError:
                continue
            mean = sitk.GetArrayViewFromImage(image).mean()
            rows.append(row(image.GetSize(), image.GetSpacing(), mean))
    return slabs(rows)


def of_highdicom(folder: Path) -> list[dict[str, Any]]:
    import highdicom
    from pydicom import dcmread

    series: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        try:
            header = dcmread(path)
        except Exception:
            continue
        if header.get("Modality") in ("SEG", "RTSTRUCT", "SR"):
            continue  # for which it has readers of their own
        series.setdefault(str(header.get("SeriesInstanceUID")), []).append(header)
    rows = []
    for headers in series.values():
        try:
            if "NumberOfFrames" in headers[0]:
                volume = highdicom.Image.from_dataset(headers[0]).get_volume()
            else:
                volume = highdicom.get_volume_from_series(headers)
        except Exception:  # it raises many types
            continue
        rows.append(row(volume.spatial_shape, volume.spacing, volume.array.mean()))
    return slabs(rows)


def of_dicom2nifti(folder: Path) -> list[dict[str, Any]]:
    import dicom2nifti

    with tempfile.TemporaryDirectory() as out:
        try:
            dicom2nifti.convert_directory(folder, out, compression=False, reorient=False)
        except Exception:  # it raises many types
            return []
        return written(Path(out))


def of_dcm2niix(folder: Path, program: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as out:
        command = [program, "-z", "n", "-f", "%s_%p", "-o", out, str(folder)]
        subprocess.run(command, capture_output=True, check=False)
        return written(Path(out))


def written(folder: Path) -> list[dict[str, Any]]:
    import nibabel

    rows = []
    for path in sorted(folder.rglob("*.nii")):
        image = nibabel.load(path)
        rows.append(row(image.shape, image.header.get_zooms(), image.get_fdata().mean(), path.name))
    return slabs(rows)


if __name__ == "__main__":
    main()
