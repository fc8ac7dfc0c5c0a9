"""Two registered scans of a phantom, as the page of a patient shows them."""

import numpy as np
from two_times import draw, grid

from volseg.columns import row_of
from volseg.comparison.changes import LesionChange
from volseg.pages.change_page import TwoScans
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Rigid

BALLS = [((-14, 0, 0), 11), ((20, 8, 4), 8)]


def two_scans(moved: Rigid, unit="HU", names=("before", "after")):
    geometry = grid()
    drawn = [draw(geometry, BALLS), draw(geometry, [*BALLS, ((0, 20, -18), 6)], moved, seed=1)]
    ids = tuple(label_lesions(mask.array, geometry).ids for _, mask in drawn)
    scans = tuple(scan for scan, _ in drawn)
    return TwoScans(names=names, scans=scans, ids=ids, transform=moved, unit=unit)


def changes_of(two):
    """Return a row per lesion of the follow-up: two matched ones and a new one."""
    rows = []
    for number in (1, 2, 3):
        values = {"patient": "p", "status": "matched", "group": number, "notes": ""}
        values |= {"followup_lesion_id": number, "followup_volume_ml": 1.0}
        for time, side in (("baseline", 0), ("followup", 1)):
            index = np.argwhere(two.ids[side] == number)
            if len(index):
                point = two.scans[side].geometry.to_world_mm(index).mean(axis=0)
                values |= {f"{time}_centroid_{axis}_mm": point[n] for n, axis in enumerate("ras")}
        if "baseline_centroid_r_mm" not in values:
            values["status"] = "new"
        rows.append(row_of(LesionChange, values))
    return rows
