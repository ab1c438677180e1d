import math

import numpy as np
import pytest

from metaopt.statistics import (
    best_threshold,
    classification,
    classification_of,
    rank_among_runs,
)


def curve(offset, tokens=(10, 100, 1000)):
    return [(t, offset - math.log1p(t)) for t in tokens]


def test_curves_that_fall_with_the_logarithm_are_compared_exactly_in_between():
    present = [*curve(0.5, (10,)), (300, 0.5 - math.log1p(300))]
    found = rank_among_runs(present, [curve(0.0), curve(1.0), curve(2.0)])
    assert found is not None
    assert (found.tokens, found.rank, found.n) == (300, 2, 3)
    assert found.quantile == pytest.approx(2 / 3)
    np.testing.assert_allclose([found.to_best, found.to_median], [0.5, -0.5], rtol=1e-12)


def test_nothing_is_extrapolated_and_nothing_said_without_history():
    present = curve(0.0, (10, 300))
    assert (
        rank_among_runs(present, [])
        is rank_among_runs(present, [[]])
        is rank_among_runs([], [present])
        is None
    )
    short, late = curve(0.0, (10, 299)), curve(0.0, (301, 1000))
    assert rank_among_runs(present, [short, late]) is None
    found = rank_among_runs(present, [short, late, curve(-1.0)])
    assert found is not None and (found.n, found.rank, found.quantile) == (1, 2, 0.0)


def test_the_first_point_of_a_run_is_at_no_tokens():
    found = rank_among_runs([(0, 2.0)], [[(0, 3.0), (10, 1.0)], [(0, 2.0), (10, 5.0)]])
    assert found is not None
    assert (found.rank, found.quantile, found.to_best) == (1, 0.75, 0.0)
    assert found.to_median == pytest.approx(-0.5)


def test_the_order_of_points_does_not_matter_and_the_last_of_equal_tokens_counts():
    history = [[(1000, 1.0), (10, 3.0), (100, 9.0), (100, 2.0)]]
    found = rank_among_runs([(100, 2.5), (10, 3.0)], history)
    assert found is not None and found.to_best == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_runs_that_diverged_are_behind_all_others(bad):
    diverged = [(10, 3.0), (100, bad), (1000, bad)]
    found = rank_among_runs(curve(0.0, (10, 500)), [diverged, diverged])
    assert found is not None
    assert (found.rank, found.quantile, found.to_best) == (1, 1.0, -math.inf)
    found = rank_among_runs([(50, 1.0)], [[(10, 3.0), (90, bad)], [(10, bad), (90, 3.0)]])
    assert found is not None and found.to_best == -math.inf  # also next to a loss that is
    found = rank_among_runs([(500, bad)], [diverged, curve(0.0)])
    assert found is not None
    assert (found.rank, found.quantile, found.to_best) == (2, 0.25, math.inf)
    assert found.to_median == 0.0


def test_tokens_that_are_none_are_refused():
    for tokens in (-1, math.nan):
        with pytest.raises(ValueError, match="tokens"):
            rank_among_runs([(tokens, 1.0)], [curve(0.0)])


def test_precision_and_recall_of_a_small_table():
    targets = np.array([[0, 0, 0], [1, 1, 2]])
    predictions = np.array([[0, 0, 1], [1, 3, 0]])
    found = classification(targets, predictions)
    assert found.accuracy == pytest.approx(3 / 6)
    expected = {"0": (2 / 3, 2 / 3, 2 / 3, 3), "1": (1 / 2, 1 / 2, 1 / 2, 2)}
    expected |= {"2": (0, 0, 0, 1), "3": (0, 0, 0, 0)}
    assert list(found.per_class) == list(expected)
    for name, values in expected.items():
        assert found.per_class[name][:4] == pytest.approx(values)
    assert found[1:4] == pytest.approx([(2 / 3 + 1 / 2) / 4] * 3)
    words = np.array(["cat", "dog"])
    assert classification(words, words)[:4] == (1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        classification(targets, predictions[0])


def test_the_best_threshold_of_a_class_by_hand():
    """Taken for the class, from the top: F1 2/4, 2/5, 4/6, 6/7, 6/8."""
    scores = np.array([0.2, 0.9, 0.8, 0.5, 0.6])
    is_class = np.array([False, True, False, True, True])
    found = best_threshold(scores, is_class)
    assert found == pytest.approx((0.5, 3 / 4, 1.0, 6 / 7))
    assert best_threshold(-scores, ~is_class).f1 == pytest.approx(2 / 3)  # -0.2: one of one


def test_equal_scores_are_on_one_side_of_a_threshold_and_the_highest_of_equal_ones_is_taken():
    found = best_threshold(np.array([0.5, 0.5, 0.1]), np.array([True, False, False]))
    assert found == pytest.approx((0.5, 1 / 2, 1.0, 2 / 3))
    tied = best_threshold(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, False, True]))
    assert tied == pytest.approx((0.9, 1.0, 0.5, 2 / 3))  # as at 0.6: 2 · 2 / (4 + 2)
    never = best_threshold(np.ones(3), np.zeros(3, bool))
    assert math.isnan(never.threshold) and never[1:] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_threshold_is_better(seed):
    rng = np.random.default_rng(seed)
    scores, is_class = rng.integers(8, size=40) / 8, rng.random(40) < 0.4
    found = best_threshold(scores, is_class)
    for threshold in np.unique(scores):
        said = classification(is_class, scores >= threshold).per_class["True"]
        assert said.f1 <= found.f1 + 1e-12
        if threshold == found.threshold:
            assert said[:3] == pytest.approx(found[1:])


def test_a_classifier_by_its_probabilities():
    probabilities = np.array([[0.8, 0.2], [0.45, 0.55], [0.3, 0.7], [0.4, 0.6]])
    labels = np.array([0, 0, 1, 1])
    found = classification_of(probabilities, labels)
    assert found.accuracy == 3 / 4
    assert found.per_class["0"][:4] == pytest.approx((1.0, 0.5, 2 / 3, 2))
    assert found.per_class["0"].best == pytest.approx((0.45, 1.0, 1.0, 1.0))
    assert found.per_class["1"].best == pytest.approx((0.6, 1.0, 1.0, 1.0))
    assert found.f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    for wrong in (np.array([0, 1]), np.array([0, 0, 1, 2]), np.array([-1, 0, 1, 1])):
        with pytest.raises(ValueError, match=r"probabilities|classes"):
            classification_of(probabilities, wrong)
