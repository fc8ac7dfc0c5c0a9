import importlib
from dataclasses import replace

import pytest

from volseg.measure import lesions
from volseg.measure.selftest import selftest
from volseg.workflows import table_columns


def test_every_known_measure_is_met():
    checks = selftest()
    assert [check for check in checks if not check.is_passed] == []
    assert len(checks) > 50
    names = {name for name, *_ in table_columns()["lesions.csv"]}
    assert {check.measure for check in checks} <= names


@pytest.mark.parametrize(
    "column, wrong", [("sphericity", 1.01), ("volume_mm3", 1.02), ("mass_g", 1.1)]
)
def test_a_wrong_number_is_found(monkeypatch, column, wrong):
    """The test of the test: a measure that is off by a percent or more fails."""
    right = lesions.measure_lesions

    def measure_wrongly(*arguments, **options):
        return [
            replace(row, **{column: getattr(row, column) * wrong})
            for row in right(*arguments, **options)
        ]

    monkeypatch.setattr(
        importlib.import_module("volseg.measure.selftest"), "measure_lesions", measure_wrongly
    )
    assert {check.measure for check in selftest() if not check.is_passed} == {column}
