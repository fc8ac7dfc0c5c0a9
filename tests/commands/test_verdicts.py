"""All commands give the same verdict on a dataset, and name what is wrong with it.

The rule, as docs/datasets.md states it: what names, tables and descriptions say of the dataset as a
whole is refused by every command, in one sentence. What is wrong with one file is named by each
command that reads this file: an error of check, plan and train, a failed row of the others.
"""

from __future__ import annotations

import pytest
from generated_datasets import FAULTS, LAYOUTS, Scope, drawn, generate, possible
from verdicts import COMMANDS, disagreements, verdicts_of

SEED, NUMBER = 20, 200
FAST = ("check", "plan", "measure")  # where files are read; the others read them alike
OF_FILES = (Scope.SCAN, Scope.MASK)
FEW = 2  # faults of a scan, and of a mask, in the fast test


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def named(pairs):
    return [pytest.param(*pair, id=", ".join(pair)) for pair in pairs]


def sample():
    """Return a pair of each fault that is no damage of a file, and a few of those."""
    pairs = drawn(len(FAULTS), SEED)
    of_files = {scope: [p for p in pairs if FAULTS[p[0]].scope is scope] for scope in OF_FILES}
    others = [pair for pair in pairs if FAULTS[pair[0]].scope not in (*OF_FILES, Scope.NONE)]
    return [*others, *(pair for damaged in of_files.values() for pair in damaged[:FEW])]


@pytest.mark.parametrize(("fault", "layout"), named(sample()))
def test_a_fault_is_named_alike(fault, layout, models, tmp_path):
    data = generate(tmp_path / "data", fault, layout, SEED)
    commands = COMMANDS if data.scope is Scope.WHOLE else FAST
    assert disagreements(data, verdicts_of(data, tmp_path, models, commands)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "layout"), named(drawn(NUMBER, SEED)))
def test_every_command_gives_the_same_verdict(fault, layout, models, tmp_path):
    data = generate(tmp_path / "data", fault, layout, SEED)
    assert disagreements(data, verdicts_of(data, tmp_path, models, COMMANDS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_dataset_goes_through_every_command(layout, models, tmp_path):
    data = generate(tmp_path / "data", "no fault", layout, SEED)
    assert data.scope is Scope.NONE
    assert disagreements(data, verdicts_of(data, tmp_path, models, COMMANDS)) == []


def test_the_draw_holds_every_kind_of_fault_and_every_layout():
    pairs = drawn(NUMBER, SEED)
    assert len(set(pairs)) == NUMBER < len(possible())
    assert {fault for fault, _ in pairs} == set(FAULTS)
    assert {layout for _, layout in pairs} == set(LAYOUTS)
    assert drawn(NUMBER, SEED) == pairs != drawn(NUMBER, SEED + 1)
