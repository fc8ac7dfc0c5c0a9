"""DICOM segmentations and reports that volseg writes, read by dcmqi, highdicom and dciodvfy.

    python benchmarks/dicom_out.py --peers BIN SERIES=MASK [SERIES=MASK ...]

BIN is the folder of programs of an environment with dcmqi and dicom3tools, which volseg does not
need. Each mask (in any format, also contours) is measured on its DICOM series and written as
`infer --dicom-seg --dicom-sr` does. An oblique series with 25 labels is made up besides. dcmqi and
highdicom must return every voxel and number; errors of dciodvfy count if the series lacks them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

import highdicom
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dicom_files import Series, oblique_volume, write_series

from volseg.commands.dicom_results import LESIONS, REPORT, SEG, DicomResults
from volseg.commands.placing import place_mask
from volseg.io.label_table import read_label_table
from volseg.io.volumes import read_mask, read_volume
from volseg.measurement.scan import SegmentedScan
from volseg.measurement.specks import MeasuredLesions, measure_largest
from volseg.measurement.units import judge_unit
from volseg.postprocessing.lesions import label_lesions
from volseg.recipe import Measure
from volseg.store.results import ResultsFolder
from volseg.volume import Geometry, Volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("pairs", nargs="*")
    arguments = parser.parse_args()
    print(
        "| series | file | bytes | s | voxels, or numbers | differ: dcmqi | differ: highdicom | "
        "new errors of dciodvfy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [tuple(map(Path, pair.split("=", 1))) for pair in arguments.pairs]
        for number, (series, path) in enumerate(pairs):
            mask = read_mask(path, like=series)
            names = read_label_table(path, series)
            for row in rows_of(series, mask, names, folder / f"{number}", arguments.peers):
                print(f"| {series.parent.name} | {row} |")
        series, mask = made_up(folder / "oblique")
        for row in rows_of(series, mask, {}, folder / "out", arguments.peers):
            print(f"| oblique, 25 labels | {row} |")


def rows_of(
    series: Path, mask: Volume, names: dict[int, str], out: Path, peers: Path
) -> Iterator[str]:
    """Yield the cells of each file that is written for a series."""
    inherited = errors_of(min(path for path in series.iterdir() if path.is_file()), peers)
    scan = read_volume(series)
    for kind in ("binary", "labelmap"):
        folder = out / kind
        lesions, seconds = write(series, scan, mask, names, folder, kind)
        ids = scan.with_array(lesions.scan.lesions.ids)
        for name, truth in ((SEG, mask), (LESIONS, ids)):
            if name == LESIONS and kind == "labelmap":
                continue
            path = folder / name / "case.dcm"
            values = np.unique(truth.array)[1:].tolist()
            theirs = differing(dcmqi_labels(path, out / f"{kind}_{name}", peers), truth, values)
            cells = [f"SEG {kind}" if name == SEG else "SEG of lesions"]
            cells += [f"{path.stat().st_size:,}", f"{seconds:.1f}"]
            cells += [f"{np.count_nonzero(truth.array):,}", theirs]
            cells += [
                differing(highdicom_labels(path), truth, values),
                new_errors(path, inherited, peers),
            ]
            yield " | ".join(map(str, cells))
    report = folder / REPORT / "case.dcm"
    numbers = sum(map(len, expected_numbers(lesions)))
    cells = ["SR", f"{report.stat().st_size:,}", "", numbers]
    cells += [wrong_numbers(dcmqi_numbers(report, out, peers), lesions)]
    cells += [
        wrong_numbers(highdicom_numbers(report), lesions),
        new_errors(report, inherited, peers),
    ]
    yield " | ".join(map(str, cells))


def write(
    series: Path, scan: Volume, mask: Volume, names: dict[int, str], out: Path, kind: str
) -> tuple[MeasuredLesions, float]:
    """Write the files of a series; return its lesions and the seconds that writing took."""
    unit = judge_unit(scan, "HU", by="the benchmark")
    lesions = measure_largest(
        SegmentedScan(
            case_id="case",
            image=scan,
            lesions=label_lesions(mask.array, scan.geometry),
            unit=unit,
            label_names={
                v: names.get(v, f"label_{v}") for v in range(1, 1 + int(mask.array.max()))
            },
            settings=Measure(),
            organ_voxels=None,
        )
    )
    results = DicomResults(seg=kind, sr=True, model="benchmark", label_names=names)
    with ResultsFolder(out, "infer", inputs=[]) as folder, folder.staged() as commit:
        start = time.perf_counter()
        results.write(series, mask, lesions, commit)
        commit.finish()
        return lesions, time.perf_counter() - start


def made_up(folder: Path) -> tuple[Path, Volume]:
    uid = "1.2.826.0.1.3680043.8.498.100000001"

    def complete(header, index):
        header.StudyInstanceUID, header.FrameOfReferenceUID = f"{uid}.1", f"{uid}.2"
        header.PatientSex, header.StudyTime, header.ReferringPhysicianName = "O", "101010", ""
        header.StudyID, header.AccessionNumber, header.SeriesNumber = "1", "", 1
        header.Manufacturer, header.PositionReferenceIndicator, header.KVP = "none", "", "120"
        header.AcquisitionNumber, header.PatientPosition = 1, "HFS"

    volume = oblique_volume((200, 180, 60), spacing=(0.8, 0.8, 2.0))
    write_series(volume, folder, Series(edit=complete))
    scan = read_volume(folder)
    array = np.zeros(scan.geometry.shape, np.uint8, order="F")
    for label in range(1, 26):
        i, j = divmod(label - 1, 5)
        array[38 * i : 38 * i + 30, 34 * j : 34 * j + 26, label : label + 20] = label
    return folder, scan.with_array(array)


# ---- other programs


def dcmqi_labels(path: Path, out: Path, peers: Path) -> list[Volume]:
    """Return a mask of each segment, in the order of their numbers."""
    out.mkdir(parents=True)
    command = [peers / "segimage2itkimage", "--inputDICOM", path, "--outputDirectory", out]
    subprocess.run([*command, "--outputType", "nii"], check=True, capture_output=True)
    files = sorted(out.glob("*.nii.gz"), key=lambda file: int(file.name.split(".")[0]))
    return [read_mask(file) for file in files]


def highdicom_labels(path: Path) -> list[Volume]:
    seg = highdicom.seg.segread(path)
    masks = []
    for number in sorted(seg.segment_numbers):
        volume = seg.get_volume(segment_numbers=[number], rescale_fractional=False)
        array = np.ascontiguousarray(volume.array[..., 0] > 0).astype(np.uint8)
        masks.append(Volume(array, Geometry(array.shape, LPS @ volume.affine)))
    return masks


def differing(masks: list[Volume], truth: Volume, values: list[int]) -> int:
    """Count the voxels in which masks of segments differ from the labels."""
    merged = np.zeros(truth.geometry.shape, np.int64)
    if len(masks) < len(values):  # dcmqi stores a label map as one file, of numbers from 1
        numbers = placed(masks[0], truth)
        merged = np.array([0, *values])[numbers]
        return int(np.count_nonzero(merged != truth.array))
    for mask, value in zip(masks, values, strict=True):
        merged[placed(mask, truth) != 0] = value
    return int(np.count_nonzero(merged != truth.array))


def placed(mask: Volume, truth: Volume) -> np.ndarray:
    return place_mask(mask, truth.geometry, mask_name="theirs", grid_name="scan").mask.array


def expected_numbers(lesions: MeasuredLesions) -> list[list[float]]:
    return [
        [
            float(value)
            for value in (
                lesion.volume_mm3,
                lesion.long_axis_mm,
                lesion.short_axis_mm,
                lesion.intensity_mean,
            )
            if value is not None
        ]
        for lesion in lesions.largest
    ]


def dcmqi_numbers(path: Path, out: Path, peers: Path) -> list[list[float]]:
    target = out / "report.json"
    command = [peers / "tid1500reader", "--inputDICOM", path, "--outputMetadata", target]
    subprocess.run(command, check=True, capture_output=True)
    groups = json.loads(target.read_text(encoding="utf-8"))["Measurements"]
    return [[float(item["value"]) for item in group["measurementItems"]] for group in groups]


def highdicom_numbers(path: Path) -> list[list[float]]:
    content = highdicom.sr.srread(path).content
    groups = content.get_volumetric_roi_measurement_groups()
    return [[float(item.value) for item in group.get_measurements()] for group in groups]


def wrong_numbers(theirs: list[list[float]], lesions: MeasuredLesions) -> int:
    pairs = zip(theirs, expected_numbers(lesions), strict=True)
    return sum(
        abs(one - other) > 1e-9 * abs(other)
        for group, expected in pairs
        for one, other in zip(group, expected, strict=True)
    )


def errors_of(path: Path, peers: Path) -> set[str]:
    run = subprocess.run([peers / "dciodvfy", path], capture_output=True, text=True)
    return {line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")}


def new_errors(path: Path, inherited: set[str], peers: Path) -> int:
    errors = errors_of(path, peers) - inherited
    for error in sorted(errors):
        print(f"{path.parent.name}: {error}", file=sys.stderr)
    return len(errors)


if __name__ == "__main__":
    main()
