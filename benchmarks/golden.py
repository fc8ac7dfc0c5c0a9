"""Record and compare every number, mask and page that volseg makes of 30 cases and the phantoms.

    python benchmarks/golden.py run --out FOLDER        run this checkout, write FOLDER/facts.json
    python benchmarks/golden.py compare BEFORE AFTER    list the differences of two such folders

To check that a change leaves every output as it was, run the script in a checkout before and after
the change on the same machine; floating-point results depend on the CPU. The real cases come from
`../shared/data`. Times and dates are left out. Of a page only the numbers count, so its wording may
change.
"""

from __future__ import annotations

import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PHANTOMS = ROOT / "sample_data"
NOT_REPEATED = frozenset(
    ("seconds", "started", "volseg", "volseg_version", "libraries", "date")
    + ("training_seconds", "steps_per_second", "waiting_share")
)
# Group → image, mask and options of `volseg measure`; {} in a path is a case.
MEASURED = {
    "totalseg": (
        "totalseg_example_ct", ("example_ct_sm_fast", "example_ct_sm"), "--objects labels --unit HU"
    ),
    "spleen": ("msd_spleen_ct", ("spleen2",), "--unit HU --calcium --figures"),
    "ibsi": ("ibsi_phantoms", ("ibsi_1_digital_phantom",), ""),
    "brain": ("pyradiomics_cases", ("brain1",), "--unit a.u."),
    "hippocampus": (
        "msd_hippocampus", ("hippocampus_001", "hippocampus_003", "hippocampus_006"), ""
    ),
    "t1": ("sts_sarcoma", ("STS_002_MR_T1", "STS_003_MR_T1"), "--unit a.u."),
    "pet": ("sts_sarcoma", ("STS_002_PET", "STS_003_PET"), "--unit SUV"),
    "ct": ("sts_sarcoma", ("STS_002_CT", "STS_008_CT"), "--unit HU --calcium"),
    "headneck": ("openkbp_headneck_ct", ("pt_002", "pt_004"), "--objects labels --unit HU"),
    "glioma": ("lgg_mri_flair", ("TCGA_CS_4941_19960909", "TCGA_CS_4942_19970222"), ""),
}  # fmt: skip
N_NODULES = 10
# Sums over several threads differ in their last bits from run to run.
ONE_THREAD = ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
PREPARED = ("hippocampus_001", "hippocampus_003", "hippocampus_006", "hippocampus_007")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("--out", type=Path, required=True)
    compared = commands.add_parser("compare")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.out.resolve())
    else:
        sys.exit(compare(options.before, options.after))


def run(out: Path) -> None:
    """Run every command into `out` and write the facts of its output to `facts.json` there."""
    if out.exists():
        sys.exit(f"{out} exists: give a new folder")
    out.mkdir(parents=True)
    facts: dict[str, Any] = {}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict.fromkeys(ONE_THREAD, "1")
    for name, arguments in steps(out):
        command = [sys.executable, "-m", "volseg", *map(str, arguments)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        codes = sorted(set(re.findall(r"\b[EW]_[A-Z_]+\b", done.stdout + done.stderr)))
        facts[name] = {"exit_code": done.returncode, "codes": codes, "files": facts_of(out / name)}
        print(f"{name}: exit {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    text = json.dumps(facts, indent=1, sort_keys=True)
    (out / "facts.json").write_text(text.replace(str(out), "OUT").replace(str(ROOT), "ROOT"))


def steps(out: Path) -> Iterator[tuple[str, Sequence[str | Path]]]:
    """Yield the name of each step, which is also its folder below `out`, and its command line."""
    with (DATA / "lidc_nodules" / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    linked = out / "linked"
    nodules = [row["subject"] for row in rows[:: len(rows) // N_NODULES][:N_NODULES]]
    scans, masks = link(linked / "nodules", "lidc_nodules", nodules)
    for backend in ("torch", "openvino"):
        name = f"infer-{backend}"
        options = ["--backend", backend, "--figures"]
        yield name, ["infer", scans, *options, "--out", out / name]
    for name, (dataset, cases, options) in MEASURED.items():
        images, labels = link(linked / name, dataset, cases)
        pair = ["--image", images, "--mask", labels, *options.split()]
        yield f"measure-{name}", ["measure", *pair, "--out", out / f"measure-{name}"]
    pair = ["--image", scans, "--mask", masks, "--unit", "HU"]
    yield "measure-nodules", ["measure", *pair, "--out", out / "measure-nodules"]
    masks_of = ["--reference", masks, "--predicted", out / "infer-torch"]
    yield "evaluate", ["evaluate", *masks_of, "--out", out / "evaluate"]
    times = [out / "measure-nodules", out / "infer-torch"]
    yield "compare", ["compare", *times, "--figures", "--out", out / "compare"]
    in_place = [*times, "--no-registration"]
    yield "compare-in-place", ["compare", *in_place, "--out", out / "compare-in-place"]
    smoke = ["--recipe", "smoke", "--epochs", "1", "--seed", "0", "--device", "cpu"]
    yield "train", ["train", PHANTOMS, *smoke, "--out", out / "train"]
    with (PHANTOMS / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    phantoms = [PHANTOMS / row["image"] for row in rows]
    for backend in ("torch", "openvino"):
        name = f"infer-phantoms-{backend}"
        options = ["--model", out / "train", "--backend", backend]
        yield name, ["infer", *phantoms, *options, "--out", out / name]
    dataset = out / "linked" / "prepared"
    link(dataset, "msd_hippocampus", PREPARED)
    recipe = ["--recipe", "hippocampus_mri", "--seed", "0"]
    yield "preprocess", ["preprocess", dataset, *recipe, "--out", out / "preprocess"]
    sarcoma = DATA / "sts_sarcoma" / "cases_t1.csv"
    for name, cases in (("hippocampus", dataset), ("sarcoma", sarcoma)):
        plan = out / f"plan-{name}" / "plan.toml"
        yield plan.parent.name, ["plan", cases, "--vram", "4G", "--device", "cpu", "--out", plan]
    sys.path.insert(0, str(ROOT / "tests"))
    import nnunet_folder

    trained = nnunet_folder.write_model(out / "nnunet")
    yield "import", ["import-nnunet", trained, "--out", out / "import"]
    imported = ["--model", out / "import", "--backend", "torch", "--accept-mismatch"]
    nodule = scans / f"{nodules[0]}.nii.gz"
    yield "infer-imported", ["infer", nodule, *imported, "--out", out / "infer-imported"]


def link(folder: Path, dataset: str, cases: Sequence[str]) -> tuple[Path, Path]:
    """Copy these cases of a dataset into `folder`/images and `folder`/labels."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, str]] = {}
    for table in (DATA / dataset).glob("cases*.csv"):
        with table.open(newline="") as file:
            rows |= {row["subject"]: row for row in csv.DictReader(file)}
    for case in cases:
        shutil.copy(DATA / dataset / rows[case]["image"], folder / "images" / f"{case}.nii.gz")
        shutil.copy(DATA / dataset / rows[case]["label"], folder / "labels" / f"{case}.nii.gz")
    return folder / "images", folder / "labels"


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts to compare of every file of an output folder, by its path there."""
    if not folder.is_dir():
        return {}
    facts: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        kinds = [kind for suffix, kind in KINDS.items() if name.endswith(suffix)]
        if path.is_file() and kinds and not name.startswith(".volseg"):
            facts[name] = kinds[0](path)
    return facts


def volume_facts(path: Path) -> str:
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj)
    return digest(voxels, image.affine)


def table_facts(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: without_hash(cell) for name, cell in row.items() if name not in NOT_REPEATED}
            for row in csv.DictReader(file)
        ]


def json_facts(path: Path) -> Any:
    return lasting(json.loads(path.read_text(encoding="utf-8")))


def recipe_facts(path: Path) -> Any:
    return lasting(tomllib.loads(path.read_text(encoding="utf-8")))


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: lasting(part) for name, part in value.items() if name not in NOT_REPEATED}
    if isinstance(value, list):
        return [lasting(part) for part in value]
    return without_hash(value) if isinstance(value, str) else value


def without_hash(text: str) -> str:
    """Remove the hash from a model's name: its files depend on the version's format."""
    return re.sub(r"@[0-9a-f]{12}\b", "@", text)


def page_facts(path: Path) -> dict[str, Any]:
    """Return how often each number is on a page, and hashes of its embedded data."""
    text = path.read_text(encoding="utf-8")
    data = sorted(
        hashlib.sha256(part.encode()).hexdigest() for part in re.findall(r"base64,[^\"')]+", text)
    )
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", without_hash(text))
    text = re.sub(r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}\S*", " ", text)
    numbers = Counter(re.findall(r"[−-]?\d+(?:\.\d+)?", html.unescape(text)))
    return {"numbers": dict(numbers), "data": data}


def picture_facts(path: Path) -> str:
    with Image.open(path) as picture:
        return digest(np.asarray(picture))


def weights_facts(path: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in sorted(load_file(path).items())}


def array_facts(path: Path) -> str:
    return digest(np.load(path, allow_pickle=False))


def digest(*arrays: np.ndarray) -> str:
    """Return shape and type of the first array and the SHA-256 of all of them."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(f"{array.shape}{array.dtype}".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return f"{arrays[0].shape} {arrays[0].dtype} {hasher.hexdigest()}"


KINDS = {
    ".nii.gz": volume_facts,
    ".csv": table_facts,
    ".json": json_facts,
    ".toml": recipe_facts,
    ".html": page_facts,
    ".png": picture_facts,
    ".jpg": picture_facts,
    ".safetensors": weights_facts,
    ".npy": array_facts,
}


def compare(before: Path, after: Path) -> int:
    """Print every fact that differs; return 1 if any does, else 0."""
    facts = [json.loads((folder / "facts.json").read_text()) for folder in (before, after)]
    counts, n_equal = [], 0
    for step in sorted(facts[0] | facts[1]):
        sides = [dict(flat(side.get(step))) for side in facts]
        paths = sorted(sides[0] | sides[1])
        differing = [path for path in paths if sides[0].get(path) != sides[1].get(path)]
        n_equal += len(paths) - len(differing)
        counts.append(len(differing))
        for path in differing:
            first, second = (side.get(path, "missing") for side in sides)
            print(f"{step}/{path}: {first} | {second}")
    print(f"{n_equal} facts are equal, {sum(counts)} differ")
    return 1 if any(counts) else 0


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every leaf."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from flat(part, f"{path}/{name}" if path else name)
    elif isinstance(value, list) and value:
        for index, part in enumerate(value):
            yield from flat(part, f"{path}[{index}]")
    else:
        yield path, value


if __name__ == "__main__":
    main()
