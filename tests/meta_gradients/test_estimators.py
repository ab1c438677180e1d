import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import anil, maml, meta_sgd, per_layer_per_step
from metaopt.losses import next_token, regression
from metaopt.meta_gradients import first_order, joint, reptile, reverse
from metaopt.models import TransformerConfig, mlp, recurrent, transformer
from metaopt.types import Batch, Episode

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


def tokens(num_support=2, num_query=3, length=5, vocab_size=4):
    rng = np.random.default_rng(0)

    def batch(size):
        sequences = rng.integers(0, vocab_size, (size, length + 1)).astype(np.int32)
        return Batch(sequences[:, :-1], sequences[:, 1:])

    return Episode(batch(num_support), batch(num_query), np.int32(0))


def columns():
    rng = np.random.default_rng(0)
    support, query = (Batch(rng.normal(size=(n, 2)), rng.normal(size=(n, 1))) for n in (4, 5))
    return Episode(support, query, np.int32(0))


MLP = mlp(2, 1, hidden=(3,), activation=jnp.tanh)
GRU = recurrent(4, 3, "gru")
TRANSFORMER = transformer(TransformerConfig(vocab_size=4, width=4, num_layers=1, num_heads=1))
CASES = {
    "maml, sgd, mlp": (MLP, maml()),
    "anil, adam, mlp": (MLP, anil(MLP, optax.adam)),
    "meta_sgd, adam, mlp": (MLP, meta_sgd(optax.adam)),
    "meta_sgd a step, adam, gru": (GRU, meta_sgd(optax.adam, num_steps=2)),
    "per_layer_per_step, sgd, transformer": (TRANSFORMER, per_layer_per_step(num_steps=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_reverse_equals_finite_differences(name):
    model, learner = CASES[name]
    is_mlp = model is MLP
    loss, episode = (regression, columns()) if is_mlp else (next_token, tokens())
    meta_params = jax.tree.map(np.float64, learner.init(jax.jit(model.init)(KEY)))
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        inner = InnerLoop(num_steps=2, unroll=is_mlp)
        quickly = {"xla_backend_optimization_level": 0}  # compiles in half the time
        estimate = jax.jit(reverse(learner, loss(model), inner), compiler_options=quickly)
        at = functools.partial(estimate, hparams=HPARAMS, episode=episode, key=KEY)
        noise, direction = (
            jax.tree.map(lambda p: rng.normal(size=p.shape), meta_params) for _ in range(2)
        )
        # Noise, so that no rate and no gradient is zero.
        start = jax.tree.map(lambda p, n: p + 0.3 * n, meta_params, noise)
        grads, _ = at(start)
        step = 1e-7  # under Adam the loss bends where a gradient passes through zero
        above, below = (
            at(jax.tree.map(lambda p, v, s=sign: p + s * step * v, start, direction))[1]["loss"]
            for sign in (1, -1)
        )
        expected = (above - below) / (2 * step)
        assert expected.dtype == jnp.float64 and abs(expected) > 1e-3
        found = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
