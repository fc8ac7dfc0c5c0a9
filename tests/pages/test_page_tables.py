from dataclasses import fields, replace

import numpy as np
import pytest
from hostile_pages import lesion
from jinja2.utils import htmlsafe_json_dumps

from volseg.measurement.rows import LesionMeasurement
from volseg.pages.page_tables import LESIONS, fitting_table, page_table


def test_rows_hold_the_numbers_of_the_csv_and_unknown_is_null():
    table = page_table(
        LESIONS,
        [lesion(volume_ml=1 / 3, n_voxels=7, intensity_mean=float("nan"), touches_border=False)],
    )
    columns = [column["name"] for column in table.content["columns"]]
    assert sorted(columns) == sorted(field.name for field in fields(LesionMeasurement))
    row = dict(zip(columns, table.content["rows"][0], strict=True))
    assert (row["volume_ml"], row["n_voxels"], row["intensity_mean"], row["touches_border"]) == (
        0.333333,
        7,
        None,
        False,
    )
    shown = {column["name"] for column in table.content["columns"] if column["shown"]}
    assert "volume_ml" in shown
    assert "mass_g" not in shown  # unknown in all rows


@pytest.mark.parametrize("max_bytes", [-1000, 0, 6000, 20_000, 200_000])
def test_a_table_that_does_not_fit_keeps_its_largest_rows(max_bytes):
    # In a page each of these characters takes six bytes.
    row = {field.name: 1.5 for field in fields(LesionMeasurement)} | {"notes": "<&'>" * 9}
    order = np.random.default_rng(0).permutation(300)
    rows = [
        LesionMeasurement(**row | {"case_id": "a", "lesion_id": int(n), "volume_ml": float(n)})
        for n in order
    ]
    layout = replace(LESIONS, shown=("lesion_id", "volume_ml"), needed=("notes",))
    table = fitting_table(layout, rows, max_bytes=max_bytes)
    size = len(
        htmlsafe_json_dumps(table.content, separators=(",", ":"), ensure_ascii=False).encode()
    )
    numbers = [row[0] for row in table.content["rows"]]
    assert sorted(numbers, reverse=True) == list(range(299, 299 - len(numbers), -1))
    assert (size <= max_bytes) or not numbers
    assert (len(numbers) < 300) is (
        f"Showing the {len(numbers)} largest of 300 rows" in table.remark
    )
    assert bool(numbers) is (max_bytes >= 6000)
