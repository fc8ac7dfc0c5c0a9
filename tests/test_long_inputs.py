"""Long untrusted inputs take time in proportion to their length, not to its square."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from volseg.commands.batch import Batch, CaseFiles, run_cases
from volseg.commands.patients import read_pairs
from volseg.errors import VolsegError
from volseg.inputs import parse_json, read_toml
from volseg.io.cases import Case
from volseg.io.layouts import find_cases
from volseg.nnunet.plans import Dataset, configuration_of
from volseg.options import MeasureOptions
from volseg.pages.about import About
from volseg.store.results import State

LONGER = 4  # times the length
MAX_GROWTH = 8  # of the time: 4 if it is linear, 16 if it is quadratic
NEGLIGIBLE_S = 0.2  # too short to judge its growth


def seconds_of(work):
    """Return the CPU seconds of a call, which may be refused: the shorter of two runs."""
    seconds = []
    for _ in range(2):
        began = time.process_time()
        with contextlib.suppress(VolsegError, ValueError):
            work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def toml_of_one_long_key(folder, n):
    (folder / "key.toml").write_text(".".join("a" * n) + " = 1")
    return lambda: read_toml(folder / "key.toml")


def toml_of_one_long_table(folder, n):
    (folder / "table.toml").write_text("[" + " . ".join(["'a.b'"] * n) + "]")
    return lambda: read_toml(folder / "table.toml")


def toml_of_a_long_key_after_text(folder, n):
    text = 'a = """\n\\"" \'\'\' # "" """"\nb = \'\'\'"""\'\'\' # \'\'\'\nc = [{ %s = 1 }]'
    (folder / "text.toml").write_text(text % ".".join("a" * n))
    return lambda: read_toml(folder / "text.toml")


def json_with_a_repeated_name(folder, n):
    text = "{" + ", ".join(f'"{number}": 0' for number in [*range(n), n - 1]) + "}"
    return lambda: parse_json(text)


def table_of_many_channels(folder, n):
    (folder / "cases.csv").write_text(",".join(f"image_{number}" for number in range(n)) + "\n")
    return lambda: find_cases(folder / "cases.csv", None)


def times(folder, names):
    return [
        SimpleNamespace(name=name, results=folder, case_ids=names)
        for name in ("baseline", "follow-up")
    ]


def table_of_pairs(folder, n):
    names = [f"p{number}" for number in range(n)]
    (folder / "pairs.csv").write_text(
        "patient,baseline,followup\n" + "".join(f"{name},{name},{name}\n" for name in names)
    )
    return lambda: read_pairs(folder / "pairs.csv", times(folder, names))


def table_of_one_patient(folder, n):
    names = [f"c{number}" for number in range(n)]
    (folder / "one.csv").write_text(
        "patient,baseline,followup\n" + "".join(f"p,{name},\n" for name in names)
    )
    return lambda: read_pairs(folder / "one.csv", times(folder, names))


def cases_that_are_complete(folder, n):
    cases = [Case(f"c{number}", {"image": Path("scan.nii")}) for number in range(n)]
    results = SimpleNamespace(
        path=folder,
        has_record=lambda name: True,
        state_of=lambda name, key, inputs: State.COMPLETE,
        check_overwrites=list,
        keep=lambda name, scan: None,
        write_tables=lambda pending: [],
    )
    batch = Batch(
        results=results,
        options=MeasureOptions(),
        inputs=SimpleNamespace(of=lambda case: ()),
        key_of=lambda case: "",
        files=CaseFiles(("masks",), False, False),
        stage="",
        about=About(),
    )
    return lambda: run_cases(cases, lambda todo: iter(()), batch)


def nnunet_channels(folder, n):
    dataset = Dataset(
        channel_names={str(number): f"c{number}" for number in range(n)},
        labels={},
        file_ending=".nii.gz",
    )
    return lambda: dataset.channels


def nnunet_configurations(folder, n):
    parents = {
        f"c{number}": {"inherits_from": f"c{number + 1}", f"key_{number}": 0} for number in range(n)
    }
    plans = SimpleNamespace(configurations=parents)
    return lambda: configuration_of(plans, "c0", folder)


@pytest.mark.parametrize(
    ("make", "n"),
    [
        (toml_of_one_long_key, 3_000),
        (toml_of_one_long_table, 3_000),
        (toml_of_a_long_key_after_text, 3_000),
        (json_with_a_repeated_name, 6_000),
        pytest.param(table_of_many_channels, 3_000, marks=pytest.mark.slow),
        (table_of_pairs, 3_000),
        (table_of_one_patient, 3_000),
        (cases_that_are_complete, 5_000),
        (nnunet_channels, 6_000),
        (nnunet_configurations, 6_000),
    ],
)
def test_four_times_the_length_takes_about_four_times_as_long(make, n, tmp_path):
    short, long = seconds_of(make(tmp_path, n)), seconds_of(make(tmp_path, LONGER * n))
    assert long < max(MAX_GROWTH * short, NEGLIGIBLE_S), (short, long)
