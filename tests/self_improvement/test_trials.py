import dataclasses
import itertools
import time

import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.files import as_record
from metaopt.self_improvement.records import past_search
from metaopt.self_improvement.trials import (
    Change,
    Search,
    Trial,
    TrialConfig,
    TrialRound,
    judge,
    lowered,
    run_trial,
)
from metaopt.self_improvement.workload import begin, changed, copied, steps

CONFIG = TrialConfig(examples=0.02, anneal=0.33, margin=0.002, least_steps=4)
PROBLEM = workload(2000)
SLOW = SETTINGS | {"outer_learning_rate": 0.02}


def rate(value, score="loss"):
    return Change({"outer_learning_rate": value}, "outer_learning_rate", score, f"rate {value}")


def last(problem, snapshot, end, **options):
    for step in steps(problem, snapshot, end, **options):
        snapshot = step.snapshot
    return snapshot


def first_round(problem, snapshot, changes, config=CONFIG, *args, **options):
    """The first round of a search."""
    search = Search(problem, config, *args, **options)
    return search.run_round(search.begin(snapshot), changes)


def test_a_round_leaves_its_start_as_it_was_and_the_winner_is_a_run_with_the_change():
    snapshot = last(PROBLEM, begin(PROBLEM, SLOW), 100)
    before = as_bytes(snapshot.state)
    state, decision = first_round(PROBLEM, snapshot, [rate(0.2), rate(0.001)], CONFIG, 1)
    assert as_bytes(snapshot.state) == before and snapshot.settings == SLOW
    assert as_bytes(state.snapshot.state._replace(hparams={})) == as_bytes(
        snapshot.state._replace(hparams={})
    )
    by_hand = last(PROBLEM, changed(PROBLEM, copied(snapshot), {"outer_learning_rate": 0.2}), 140)
    assert as_bytes(state.reached.state) == as_bytes(by_hand.state)
    assert state.reached.examples == 140
    assert state.snapshot.settings["outer_learning_rate"] == 0.2
    assert decision.verdict == "accepted" and decision.phase == 1 and decision.step == 25
    assert decision.changes == {"outer_learning_rate": (0.02, 0.2)}
    assert [t.verdict for t in decision.trials] == ["better", "worse"]
    assert [t.accepted for t in decision.trials] == [True, False]
    # Three trials of 40 and 16 to anneal (13.2, in batches of 4), less the 40 of progress.
    assert decision.trial_examples == 3 * 56 - 40 and decision.gained == decision.size == 40


def test_what_a_memory_tells_is_read_as_decisions_or_not_at_all():
    _, decision = first_round(PROBLEM, begin(PROBLEM, SLOW), [rate(0.2)])
    told = as_record(decision)
    assert past_search([told, told | {"phase": 1}]) == [decision]
    entry = told["trials"][0] | {"settings": {}}
    damages = ({"trials": [{"setting": "x"}]}, {"trials": [entry]}, {"step": -1})
    for damaged in ({"phase": 0}, "x", told | {"changes": None}, *(told | d for d in damages)):
        assert past_search([told, damaged]) is None


def test_the_next_round_starts_at_the_same_place_and_knows_its_trial_without_a_change():
    problem, seen = PROBLEM, []

    def sample(settings, position):
        seen.append(settings["outer_learning_rate"])
        return quadratic.sample(settings, position)

    state, first = first_round(problem, begin(problem, SLOW), [rate(0.2)])
    problem = problem._replace(sample=sample)
    again, second = Search(problem, CONFIG).run_round(state, [rate(0.8)], 40, first)
    assert set(seen) == {0.8} and second.examples == first.examples == 0
    assert second.trial_examples == 56  # all of its one trial; the first one's is kept
    # A run that was stopped in between tries its winner once more, at no account.
    resumed = Search(problem, CONFIG).begin(state.snapshot)
    after, decision = Search(problem, CONFIG).run_round(resumed, [rate(0.8)], 40, first)
    assert decision.trial_examples == second.trial_examples
    assert as_bytes(after.reached.state) == as_bytes(again.reached.state)


def test_longer_trials_go_on_with_the_winner_where_it_had_come_to():
    snapshot, positions = begin(PROBLEM, SLOW), []

    def sample(settings, position):
        if settings["outer_learning_rate"] == 0.2:
            positions.append(position)
        return quadratic.sample(settings, position)

    state, first = first_round(PROBLEM, snapshot, [rate(0.2)])
    problem = PROBLEM._replace(sample=sample)
    longer, second = Search(problem, CONFIG).run_round(state, [rate(30.0)], 80, first)
    assert min(positions) == 40 and longer.size == 80
    by_hand = last(PROBLEM, changed(PROBLEM, copied(snapshot), {"outer_learning_rate": 0.2}), 80)
    assert as_bytes(longer.reached.state) == as_bytes(by_hand.state)
    assert longer.winner is not None and longer.winner.examples == 80 + 28  # 26.4 to anneal
    # 108 of the change; of the other, all but the 80 that the run continues from.
    assert second.gained == 80 and second.trial_examples == 108 + 28
    resumed = Search(PROBLEM, CONFIG).begin(state.snapshot)
    after, again = Search(PROBLEM, CONFIG).run_round(resumed, [rate(30.0)], 80, first)
    assert again.trial_examples == second.trial_examples
    assert as_bytes(after.reached.state) == as_bytes(longer.reached.state)
    assert after.winner is not None
    np.testing.assert_array_equal(after.winner.losses, longer.winner.losses)


def test_where_nothing_is_better_the_trial_without_change_was_progress():
    snapshot = begin(PROBLEM, SETTINGS)
    state, decision = first_round(PROBLEM, copied(snapshot), [rate(1e-4), rate(30.0)])
    assert decision.verdict == "kept" and decision.changes == {}
    assert as_bytes(state.reached.state) == as_bytes(last(PROBLEM, snapshot, 40).state)


def test_where_all_diverge_it_goes_nowhere_and_lowers_the_rates():
    settings = SETTINGS | {"outer_learning_rate": 900.0}
    problem = workload(20_000)
    snapshot = begin(problem, settings)
    before = as_bytes(snapshot.state._replace(hparams={}))
    state, decision = first_round(problem, snapshot, [rate(500.0)])
    after = state.reached
    assert decision.verdict == "rolled back" and decision.left_out is None
    assert decision.changes == {"outer_learning_rate": (900.0, 225.0)} and decision.gained == 0
    assert as_bytes(after.state._replace(hparams={})) == before and after.examples == 0
    assert float(after.state.hparams["outer_learning_rate"]) == 225.0


def test_a_batch_that_gives_no_number_is_left_out_and_the_rates_are_not_touched():
    problem = workload(2000, bad={13})
    snapshot = begin(problem, SLOW)
    state, decision = first_round(problem, snapshot, [rate(0.2)])
    assert decision.verdict == "rolled back" and decision.left_out == (12, 16)
    assert decision.changes == {} and state.reached.examples == 0
    assert state.snapshot.left_out == {(12, 16)}
    assert as_bytes(state.reached.state) == as_bytes(snapshot.state)
    state, decision = Search(problem, CONFIG).run_round(state, [rate(0.2)])
    assert decision.verdict == "accepted" and decision.left_out is None
    assert state.reached.examples == 40


def test_a_change_that_cannot_be_run_is_worse_and_says_why():
    def sample(settings, position):
        if settings["batch_size"] == 5:
            raise UserError("5 does not divide")
        return quadratic.sample(settings, position)

    problem = PROBLEM._replace(sample=sample)
    five = Change({"batch_size": 5}, "batch_size", "efficiency", "batch_size 4 to 5")
    _, decision = first_round(problem, begin(problem, SLOW), [five, rate(0.2)])
    refused, better = decision.trials
    assert refused.verdict == "worse" and refused.error == "5 does not divide"
    assert better.accepted and better.error == ""


def test_a_start_without_a_finite_loss_is_no_state_to_decide_on():
    snapshot = begin(PROBLEM, SETTINGS)
    params = {"params": jnp.full(6, jnp.nan)}
    with pytest.raises(FloatingPointError):
        Search(PROBLEM, CONFIG).begin(
            snapshot._replace(state=snapshot.state._replace(meta_params=params))
        )


def test_a_round_that_is_given_up_leaves_its_start_whole():
    snapshot, calls = begin(PROBLEM, SETTINGS), itertools.count()

    def check():
        if next(calls) == 17:
            raise KeyboardInterrupt

    before = as_bytes(snapshot.state)
    with pytest.raises(KeyboardInterrupt):
        first_round(PROBLEM, snapshot, [rate(0.1)], check=check)
    assert as_bytes(snapshot.state) == before


def test_what_the_loss_judges_does_not_depend_on_the_clock():
    """The better loss wins, though it took longer."""

    def sample(settings, position):
        time.sleep(0.02 if settings["outer_learning_rate"] == 0.5 else 0.0)
        return quadratic.sample(settings, position)

    problem = PROBLEM._replace(sample=sample)
    state, decision = first_round(problem, begin(problem, SLOW), [rate(0.05), rate(0.5)])
    assert state.snapshot.settings["outer_learning_rate"] == 0.5
    quick, slow = decision.trials
    assert slow.seconds > 5 * quick.seconds


def test_a_trial_of_a_single_step_is_timed_as_well():
    found = run_trial(PROBLEM, begin(PROBLEM, SETTINGS | {"batch_size": 64}), None, 40, 0)
    assert found.examples == 64 and 1e-6 < found.seconds < 10


def test_rates_are_lowered_within_their_bounds():
    snapshot = begin(PROBLEM, SETTINGS | {"outer_learning_rate": 2e-5})
    assert lowered(PROBLEM, snapshot).settings["outer_learning_rate"] == quadratic.RATE.low


def trial(losses, seconds, score=None, examples=100):
    change = score and Change({}, "x", score, "x")
    return Trial(change, None, np.asarray(losses, np.float64), seconds, examples)  # type: ignore[arg-type]


SPREAD = np.linspace(-0.01, 0.01, 16)


@pytest.mark.parametrize(
    ("score", "fall", "seconds", "outcome"),
    [
        ("loss", 0.5, 9.0, "better"),
        ("loss", -0.5, 0.1, "worse"),
        ("loss", 0.001, 0.1, "noise"),  # within the margin
        ("loss", np.nan, 1.0, "worse"),
        ("efficiency", 0.0, 0.5, "better"),  # the same loss in half of the time
        ("efficiency", 0.0, 2.0, "worse"),
        ("efficiency", 0.0, 0.95, "noise"),
        ("efficiency", -0.12, 0.88, "better"),  # the same a second, and the run ends sooner
        ("efficiency", -0.06, 0.94, "noise"),
        ("efficiency", np.inf, 0.1, "worse"),
        ("throughput", 0.0, 0.8, "better"),
        ("throughput", 0.0, 0.99, "noise"),
        ("throughput", 0.0, 1.5, "noise"),
        ("throughput", -0.5, 0.1, "worse"),
    ],
)
def test_each_score_judges_what_it_says(score, fall, seconds, outcome):
    before, unchanged = np.full(16, 3.0), trial(np.full(16, 2.0), 1.0)
    found, _ = judge(before, unchanged, trial(2.0 - fall + SPREAD, seconds, score), margin=0.002)
    assert found.outcome == outcome


def a_round(unchanged=2.0, **seconds):
    return TrialRound(np.full(16, 3.0), trial(np.full(16, unchanged), 1.0, **seconds), margin=0.002)


def entered(found, setting, loss, *, score="loss", seconds=1.0, direction=0, level=0):
    change = Change({setting: loss}, setting, score, setting, direction, level)
    found.enter(trial(loss + SPREAD, seconds)._replace(change=change))
    return change


def test_the_better_of_several_settings_are_tried_together_the_others_not():
    found = a_round()
    a = entered(found, "a", 1.5)
    entered(found, "a", 1.7)
    b = entered(found, "b", 1.8)
    entered(found, "c", 1.9)  # a fifth of the best difference
    entered(found, "d", 2.5)
    assert found.together() == Change({"a": 1.5, "b": 1.8}, "a and b", "loss", "a; b", parts=(a, b))
    together = entered(found, "a and b", 1.4)
    assert found.best is not None and found.best.change == together
    alone = a_round()
    entered(alone, "a", 1.5)
    assert alone.together() is None and a_round().together() is None


def test_the_other_direction_is_not_tried_where_one_was_better():
    found = a_round()
    entered(found, "a", 1.5, direction=1)
    entered(found, "b", 2.5, direction=1)
    down = Change({"a": 0.0}, "a", "loss", "", direction=-1)
    assert found.is_needless(down) and not found.is_needless(down._replace(setting="b"))
    assert not found.is_needless(down._replace(direction=1)) and not found.is_needless(
        down._replace(direction=0)
    )


def test_nothing_is_tried_after_what_makes_all_else_much_quicker():
    found = a_round()
    entered(found, "a", 1.9, score="efficiency", seconds=0.9)
    assert not found.is_needless(Change({}, "b", "loss", ""))
    entered(found, "a", 1.9, score="efficiency", seconds=0.5)
    assert found.is_needless(Change({}, "b", "loss", ""))


@pytest.mark.parametrize(
    ("direction", "level", "loss", "wins"),
    [(-1, 1, 2.001, True), (1, 1, 2.001, False), (-1, 0, 2.001, False), (-1, 1, 2.5, False)],
)
def test_of_what_refines_the_smaller_wins_a_tie(direction, level, loss, wins):
    found = a_round()
    entered(found, "a", loss, direction=direction, level=level)
    assert (found.best is not None) == wins
    assert [trial.accepted for trial in found.trials()] == [wins]


BUDGETED = TrialConfig(examples=0.02, longer=4.0, anneal=0.25, least_steps=4)
START = begin(PROBLEM, SETTINGS)


def of_rate(value, direction=0, level=0):
    return Change(
        {"outer_learning_rate": value}, "outer_learning_rate", "loss", "", direction, level
    )


def afforded(changes, **options):
    found, size = Search(PROBLEM, BUDGETED).affordable(options.pop("at", START), changes, **options)
    return [change.direction for change in found], size


COARSE = [of_rate(1.0, 1), of_rate(0.1, -1)]
FINE = [of_rate(0.3, -1, 1), of_rate(0.6, 1, 1)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (110, ([1, -1], 40)),  # 40 examples and 10 to anneal, three times; 40 are kept
        (109, ([1], 40)),
        (60, ([1], 40)),
        (59, ([], 0)),
    ],
)
def test_the_first_round_pays_for_the_trial_without_a_change_but_not_for_the_best(budget, expected):
    assert afforded(COARSE, budget=budget) == expected


def test_the_next_round_pays_for_its_own_trials_alone():
    assert afforded(COARSE, budget=100, size=40) == ([1, -1], 40)
    assert afforded(COARSE, budget=99, size=40) == ([1], 40)
    assert afforded(COARSE, budget=49, size=40) == ([], 40)
    assert afforded(COARSE, budget=-200, size=40) == ([], 40)  # overdrawn


def test_a_trial_of_several_settings_together_is_paid_for():
    decay = Change({"weight_decay": 0.1}, "weight_decay", "loss", "")
    assert afforded([*COARSE, decay], budget=210) == ([1, -1, 0], 40)  # five trials, less 40
    assert afforded([*COARSE, decay], budget=209) == ([1, -1], 40)
    assert afforded([*COARSE, decay], budget=200, size=40) == ([1, -1, 0], 40)
    assert afforded([*COARSE, decay], budget=199, size=40) == ([1, -1], 40)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (440, ([-1, 1], 160)),  # three of 160 and 40, of which 160 are kept
        (439, ([-1], 160)),
        (240, ([-1], 160)),
        (180, ([-1], 120)),  # the last one is shorter
        (120, ([-1], 80)),
        (119, ([-1], 40)),  # no longer than before: one more of those
        (49, ([], 40)),
    ],
)
def test_what_refines_has_longer_trials_or_fewer(budget, expected):
    assert afforded(FINE, budget=budget, size=40) == expected


def test_short_trials_are_not_believed_where_they_say_larger():
    assert afforded(FINE[1:], budget=119, size=40) == ([], 40)
    assert afforded(FINE[1:], budget=120, size=40) == ([1], 80)


def test_trials_do_not_become_shorter_within_a_search():
    assert afforded(COARSE, budget=1000, size=160) == ([1, -1], 160)


def test_where_the_coarser_of_what_refines_cannot_be_believed_the_finer_is_tried():
    decay = Change({"weight_decay": 0.1}, "weight_decay", "loss", "", -1, 2)
    assert afforded([FINE[1], decay], budget=119, size=40) == ([-1], 40)


def test_nothing_is_refined_while_something_coarse_is_left():
    assert afforded(FINE + COARSE, budget=1000) == ([1, -1], 40)


def test_nothing_is_asked_for_after_the_end_of_the_run():
    assert afforded(COARSE, budget=1000, at=START._replace(examples=1942)) == ([1, -1], 40)
    assert afforded(COARSE, budget=1000, at=START._replace(examples=1943)) == ([], 0)
    late = START._replace(examples=1880)
    assert afforded(FINE, budget=1000, size=40, at=late) == ([-1], 89)


def test_only_changes_that_leave_a_trial_enough_steps_are_possible():
    batch = Change({"batch_size": 10}, "batch_size", "efficiency", "")
    more = dataclasses.replace(BUDGETED, least_steps=5)
    assert BUDGETED.judges(PROBLEM, SETTINGS, batch)  # 40 examples are 4 steps
    assert not more.judges(PROBLEM, SETTINGS, batch)
    assert more.judges(PROBLEM, SETTINGS, batch._replace(level=1))
    large = batch._replace(settings={"batch_size": 40}, level=1)
    assert Search(PROBLEM, BUDGETED).affordable(START, [large], 240, 40) == ([large], 160)
    assert Search(PROBLEM, BUDGETED).affordable(START, [large], 120, 40) == ([], 80)  # of 2 steps


@pytest.mark.parametrize(
    "wrong", [{"examples": 0.0}, {"anneal": -1.0}, {"least_steps": 0}, {"longer": 0.5}]
)
def test_configs_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError):
        TrialConfig(**wrong)


def test_what_waits_comes_when_nothing_before_it_is_possible():
    late = of_rate(0.5, 0, 1)._replace(rank=1)
    assert afforded([*FINE, late], budget=1000) == ([-1, 1], 160)
    assert afforded([late], budget=1000) == ([0], 160)
    large = Change({"batch_size": 16}, "batch_size", "efficiency", "", 1)  # not four steps in 40
    assert afforded([large, late], budget=1000) == ([0], 160)
