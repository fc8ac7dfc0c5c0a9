"""Time to the voxels of a CT series, beside dcm2niix and reading the NIfTI file that it writes.

    python benchmarks/read_dicom.py --dcm2niix PATH [--slices 300] [--turns 5]

Both start from the same files, in turn, and end with the intensities in memory. volseg lists the
series of the folder as `infer` does, reads the headers again, and reads the voxels; dcm2niix
writes without compression, which is its fastest. The voxels of both must be equal.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from volseg.io.layouts import find_scans
from volseg.io.volumes import read_volume


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dcm2niix", required=True)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--edge", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_series(folder / "series", arguments.slices, arguments.edge)
        times = []
        for turn in range(arguments.turns + 1):
            for path in (folder / "series").iterdir():
                path.touch()  # volseg knows the header of a file that has not changed
            start = time.perf_counter()
            (case,) = find_scans([folder / "series"])
            ours = read_volume(case.images["image"])
            middle = time.perf_counter()
            theirs = converted(folder, turn, arguments.dcm2niix)
            end = time.perf_counter()
            assert np.array_equal(ours.canonical().array, theirs.canonical().array)
            times.append((middle - start, end - middle))
    ours, theirs = np.array(times[1:]).T  # the first turn imports
    print("| | volseg, s | dcm2niix and reading, s | ratio, median of turns |")
    print("|---|---|---|---|")
    label = f"{arguments.slices} slices of {arguments.edge}²"
    ratio = np.median(ours / theirs)
    print(f"| {label} | {np.median(ours):.2f} | {np.median(theirs):.2f} | {ratio:.2f} |")


def converted(folder: Path, turn: int, program: str):
    out = folder / f"turn_{turn}"
    out.mkdir()
    command = [program, "-z", "n", "-f", "scan", "-o", out, folder / "series"]
    subprocess.run(command, check=True, capture_output=True)
    return read_volume(out / "scan.nii")


def write_series(folder: Path, n: int, edge: int) -> None:
    folder.mkdir()
    rng, uid = np.random.default_rng(0), generate_uid()
    for index in range(n):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID = generate_uid(), uid
        header.FrameOfReferenceUID, header.Modality = generate_uid(), "CT"
        header.Manufacturer, header.ImageType = "none", ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.SeriesNumber, header.InstanceNumber = 1, index + 1
        header.SeriesDescription, header.PatientID = "CT", "1"
        header.ImagePositionPatient = [-180, -180, index]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.PixelSpacing, header.SliceThickness = [0.7, 0.7], 1
        header.Rows = header.Columns = edge
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation, header.RescaleSlope, header.RescaleIntercept = 1, 1, 0
        header.PixelData = rng.integers(-1000, 2000, (edge, edge)).astype(np.int16).tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dcmwrite(folder / f"{index:04d}.dcm", header, enforce_file_format=True)


if __name__ == "__main__":
    main()
