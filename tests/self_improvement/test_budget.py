import dataclasses

import pytest
from noisy_quadratic import SETTINGS, workload

from metaopt.errors import UserError
from metaopt.self_improvement.trials import Change, TrialConfig, affordable
from metaopt.self_improvement.workload import begin

CONFIG = TrialConfig(examples=0.02, longer=4.0, anneal=0.25, least_steps=4)
PROBLEM = workload(2000)
START = begin(PROBLEM, SETTINGS)


def rate(value, way=0, level=0):
    return Change({"outer_learning_rate": value}, "outer_learning_rate", "loss", "", way, level)


def ways(changes, **options):
    found, size = affordable(PROBLEM, options.pop("at", START), changes, CONFIG, **options)
    return [change.way for change in found], size


COARSE = [rate(1.0, 1), rate(0.1, -1)]
FINE = [rate(0.3, -1, 1), rate(0.6, 1, 1)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (110, ([1, -1], 40)),  # 40 examples and 10 to anneal, three times; 40 are gone on with
        (109, ([1], 40)),
        (60, ([1], 40)),
        (59, ([], 0)),
    ],
)
def test_the_first_race_pays_for_the_trial_without_a_change_but_not_for_the_best(budget, expected):
    assert ways(COARSE, budget=budget) == expected


def test_the_next_race_pays_for_its_own_trials_alone():
    assert ways(COARSE, budget=100, size=40) == ([1, -1], 40)
    assert ways(COARSE, budget=99, size=40) == ([1], 40)
    assert ways(COARSE, budget=49, size=40) == ([], 40)
    assert ways(COARSE, budget=-200, size=40) == ([], 40)  # overdrawn


def test_a_trial_of_several_settings_together_is_paid_for():
    decay = Change({"weight_decay": 0.1}, "weight_decay", "loss", "")
    assert ways([*COARSE, decay], budget=210) == ([1, -1, 0], 40)  # five trials, less 40
    assert ways([*COARSE, decay], budget=209) == ([1, -1], 40)
    assert ways([*COARSE, decay], budget=200, size=40) == ([1, -1, 0], 40)
    assert ways([*COARSE, decay], budget=199, size=40) == ([1, -1], 40)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (440, ([-1, 1], 160)),  # three of 160 and 40, of which 160 are gone on with
        (439, ([-1], 160)),
        (240, ([-1], 160)),
        (180, ([-1], 120)),  # the last one is shorter
        (120, ([-1], 80)),
        (119, ([-1], 40)),  # no longer than before: one more of those
        (49, ([], 40)),
    ],
)
def test_what_refines_has_longer_trials_or_fewer(budget, expected):
    assert ways(FINE, budget=budget, size=40) == expected


def test_short_trials_are_not_believed_where_they_say_larger():
    assert ways(FINE[1:], budget=119, size=40) == ([], 40)
    assert ways(FINE[1:], budget=120, size=40) == ([1], 80)


def test_trials_do_not_become_shorter_within_a_search():
    assert ways(COARSE, budget=1000, size=160) == ([1, -1], 160)


def test_where_the_coarser_of_what_refines_cannot_be_believed_the_finer_is_tried():
    decay = Change({"weight_decay": 0.1}, "weight_decay", "loss", "", -1, 2)
    assert ways([FINE[1], decay], budget=119, size=40) == ([-1], 40)


def test_nothing_is_refined_while_something_coarse_is_left():
    assert ways(FINE + COARSE, budget=1000) == ([1, -1], 40)


def test_nothing_is_asked_for_after_the_end_of_the_run():
    assert ways(COARSE, budget=1000, at=START._replace(examples=1942)) == ([1, -1], 40)
    assert ways(COARSE, budget=1000, at=START._replace(examples=1943)) == ([], 0)
    late = START._replace(examples=1880)
    assert ways(FINE, budget=1000, size=40, at=late) == ([-1], 89)


def test_only_changes_that_leave_a_trial_enough_steps_are_possible():
    batch = Change({"batch_size": 10}, "batch_size", "efficiency", "")
    more = dataclasses.replace(CONFIG, least_steps=5)
    assert CONFIG.possible(PROBLEM, SETTINGS, batch)  # 40 examples are 4 steps
    assert not more.possible(PROBLEM, SETTINGS, batch)
    assert more.possible(PROBLEM, SETTINGS, batch._replace(level=1))
    large = batch._replace(settings={"batch_size": 40}, level=1)
    assert affordable(PROBLEM, START, [large], CONFIG, 240, size=40) == ([large], 160)
    assert affordable(PROBLEM, START, [large], CONFIG, 120, size=40) == ([], 80)  # of 2 steps


@pytest.mark.parametrize(
    "wrong", [{"examples": 0.0}, {"anneal": -1.0}, {"least_steps": 0}, {"longer": 0.5}]
)
def test_configs_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        TrialConfig(**wrong)


def test_what_waits_comes_when_nothing_before_it_is_possible():
    late = rate(0.5, 0, 1)._replace(rank=1)
    assert ways([*FINE, late], budget=1000) == ([-1, 1], 160)
    assert ways([late], budget=1000) == ([0], 160)
    large = Change({"batch_size": 16}, "batch_size", "efficiency", "", 1)  # not four steps in 40
    assert ways([large, late], budget=1000) == ([0], 160)
