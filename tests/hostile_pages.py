"""Pages of a scan and of a run whose names look like HTML."""

import numpy as np
from laws import ball, centre_mm, grid_around, oblique
from segmented_scans import segmented

from volseg.columns import row_of
from volseg.measurement.lesions import measure_lesions
from volseg.measurement.rows import CaseRow, LesionMeasurement
from volseg.pages.about import About
from volseg.pages.montage import montage_jpeg
from volseg.pages.preview import make_preview
from volseg.pages.run_page import run_page
from volseg.pages.viewer_page import image_budget, viewer_html
from volseg.postprocessing.lesions import label_lesions
from volseg.volume import Volume

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}} <!--\u2028"
CASE = CaseRow(case_id="a", status="done", n_lesions=1, total_volume_ml=2.5, image="a.nii.gz")


def scene(affine=None, radii=(8, 5, 3), n_small=0):
    """Make a noisy scan with three distant balls and `n_small` lesions of one voxel.

    Returns (scan, ids, rows, centres of the balls).
    """
    geometry = grid_around(26, oblique((0.9, 1.2, 2.2)) if affine is None else affine, 2)
    centre = centre_mm(geometry)
    centres = [centre + offset for offset in ([-14, -8, 6], [13, 9, -4], [10, -12, 8])]
    mask = np.zeros(geometry.shape, np.uint8)
    for radius, point in zip(radii, centres, strict=True):
        mask[ball(radius, geometry, point)] = 1
    if n_small:
        free = np.zeros(geometry.shape, bool)
        free[::3, ::3, ::3] = True
        free &= ~ball(20, geometry)
        mask[tuple(np.argwhere(free)[:n_small].T)] = 2
    array = np.random.default_rng(0).normal(-50, 15, geometry.shape) + np.where(mask == 1, 150, 0)
    scan = Volume(np.asfortranarray(array.astype(np.int16)), geometry)
    lesions = label_lesions(mask, geometry)
    names = {1: HOSTILE, 2: "speck"}
    rows = measure_lesions(segmented(scan, lesions, case_id=HOSTILE, label_names=names))
    return scan, lesions.ids, rows, centres


def page_of(scan, ids, rows, case=CASE):
    preview = make_preview(scan, ids, unit="HU", max_bytes=image_budget(rows))
    montage = montage_jpeg(scan, ids, window=preview.window, point_mm=None, extent_mm=0)
    return viewer_html(case, rows, preview, montage, unit="HU")


def lesion(**values):
    return row_of(LesionMeasurement, {"case_id": "a", "notes": "", "connectivity": 26} | values)


def report_of_all_states(n=12):
    """Report done, failed and pending scans with hostile names; some lesion values are unknown."""
    cases = [CaseRow(case_id=f"scan_{i:02}", status="done", n_lesions=i % 3) for i in range(n)]
    cases += [
        CaseRow(
            case_id=HOSTILE,
            status="failed",
            reason=f"E_PAIR: {HOSTILE}; to fix: {HOSTILE}",
            image=HOSTILE,
        ),
        CaseRow(case_id="later", status="pending"),
    ]
    lesions = [
        lesion(
            case_id=f"scan_{i:02}",
            lesion_id=1,
            label_name=HOSTILE if i % 2 else "node",
            volume_ml=float(1 + (7 * i) % n),
            intensity_mean=None if i == 3 else 10.0 * i,
            intensity_unit="HU",
            notes="intensity: no finite voxel" if i == 3 else "",
        )
        for i in range(n)
    ]
    scan, ids, _, _ = scene()
    montage = montage_jpeg(scan, ids, window=(-100.0, 200.0), point_mm=None, extent_mm=0, pixels=96)
    return run_page(
        About(command="infer", volseg="9.9", model=HOSTILE, started="today"),
        cases,
        lesions,
        montages={f"scan_{i:02}": montage for i in range(n)},
        pages=["scan_00", "scan_01"],
    ).html()
