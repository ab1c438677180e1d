from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import learners, models
from metaopt.diagnostics.finite_differences import directional_derivative
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients import streaming
from metaopt.streams.dynamic_evaluation import (
    cut_segments,
    decay_towards,
    mean_squared_gradients,
    rms_with_prior,
    segment_loss,
    sgd_with_prior,
    walk,
)
from metaopt.types import Batch, Episode, Model

QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time
START = {"w": np.array([1.0, -2.0], np.float32)}
POINTS: Any = np.array([[3.0, 0.5], [-1.0, 2.0], [0.0, 4.0], [2.0, 2.0]], np.float32)
STREAM = Batch(POINTS, POINTS)
RATE, DECAY = 0.3, 0.05


def half_square(params, batch):
    """``½ |w - x|²``, whose gradient is ``w - x``."""
    return 0.5 * jnp.sum((params["w"] - batch.inputs[0]) ** 2)


def by_hand(step, points=POINTS):
    """Losses and last parameters of ``w <- step(w, gradient)``, each segment scored first."""
    w, found = START["w"].astype(np.float64), []
    for x in points:
        found.append(0.5 * np.sum((w - x) ** 2))
        w = step(w, w - x)
    return np.array(found), w


def test_every_token_after_the_context_is_predicted_once():
    segments = cut_segments(np.arange(100, 112, dtype=np.uint8), 3, 2)
    np.testing.assert_array_equal(segments.targets, 103 + np.arange(9).reshape(3, 3))
    np.testing.assert_array_equal(segments.inputs[1], [103, 104, 105, 106, 107])
    np.testing.assert_array_equal(segments.inputs[:, 1:][:, -2:], segments.targets[:, :2])
    assert segments.inputs.dtype == segments.targets.dtype == np.int32
    assert len(cut_segments(np.arange(6), 3, 2).targets) == 1


@pytest.mark.parametrize(
    ("size", "length", "context", "message"),
    [(5, 3, 2, "holds no segment"), (9, 0, 1, "length is 0"), (9, 2, -1, "context is -1")],
)
def test_streams_that_cannot_be_cut(size, length, context, message):
    with pytest.raises(UserError, match=message):
        cut_segments(np.arange(size), length, context)


def test_context_is_read_and_not_scored():
    weights = np.array([0.3, -1.0, 2.0, 0.1, 0.7], np.float32)

    def apply(params, inputs):  # sees all tokens so far
        return jnp.cumsum(jax.nn.one_hot(inputs, 5), axis=1) * params

    tokens: Any = np.array([[0, 3, 2, 2, 4, 1, 0], [1, 1, 0, 4, 3, 3, 2]])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    counts = np.cumsum(np.eye(5)[inputs], axis=1) * weights
    logs = counts - np.log(np.exp(counts).sum(-1, keepdims=True))
    picked = np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    loss = jax.jit(segment_loss(Model(lambda key: key, apply)))
    for length in (3, 6):  # with context, and without
        found = loss(weights.reshape(1, 1, 5), Batch(inputs, targets[:, -length:]))
        np.testing.assert_allclose(found, -picked[:, -length:].mean(), rtol=1e-6)


def test_sgd_with_a_prior_has_its_closed_form():
    optimizer = sgd_with_prior(START, RATE, DECAY)
    found = walk(half_square, optimizer, START, STREAM)
    expected, last = by_hand(lambda w, g: w - RATE * g + DECAY * (START["w"] - w))
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    np.testing.assert_allclose(found.params["w"], last, rtol=1e-5)
    constant: Any = np.repeat(POINTS[:1], 6, axis=0)
    found = walk(half_square, optimizer, START, Batch(constant, constant))
    fixed = (RATE * POINTS[0] + DECAY * START["w"]) / (RATE + DECAY)
    left = (1 - RATE - DECAY) ** 6 * (START["w"] - fixed)
    np.testing.assert_allclose(found.params["w"], fixed + left, rtol=1e-5)


def test_no_rate_and_no_decay_is_static_evaluation():
    found = walk(half_square, sgd_with_prior(START, 0.0), START, STREAM)
    np.testing.assert_array_equal(found.params["w"], START["w"])
    np.testing.assert_allclose(found.losses, by_hand(lambda w, g: w)[0], rtol=1e-6)


def test_rms_rule_has_its_closed_form():
    squares = {"w": np.array([0.04, 4.0], np.float32)}
    roots, mean = np.array([0.2, 2.0]), 1.1
    decay = 0.6  # clipped at 1 for the second parameter: 0.6 * 2 / 1.1 > 1
    found = walk(half_square, rms_with_prior(START, RATE, decay, squares, 0.1), START, STREAM)

    def step(w, g):
        pull = np.minimum(decay * roots / mean, 1) * (START["w"] - w)
        return w - RATE * g / (roots + 0.1 * mean) + pull

    expected, last = by_hand(step)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    np.testing.assert_allclose(found.params["w"], last, rtol=1e-5)


def test_full_decay_begins_every_step_at_the_anchor():
    optimizer = optax.chain(optax.sgd(RATE), decay_towards(START, 1.0))
    found = walk(half_square, optimizer, START, STREAM)
    moved = by_hand(lambda w, g: START["w"] - RATE * g)
    np.testing.assert_allclose(found.params["w"], moved[1], rtol=1e-5)
    np.testing.assert_allclose(found.losses, moved[0], rtol=1e-5)


def test_mean_squared_gradients_are_of_single_segments():
    found = mean_squared_gradients(half_square, START, STREAM)
    np.testing.assert_allclose(found["w"], ((START["w"] - POINTS) ** 2).mean(0), rtol=1e-6)


def test_a_segment_is_scored_before_it_is_learned_from():
    changed = Batch(STREAM.inputs.copy(), STREAM.targets)
    changed.inputs[2] += 1
    before = walk(half_square, sgd_with_prior(START, RATE), START, STREAM).losses
    after = walk(half_square, sgd_with_prior(START, RATE), START, changed).losses
    np.testing.assert_array_equal(before[:2], after[:2])
    assert (before[2:] != after[2:]).all()


def test_a_walk_is_gone_on_with():
    optimizer = optax.chain(optax.sgd(RATE, momentum=0.9), decay_towards(START, DECAY))
    first, second = (jax.tree.map(lambda x, s=s: x[s], STREAM) for s in (slice(3), slice(3, 4)))
    whole = walk(half_square, optimizer, START, STREAM)
    half = walk(half_square, optimizer, START, first)
    rest = walk(half_square, optimizer, half.params, second, opt_state=half.opt_state)
    np.testing.assert_allclose(jnp.append(half.losses, rest.losses), whole.losses, rtol=1e-6)
    np.testing.assert_allclose(rest.params["w"], whole.params["w"], rtol=1e-6)


def text_episode():
    tokens = np.asarray(jax.random.randint(jax.random.key(3), (19,), 0, 4))
    segments = cut_segments(tokens, 4, 2)
    support, query = (jax.tree.map(lambda x, s=s: x[s], segments) for s in (slice(2), slice(2, 4)))
    return Episode(support, query, jnp.int32(0)), segments


def test_meta_gradient_is_that_of_the_score_of_a_walk():
    with jax.enable_x64(True):
        model = models.bigram(4)
        loss = segment_loss(model)
        episode, segments = text_episode()
        draw = optax.tree.random_like(jax.random.key(0), model.init(jax.random.key(1)))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), draw)
        estimate = streaming(learners.maml(), loss, InnerLoop(unroll=False))
        hparams = {"inner_learning_rate": jnp.float64(0.7)}
        grads, metrics = jax.jit(estimate, compiler_options=QUICKLY)(
            {"params": params}, hparams, episode, jax.random.key(0)
        )

        @jax.jit
        def score(params):
            return walk(loss, optax.sgd(0.7), params, segments).losses.mean()

        direction = optax.tree.random_like(jax.random.key(2), params)
        slope, error = directional_derivative(
            lambda h: score(jax.tree.map(lambda p, d: p + h * d, params, direction)),
            np.dtype("float64"),
        )
        along = sum(
            jnp.vdot(g, d)
            for g, d in zip(
                jax.tree.leaves(grads["params"]), jax.tree.leaves(direction), strict=True
            )
        )
        assert error < 1e-7 < abs(slope)
        np.testing.assert_allclose(along, slope, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], score(params), rtol=1e-9)
        assert metrics["inner_losses"].shape == (4,)


def test_without_a_rate_it_is_plain_training_on_the_segments():
    support, query = (Batch(x, x) for x in np.split(POINTS, 2))
    episode, key = Episode(support, query, jnp.int32(0)), jax.random.key(0)
    hparams = {"inner_learning_rate": jnp.float32(0.0)}
    estimate = jax.jit(streaming(learners.maml(), half_square, InnerLoop(unroll=False)))
    grads, metrics = estimate({"params": START}, hparams, episode, key)
    np.testing.assert_allclose(grads["params"]["w"], START["w"] - POINTS.mean(0), rtol=1e-6)
    static = by_hand(lambda w, g: w)[0]
    np.testing.assert_allclose(metrics["inner_losses"], static, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], static.mean(), rtol=1e-6)


@pytest.mark.parametrize("query_loss", ["mean", "annealed"])
def test_a_walk_has_no_query_to_weigh(query_loss):
    with pytest.raises(UserError, match="query_loss"):
        streaming(learners.maml(), half_square, InnerLoop(query_loss=query_loss))
