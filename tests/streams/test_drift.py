import itertools
import math

import jax
import numpy as np
import pytest

from metaopt.streams.drift import (
    DriftConfig,
    LinearDriftConfig,
    drifting,
    drifting_linear,
    filter_losses,
    kalman_errors,
)


def config(**fields):
    return DriftConfig(**{"num_tokens": 400, "vocab_size": 4, "hazard": 0.02} | fields)


def evidence(tokens, begins, a, size):
    """Chance of tokens whose language begins anew at each of some places: Dirichlet-multinomial."""
    total = 0.0
    for begin, end in itertools.pairwise([*begins, len(tokens) - 1]):
        counts = np.zeros((size, size))
        for t in range(begin, end):
            c, x = tokens[t], tokens[t + 1]
            total += math.log((counts[c, x] + a) / (counts[c].sum() + size * a))
            counts[c, x] += 1
    return math.exp(total)


def test_the_filter_is_the_sum_over_all_ways_to_change():
    """Of 7 tokens all 64 patterns of changes are summed by hand."""
    one = config(hazard=0.3, concentration=0.5, vocab_size=3)
    tokens = np.array([0, 1, 1, 2, 1, 1, 0, 2])
    total = 0.0
    for pattern in itertools.product([False, True], repeat=6):
        begins = [0, *(i + 1 for i, change in enumerate(pattern) if change)]
        chance = math.prod(0.3 if change else 0.7 for change in pattern)
        total += chance * evidence(tokens, begins, 0.5, 3)
    np.testing.assert_allclose(filter_losses(tokens, one).sum(), -math.log(total), rtol=1e-6)


def test_without_changes_it_is_the_posterior_of_one_language():
    one = config(hazard=0.0)
    tokens = drifting(one, jax.random.key(0)).tokens
    found = np.exp(-filter_losses(tokens, one)[:30].sum())
    np.testing.assert_allclose(found, evidence(tokens[:31], [0], 0.3, 4), rtol=1e-4)


def test_the_right_hazard_is_better_than_others():
    one = config(num_tokens=1000)
    streams = [drifting(one, jax.random.key(i)).tokens for i in range(4)]
    losses = {
        h: np.mean([filter_losses(x, config(hazard=h)).mean() for x in streams])
        for h in (0.0, 0.02, 0.3)
    }
    assert min(losses, key=losses.get) == 0.02


def test_changes_are_as_frequent_as_they_should_be():
    found = drifting(config(num_tokens=20_000), jax.random.key(0))
    assert abs(found.changes.mean() - 0.02) < 0.004
    assert found.tokens.dtype == np.int32 and found.tokens.shape == (20_001,)
    np.testing.assert_array_equal(found.language, np.cumsum(found.changes))


def counts_of(found, language):
    table = np.zeros((4, 4))
    rows = np.flatnonzero(found.language == language)
    np.add.at(table, (found.tokens[rows], found.tokens[rows + 1]), 1)
    return table / table.sum(axis=1, keepdims=True)


def test_a_recurring_language_is_the_same_each_time():
    one = config(kind="recurring", num_languages=2, num_tokens=20_000, hazard=0.001)
    found = drifting(one, jax.random.key(1))
    is_late = np.arange(len(found.language)) >= len(found.language) // 2
    parts = [
        counts_of(found._replace(language=np.where(inside, found.language, -1)), 0)
        for inside in (~is_late, is_late)
    ]
    np.testing.assert_allclose(parts[0], parts[1], atol=0.05)
    other = counts_of(found, 1)
    assert np.abs(parts[0] - other).max() > 0.2


def test_a_gradual_drift_begins_as_the_old_and_ends_as_the_new():
    found = drifting(config(kind="gradual", num_tokens=60_000, hazard=2e-4), jax.random.key(0))
    lengths = np.bincount(found.language)
    k = int(lengths[:-1].argmax())
    rows, tenth = np.flatnonzero(found.language == k), lengths[k] // 10

    def table(chosen):
        inside = np.isin(np.arange(60_000), chosen)
        return counts_of(found._replace(language=np.where(inside, 0, -1)), 0)

    first, last = table(rows[:tenth]), table(rows[-tenth:])
    following = table(np.arange(rows[-1] + 1, rows[-1] + 1 + lengths[k + 1] // 10))
    assert tenth > 500
    assert np.nanmean(np.abs(last - following)) < np.nanmean(np.abs(first - last)) / 2


@pytest.mark.parametrize("kind", ["sudden", "gradual", "recurring"])
def test_the_same_key_draws_the_same_stream(kind):
    first, again = (drifting(config(kind=kind), jax.random.key(3)) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_kalman_filter_is_the_normal_posterior():
    """By the joint covariance of all targets, for a few examples."""
    one = LinearDriftConfig(dim=3, num_examples=7, noise=0.5, memory=0.8)
    found = drifting_linear(one, jax.random.key(0))
    x, y = found.inputs.astype(np.float64), found.targets.astype(np.float64)
    steps = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    covariance = 0.8**steps * (x @ x.T) + 0.25 * np.eye(7)
    wanted = []
    for t in range(7):
        known = covariance[:t, :t]
        mean = covariance[t, :t] @ np.linalg.solve(known, y[:t]) if t else 0.0
        wanted.append((y[t] - mean) ** 2)
    np.testing.assert_allclose(kalman_errors(found, one), wanted, rtol=1e-8)


def test_weights_drift_and_stay_of_one_size():
    one = LinearDriftConfig(dim=4, num_examples=20_000, noise=0.1, memory=0.99)
    found = drifting_linear(one, jax.random.key(0))
    np.testing.assert_allclose(found.weights.var(), 1, rtol=0.15)
    pairs = found.weights[:-50] * found.weights[50:]
    np.testing.assert_allclose(pairs.mean(), 0.99**50, atol=0.1)
    rest = found.targets - np.sum(found.weights * found.inputs, axis=1)
    np.testing.assert_allclose(rest.std(), 0.1, rtol=0.05)
