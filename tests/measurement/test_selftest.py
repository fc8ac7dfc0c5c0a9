import importlib
from dataclasses import replace

import pytest

from volseg.commands import table_columns
from volseg.measurement import lesions
from volseg.measurement.selftest import selftest


def test_every_check_of_the_selftest_passes():
    checks = selftest()
    assert [check for check in checks if not check.is_passed] == []
    assert len(checks) > 50
    names = {name for name, *_ in table_columns()["lesions.csv"]}
    assert {check.measure for check in checks} <= names


@pytest.mark.parametrize(
    "column, wrong", [("sphericity", 1.01), ("volume_mm3", 1.02), ("mass_g", 1.1)]
)
def test_the_selftest_detects_a_wrong_number(monkeypatch, column, wrong):
    """A measure that is off by a percent or more fails."""
    right = lesions.measure_lesions

    def measure_wrongly(*arguments, **options):
        rows = right(*arguments, **options)
        return [replace(row, **{column: getattr(row, column) * wrong}) for row in rows]

    module = importlib.import_module("volseg.measurement.selftest")
    monkeypatch.setattr(module, "measure_lesions", measure_wrongly)
    assert {check.measure for check in selftest() if not check.is_passed} == {column}
