"""Measure how far OpenVINO's logits are from torch's in float32, on tiles of a scan.

    python benchmarks/logits.py SCAN MODEL [--tiles 2]

The tiles come from the middle of the scan. "its own sums" is OpenVINO's own instance normalisation,
"axis by axis" volseg's float32 variant of it (docs/adr/0013). Seconds are those of the fastest of
three forward passes.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from volseg.bundle import ModelBundle, load_bundle
from volseg.inference.backend import Backend
from volseg.inference.export import batch_shape_of, convert
from volseg.inference.openvino_backend import OpenVINOBackend, find_half_type
from volseg.inference.torch_backend import TorchBackend
from volseg.io.nifti import read_volume
from volseg.preprocessing.prepare import Preparation


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tiles", type=int, default=2)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.model)
    shape = batch_shape_of(bundle)
    tiles = tiles_of(arguments.scan, bundle, shape[2:], arguments.tiles)
    network = bundle.segmentation_network()
    expected = [TorchBackend(network, torch.device("cpu")).logits(tile) for tile in tiles]

    def openvino_backend(precision: str = "fp32") -> Backend:
        return OpenVINOBackend(convert(network, shape), shape, precision=precision)

    def unchanged_backend() -> Backend:
        rewrite = "volseg.inference.openvino_backend.sum_axis_by_axis"
        with mock.patch(rewrite, lambda model: None):
            return openvino_backend()

    kinds: dict[str, Callable[[], Backend]] = {
        "fp32, its own sums": unchanged_backend,
        "fp32, axis by axis": openvino_backend,
    }
    if name := find_half_type():
        kinds[f"half ({name})"] = lambda: openvino_backend(precision="fp16")
    print(
        "| OpenVINO | mean difference | largest | of logits up to "
        "| labels that differ, of 1000 foreground | s |"
    )
    print("|---|---|---|---|---|---|")
    for kind, make in kinds.items():
        backend = make()
        pairs = [(backend.logits(tile), e) for tile, e in zip(tiles, expected, strict=True)]
        errors = [np.abs(logits - e) for logits, e in pairs]
        different, foreground = np.sum([count_labels(*pair) for pair in pairs], axis=0)
        fastest = min(seconds(backend, tiles[0]) for _ in range(3))
        print(
            f"| {kind} | {np.mean(errors):.2g} | {np.max(errors):.2g} "
            f"| {np.abs(expected).max():.1f} | {1000 * different / max(1, foreground):.3f} "
            f"| {fastest:.2f} |",
            flush=True,
        )


def tiles_of(scan: Path, bundle: ModelBundle, patch: Sequence[int], n: int) -> list[np.ndarray]:
    """Return adjacent patches (1, channels, *patch) through the middle of the prepared scan."""
    volume = read_volume(scan)
    channels = bundle.recipe.data.channels
    preparation = Preparation(dict.fromkeys(channels, volume), bundle.recipe.preprocess)
    planes = preparation.planes(2)
    start = max(0, (planes.shape[2] - patch[2]) // 2)
    whole = np.asarray(planes.read(start, min(planes.shape[2], start + patch[2])))
    a = max(0, (whole.shape[2] - patch[1]) // 2)
    cuts = [whole[:, r : r + patch[0], a : a + patch[1]] for r in range(0, n * patch[0], patch[0])]
    full = [cut for cut in cuts if cut.shape[1:] == tuple(patch)]
    if not full:
        raise SystemExit(f"{scan}: smaller than a patch of {tuple(patch)}")
    return [np.ascontiguousarray(cut)[None] for cut in full]


def count_labels(logits: np.ndarray, expected: np.ndarray) -> tuple[int, int]:
    """Count the voxels whose label differs and those that are foreground in either."""
    a, b = logits.argmax(1), expected.argmax(1)
    return int((a != b).sum()), int(((a > 0) | (b > 0)).sum())


def seconds(backend: Backend, tile: np.ndarray) -> float:
    started = time.perf_counter()
    backend.logits(tile)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
