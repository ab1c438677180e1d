import dataclasses
import itertools

import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.self_improvement.trials import (
    Change,
    Trial,
    TrialConfig,
    decide,
    judge,
    lowered,
    try_change,
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


def test_a_race_leaves_its_start_as_it_was_and_the_winner_is_a_run_with_the_change():
    snapshot = last(PROBLEM, begin(PROBLEM, SLOW), 100)
    before = as_bytes(snapshot.state)
    after, decision = decide(PROBLEM, snapshot, [rate(0.2), rate(0.001)], CONFIG, phase=1)
    assert as_bytes(snapshot.state) == before and snapshot.settings == SLOW
    by_hand = last(PROBLEM, changed(PROBLEM, copied(snapshot), {"outer_learning_rate": 0.2}), 140)
    assert as_bytes(after.state) == as_bytes(by_hand.state)
    assert after.examples == 140 and after.settings["outer_learning_rate"] == 0.2
    assert decision.verdict == "accepted" and decision.phase == 1 and decision.step == 25
    assert decision.changes == {"outer_learning_rate": [0.02, 0.2]}
    assert [e["verdict"] for e in decision.evidence] == ["better", "worse"]
    assert [e["accepted"] for e in decision.evidence] == [True, False]
    # Three trials of 40 and 16 to anneal (13.2, in batches of 4), less the 40 of progress.
    assert decision.trial_examples == 3 * 56 - 40


def test_where_nothing_is_better_the_trial_without_change_was_progress():
    snapshot = begin(PROBLEM, SETTINGS)
    after, decision = decide(PROBLEM, copied(snapshot), [rate(1e-4), rate(30.0)], CONFIG)
    assert decision.verdict == "kept" and decision.changes == {}
    assert as_bytes(after.state) == as_bytes(last(PROBLEM, snapshot, 40).state)


def test_where_all_diverge_it_goes_nowhere_and_lowers_the_rates():
    settings = SETTINGS | {"outer_learning_rate": 900.0}
    problem = workload(20_000)
    snapshot = begin(problem, settings)
    before = as_bytes(snapshot.state._replace(hparams={}))
    after, decision = decide(problem, snapshot, [rate(500.0)], CONFIG)
    assert decision.verdict == "rolled back" and decision.left_out is None
    assert decision.changes == {"outer_learning_rate": [900.0, 225.0]}
    assert as_bytes(after.state._replace(hparams={})) == before and after.examples == 0
    assert float(after.state.hparams["outer_learning_rate"]) == 225.0


def test_a_batch_that_gives_no_number_is_left_out_and_the_rates_are_not_touched():
    problem = workload(2000, bad={13})
    snapshot = begin(problem, SLOW)
    after, decision = decide(problem, snapshot, [rate(0.2)], CONFIG)
    assert decision.verdict == "rolled back" and decision.left_out == (12, 16)
    assert decision.changes == {} and after.examples == 0
    assert as_bytes(after.state) == as_bytes(snapshot.state)
    after, decision = decide(problem, after, [rate(0.2)], CONFIG, skip=frozenset({(12, 16)}))
    assert decision.verdict == "accepted" and decision.left_out is None and after.examples == 40


def test_a_change_that_cannot_be_run_is_worse_and_says_why():
    def sample(settings, position):
        if settings["batch_size"] == 5:
            raise UserError("5 does not divide")
        return quadratic.sample(settings, position)

    problem = PROBLEM._replace(sample=sample)
    five = Change({"batch_size": 5}, "batch_size", "efficiency", "batch_size 4 to 5")
    _, decision = decide(problem, begin(problem, SLOW), [five, rate(0.2)], CONFIG)
    refused, better = decision.evidence
    assert refused["verdict"] == "worse" and refused["error"] == "5 does not divide"
    assert better["accepted"] and better["error"] == ""


def test_a_start_without_a_finite_loss_is_no_ground_to_decide_on():
    snapshot = begin(PROBLEM, SETTINGS)
    params = {"params": jnp.full(6, jnp.nan)}
    with pytest.raises(FloatingPointError):
        decide(
            PROBLEM,
            snapshot._replace(state=snapshot.state._replace(meta_params=params)),
            [rate(0.1)],
            CONFIG,
        )


def test_a_race_that_is_given_up_leaves_its_start_whole():
    snapshot, calls = begin(PROBLEM, SETTINGS), itertools.count()

    def check():
        if next(calls) == 17:
            raise KeyboardInterrupt

    before = as_bytes(snapshot.state)
    with pytest.raises(KeyboardInterrupt):
        decide(PROBLEM, snapshot, [rate(0.1)], CONFIG, check=check)
    assert as_bytes(snapshot.state) == before


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
        ("efficiency", np.inf, 0.1, "worse"),
        ("throughput", 0.0, 0.8, "better"),
        ("throughput", 0.0, 0.99, "noise"),
        ("throughput", 0.0, 1.5, "noise"),
        ("throughput", -0.5, 0.1, "worse"),
    ],
)
def test_each_score_judges_what_it_says(score, fall, seconds, outcome):
    before, unchanged = np.full(16, 3.0), trial(np.full(16, 2.0), 1.0)
    found = judge(before, unchanged, trial(2.0 - fall + SPREAD, seconds, score), margin=0.002)
    assert found.outcome == outcome


def test_trials_that_the_loss_judges_do_not_race_the_clock(monkeypatch):
    """The better loss wins, though it took longer by the clock."""
    snapshot = begin(PROBLEM, SLOW)

    def slowed(workload, snapshot, change, *args, **options):
        found = try_change(workload, snapshot, change, *args, **options)
        return found._replace(seconds=99.0 if change == rate(0.5) else found.seconds)

    monkeypatch.setattr("metaopt.self_improvement.trials.try_change", slowed)
    after, _ = decide(PROBLEM, snapshot, [rate(0.05), rate(0.5)], CONFIG)
    assert after.settings["outer_learning_rate"] == 0.5


def test_a_trial_of_a_single_step_is_timed_as_well():
    found = try_change(PROBLEM, begin(PROBLEM, SETTINGS | {"batch_size": 64}), None, 40, 0.0)
    assert found.examples == 64 and 1e-6 < found.seconds < 10


def test_rates_are_lowered_within_their_bounds():
    snapshot = begin(PROBLEM, SETTINGS | {"outer_learning_rate": 2e-5})
    assert lowered(PROBLEM, snapshot).settings["outer_learning_rate"] == quadratic.RATE.low


def test_only_changes_that_leave_a_trial_enough_steps_are_possible():
    batch = Change({"batch_size": 10}, "batch_size", "efficiency", "")
    more = dataclasses.replace(CONFIG, least_steps=5)
    assert CONFIG.possible(PROBLEM, SETTINGS, batch)  # 40 examples are 4 steps
    assert not more.possible(PROBLEM, SETTINGS, batch)
    for wrong in ({"examples": 0.0}, {"anneal": -1.0}, {"least_steps": 0}):
        with pytest.raises(UserError):
            TrialConfig(**wrong)
