import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic
from scipy import stats

from metaopt import eager
from metaopt.evaluate import LEAST_PER_CALL, make_curves, tuned_curves
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.statistics import interval, t_interval

EPISODES = quadratic.episodes(5)
META_PARAMS = {"params": quadratic.PARAMS}


@pytest.mark.parametrize("tasks_at_a_time", [0, 1, 2])
def test_curves_are_the_query_loss_after_each_step_of_the_whole_support(tasks_at_a_time):
    inner, devices = InnerLoop(num_steps=2, batching="split"), jax.devices()[:2]
    traces, traced_by_rate = [], []

    def loss(params, batch):
        traces.append(None)
        return quadratic.loss(params, batch)

    curves = make_curves(maml(), loss, inner, 4, devices, tasks_at_a_time)
    for rate in (0.1, 0.3):
        found = curves(META_PARAMS, {"inner_learning_rate": np.float32(rate)}, EPISODES)
        assert found.shape == (5, 5) and found.dtype == np.float64
        traced_by_rate.append(len(traces))
        for i, curve in enumerate(found):
            support, query = jax.tree.map(lambda x, i=i: x[i], (EPISODES.support, EPISODES.query))
            path = quadratic.descend(quadratic.START, support, [rate] * 4)
            np.testing.assert_allclose(curve, [quadratic.value(w, query) for w in path], rtol=1e-4)
    assert traced_by_rate[0] == traced_by_rate[1]


def test_a_measure_of_several_numbers_takes_the_place_of_the_loss():
    def measure(params, episode):
        losses = [quadratic.loss(params, batch) for batch in (episode.query, episode.support)]
        return jnp.stack([*losses, params["head"][0]])

    hparams = {"inner_learning_rate": np.float32(0.1)}
    curves = [
        make_curves(maml(), quadratic.loss, InnerLoop(), 2, jax.devices()[:2], measure=m)
        for m in (None, measure)
    ]
    plain, found = (curve(META_PARAMS, hparams, EPISODES) for curve in curves)
    assert found.shape == (5, 3, 3)
    np.testing.assert_allclose(found[..., 0], plain, rtol=1e-6)
    for i in range(5):
        support = jax.tree.map(lambda x, i=i: x[i], EPISODES.support)
        path = quadratic.descend(quadratic.START, support, [0.1] * 2)
        np.testing.assert_allclose(found[i, :, 2], path[:, 0], rtol=1e-4)
        np.testing.assert_allclose(
            found[i, :, 1], [quadratic.value(w, support) for w in path], rtol=1e-4
        )


def test_equal_learners_and_more_episodes_take_no_other_program(monkeypatch, compilations):
    monkeypatch.setattr(eager, "_compiled", collections.OrderedDict())
    hparams, devices = {"inner_learning_rate": np.float32(0.1)}, jax.devices()[:2]
    several = 2 * LEAST_PER_CALL
    episodes = quadratic.episodes(2 * several + 3)

    def losses(number, num_steps=2):
        curves = make_curves(maml(), quadratic.loss, InnerLoop(), num_steps, devices, 1)
        return curves(META_PARAMS, hparams, jax.tree.map(lambda x: x[:number], episodes))

    losses(several)
    before = compilations("_fun")
    found = losses(2 * several + 3)
    assert found.shape == (2 * several + 3, 3) and compilations("_fun") == before > 0
    np.testing.assert_array_equal(found[:several], losses(several))
    losses(several, num_steps=3)
    assert compilations("_fun") == before + 1


def test_no_steps_are_the_loss_at_the_start():
    curves = make_curves(maml(), quadratic.loss, InnerLoop(), 0, jax.devices()[:1])
    found = curves(META_PARAMS, {"inner_learning_rate": np.float32(0.1)}, EPISODES)
    expected = [
        quadratic.value(quadratic.START, jax.tree.map(lambda x, i=i: x[i], EPISODES.query))
        for i in range(5)
    ]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    assert found.shape == (5, 1)


def test_the_interval_is_students_over_the_means_of_the_tasks():
    rng = np.random.default_rng(0)
    groups = np.array([7, 3, 7, 9, 3, 7, 4])
    values = rng.normal(size=7)
    means = [values[groups == g].mean() for g in (3, 4, 7, 9)]
    expected = stats.ttest_1samp(means, 0.0).confidence_interval(0.95)
    found = interval(values, groups)
    assert found.n == 4
    np.testing.assert_allclose(found.mean - found.ci95, expected.low, rtol=1e-12)
    np.testing.assert_allclose(found.mean + found.ci95, expected.high, rtol=1e-12)
    alone = interval(values, np.zeros(7, int))
    assert alone.n == 1 and np.isnan(alone.ci95) and alone.mean == pytest.approx(values.mean())
    for values, groups in [(np.zeros(0), np.zeros(0)), (np.zeros(3), np.zeros(2))]:
        with pytest.raises(ValueError, match="one shape"):
            interval(values, groups)


def table_of_curves(valid, test):
    """Curves by rate, looked up instead of computed, and the test rates that were asked for."""
    asked = []

    def curves(meta_params, hparams, episodes):
        rate = round(float(hparams["inner_learning_rate"]), 3)
        assert hparams["other"] == 1
        if episodes is VALID:
            return np.asarray(valid.get(rate, [[9, 9, 9]] * 3), np.float64)
        asked.append(rate)
        return np.asarray(test[rate], np.float64)

    return curves, asked


VALID = EPISODES._replace(task=np.array([0, 0, 1]))
RATES = (0.1, 0.2, 0.4)


def test_rates_are_chosen_on_validation_for_each_number_of_steps():
    # Over tasks, not episodes: task 0 has two episodes and counts as much as task 1.
    valid = {
        0.1: [[3, 2, 2], [3, 2, 2], [3, 3.0, 2]],  # means over tasks: 3, 2.5, 2
        0.2: [[3, 3, 1], [3, 3, 1], [3, 1.6, 1]],  # 3, 2.3, 1: though over episodes 2.53
        0.4: [[3, 0, 0], [3, 0, np.nan], [3, np.inf, 0]],
    }
    test = {rate: np.full((2, 3), rate) for rate in RATES}
    curves, asked = table_of_curves(valid, test)
    tuned = tuned_curves(curves, {}, {"other": 1}, RATES, VALID, EPISODES)
    np.testing.assert_array_equal(tuned.rates, [0.2, 0.2, 0.2])
    np.testing.assert_array_equal(tuned.losses, np.full((2, 3), 0.2))
    assert asked == [0.2]

    valid[0.1] = [[3, 1, 2]] * 3
    test[0.1], test[0.2] = np.array([[5, 6, 7.0]] * 2), np.array([[5, 8, 9.0]] * 2)
    curves, asked = table_of_curves(valid, test)
    tuned = tuned_curves(curves, {}, {"other": 1}, RATES, VALID, EPISODES)
    np.testing.assert_array_equal(tuned.rates, [0.2, 0.1, 0.2])
    np.testing.assert_array_equal(tuned.losses, [[5, 6, 9.0]] * 2)


def test_rates_are_tried_beyond_the_grid_until_the_best_is_inside():
    def curves(meta_params, hparams, episodes):
        rate = float(hparams["inner_learning_rate"])
        one = [1.0, np.log(rate / 3.2) ** 2, np.log(rate / 0.05) ** 2]
        return np.array([one] * len(episodes.task))

    tuned = tuned_curves(curves, {}, {}, RATES, VALID, EPISODES)
    np.testing.assert_allclose(tuned.rates[1:], [3.2, 0.05])
    assert tuned.losses.max() <= 1.0
    alone = tuned_curves(curves, {}, {}, (0.4,), VALID, EPISODES)
    np.testing.assert_array_equal(alone.rates, [0.4, 0.4, 0.4])


def covered(found, mean):
    return abs(found.mean - mean) <= found.ci95


def test_the_interval_of_few_tasks_covers_skewed_values_more_often_than_students():
    draws = np.random.default_rng(0).exponential(size=(400, 10))
    tasks = np.arange(10)
    bootstrap = np.mean([covered(interval(x, tasks), 1.0) for x in draws])
    student = np.mean([covered(t_interval(x, tasks), 1.0) for x in draws])
    assert student < 0.91 < bootstrap < 0.96


@pytest.mark.parametrize(
    ("n", "method"),
    [(7, "Student t"), (8, "bootstrap t"), (256, "bootstrap t"), (257, "Student t")],
)
def test_the_method_of_an_interval_is_named_and_depends_on_the_number_of_tasks(n, method):
    values = np.random.default_rng(1).normal(size=2 * n)
    groups = np.repeat(np.arange(n), 2)
    found, student = interval(values, groups), t_interval(values, groups)
    assert found.method == method and student.method == "Student t"
    assert (found == student) == (method == "Student t")
    assert found[::2] == student[::2] and interval(values, groups) == found  # from a fixed seed
    if n == 256:  # where both agree
        np.testing.assert_allclose(found.ci95, student.ci95, rtol=0.05)
