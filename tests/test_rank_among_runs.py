import math

import numpy as np
import pytest

from metaopt.statistics import rank_among_runs


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
