"""Read damaged files of every format; each must be read, or refused with a code and a fix.

    python benchmarks/mutated_files.py [--number 1000000] [--seed 0] [--kinds nifti dicom ...]

Every kind has a few small valid files. A mutation changes one to five places of one of them: a
byte, a piece cut out or repeated, a number or a separator put in, the end cut off. Kinds are read
in processes of their own, 5000 mutations each, so that an abort is seen. Counted are mutations that
were read, those that were refused, and failures: an exception of another type, more than 5 s, an
abort, or memory over 1 GB beside that of the libraries.
"""

from __future__ import annotations

import gzip
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "io")]

SHARD, SECONDS, BYTES = 5000, 5, 1 << 30
PIECES = (
    *(b"\n", b"\r", b"\0", b"\0" * 8, b"\xff" * 4, b"\xff" * 8, b"nan", b"inf", b"-1", b"0"),
    *(b"1e999", b"9" * 30, b"../../x", b"(", b",", b" ", b"\\", b"\x7f\xff\xff\xff", b"\x80"),
)
Files = Sequence[tuple[str, str, bytes]]  # what is read, the file that is damaged, its content


def nifti(folder: Path) -> Files:
    return [(name, name, _stored(_scan(), folder / name)) for name in ("a.nii", "b.nii.gz")]


def mgh(folder: Path) -> Files:
    return [(name, name, _stored(_scan(), folder / name)) for name in ("a.mgh", "b.mgz")]


def text(folder: Path) -> Files:
    """NRRD and MetaImage, with their files of voxels beside them."""
    from test_mutated_headers import FILES, VOXELS  # pyright: ignore[reportMissingImports]

    (folder / "scan.raw").write_bytes(VOXELS)
    (folder / "scan.gz").write_bytes(gzip.compress(VOXELS, 1, mtime=0))
    (folder / "scan.z").write_bytes(zlib.compress(VOXELS, 1))
    return [(name, name, content) for name, contents in FILES.items() for content in contents]


def dicom(folder: Path) -> Files:
    from dicom_files import Series, oblique_volume, write_enhanced, write_series
    from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

    scan, large = oblique_volume(), oblique_volume((33, 35, 2))
    paths = [write_series(scan, folder / "plain") / "IM0001"]
    for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        paths.append(write_series(large, folder / syntax.name, Series(syntax=syntax)) / "IM0001")
    series = [(path.parent.name, f"{path.parent.name}/IM0001", path.read_bytes()) for path in paths]
    enhanced = write_enhanced(scan, folder / "enhanced.dcm").read_bytes()
    return [*series, ("enhanced.dcm", "enhanced.dcm", enhanced)]


def pet(folder: Path) -> Files:
    from dicom_files import Series, oblique_volume, write_series
    from pet_headers import pet as headers

    path = write_series(oblique_volume(), folder / "pet", Series(edit=headers())) / "IM0001"
    return [("pet#SUVbw", "pet/IM0001", path.read_bytes())]


def masks(folder: Path) -> Files:
    """SEG and RTSTRUCT."""
    from dicom_files import oblique_volume
    from dicom_mask_files import Roi, Seg, contour_on, write_rtstruct, write_seg
    from pydicom.uid import RLELossless

    labels = _labels()
    corners = 1.3 + 4 * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    contours = [contour_on(oblique_volume().geometry, corners, k) for k in (1, 2)]
    rois = [Roi(number=1, contours=contours)]
    paths = [
        write_seg(labels, folder / "a.dcm"),
        write_seg(labels, folder / "b.dcm", Seg(kind="LABELMAP", syntax=RLELossless)),
        write_rtstruct(rois, folder / "rs.dcm"),
    ]
    return [(path.name, path.name, path.read_bytes()) for path in paths]


def stacks(folder: Path) -> Files:
    import tifffile

    voxels = np.ascontiguousarray(_scan().array)
    np.save(folder / "a.npy", voxels)
    np.savez_compressed(folder / "a.npz", voxels)
    tifffile.imwrite(folder / "a.tif", np.moveaxis(voxels, 2, 0).astype(np.uint16))
    names = ("a.npy", "a.npz", "a.tif")
    return [(f"{name}#1.0x1.0x2.0mm", name, (folder / name).read_bytes()) for name in names]


def images(folder: Path) -> Files:
    """Pictures for classifiers."""
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 255, (24, 31), np.uint8)
    names = ("a.png", "a.jpg", "a.bmp", "a.tif")
    for name in names:
        Image.fromarray(picture).save(folder / name)
    return [(name, name, (folder / name).read_bytes()) for name in names]


KINDS: dict[str, Callable[[Path], Files]] = {
    "nifti": nifti,
    "mgh": mgh,
    "text": text,
    "dicom": dicom,
    "pet": pet,
    "masks": masks,
    "stacks": stacks,
    "images": images,
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1_000_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--shard", nargs=3, help="KIND SEED NUMBER: used by the script itself")
    arguments = parser.parse_args()
    if arguments.shard is not None:
        kind, seed, number = arguments.shard
        print(json.dumps(read_shard(kind, int(seed), int(number))))
        return
    print(
        "| files | mutations | read | refused | codes | failures | slowest, s | most memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    n_mutations = arguments.number // len(arguments.kinds)
    for kind in arguments.kinds:
        print(in_shards(kind, n_mutations, arguments.seed), flush=True)


def in_shards(kind: str, number: int, seed: int) -> str:
    """Read the mutations of a kind in processes; return its row of the table."""
    counts, codes, failures = Counter[str](), set[str](), list[str]()
    slowest, memory = 0.0, 0
    for start in range(0, number, SHARD):
        n = min(SHARD, number - start)
        stated = [kind, str(seed + start), str(n)]
        command = [sys.executable, __file__, "--shard", *stated]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"{stated}: exit {done.returncode}: {done.stderr[-500:]}")
            continue
        outcome = json.loads(done.stdout.splitlines()[-1])
        counts.update(outcome["counts"])
        codes.update(outcome["codes"])
        failures += outcome["failures"]
        slowest, memory = max(slowest, outcome["slowest"]), max(memory, outcome["mb"])
    for failure in failures[:20]:
        print(failure, file=sys.stderr, flush=True)
    read, refused = counts["read"], counts["refused"]
    shown = f"{read + refused + len(failures):,} | {read:,} | {refused:,} | {len(codes)}"
    return f"| {kind} | {shown} | {len(failures)} | {slowest:.2f} | {memory} |"


def read_shard(kind: str, seed: int, number: int) -> dict[str, Any]:
    """Read mutations of one kind; return what came of them."""
    rng, counts, codes, failures = np.random.default_rng(seed), Counter[str](), set[str](), []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, read = KINDS[kind](folder), _reader(kind)
        for target, file, content in files:  # loads the libraries
            (folder / file).write_bytes(content)
            read(folder / target)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _limit_memory()
        for number_of in range(number):
            target, file, content = files[number_of % len(files)]
            (folder / file).write_bytes(mutated(content, rng))
            began = time.monotonic()
            signal.alarm(SECONDS)
            try:
                read(folder / target)
                counts["read"] += 1
            except Exception as error:
                code = getattr(error, "code", "")
                if not code or not getattr(error, "fix", ""):
                    failures.append(f"{kind} {seed} {number_of} {target}: {error!r:.300}")
                else:
                    counts["refused"] += 1
                    codes.add(code)
            finally:
                signal.alarm(0)
            seconds = time.monotonic() - began
            if seconds > SECONDS:  # also if the reader caught the alarm
                failures.append(f"{kind} {seed} {number_of} {target}: {seconds:.0f} s")
            slowest = max(slowest, seconds)
            (folder / file).write_bytes(content)
        mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {
        "counts": counts,
        "codes": sorted(codes),
        "failures": failures,
        "slowest": slowest,
        "mb": mb,
    }


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with one to five random changes, half of them in its first 1000 bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 1000)
        at, kind = int(rng.integers(0, max(1, end))), int(rng.integers(0, 8))
        piece = PIECES[int(rng.integers(len(PIECES)))]
        if kind < 3 and data:
            data[at % len(data)] = int(rng.integers(256))
        elif kind == 3:
            data[at : at + len(piece)] = piece
        elif kind == 4:
            data[at:at] = piece
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 6:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def _reader(kind: str) -> Callable[[Path], object]:
    from volseg.io.images import ImageReader
    from volseg.io.volumes import read_mask, read_volume

    if kind == "images":
        return ImageReader().read
    if kind == "masks":
        from dicom_files import oblique_volume

        geometry = oblique_volume().geometry
        return lambda path: read_mask(path, like=geometry)
    return lambda path: (read_mask if ".seg." in path.name else read_volume)(path)


def _limit_memory() -> None:
    """Let allocations beyond the budget fail, and calls that take too long."""

    def stop(*_: object) -> None:
        raise RuntimeError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))


def _scan() -> Any:
    from dicom_files import oblique_volume

    return oblique_volume()


def _labels() -> Any:
    from volseg.volume import Volume

    geometry = _scan().geometry
    array = np.random.default_rng(0).integers(0, 4, geometry.shape).astype(np.uint8)
    return Volume(np.asfortranarray(array), geometry)


def _stored(scan: Any, path: Path) -> bytes:
    from volseg.io.volumes import write_volume

    write_volume(scan, path)
    return path.read_bytes()


if __name__ == "__main__":
    main()
