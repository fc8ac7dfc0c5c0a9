import re

import pytest

from volseg.commands.fitting import (
    ROOM,
    Folds,
    TooShortError,
    best_plan,
    fit_to_time,
    refuse_time,
    suggested,
)
from volseg.errors import VolsegError
from volseg.planning.close import Closed
from volseg.recipe import load_recipe
from volseg.sizing import LEAST_STEPS, STEPS


def plan(edge):
    recipe = load_recipe("lung_nodule_ct")
    train = recipe.train.model_copy(update={"patch_shape": (edge, edge, edge)})
    return Closed(recipe.model_copy(update={"train": train}))


LARGE, SMALL = plan(64), plan(16)


def seconds_of(candidate):
    return 1.0 if candidate == LARGE else 0.1


def fit(seconds, folds=5, may_drop_folds=True, smaller=SMALL, **needs):
    networks = Folds(n=folds, may_drop=may_drop_folds, **needs)
    return fit_to_time(LARGE, seconds, networks, time_step=seconds_of, smaller=smaller)


def test_time_enough_changes_nothing():
    fitted = fit(5 * ROOM * LEAST_STEPS)
    assert (fitted.plan, fitted.folds, fitted.reasons) == (LARGE, 5, ())


def test_folds_are_dropped_before_the_network_gets_smaller():
    fitted = fit(2.5 * ROOM * LEAST_STEPS)
    assert (fitted.plan, fitted.folds) == (LARGE, 2)
    assert "2 instead of 5 folds" in fitted.reasons[0]
    fitted = fit(1.0 * LEAST_STEPS)
    assert (fitted.plan, fitted.folds) == (LARGE, 1)


def test_next_the_network_gets_smaller_and_then_the_error_states_the_time_needed():
    fitted = fit(0.9 * LEAST_STEPS)
    assert fitted.plan == SMALL
    assert "a smaller network" in " ".join(fitted.reasons)
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
        fitted = fit(seconds, **options)
    except TooShortError as error:
        assert error.needed > seconds
        return
    assert seconds / fitted.folds / fitted.seconds_per_step >= LEAST_STEPS - 1e-6
    assert 1 <= fitted.folds <= options.get("folds", 5)
    if options.get("may_drop_folds") is False:
        assert fitted.folds == 5


def test_the_best_plan_fits_all_folds_else_one_network_else_it_is_the_smallest():
    requests = []

    def plan_for(flops):
        requests.append(flops)
        return LARGE

    assert best_plan(plan_for, SMALL, 5 * 10 * STEPS, 5, 10) == LARGE
    assert best_plan(plan_for, SMALL, 10 * STEPS, 5, 10) == LARGE
    assert requests == [10 * STEPS, 10 * STEPS]
    assert best_plan(plan_for, SMALL, 9 * STEPS, 5, 10) == SMALL


def test_a_refusal_names_a_time_that_holds_what_is_needed():
    for needed in (3, 59, 61, 100, 130, 3000, 50_000):
        text = suggested(needed)
        number, unit = re.fullmatch(r"([\d.]+)([smh])", text).groups()
        assert needed < float(number) * {"s": 1, "m": 60, "h": 3600}[unit] < 2 * needed + 60
    assert suggested(50_000).endswith("h")
    words = "budget of 60 s is too short: all of it; to fix: give --time-budget 3m or more; keep"
    with pytest.raises(VolsegError, match=words):
        refuse_time(60, 110, "all of it", kept="; keep")
