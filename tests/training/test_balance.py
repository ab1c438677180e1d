import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.training.balance import (
    cropped,
    imbalance,
    lay_out,
    linear_partition,
    longest_first,
    mean_over_real,
)


def largest(costs, groups):
    return max(np.sum(np.asarray(costs)[group]) for group in groups)


def least_contiguous(costs, num_groups):
    """Over all ways to cut."""
    cuts = itertools.combinations_with_replacement(range(len(costs) + 1), num_groups - 1)
    return min(max(part.sum() for part in np.split(costs, cut)) for cut in cuts)


def least_of_all(costs, num_groups):
    assignments = itertools.product(range(num_groups), repeat=len(costs))
    return min(np.bincount(a, costs, minlength=num_groups).max() for a in assignments)


def test_contiguous_groups_are_the_best_of_all_ways_to_cut():
    rng = np.random.default_rng(0)
    for _ in range(300):
        costs = rng.integers(0, 9, rng.integers(0, 8)).astype(float)
        num_groups = int(rng.integers(1, 5))
        groups = linear_partition(costs, num_groups)
        assert len(groups) == num_groups
        np.testing.assert_array_equal(np.concatenate(groups), np.arange(len(costs)))
        assert largest(costs, groups) == least_contiguous(costs, num_groups)


def test_contiguous_groups_of_real_costs_are_the_best_too():
    rng = np.random.default_rng(1)
    for _ in range(100):
        costs = rng.exponential(size=7)
        found = largest(costs, linear_partition(costs, 3))
        np.testing.assert_allclose(found, least_contiguous(costs, 3), rtol=1e-12)


def test_a_long_sequence_meets_the_bounds_that_any_partition_has():
    costs = np.random.default_rng(2).lognormal(sigma=1.5, size=20_000)
    found = largest(costs, linear_partition(costs, 64))
    least = max(costs.max(), costs.sum() / 64)
    assert least <= found <= costs.sum() / 64 + costs.max()


def test_longest_first_keeps_grahams_bound_and_attains_it():
    rng = np.random.default_rng(3)
    for _ in range(40):
        costs = rng.integers(1, 20, 7).astype(float)
        groups = longest_first(costs, 3)
        assert sorted(np.concatenate(groups)) == list(range(7))
        assert largest(costs, groups) <= (4 / 3 - 1 / 9) * least_of_all(costs, 3) + 1e-9
    worst = np.array([5.0, 5, 4, 4, 3, 3, 3])  # of Graham's own: 11 where 9 is possible
    assert (largest(worst, longest_first(worst, 3)), least_of_all(worst, 3)) == (11, 9)


def test_imbalance():
    costs = [4.0, 1, 1, 2]
    assert imbalance(costs, [np.array([0]), np.array([1, 2, 3])]) == 1
    assert imbalance(costs, [np.array([0, 1, 2, 3]), np.array([], int)]) == 2
    assert imbalance([0.0, 0.0], [np.array([0]), np.array([1])]) == 1


@pytest.mark.parametrize("assign", [linear_partition, longest_first])
def test_a_layout_holds_every_task_once_and_says_what_it_gained(assign):
    costs = np.array([9, 8, 7, 1, 1, 1, 1], float)
    found = lay_out({"x": np.arange(7) * 10}, costs, 3, assign)
    real = found.weights > 0
    assert sorted(found.order[real]) == list(range(7))
    np.testing.assert_array_equal(found.tasks["x"], 10 * found.order)
    assert not found.order[~real].any()
    by_hand = [costs[:3].sum(), costs[3:5].sum(), costs[5:].sum()]
    assert found.before == pytest.approx(max(by_hand) / np.mean(by_hand))
    sums = (costs[found.order] * found.weights).sum(1)
    assert found.after == pytest.approx(sums.max() / sums.mean())
    assert found.after < 1.2 < 2.5 < found.before


def test_bad_costs_are_refused():
    for costs, num_groups, message in [
        ([1.0, -1.0], 2, "from 0 on"),
        ([1.0, np.nan], 2, "from 0 on"),
        ([1.0], 0, "at least 1"),
    ]:
        for assign in (linear_partition, longest_first):
            with pytest.raises(UserError, match=message):
                assign(costs, num_groups)
    with pytest.raises(UserError, match="3 tasks have 2 costs"):
        lay_out(np.zeros(3), [1.0, 2.0], 2)


def test_the_mean_over_real_tasks_is_that_of_the_meta_batch_and_computes_no_padding():
    x = np.random.default_rng(4).normal(size=(7, 3)).astype(np.float32)
    calls = []

    def of_task(x):
        jax.debug.callback(lambda: calls.append(None))
        return {"sum": jnp.sum(x**2), "x": x}

    laid = lay_out(x, [9, 8, 7, 1, 1, 1, 1], 3)
    assert (laid.weights == 0).any()
    mean = partial(mean_over_real, of_task, axis_name="devices")
    found = jax.pmap(lambda x, w: mean((x,), w), axis_name="devices")(laid.tasks, laid.weights)
    jax.effects_barrier()
    assert len(calls) == 7
    np.testing.assert_allclose(found["x"], np.tile(x.mean(0), (3, 1)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["sum"], np.full(3, (x**2).sum() / 7), rtol=1e-5)


def test_a_task_is_run_at_the_least_size_that_its_length_fits():
    sizes, ran = (2, 4, 8), []

    def masked_sum(task):
        x, length = task
        jax.debug.callback(lambda: ran.append(len(x)))
        return jnp.sum(jnp.where(jnp.arange(len(x)) < length, x, 0.0))

    run = cropped(masked_sum, lambda task, size: (task[0][:size], task[1]), sizes)
    x, lengths = jnp.arange(1.0, 41.0).reshape(5, 8), jnp.array([1, 2, 3, 5, 8])
    scanned = jax.jit(
        lambda: jax.lax.scan(lambda _, task: (None, run(task, task[1])), None, (x, lengths))[1]
    )
    expected = [x[i, :length].sum() for i, length in enumerate(lengths)]
    np.testing.assert_array_equal(scanned(), expected)
    jax.effects_barrier()
    assert sorted(ran) == [2, 2, 4, 8, 8]
