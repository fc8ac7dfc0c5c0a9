"""How often a lesion is a false one, by its mask confidence: the source of a report's remark.

    volseg infer CASES --out RESULTS --no-report
    python benchmarks/lesion_confidence.py RESULTS --labels LABELS

LABELS is the folder of the true masks, named after the cases. A lesion is false if it shares no
voxel with the true mask, and poor if its Dice with it is below 0.5.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

import volseg
from volseg.io.volumes import read_mask

EDGES = (0.0, 0.7, 0.8, 0.85, 0.9, 1.0)
MAX_LESION_IDS = 2**32


def lesions(results: Path, labels: Path) -> Iterator[tuple[float, float]]:
    """Yield the mask confidence of each lesion, and its Dice with the true mask."""
    rows = volseg.read_table(results / "lesions.csv")
    for case_id, group in rows.groupby("case_id"):
        path = results / "lesion_ids" / f"{case_id}.nii.gz"
        ids = read_mask(path, max_labels=MAX_LESION_IDS).array
        truth = read_mask(labels / f"{case_id}.nii.gz").array > 0
        for number, confidence in zip(group["lesion_id"], group["confidence_mean"], strict=True):
            inside = ids == number
            shared = np.count_nonzero(inside & truth)
            yield confidence, 2 * shared / (np.count_nonzero(inside) + np.count_nonzero(truth))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    arguments = parser.parse_args()
    table = np.array(list(lesions(arguments.results, arguments.labels)))
    print("| mask confidence | lesions | false | poor |\n|---|---|---|---|")
    for low, high in pairwise(EDGES):
        is_last = high == EDGES[-1]
        inside = (table[:, 0] >= low) & ((table[:, 0] < high) | is_last)
        dice = table[inside, 1]
        counts = (len(dice), np.count_nonzero(dice == 0), np.count_nonzero(dice < 0.5))
        print(f"| {low:g} to {high:g} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
