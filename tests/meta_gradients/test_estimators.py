import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, query_weights
from metaopt.learners import maml, meta_sgd, per_layer_per_step
from metaopt.meta_gradients import first_order, joint, reptile, reverse
from metaopt.types import Batch

KEY = jax.random.key(0)
EPISODE = quadratic.episode()
SUPPORT, QUERY = EPISODE.support, EPISODE.query
RATE = 0.3
HPARAMS = {"inner_learning_rate": RATE}


def run(estimator, learner=None, *, num_steps=3, rate=RATE, batching="same", log_rates=None):
    """The meta-gradient and metrics of an estimator on the quadratic."""
    learner = learner or maml()
    estimate = estimator(learner, quadratic.loss, InnerLoop(num_steps=num_steps, batching=batching))
    meta_params = learner.init(quadratic.PARAMS)
    if log_rates is not None:
        meta_params["log_rates"] = {"head": jnp.asarray(log_rates, jnp.float32)}
    return jax.jit(estimate)(meta_params, {"inner_learning_rate": rate}, EPISODE, KEY)


def adapted(num_steps=3):
    return quadratic.descend(quadratic.START, SUPPORT, [RATE] * num_steps)[-1]


def test_reverse_on_a_quadratic_has_its_closed_form():
    grads, metrics = run(reverse)
    outer = quadratic.gradient(adapted(), QUERY)
    expected = quadratic.contraction(SUPPORT, RATE, 3).T @ outer
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], quadratic.value(adapted(), QUERY), rtol=1e-5)
    path = quadratic.descend(quadratic.START, SUPPORT, [RATE] * 2)
    inner_losses = [quadratic.value(w, SUPPORT) for w in path]
    np.testing.assert_allclose(metrics["inner_losses"], inner_losses, rtol=1e-5)


def test_the_mean_query_loss_is_that_of_every_number_of_steps():
    inner = InnerLoop(num_steps=3, query_loss="mean")
    estimate = reverse(maml(), quadratic.loss, inner)
    grads, metrics = estimate(maml().init(quadratic.PARAMS), HPARAMS, EPISODE, KEY)
    each = [run(reverse, num_steps=k) for k in (1, 2, 3)]
    expected = np.mean([found["params"]["head"] for found, _ in each], axis=0)
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], each[-1][1]["loss"], rtol=1e-5)


def test_annealed_weights_are_data_and_go_from_the_mean_to_the_last():
    traces, counts = [], []

    def loss(params, batch):
        traces.append(None)
        return quadratic.loss(params, batch)

    estimate = jax.jit(reverse(maml(), loss, InnerLoop(num_steps=3, query_loss="annealed")))
    start = maml().init(quadratic.PARAMS)
    each = [run(reverse, num_steps=k)[0]["params"]["head"] for k in (1, 2, 3)]
    for annealing, weights in [(0.0, [1 / 3] * 3), (0.25, [0.25, 0.25, 0.5]), (1.0, [0, 0, 1])]:
        np.testing.assert_allclose(query_weights(3, annealing), weights, rtol=1e-6)
        hparams = HPARAMS | {"query_annealing": jnp.float32(annealing)}
        grads, metrics = estimate(start, hparams, EPISODE, KEY)
        expected = np.tensordot(weights, each, 1)
        np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], quadratic.value(adapted(), QUERY), rtol=1e-5)
        counts.append(len(traces))
    assert counts[0] == counts[-1]
    with pytest.raises(UserError, match="'first'"):
        InnerLoop(query_loss="first")  # type: ignore[arg-type]


def test_first_order_on_a_quadratic_is_the_gradient_where_the_loop_ends():
    grads, metrics = run(first_order)
    outer = quadratic.gradient(adapted(), QUERY)
    np.testing.assert_allclose(grads["params"]["head"], outer, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], quadratic.value(adapted(), QUERY), rtol=1e-5)


def test_first_order_equals_reverse_at_zero_rate_and_no_other():
    for rate, equal in [(0.0, True), (RATE, False)]:
        first, full = (run(estimator, rate=rate)[0] for estimator in (first_order, reverse))
        assert np.allclose(first["params"]["head"], full["params"]["head"], rtol=1e-6) == equal


def test_first_order_is_exact_for_the_rates_of_the_last_step():
    rates = np.log([[0.5, 1.0, 2.0], [1.5, 0.7, 1.0]])
    learner = meta_sgd(num_steps=2)
    first, full = (
        run(estimator, learner, num_steps=2, log_rates=rates)[0]["log_rates"]["head"]
        for estimator in (first_order, reverse)
    )
    np.testing.assert_allclose(first[1], full[1], rtol=1e-4)
    assert not np.allclose(first[0], full[0], rtol=0.01)
    first, full = (
        run(estimator, meta_sgd(), num_steps=1, log_rates=rates[0])[0]["log_rates"]["head"]
        for estimator in (first_order, reverse)
    )
    step = -RATE * np.exp(rates[0]) * quadratic.gradient(quadratic.START, SUPPORT)
    expected = step * quadratic.gradient(quadratic.START + step, QUERY)
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    np.testing.assert_allclose(full, expected, rtol=1e-4)


def union(part=slice(None)):
    return Batch(*(np.concatenate(pair)[part] for pair in zip(SUPPORT, QUERY, strict=True)))


def test_reptile_is_the_mean_inner_gradient_over_support_and_query():
    grads, metrics = run(reptile, num_steps=4)
    path = quadratic.descend(quadratic.START, union(), [RATE] * 4)
    expected = np.mean([quadratic.gradient(w, union()) for w in path[:-1]], axis=0)
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], quadratic.value(path[-1], QUERY), rtol=1e-4)

    grads, _ = run(reptile, num_steps=2, batching="split")  # 8 + 6 examples, 7 a step
    w = quadratic.START - RATE * quadratic.gradient(quadratic.START, union(slice(0, 7)))
    w = w - RATE * quadratic.gradient(w, union(slice(7, 14)))
    expected = (quadratic.START - w) / (2 * RATE)
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)


@pytest.mark.parametrize("estimator", [joint, functools.partial(run, reptile, num_steps=1)])
def test_joint_and_one_step_of_reptile_are_the_gradient_on_the_union(estimator):
    grads, metrics = run(joint) if estimator is joint else estimator()
    expected = quadratic.gradient(quadratic.START, union())
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    if estimator is joint:
        loss = quadratic.value(quadratic.START, union())
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert metrics["inner_losses"].shape == (0,)


@pytest.mark.parametrize("estimator", [joint, reptile])
@pytest.mark.parametrize("learner", [meta_sgd(), per_layer_per_step(num_steps=2)])
def test_estimators_of_the_initialisation_refuse_learned_rates(estimator, learner):
    with pytest.raises(UserError, match="log_rates"):
        estimator(learner, quadratic.loss, InnerLoop())
