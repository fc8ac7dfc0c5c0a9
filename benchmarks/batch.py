"""Time `volseg infer` of ten scans in one call and in ten calls, with the shipped model.

python benchmarks/batch.py FOLDER_OF_SCANS
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    scans = sorted(arguments.folder.glob("*.nii.gz"))[:10]
    with tempfile.TemporaryDirectory() as temporary:
        walls = []
        for name, calls in (("one", [scans]), ("ten", [[scan] for scan in scans])):
            started = time.perf_counter()
            for index, part in enumerate(calls):
                out = f"{temporary}/{name}_{index}"
                subprocess.run(
                    [sys.executable, "-m", "volseg", "infer", *part, "--out", out],
                    check=True,
                    capture_output=True,
                )
            walls.append(time.perf_counter() - started)
    print(
        f"{len(scans)} scans: one call {walls[0]:.1f} s, {len(scans)} calls {walls[1]:.1f} s, "
        f"ratio {walls[0] / walls[1]:.2f}"
    )


if __name__ == "__main__":
    main()
