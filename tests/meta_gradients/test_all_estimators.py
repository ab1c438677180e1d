"""Every estimator against finite differences and reverse mode, in float64, on every kind of model.

Reverse and mixed mode meet every model and inner optimiser. The others, whose mathematics is
tested on a quadratic, meet every model once and both optimisers.
"""

import dataclasses
import functools
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.inner_loop import InnerLoop
from metaopt.learners import anil, maml, meta_sgd, per_layer_per_step
from metaopt.losses import next_token, regression
from metaopt.meta_gradients import (
    evolution,
    first_order,
    implicit,
    mixed_mode,
    proximal,
    reverse,
    truncated,
)
from metaopt.models import TransformerConfig, mlp, recurrent, transformer
from metaopt.types import Batch, Episode, Learner, LossFn, Model

KEY = jax.random.key(0)
RATE, STEPS = 0.1, 2
INNER = InnerLoop(num_steps=STEPS)
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def columns():
    rng = np.random.default_rng(0)
    support, query = (Batch(rng.normal(size=(n, 2)), rng.normal(size=(n, 1))) for n in (4, 5))
    return Episode(support, query, np.int32(0))


def tokens():
    rng = np.random.default_rng(0)
    sequences = (rng.integers(0, 4, (n, 6)).astype(np.int32) for n in (2, 3))
    support, query = (Batch(rows[:, :-1], rows[:, 1:]) for rows in sequences)
    return Episode(support, query, np.int32(0))


MLP = mlp(2, 1, hidden=(3,), activation=jnp.tanh)
RNN = recurrent(4, 3, "rnn")
TRANSFORMER = transformer(TransformerConfig(vocab_size=4, width=4, num_layers=1, num_heads=1))
# Adam of a large eps, for what must be smooth: else it bends where a gradient changes sign.
SMOOTH_ADAM = partial(optax.adam, b1=0.5, eps=1.0)


class Case(NamedTuple):
    model: Model
    learner: Learner

    def loss(self) -> LossFn:
        return (regression if self.model is MLP else next_token)(self.model)

    def episode(self) -> Episode:
        return columns() if self.model is MLP else tokens()

    def start(self):
        """Meta-parameters at which no rate and no gradient is zero, and a direction; float64."""
        rng = np.random.default_rng(1)
        meta_params = jax.tree.map(np.float64, self.learner.init(quick_jit(self.model.init)(KEY)))
        moved = jax.tree.map(lambda m: m + 0.3 * rng.normal(size=m.shape), meta_params)
        return moved, jax.tree.map(lambda m: rng.normal(size=m.shape), meta_params)

    def estimator(self, estimator, inner=INNER, **options):
        """A compiled ``(meta_params, rate=RATE, key=KEY) -> (gradient, metrics)``."""
        estimate = estimator(self.learner, self.loss(), inner, **options)

        def run(meta_params, rate, key):
            return estimate(meta_params, {"inner_learning_rate": rate}, self.episode(), key)

        run = quick_jit(run)
        return lambda meta_params, rate=RATE, key=KEY: run(meta_params, rate, key)


CASES = {
    "mlp, sgd": Case(MLP, maml()),
    "mlp, adam": Case(MLP, anil(MLP, optax.adam)),
    "rnn, sgd": Case(RNN, meta_sgd()),
    "rnn, adam": Case(RNN, meta_sgd(optax.adam, num_steps=STEPS)),
    "transformer, sgd": Case(TRANSFORMER, per_layer_per_step(num_steps=STEPS)),
    "transformer, adam": Case(TRANSFORMER, meta_sgd(optax.adam)),
}


@functools.cache
def reference(name):
    """Reverse mode: compiled, and its gradient at the start of the case."""
    run = CASES[name].estimator(reverse)
    return run, run(CASES[name].start()[0])


assert_close = partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-12)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", CASES)
def test_reverse_equals_finite_differences_and_mixed_mode(name):
    with jax.enable_x64(True):
        meta_params, direction = CASES[name].start()
        run, expected = reference(name)
        step = 1e-7  # under Adam the loss bends where a gradient passes through zero
        above, below = (
            run(jax.tree.map(lambda m, v, s=sign: m + s * step * v, meta_params, direction))
            for sign in (1, -1)
        )
        slope = (above[1]["loss"] - below[1]["loss"]) / (2 * step)
        assert slope.dtype == jnp.float64 and abs(slope) > 1e-3
        np.testing.assert_allclose(flat(expected[0]) @ flat(direction), slope, rtol=1e-5)
        assert_close(CASES[name].estimator(mixed_mode)(meta_params), expected)


@pytest.mark.parametrize("name", ["mlp, adam", "rnn, sgd", "transformer, sgd"])
def test_first_order_is_reverse_at_zero_rate_and_no_other(name):
    with jax.enable_x64(True):
        meta_params, _ = CASES[name].start()
        run, expected = reference(name)
        first = CASES[name].estimator(first_order)
        assert_close(first(meta_params, 0.0), run(meta_params, 0.0))
        assert not np.allclose(flat(first(meta_params)[0]), flat(expected[0]), rtol=1e-3)


def test_one_window_is_reverse(name="rnn, adam"):
    with jax.enable_x64(True):
        meta_params, _ = CASES[name].start()
        assert_close(CASES[name].estimator(truncated)(meta_params), reference(name)[1])


@pytest.mark.parametrize(
    "case",
    [
        Case(MLP, meta_sgd(optax.adam, num_steps=STEPS)),
        Case(TRANSFORMER, per_layer_per_step(num_steps=STEPS)),
    ],
    ids=["mlp, adam", "transformer, sgd"],
)
def test_windows_are_the_hand_written_sum(case):
    loss, episode = case.loss(), case.episode()

    @quick_jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def step_by_hand(meta_params, params, opt_state):
        """The query loss one step on."""
        inner_opt = case.learner.inner_opt(meta_params, {"inner_learning_rate": RATE})
        grads = jax.grad(loss)(params, episode.support)
        updates, opt_state = inner_opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return loss(params, episode.query), (params, opt_state)

    with jax.enable_x64(True):
        meta_params, _ = case.start()
        params = meta_params["params"]
        opt_state = case.learner.inner_opt(meta_params, {"inner_learning_rate": RATE}).init(params)
        expected = jax.tree.map(np.zeros_like, meta_params)
        for k in range(STEPS):
            (of_meta, of_start), (params, opt_state) = step_by_hand(meta_params, params, opt_state)
            if k == 0:  # later windows do not see the start
                of_meta = {**of_meta, "params": of_start}
            expected = jax.tree.map(lambda total, g: total + g / STEPS, expected, of_meta)
        scanned = InnerLoop(num_steps=STEPS, unroll=False)
        found, _ = case.estimator(truncated, scanned, window=1)(meta_params)
        assert_close(found, expected)


@pytest.mark.parametrize(
    "case",
    [Case(MLP, maml(SMOOTH_ADAM)), Case(RNN, maml()), Case(TRANSFORMER, maml())],
    ids=["mlp, adam", "rnn, sgd", "transformer, sgd"],
)
def test_implicit_is_reverse_where_the_inner_loop_converges(case):
    strength = 10.0
    inner = InnerLoop(num_steps=100, unroll=False)
    with jax.enable_x64(True):
        meta_params, _ = case.start()
        through = case._replace(learner=proximal(case.learner, strength))
        expected, _ = through.estimator(reverse, inner)(meta_params)
        options = {"regularization": strength, "num_solver_steps": 20}
        found, metrics = case.estimator(implicit, inner, **options)(meta_params)
        assert metrics["residual"] < 1e-9
        assert_close(found, expected, rtol=1e-6, atol=1e-9)


def over_keys(*arguments, **options):
    return jax.vmap(evolution(*arguments, **options), (None, None, None, 0))


@pytest.mark.parametrize("name", ["mlp, adam, windows", "rnn, sgd", "transformer, sgd"])
def test_the_mean_of_evolution_is_the_gradient_of_reverse(name):
    num_keys = 200
    inner, options = InnerLoop(num_steps=STEPS, unroll=False), {"num_pairs": 8, "sigma": 1e-3}
    with jax.enable_x64(True):
        if name in CASES:
            case, (_, (exact, _)) = CASES[name], reference(name)
        else:
            # The mean over windows of one step is the mean over steps.
            inner, options["window"] = dataclasses.replace(inner, query_loss="mean"), 1
            case = Case(MLP, meta_sgd(SMOOTH_ADAM, num_steps=STEPS))
            exact, _ = case.estimator(reverse, inner)(case.start()[0])
        meta_params, expected = case.start()[0], flat(exact)
        keys = jax.random.split(KEY, num_keys)
        grads, _ = case.estimator(over_keys, inner, **options)(meta_params, key=keys)
        draws = np.concatenate([g.reshape(num_keys, -1) for g in jax.tree.leaves(grads)], axis=1)
        errors = (draws.mean(0) - expected) / (draws.std(0) / np.sqrt(num_keys))
        assert np.abs(errors).max() < 5
        # On the whole it is right in sign and scale, to a few hundredths.
        np.testing.assert_allclose((draws @ expected).mean(), expected @ expected, rtol=0.15)
