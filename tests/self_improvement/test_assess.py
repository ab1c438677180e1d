import json
import math

import numpy as np
import pytest
from scipy import stats

from metaopt.errors import UserError
from metaopt.files import as_record, parsed, what_is_wrong
from metaopt.ranges import OutOfRange
from metaopt.self_improvement.assess import (
    Assessment,
    CostConfig,
    GroupLoss,
    assess,
    by_group,
    difference,
    rank_in_words,
    strengths_and_weaknesses,
    total_cost,
)
from metaopt.statistics import Interval, compare, rank_among_runs


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
    assert assess(late, (nothing, early), **now)[6:9] == (None, None, None)


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


NOW = {"step": 1, "tokens": 64, "seconds": 2.0}
GROUPS = ["easy", "hard", "easy", "hard", "hard", "easy", "hard"]
LOSSES = np.array([1.0, 4.0, 2.0, 6.0, 8.0, 3.0, 10.0])


def test_two_groups_differ_by_hand():
    """Means 2 and 7, se² = 1/3 + (20/3)/4 = 2, and 2² / ((1/3)²/2 + (5/3)²/3) = 216/53."""
    found = difference(LOSSES[[0, 2, 5]], LOSSES[[1, 3, 4, 6]])
    assert found.mean == -5.0 and found.n == 7
    assert found.ci95 == pytest.approx(stats.t.ppf(0.975, 216 / 53) * math.sqrt(2), rel=1e-9)
    test = stats.ttest_ind(LOSSES[[0, 2, 5]], LOSSES[[1, 3, 4, 6]], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high))


def test_a_single_loss_is_taken_to_spread_as_the_others_do():
    """s = 2 of 4, 6, 8: the error is 2 √(1 + 1/3), with two degrees of freedom."""
    found = difference(np.array([1.0]), np.array([4.0, 6.0, 8.0]))
    assert found.mean == -5.0
    assert found.ci95 == pytest.approx(4.302653 * 2 * math.sqrt(4 / 3), rel=1e-6)
    other_way = difference(np.array([4.0, 6.0, 8.0]), np.array([1.0]))
    assert (other_way.mean, other_way.ci95) == (5.0, found.ci95)
    assert math.isnan(difference(np.array([1.0]), np.array([2.0])).ci95)


def test_groups_without_any_spread_differ_by_what_they_differ():
    assert difference(np.array([1.0, 1.0]), np.array([2.0, 2.0]))[:2] == (-1.0, 0.0)


def test_each_group_has_its_loss_its_fall_and_its_difference_from_the_others():
    fall = np.array([0.5, 0.0, 0.5, 1.0, -1.0, 0.5, 0.0])
    easy, hard = by_group(LOSSES, GROUPS, LOSSES + fall)
    assert (easy.group, hard.group) == ("easy", "hard")
    assert (easy.loss.mean, easy.loss.n, hard.loss.mean, hard.loss.n) == (2.0, 3, 7.0, 4)
    assert easy.loss.ci95 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert easy.improvement is not None and hard.improvement is not None
    assert easy.improvement[:2] == (0.5, 0.0) and hard.improvement.mean == 0.0
    assert hard.improvement.ci95 > 0  # a gain and a loss
    assert easy.difference is not None and hard.difference is not None
    assert easy.difference.mean == -hard.difference.mean == -5.0
    assert by_group(LOSSES, GROUPS)[0].improvement is None
    (alone,) = by_group(LOSSES, ["all"] * 7)
    assert alone.difference is None and by_group(LOSSES, ()) == ()
    with pytest.raises(UserError, match="names 6 losses, but evaluate gives 7"):
        by_group(LOSSES, GROUPS[:-1])


def test_strengths_and_weaknesses_are_beyond_the_interval_and_extreme_ones_first():
    def group(name, mean, ci95):
        return GroupLoss(name, Interval(0.0, 0.0, 2), None, Interval(mean, ci95, 2))

    found = [
        *(group("a bit better", -1.0, 0.5), group("noise", -3.0, 3.5), group("best", -2.0, 1.9)),
        *(group("worse", 1.0, 0.9), group("unknown", 9.0, math.nan), group("worst", 2.0, 0.1)),
        GroupLoss("alone", Interval(0.0, 0.0, 2), None, None),
    ]
    assert strengths_and_weaknesses(found) == (("best", "a bit better"), ("worst", "worse"))
    assert strengths_and_weaknesses([]) == ((), ())
    assessed = assess(LOSSES, groups=GROUPS, **NOW)
    assert (assessed.strengths, assessed.weaknesses) == (("easy",), ("hard",))


def test_groups_that_do_not_differ_are_named_in_one_case_of_twenty():
    rng, groups = np.random.default_rng(0), np.repeat(["a", "b", "c"], 8).tolist()
    named = [
        len(sum(strengths_and_weaknesses(by_group(rng.normal(size=24), groups)), ()))
        for _ in range(1000)
    ]
    assert 0.03 < np.mean(named) / 3 < 0.07


def test_the_cost_is_the_weighted_sum():
    """2 · 0.5 + 0.1 · 30 + 4 · 1.5 = 1 + 3 + 6."""
    weights = CostConfig(loss=2.0, seconds=0.1, gib=4.0)
    assert total_cost(weights, loss=0.5, seconds=30.0, gib=1.5) == pytest.approx(10.0)
    assert total_cost(weights, loss=0.5, seconds=30.0, gib=None) is None
    assert total_cost(CostConfig(), loss=0.5, seconds=math.inf, gib=None) == 0.5
    with pytest.raises(OutOfRange, match="seconds"):
        CostConfig(seconds=-1.0)
    first = assess(LOSSES, gib=3.0, cost=weights, **NOW)
    assert first.cost == pytest.approx(2 * LOSSES.mean() + 0.2 + 12)
    after = assess(LOSSES, (first, LOSSES), gib=1.0, **NOW)
    assert after.gib == 3.0  # the peak of a process that was killed counts
    assert after.cost == pytest.approx(LOSSES.mean())


def test_a_line_is_read_back_as_it_was_and_an_old_one_too():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    rank = rank_among_runs([(10, 1.0)], [[(10, 2.0)], [(10, 0.5)]])
    found = assess(
        LOSSES,
        (assess(LOSSES + 1, **NOW), LOSSES + 1),
        groups=GROUPS,
        gib=1.0,
        predictions=(probabilities, np.array([0, 1, 0])),
        **NOW,
    )._replace(rank=rank)
    line = json.loads(json.dumps(as_record(found)))
    assert what_is_wrong(line, Assessment) is None
    assert parsed(line, Assessment) == found
    new = ("cost", "gib", "groups", "strengths", "weaknesses", "classes", "rank")
    old = {name: value for name, value in line.items() if name not in new}
    assert what_is_wrong(old, Assessment) is None
    assert parsed(old, Assessment) == Assessment(*found[:9])
    wrong = line | {"groups": [{"group": 3, "loss": None}]}
    assert "'groups' is" in (what_is_wrong(wrong, Assessment) or "")


def test_a_rank_in_words():
    rank = rank_among_runs([(10, 1.0)], [[(10, 2.0)], [(10, 0.75)]])
    assert rank is not None
    assert "loss 1, rank 2 of 3 runs" in (said := rank_in_words(rank)) and "0.25 above" in said
    assert "1 below" in rank_in_words(rank._replace(to_best=-1.0))
    assert "equal to the best" in rank_in_words(rank._replace(to_best=0.0))
