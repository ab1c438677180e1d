import itertools

import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.self_improvement.records import known_decisions
from metaopt.self_improvement.trials import Change, TrialConfig, decide, lowered, stand, try_change
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


def race(problem, snapshot, changes, config=CONFIG, *args, **options):
    """Of a search that begins with it."""
    return decide(problem, stand(problem, snapshot), changes, config, *args, **options)


def test_a_race_leaves_its_start_as_it_was_and_the_winner_is_a_run_with_the_change():
    snapshot = last(PROBLEM, begin(PROBLEM, SLOW), 100)
    before = as_bytes(snapshot.state)
    ground, decision = race(PROBLEM, snapshot, [rate(0.2), rate(0.001)], CONFIG, 1)
    assert as_bytes(snapshot.state) == before and snapshot.settings == SLOW
    assert as_bytes(ground.snapshot.state._replace(hparams={})) == as_bytes(
        snapshot.state._replace(hparams={})
    )
    by_hand = last(PROBLEM, changed(PROBLEM, copied(snapshot), {"outer_learning_rate": 0.2}), 140)
    assert as_bytes(ground.reached.state) == as_bytes(by_hand.state)
    assert ground.reached.examples == 140
    assert ground.snapshot.settings["outer_learning_rate"] == 0.2
    assert decision.verdict == "accepted" and decision.phase == 1 and decision.step == 25
    assert decision.changes == {"outer_learning_rate": [0.02, 0.2]}
    assert [e["verdict"] for e in decision.evidence] == ["better", "worse"]
    assert [e["accepted"] for e in decision.evidence] == [True, False]
    # Three trials of 40 and 16 to anneal (13.2, in batches of 4), less the 40 of progress.
    assert decision.trial_examples == 3 * 56 - 40 and decision.gained == decision.size == 40


def test_what_a_memory_tells_is_read_as_decisions_or_not_at_all():
    _, decision = race(PROBLEM, begin(PROBLEM, SLOW), [rate(0.2)])
    told = decision.as_json()
    assert known_decisions([told, told | {"phase": 1}]) == [decision]
    entry = told["evidence"][0] | {"settings": {}}
    damages = ({"evidence": [{"setting": "x"}]}, {"evidence": [entry]}, {"new": 1})
    for damaged in ({"phase": 0}, "x", told | {"changes": None}, *(told | d for d in damages)):
        assert known_decisions([told, damaged]) == []


def test_the_next_race_starts_at_the_same_place_and_knows_its_trial_without_a_change():
    problem, seen = PROBLEM, []

    def sample(settings, position):
        seen.append(settings["outer_learning_rate"])
        return quadratic.sample(settings, position)

    ground, first = race(problem, begin(problem, SLOW), [rate(0.2)])
    problem = problem._replace(sample=sample)
    again, second = decide(problem, ground, [rate(0.8)], CONFIG, size=40, last=first)
    assert set(seen) == {0.8} and second.examples == first.examples == 0
    assert second.trial_examples == 56  # all of its one trial, and the first one's is gone on with
    # A run that was stopped in between tries its winner once more, at no account.
    resumed = stand(problem, ground.snapshot)
    after, decision = decide(problem, resumed, [rate(0.8)], CONFIG, size=40, last=first)
    assert decision.trial_examples == second.trial_examples
    assert as_bytes(after.reached.state) == as_bytes(again.reached.state)


def test_longer_trials_go_on_with_the_winner_where_it_had_come_to():
    snapshot, positions = begin(PROBLEM, SLOW), []

    def sample(settings, position):
        if settings["outer_learning_rate"] == 0.2:
            positions.append(position)
        return quadratic.sample(settings, position)

    ground, first = race(PROBLEM, snapshot, [rate(0.2)])
    problem = PROBLEM._replace(sample=sample)
    longer, second = decide(problem, ground, [rate(30.0)], CONFIG, size=80, last=first)
    assert min(positions) == 40 and longer.size == 80
    by_hand = last(PROBLEM, changed(PROBLEM, copied(snapshot), {"outer_learning_rate": 0.2}), 80)
    assert as_bytes(longer.reached.state) == as_bytes(by_hand.state)
    assert longer.winner is not None and longer.winner.examples == 80 + 28  # 26.4 to anneal
    # 108 of the change; of the other, all but the 80 that are gone on with.
    assert second.gained == 80 and second.trial_examples == 108 + 28
    resumed = stand(PROBLEM, ground.snapshot)
    after, again = decide(PROBLEM, resumed, [rate(30.0)], CONFIG, size=80, last=first)
    assert again.trial_examples == second.trial_examples
    assert as_bytes(after.reached.state) == as_bytes(longer.reached.state)
    assert after.winner is not None
    np.testing.assert_array_equal(after.winner.losses, longer.winner.losses)


def test_where_nothing_is_better_the_trial_without_change_was_progress():
    snapshot = begin(PROBLEM, SETTINGS)
    ground, decision = race(PROBLEM, copied(snapshot), [rate(1e-4), rate(30.0)])
    assert decision.verdict == "kept" and decision.changes == {}
    assert as_bytes(ground.reached.state) == as_bytes(last(PROBLEM, snapshot, 40).state)


def test_where_all_diverge_it_goes_nowhere_and_lowers_the_rates():
    settings = SETTINGS | {"outer_learning_rate": 900.0}
    problem = workload(20_000)
    snapshot = begin(problem, settings)
    before = as_bytes(snapshot.state._replace(hparams={}))
    ground, decision = race(problem, snapshot, [rate(500.0)])
    after = ground.reached
    assert decision.verdict == "rolled back" and decision.left_out is None
    assert decision.changes == {"outer_learning_rate": [900.0, 225.0]} and decision.gained == 0
    assert as_bytes(after.state._replace(hparams={})) == before and after.examples == 0
    assert float(after.state.hparams["outer_learning_rate"]) == 225.0


def test_a_batch_that_gives_no_number_is_left_out_and_the_rates_are_not_touched():
    problem = workload(2000, bad={13})
    snapshot = begin(problem, SLOW)
    ground, decision = race(problem, snapshot, [rate(0.2)])
    assert decision.verdict == "rolled back" and decision.left_out == (12, 16)
    assert decision.changes == {} and ground.reached.examples == 0
    assert as_bytes(ground.reached.state) == as_bytes(snapshot.state)
    ground, decision = decide(problem, ground, [rate(0.2)], CONFIG, skip=frozenset({(12, 16)}))
    assert decision.verdict == "accepted" and decision.left_out is None
    assert ground.reached.examples == 40


def test_a_change_that_cannot_be_run_is_worse_and_says_why():
    def sample(settings, position):
        if settings["batch_size"] == 5:
            raise UserError("5 does not divide")
        return quadratic.sample(settings, position)

    problem = PROBLEM._replace(sample=sample)
    five = Change({"batch_size": 5}, "batch_size", "efficiency", "batch_size 4 to 5")
    _, decision = race(problem, begin(problem, SLOW), [five, rate(0.2)])
    refused, better = decision.evidence
    assert refused["verdict"] == "worse" and refused["error"] == "5 does not divide"
    assert better["accepted"] and better["error"] == ""


def test_a_start_without_a_finite_loss_is_no_ground_to_decide_on():
    snapshot = begin(PROBLEM, SETTINGS)
    params = {"params": jnp.full(6, jnp.nan)}
    with pytest.raises(FloatingPointError):
        stand(PROBLEM, snapshot._replace(state=snapshot.state._replace(meta_params=params)))


def test_a_race_that_is_given_up_leaves_its_start_whole():
    snapshot, calls = begin(PROBLEM, SETTINGS), itertools.count()

    def check():
        if next(calls) == 17:
            raise KeyboardInterrupt

    before = as_bytes(snapshot.state)
    with pytest.raises(KeyboardInterrupt):
        race(PROBLEM, snapshot, [rate(0.1)], check=check)
    assert as_bytes(snapshot.state) == before


def test_trials_that_the_loss_judges_do_not_race_the_clock(monkeypatch):
    """The better loss wins, though it took longer by the clock."""
    snapshot = begin(PROBLEM, SLOW)

    def slowed(workload, snapshot, change, *args, **options):
        found = try_change(workload, snapshot, change, *args, **options)
        return found._replace(seconds=99.0 if change == rate(0.5) else found.seconds)

    monkeypatch.setattr("metaopt.self_improvement.trials.try_change", slowed)
    ground, _ = race(PROBLEM, snapshot, [rate(0.05), rate(0.5)])
    assert ground.snapshot.settings["outer_learning_rate"] == 0.5


def test_a_trial_of_a_single_step_is_timed_as_well():
    found = try_change(PROBLEM, begin(PROBLEM, SETTINGS | {"batch_size": 64}), None, 40, 0)
    assert found.examples == 64 and 1e-6 < found.seconds < 10


def test_rates_are_lowered_within_their_bounds():
    snapshot = begin(PROBLEM, SETTINGS | {"outer_learning_rate": 2e-5})
    assert lowered(PROBLEM, snapshot).settings["outer_learning_rate"] == quadratic.RATE.low
