"""A patient at two time points: a phantom with balls as lesions, on any grid, after any motion."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import volseg
from volseg.io.files import sha256_of
from volseg.io.volumes import write_volume
from volseg.store.records import record_files
from volseg.volume import Geometry, Rigid, Volume

CENTRE = np.array([12.0, -100.0, 40.0])  # of the body, RAS mm
Balls = Sequence[tuple[tuple[float, float, float], float]]  # offset from CENTRE in mm, radius in mm


def _phantoms():
    spec = importlib.util.spec_from_file_location(
        "phantoms_of_two_times", Path(__file__).parents[1] / "sample_data" / "make_phantoms.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PHANTOMS = _phantoms()
REGIONS = PHANTOMS.draw_anatomy(np.random.default_rng(7), CENTRE)


def grid(
    codes: str = "LPS", spacing_mm=(1.5, 1.5, 2.2), tilt_deg: float = 0.0, seed: int = 0
) -> Geometry:
    """Return a grid around the body."""
    spec = PHANTOMS.CaseSpec(
        number=1, split="test", axis_codes=codes, spacing_mm=spacing_mm, tilt_deg=tilt_deg
    )
    drawn = PHANTOMS.draw_grid(spec, np.random.default_rng(seed), CENTRE)
    return Geometry(drawn.shape, drawn.affine)


def movement(turn_deg: float, shift_mm, axis=(0.3, 0.5, 1.0)) -> Rigid:
    """Return a rotation about the middle of the body, followed by a shift."""
    rotation = PHANTOMS.rotation(np.array(axis), np.deg2rad(turn_deg))
    return Rigid.about(CENTRE, rotation, np.array(shift_mm))


def draw(
    geometry: Geometry, balls: Balls, moved: Rigid | None = None, seed: int = 0
) -> tuple[Volume, Volume]:
    """Return a noisy scan in HU and a mask (1 in the balls) of the patient after a movement."""
    points = geometry.to_world_mm(np.moveaxis(np.indices(geometry.shape), 0, -1).reshape(-1, 3))
    points = points if moved is None else moved.inverse().apply(points)
    density = PHANTOMS.hu_at(points, REGIONS)
    mask = np.zeros(len(points), np.uint8)
    for offset, radius in balls:
        inside = np.linalg.norm(points - CENTRE - offset, axis=1) <= radius
        density[inside], mask[inside] = 150, 1
    density += np.random.default_rng(seed).normal(0, 10, density.shape)
    arrays = np.rint(density).astype(np.int16), mask
    scan, mask = (np.asfortranarray(array.reshape(geometry.shape)) for array in arrays)
    return Volume(scan, geometry), Volume(mask, geometry)


def measured(
    folder: Path,
    cases: Mapping[str, tuple[Volume, Volume]],
    *,
    names=None,
    lymph_nodes=(),
    unit="Bq/mL",
) -> Path:
    """Return the results of `volseg measure` on (scan, mask) of each case.

    The scans are in `folder`/scans; no scan contradicts `unit`.
    """
    (folder / "scans").mkdir(parents=True)
    lines = [["subject", "image", "label"]]
    for name, (scan, mask) in cases.items():
        write_volume(scan, folder / "scans" / f"{name}.nii.gz")
        write_volume(mask, folder / f"mask_{name}.nii.gz")
        lines.append([name, f"scans/{name}.nii.gz", f"mask_{name}.nii.gz"])
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    options = {"label_names": names or {1: "tumour"}, "lymph_nodes": lymph_nodes}
    options |= {"cases": folder / "cases.csv", "out": folder / "results", "intensity_unit": unit}
    report = volseg.measure(**options)
    assert report.exit_code == 0
    return folder / "results"


def change_record(results: Path, name: str, change) -> None:
    """Let `change` edit the record of a case, with its rows as `lesions`, and write the result."""
    path, rows = record_files(results, name)
    record = json.loads(path.read_text())
    record["lesions"] = [json.loads(line) for line in rows.read_text().splitlines()]
    change(record)
    rows.write_text("".join(json.dumps(lesion) + "\n" for lesion in record.pop("lesions")))
    record["files"][rows.relative_to(results).as_posix()] = sha256_of(rows)
    path.write_text(json.dumps(record))
