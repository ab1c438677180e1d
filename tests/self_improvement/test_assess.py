import json
import math

import numpy as np
import pytest
from scipy import stats

from metaopt.files import as_record
from metaopt.self_improvement.assess import assess
from metaopt.statistics import compare


def losses(seed, size=50):
    return np.random.default_rng(seed).normal(2.0, 0.5, size)


def test_a_comparison_is_the_paired_t_test():
    before, noise = losses(0), losses(1)
    after = before - 0.02 + 0.2 * (noise - 2.0)
    found = compare(before, after)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    np.testing.assert_allclose(found.difference - found.ci95, expected.low, rtol=1e-9)
    np.testing.assert_allclose(found.difference + found.ci95, expected.high, rtol=1e-9)
    assert found.n == 50


@pytest.mark.parametrize(
    "spread", [lambda rng, n: rng.normal(size=n), lambda rng, n: rng.standard_t(4, n)]
)
def test_noise_is_accepted_in_two_and_a_half_percent_of_cases(spread):
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(2000):
        before = 2.0 + rng.normal(size=24)
        outcomes.append(compare(before, before + 0.1 * spread(rng, 24)).outcome)
    # 0.025 ± 3 standard errors of 2000 draws.
    for outcome in ("better", "worse"):
        assert 0.0145 < outcomes.count(outcome) / 2000 < 0.0355


def test_a_gain_of_just_the_margin_is_accepted_as_seldom_as_noise():
    rng = np.random.default_rng(1)
    accepted = {0.0: 0, 0.1: 0}
    for _ in range(1000):
        before = 2.0 + rng.normal(size=24)
        after = before - 0.1 + 0.1 * rng.normal(size=24)
        for margin in accepted:
            accepted[margin] += compare(before, after, margin=margin).outcome == "better"
    assert accepted[0.0] > 990
    assert 0.01 < accepted[0.1] / 1000 < 0.04


def test_a_clear_gain_is_better_and_back_again_is_worse():
    before = losses(2)
    after = before - 0.1 + 0.01 * losses(3)
    assert compare(before, after).outcome == "better"
    assert compare(after, before).outcome == "worse"
    assert compare(before, before).outcome == "noise"
    assert compare(before, before - 0.1).outcome == "better"  # without any spread
    assert compare(before, before - 0.1, margin=0.2).outcome == "noise"
    assert compare(before, before + 0.1, margin=0.2).outcome == "noise"


def test_pairing_finds_what_the_spread_of_episodes_hides():
    before = losses(4)
    after = before - 0.02 + 0.002 * losses(5)
    assert compare(before, after).outcome == "better"
    assert compare(before, np.roll(after, 1)).outcome == "noise"


def test_a_verdict_does_not_depend_on_the_order_unit_or_offset_of_losses():
    before = losses(6)
    after = before - 0.05 + 0.2 * (losses(7) - 2)
    found = compare(before, after, margin=0.003)
    order = np.random.default_rng(0).permutation(50)
    for b, a, scale in [
        (before[order], after[order], 1.0),
        (before + 7, after + 7, 1.0),
        (before / math.log(2), after / math.log(2), 1 / math.log(2)),
    ]:
        again = compare(b, a, margin=0.003 * scale)
        assert again.outcome == found.outcome
        np.testing.assert_allclose(again[1:3], np.array(found[1:3]) * scale, rtol=1e-9)


def test_episodes_of_one_task_are_one():
    before, groups = losses(8, 60), np.repeat(np.arange(3), 20)
    shift = np.array([-1.0, 0.3, -0.5])[groups]  # tells nothing over three tasks
    assert compare(before, before + shift).outcome == "better"
    found = compare(before, before + shift, groups=groups)
    assert found.outcome == "noise" and found.n == 3
    assert compare(before, before - 1.0, groups=np.zeros(60)).outcome == "noise"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_worse_and_what_heals_it_is_better(bad):
    good, broken = losses(9), losses(9) - 1.0
    broken[3] = bad
    for before in (good, broken):
        found = compare(before, broken)
        assert found.outcome == "worse" and found.difference == math.inf
    found = compare(broken, good + 5.0, margin=math.nan)  # a share of a loss that is NaN
    assert found.outcome == "better" and found.difference == -math.inf
    assert compare(good, good - 1.0, margin=math.nan).outcome == "noise"


def test_what_cannot_be_compared_is_refused():
    for before, after, margin in [
        (np.zeros(3), np.zeros(4), 0.0),
        (np.zeros(0), np.zeros(0), 0.0),
        (np.zeros(3), np.zeros(3), -0.1),
    ]:
        with pytest.raises(ValueError, match=r"same episodes|one shape|negative"):
            compare(before, after, margin=margin)


def test_an_assessment_divides_the_fall_of_the_loss_by_what_was_spent():
    early, late = losses(10), losses(10) - 0.5
    begun = assess(early, step=100, tokens=6400, seconds=10.0, flops=1e9, resources=2)
    assert begun.improvement is begun.per_second is begun.per_flop is None
    assert begun.per_cost == pytest.approx(1 / 20)
    assert begun.loss.mean == pytest.approx(early.mean()) and begun.loss.n == 50

    now = {"step": 300, "tokens": 19200, "seconds": 14.0, "flops": 3e9}
    found = assess(late, (begun, early), **now, resources=2)
    assert found[:4] == tuple(now.values())
    assert found.improvement is not None and found.improvement.mean == pytest.approx(0.5)
    assert found.improvement.ci95 < 1e-12 < found.loss.ci95  # paired
    assert found.per_second == pytest.approx(0.5 / 4)
    assert found.per_flop == pytest.approx(0.5 / 2e9)
    assert found.per_cost == pytest.approx(1 / 8)
    from_zero = assess(late, (begun._replace(flops=0.0), early), **now)
    assert from_zero.per_flop == pytest.approx(0.5 / 3e9)
    nothing = begun._replace(seconds=14.0, flops=None)
    assert assess(late, (nothing, early), **now)[6:] == (None, None, None)


def test_an_assessment_is_strict_json_also_where_it_diverged():
    first = assess(losses(11), step=1, tokens=64, seconds=1.0)
    broken = np.array([np.nan] + [np.inf] * 49)
    record = as_record(assess(broken, (first, losses(11)), step=2, tokens=64, seconds=2.0))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["loss"] == {"mean": None, "ci95": None, "n": 50, "method": "Student t"}
    assert record["improvement"]["mean"] is record["per_second"] is None
    assert record["per_cost"] == 1.0
    nested = {"array": np.array([1.0, np.nan], np.float32), "flag": np.bool_(True), 3: (1, "a")}
    assert as_record(nested) == {"array": [1.0, None], "flag": True, "3": [1, "a"]}
