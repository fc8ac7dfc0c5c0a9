import re

import pytest

from volseg.errors import VolsegError
from volseg.plan import Plan
from volseg.sizing import LEAST_STEPS, STEPS
from volseg.workflows.fitting import (
    ROOM,
    TooShortError,
    best_plan,
    fit_to_time,
    refuse_time,
    suggested,
)


def plan(edge):
    return Plan(spacing_mm=(1, 1, 1), patch_shape=(edge, edge, edge), batch_size=2, windows={})


LARGE, SMALL = plan(64), plan(16)


def seconds_of(candidate):
    return 1.0 if candidate == LARGE else 0.1


def fit(seconds, **options):
    usual = {"folds": 5, "may_drop_folds": True, "time_step": seconds_of, "smaller": lambda: SMALL}
    return fit_to_time(LARGE, seconds, **usual | options)


def test_time_enough_changes_nothing():
    found = fit(5 * ROOM * LEAST_STEPS)
    assert (found.plan, found.folds, found.reasons) == (LARGE, 5, ())


def test_folds_are_dropped_before_the_network_gets_smaller():
    found = fit(2.5 * ROOM * LEAST_STEPS)
    assert (found.plan, found.folds) == (LARGE, 2)
    assert "2 instead of 5 folds" in found.reasons[0]
    found = fit(1.0 * LEAST_STEPS)
    assert (found.plan, found.folds) == (LARGE, 1)


def test_then_the_network_gets_smaller_and_then_it_is_refused_with_the_time_it_needs():
    found = fit(0.9 * LEAST_STEPS)
    assert found.plan == SMALL
    assert "a smaller network" in " ".join(found.reasons)
    with pytest.raises(TooShortError) as caught:
        fit(0.09 * LEAST_STEPS)
    assert caught.value.needed == pytest.approx(0.1 * LEAST_STEPS)
    assert fit(caught.value.needed).folds == 1


@pytest.mark.parametrize("seconds", [1, 15, 19, 20, 21, 100, 150, 200, 399, 400, 1000, 3000])
@pytest.mark.parametrize(
    "options", [{}, {"smaller": None}, {"may_drop_folds": False}, {"folds": 1}]
)
def test_no_network_is_planned_with_fewer_steps_than_it_needs(seconds, options):
    try:
        found = fit(seconds, **options)
    except TooShortError as error:
        assert error.needed > seconds
        return
    assert seconds / found.folds / found.seconds_per_step >= LEAST_STEPS - 1e-6
    assert 1 <= found.folds <= options.get("folds", 5)
    if options.get("may_drop_folds") is False:
        assert found.folds == 5


def test_the_best_plan_has_its_steps_in_each_fold_else_in_one_network_else_it_is_the_smallest():
    asked = []

    def plan_for(flops):
        asked.append(flops)
        return LARGE

    def steps_of(candidate, flops):
        return flops / 10

    assert best_plan(plan_for, SMALL, 5 * 10 * STEPS, 5, steps_of) == LARGE
    assert best_plan(plan_for, SMALL, 10 * STEPS, 5, steps_of) == LARGE
    assert asked == [10 * STEPS, 10 * STEPS]
    assert best_plan(plan_for, SMALL, 9 * STEPS, 5, steps_of) == SMALL


def test_a_refusal_names_a_time_that_holds_what_is_needed():
    for needed in (3, 59, 61, 100, 130, 3000, 50_000):
        text = suggested(needed)
        number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
        assert needed < int(number) * {"s": 1, "m": 60}[unit] < 2 * needed + 60
    with pytest.raises(
        VolsegError,
        match=r"budget of 60 s is too short: all of it; to fix: give --time-budget 3m or more; keep",
    ):
        refuse_time(60, 110, "all of it", kept="; keep")
