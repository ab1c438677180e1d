from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners.training_run import (
    DOMAINS,
    DomainBatch,
    adamw_from_values,
    sgd_from_values,
    weighted_by_domain,
)
from metaopt.meta_gradients import truncated_windows
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.streams.online_hyperparameters import OnlineConfig, online
from metaopt.types import Batch, Episode

KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}
STEPS = 3
WINDOW = InnerLoop(num_steps=STEPS, batching="split")
START = {"learning_rate": 0.1, "momentum": 0.7, "weight_decay": 0.02}
NAMES = tuple(START)
jit = partial(jax.jit, compiler_options=QUICK)


def windows_of(num_windows, num_domains=1, size=8):
    """Batches ``[windows, W, S, ...]`` and a held-out batch."""
    rng = np.random.default_rng(0)
    shape = (num_windows, STEPS, size)
    inputs = rng.normal(size=(*shape, 3))
    domains = rng.integers(num_domains, size=shape)
    batches = jax.tree.map(jnp.asarray, DomainBatch(inputs, rng.normal(size=shape), domains))
    held_out = Batch(jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=6)))
    return batches, held_out


def meta_gradient(state):
    """Of the first update: Adam's first moment is a tenth of it."""
    return jax.tree.map(lambda mu: 10 * mu, optax.tree.get(state.meta_opt_state, "mu"))


def first(batches):
    return jax.tree.map(lambda x: x[0], batches)


@pytest.mark.parametrize(
    "optimizer, scope", [(sgd_from_values, "per_layer"), (adamw_from_values, "per_parameter")]
)
def test_every_meta_gradient_is_the_finite_difference(optimizer, scope):
    """Of the second window, so that the state carried into it counts."""
    start = (
        START
        if optimizer is sgd_from_values
        else {"learning_rate": 0.1, "b1": 0.8, "weight_decay": 0.02}
    )
    with jax.enable_x64(True):
        batches, held_out = windows_of(2, num_domains=2)
        config = OnlineConfig(
            learned=tuple(start), scope=scope, num_domains=2, window=WINDOW, every=2
        )
        training = online(optimizer, start, quadratic.loss, config)
        params = {"head": jnp.asarray(quadratic.START, jnp.float64)}
        step = jit(training.step)
        state, metrics = step(training.init(params), first(batches), held_out)
        assert metrics["meta_grad_norm"] == 0
        state = state._replace(logs=state.logs | {DOMAINS: jnp.array([0.3, -0.2])})
        second = jax.tree.map(lambda x: x[1], batches)
        grads = meta_gradient(step(state, second, held_out)[0])

        flat, unravel = jax.flatten_util.ravel_pytree(state.logs)

        def loss(flat):
            moved = state._replace(logs=unravel(flat))
            return step(moved, second, held_out)[1]["loss"]

        h = 1e-5
        found = [
            (loss(flat.at[i].add(h)) - loss(flat.at[i].add(-h))) / (2 * h) for i in range(len(flat))
        ]
        expected = jax.flatten_util.ravel_pytree(grads)[0]
        assert len(flat) == (5 if scope == "per_layer" else 7) and np.all(np.abs(expected) > 1e-6)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("query_loss, grad_fn", [("last", None), ("mean", forward_over_reverse)])
def test_it_is_the_estimator_truncated(query_loss, grad_fn):
    """The second window of a run of two, the first one's state and all."""
    batches, held_out = windows_of(2)
    batches = jax.tree.map(lambda x: x.astype(jnp.float32), Batch(*batches[:2]))
    held_out = jax.tree.map(lambda x: x.astype(jnp.float32), held_out)
    window = InnerLoop(num_steps=STEPS, batching="split", query_loss=query_loss)
    training = online(
        sgd_from_values,
        START,
        quadratic.loss,
        OnlineConfig(learned=NAMES, window=window, every=2),
        grad_fn=grad_fn or jax.value_and_grad,
    )
    state, step = training.init(quadratic.PARAMS), jit(training.step)
    for i in range(2):
        state, metrics = step(state, jax.tree.map(lambda x, i=i: x[i], batches), held_out)

    whole = InnerLoop(num_steps=2 * STEPS, batching="split", query_loss=query_loss)
    estimator = truncated_windows(training.learner, quadratic.loss, whole, window=STEPS)
    support = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), batches)
    episode = Episode(support, held_out, jnp.int32(0))
    meta_params = training.learner.init(quadratic.PARAMS)
    run, next_window = estimator.init(meta_params, {}, episode, KEY), jit(estimator.step)
    for _ in range(2):
        grads, expected, run = next_window(meta_params, {}, episode, run)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
    jax.tree.map(close, meta_gradient(state), {name: grads[name] for name in NAMES})
    jax.tree.map(close, state.run.params, run.params)
    close(metrics["loss"], expected["loss"])
    close(metrics["inner_losses"], expected["inner_losses"])
    assert state.run.step == 2 * STEPS


def test_weights_on_domains_are_a_softmax_over_the_batch():
    batch = DomainBatch(jnp.eye(3), jnp.array([2.0, 4.0, 6.0]), jnp.array([0, 1, 1]))
    params = {"head": jnp.zeros(3)}  # losses of 2, 8 and 18
    for logits, expected in (([0.7, 0.7], 28 / 3), ([np.log(2.0), 0.0], (2 * 2 + 8 + 18) / 4)):
        loss = weighted_by_domain(quadratic.loss, jnp.array(logits))
        np.testing.assert_allclose(loss(params, batch), expected, rtol=1e-6)


def regression(key, num_domains, noisy, size=16):
    """Domains of one linear task; the targets of the last one are noise."""
    keys = jax.random.split(key, 3)
    inputs = jax.random.normal(keys[0], (STEPS + 1, size, 3))
    domains = jax.random.randint(keys[1], (STEPS + 1, size), 0, num_domains)
    targets = inputs @ jnp.array([1.0, -2.0, 0.5])
    noise = 3 * jax.random.normal(keys[2], targets.shape)
    targets = jnp.where(noisy & (domains == num_domains - 1), noise, targets)
    batches = DomainBatch(inputs[:-1], targets[:-1], domains[:-1])
    held_out = Batch(inputs[-1], inputs[-1] @ jnp.array([1.0, -2.0, 0.5]))
    return batches, held_out


def train(training, params, num_windows, **of_data):
    def step(state, key):
        return training.step(state, *regression(key, **of_data))

    keys = jax.random.split(KEY, num_windows)
    return jit(lambda state: jax.lax.scan(step, state, keys))(training.init(params))


@pytest.mark.parametrize("noisy", [True, False])
def test_a_domain_of_noise_loses_its_weight(noisy):
    config = OnlineConfig(learned=(), num_domains=3, window=WINDOW)
    training = online(
        sgd_from_values,
        {"learning_rate": 0.1},
        quadratic.loss,
        config,
    )
    state, metrics = train(
        training, {"head": jnp.zeros(3)}, 150, num_domains=3, noisy=jnp.bool_(noisy)
    )
    weights = training.values(state)["domain_weights"]
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    if noisy:
        assert weights[2] < 0.1 * weights[:2].min()
        assert metrics["loss"][-10:].mean() < 0.02
    else:
        assert weights[2] > 0.3 * weights[:2].max()


@pytest.mark.parametrize("rate", [0.1 / 30, 0.5])
def test_a_wrong_rate_and_decay_are_found_out(rate):
    start = {"learning_rate": rate, "weight_decay": 1.0}
    config = OnlineConfig(learned=tuple(start), window=WINDOW, meta_rate=0.1)
    training = online(sgd_from_values, start, quadratic.loss, config)
    params = {"head": jnp.zeros(3)}
    state, metrics = train(training, params, 150, num_domains=1, noisy=jnp.bool_(False))
    values = training.values(state)
    assert 0.05 < values["learning_rate"] < 1.0 and values["weight_decay"] < 0.05
    assert metrics["loss"][-10:].mean() < 0.01


def test_caps_hold_and_what_is_not_finite_teaches_nothing():
    config = OnlineConfig(window=WINDOW, meta_rate=5.0, max_step_factor=1.5, max_factor=2.0)
    training = online(sgd_from_values, {"learning_rate": 1e-3}, quadratic.loss, config)
    batches, held_out = regression(KEY, 1, jnp.bool_(False))
    state, step = training.init(quadratic.PARAMS), jax.jit(training.step, donate_argnums=0)
    rates = []
    for _ in range(3):
        state, _ = step(state, batches, held_out)
        rates.append(float(training.values(state)["learning_rate"]) / 1e-3)
    np.testing.assert_allclose(rates, [1.5, 2.0, 2.0], rtol=1e-5)
    before = jax.tree.map(np.array, (state.logs, state.meta_opt_state))
    bad = jax.tree.map(lambda x: x * jnp.nan, held_out)
    state, metrics = step(state, batches, bad)
    assert not np.isfinite(metrics["meta_grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, (state.logs, state.meta_opt_state), before)
    assert step._cache_size() == 1 and np.all(np.isfinite(state.run.params["head"]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"learned": ()}, "nothing is learned"),
        ({"scope": "each"}, "scope is 'each'"),
        ({"num_domains": 1}, "single domain"),
        ({"every": 0}, "every is 0"),
        ({"meta_rate": -1.0}, "meta_rate is -1.0"),
        ({"max_step_factor": 0.5}, "max_step_factor is 0.5"),
        ({"window": InnerLoop(num_steps=2)}, "batching='split'"),
    ],
)
def test_configs_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        OnlineConfig(**options)


def test_what_is_given_is_checked():
    with pytest.raises(UserError, match="no value for momentum"):
        online(
            sgd_from_values,
            {"learning_rate": 1.0},
            quadratic.loss,
            OnlineConfig(learned=("momentum",)),
        )
    with pytest.raises(UserError, match=r"momentum starts at 1.0.*between 0 and 1"):
        start = {"learning_rate": 1.0, "momentum": 1.0}
        online(sgd_from_values, start, quadratic.loss, OnlineConfig(learned=("momentum",)))
    training = online(sgd_from_values, START, quadratic.loss, OnlineConfig())
    batches, held_out = regression(KEY, 1, jnp.bool_(False))
    with pytest.raises(UserError, match=r"window of 10 steps takes as many.*not \[3\]"):
        training.step(training.init(quadratic.PARAMS), batches, held_out)
