"""Give models scans they were not trained for; count what is refused, marked or taken for HU.

    python benchmarks/mismatch.py SHARED_DATA --out FOLDER

SHARED_DATA holds lidc_nodules, sts_sarcoma, msd_hippocampus, msd_spleen_ct, totalseg_example_ct,
openkbp_headneck_ct, lgg_mri_flair, pyradiomics_cases and nifti_zoo. The nodule model is the shipped
one; the hippocampus model is trained for five minutes, as only its fingerprint matters.
"""

from __future__ import annotations

import csv
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import volseg
from volseg.io.volumes import read_volume, write_volume
from volseg.measurement.units import judge_unit
from volseg.volume import Volume

QUICK = {"tta": False, "overlap": 0.0, "pages": False, "device": "cpu"}
NUMBERS = ("density_g_cm3", "mass_g", "agatston_score", "class_name")
FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "intercept of 1024 missing": lambda hu: hu + 1024,
    "the same, unsigned": lambda hu: np.clip(hu + 1024, 0, None),
    "intercept applied twice": lambda hu: hu - 1024,
    "windowed to 0..255": lambda hu: np.round(np.clip((hu + 1000) / 1400, 0, 1) * 255),
    "scaled to 0..1": lambda hu: np.clip((hu + 1000) / 1400, 0, 1),
    "scaled to -1..1": lambda hu: np.clip((hu + 1000) / 700 - 1, -1, 1),
    "standardised": lambda hu: (hu - hu.mean()) / hu.std(),
    "clipped to 0..80": lambda hu: np.clip(hu, 0, 80),
    "constant": lambda hu: np.full_like(hu, 40),
}
PADDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    f"{part:.1%} filled with {fill}": lambda values, part=part, fill=fill: pad(values, part, fill)
    for part, fill in ((0.002, -1000), (0.02, -1024), (0.1, -2000), (0.3, -3024), (0.3, 3071))
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    print("| scans | model | n | refused | accepted: marked | numbers or classes |")
    print("|---|---|---|---|---|---|")
    hippocampus = train_hippocampus(data / "msd_hippocampus", out)
    scans, shipped = scans_of_other_modalities(data), "shipped nodule model"
    report_mismatches("MR and PET", scans, shipped, None, out / "nodule")
    padded = padded_scans(scans, out / "padded")
    report_mismatches("MR and PET, padded", padded, shipped, None, out / "padded_nodule")
    report_mismatches("CT", ct_scans(data), "hippocampus", hippocampus, out / "hippocampus")
    print()
    report_nodules(data / "lidc_nodules", out / "test_split")
    print()
    print("| CTs outside the test splits | n | contradict HU |")
    print("|---|---|---|")
    cts = [Path(path) for path in all_ct(data) if not path.startswith("test ")]
    for name, change in {"as they are": lambda hu: hu, **PADDINGS, **FAULTS}.items():
        n = sum(contradicts(scan, change) for scan in map(read_volume, cts))
        print(f"| {name} | {len(cts)} | {n} |")


def train_hippocampus(dataset: Path, out: Path) -> Path:
    """Train on twelve cases for five minutes: which scans a model accepts depends on its data."""
    out.mkdir(parents=True, exist_ok=True)
    table = out / "cases.csv"
    rows = [row for row in rows_of(dataset / "cases.csv") if row["split"] == "train"][:12]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "image", "label", "split"])
        for n, row in enumerate(rows):
            paths = [str((dataset / row[name]).resolve()) for name in ("image", "label")]
            writer.writerow([row["subject"], *paths, "val" if n % 4 == 0 else "train"])
    if not (out / "model" / "model.json").exists():
        budget = {"time_budget_seconds": 300, "device": "cpu"}
        volseg.train(table, recipe="hippocampus_mri", out=out / "model", **budget)
    return out / "model"


def report_mismatches(
    name: str, scans: Sequence[Path], model_name: str, model: Path | None, out: Path
) -> None:
    """Print a row: scans refused by default, and what the tables contain with accept_mismatch."""
    refused = volseg.infer(scans, model=model, out=out / "refused", **QUICK)
    n_refused = sum(reason.startswith("E_MODALITY") for reason in refused.failed.values())
    smallest = sorted(scans, key=lambda path: path.stat().st_size)[:20]
    volseg.infer(smallest, model=model, out=out / "accepted", accept_mismatch=True, **QUICK)
    cases, lesions = (rows_of(out / "accepted" / f"{table}.csv") for table in ("cases", "lesions"))
    marked = sum(row["status"] == "done" and "W_MODALITY" in row["warnings"] for row in cases)
    unmarked = sum("W_MODALITY" not in row["notes"] for row in lesions)
    n_numbers = sum(bool(row[column]) for row in lesions for column in NUMBERS)
    shown = f"{marked} of {len(cases)}; {len(lesions) - unmarked} of {len(lesions)} lesions"
    row = f"| {name} | {model_name} | {len(scans)} | {n_refused} | {shown} | {n_numbers} |"
    print(row, flush=True)


def report_nodules(dataset: Path, out: Path) -> None:
    """Print whether the test nodules are accepted and measured, and the announced and real time."""
    rows = [row for row in rows_of(dataset / "cases.csv") if row["split"] == "test"]
    scans = [dataset / row["image"] for row in rows]
    lines: list[str] = []
    started = time.monotonic()
    report = volseg.infer(scans, out=out, announce=lines.append, **QUICK)
    seconds = time.monotonic() - started
    cases, lesions = rows_of(out / "cases.csv"), rows_of(out / "lesions.csv")
    codes = ("MODALITY", "UNIT", "SPACING", "FOV", "SLICES")
    marked = sum(any(f"W_{code}:" in row["warnings"] for code in codes) for row in cases)
    columns = ("density_g_cm3", "mass_g", "class_name")
    with_numbers = sum(all(row[column] for column in columns) for row in lesions)
    print("| test nodules | refused | marked | lesions | with density, mass and class |")
    print("|---|---|---|---|---|")
    print(f"| {len(cases)} | {len(report.failed)} | {marked} | {len(lesions)} | {with_numbers} |")
    announced = next(line for line in lines if line.startswith("time: "))
    print(f"\n{announced}; the whole run took {seconds:.0f} s", flush=True)


def scans_of_other_modalities(data: Path) -> list[Path]:
    """Return all MR and PET of sarcomas, and some MR of brains."""
    sarcoma = sorted((data / "sts_sarcoma" / "images").glob("*_[MP][RE]*.nii.gz"))
    brains = [*sorted((data / "msd_hippocampus" / "images").glob("*.nii.gz"))[:20]]
    brains += [*sorted((data / "lgg_mri_flair" / "images").glob("*.nii.gz"))[:20]]
    names = ("niivue_d__FLAIR", "niivueimages__CT_AVM")
    zoo = [data / "nifti_zoo" / f"{name}.nii.gz" for name in names]
    return [*sarcoma, *brains, data / "pyradiomics_cases" / "images" / "brain1.nii.gz", *zoo]


def padded_scans(scans: Sequence[Path], folder: Path) -> list[Path]:
    """Write the scans with the first four paddings in turn and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paddings, paths = list(PADDINGS.values())[:4], []
    for n, path in enumerate(scans):
        scan = read_volume(path)
        values = paddings[n % len(paddings)](np.asarray(scan.intensities(), np.float32))
        paths.append(folder / path.name)
        write_volume(Volume(np.asfortranarray(values), scan.geometry), paths[-1])
    return paths


def pad(values: np.ndarray, part: float, fill: float) -> np.ndarray:
    """Return a copy whose first voxels in memory order, this fraction of all, have one value."""
    padded = values.copy(order="F")
    padded.ravel(order="K")[: int(part * values.size)] = fill
    return padded


def all_ct(data: Path) -> Iterator[str]:
    """Yield the path of every CT, after the word "test " if it belongs to a test split."""
    names = ("lidc_nodules/cases", "openkbp_headneck_ct/cases", "sts_sarcoma/cases_ct")
    for table in (data / f"{name}.csv" for name in names):
        for row in rows_of(table):
            prefix = "test " if row["split"] == "test" else ""
            yield f"{prefix}{table.parent / row['image']}"
    yield str(data / "msd_spleen_ct" / "images" / "spleen2.nii.gz")
    yield from map(str, sorted((data / "totalseg_example_ct" / "images").glob("*.nii.gz")))


def ct_scans(data: Path) -> list[Path]:
    """Return at most 17 CTs of each large dataset and all others: chest, abdomen, thigh, head."""
    paths = [Path(path.removeprefix("test ")) for path in all_ct(data)]
    large = ("lidc_nodules", "openkbp_headneck_ct")
    first = [path for name in large for path in [path for path in paths if name in path.parts][:17]]
    return first + [path for path in paths if not any(name in path.parts for name in large)]


def contradicts(scan: Volume, change: Callable[[np.ndarray], np.ndarray]) -> bool:
    changed = change(np.asarray(scan.intensities(), np.float64))
    return judge_unit(scan.with_array(np.asfortranarray(changed)), "HU").is_contradicted


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
