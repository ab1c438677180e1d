import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import losses, models
from metaopt.learners.training_run import adamw_from_values, sgd_from_values
from metaopt.streams.data_rater import (
    Rater,
    RaterConfig,
    auc,
    rated_loss,
    rated_training,
    transformer_rater,
)
from metaopt.types import Batch

VOCAB = 8
MODEL = models.bigram(VOCAB)
LOSS = losses.next_token(MODEL)
LINEAR = Rater(
    init=lambda key: {"w": jnp.zeros(VOCAB)},
    score=lambda params, inputs: jax.nn.one_hot(inputs, VOCAB).mean(axis=1) @ params["w"],
)


def counting(rng, shape):
    """Sequences in which every token is the one before and one more."""
    start = rng.integers(VOCAB, size=(*shape[:-1], 1))
    return jnp.asarray((start + np.arange(shape[-1] + 1)) % VOCAB, jnp.int32)


def batch_of(sequences):
    return Batch(sequences[..., :-1], sequences[..., 1:])


def test_equal_scores_give_the_plain_loss():
    batch = batch_of(counting(np.random.default_rng(0), (6, 9)))
    params = MODEL.init(jax.random.key(0))
    rated = rated_loss(LOSS, LINEAR, LINEAR.init(jax.random.key(0)))
    np.testing.assert_allclose(rated(params, batch), LOSS(params, batch), rtol=1e-6)


def test_weights_are_the_softmax_of_the_scores():
    batch = batch_of(jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(5, 10))))
    params = MODEL.init(jax.random.key(0))
    scores = {"w": jnp.arange(VOCAB) / 2.0}
    each = [
        LOSS(params, Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1])) for i in range(5)
    ]
    weights = jax.nn.softmax(LINEAR.score(scores, batch.inputs))
    found = rated_loss(LOSS, LINEAR, scores)(params, batch)
    np.testing.assert_allclose(found, weights @ jnp.stack(each), rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_the_gradient_of_the_rater_is_the_finite_difference(window):
    rng = np.random.default_rng(0)
    batches = batch_of(jnp.asarray(rng.integers(VOCAB, size=(window, 4, 7))))
    held_out = batch_of(counting(rng, (5, 6)))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), MODEL.init(jax.random.key(0)))
        at = {"w": jnp.asarray(rng.normal(size=VOCAB))}
        config = RaterConfig(window=window)
        training = rated_training(sgd_from_values, {"learning_rate": 0.5}, LOSS, LINEAR, config)
        state, metrics = training.step(training.init(params, at), batches, held_out)
        grads = 10 * optax.tree.get(state.opt_state, "mu")["w"]  # Adam's first moment: a tenth

        def after(w):
            walked = params
            for i in range(window):
                one = jax.tree.map(lambda x, i=i: x[i], batches)
                steps = jax.grad(rated_loss(LOSS, LINEAR, {"w": w}))(walked, one)
                walked = jax.tree.map(lambda p, g: p - 0.5 * g, walked, steps)
            return LOSS(walked, held_out)

        np.testing.assert_allclose(metrics["loss"], after(at["w"]), rtol=1e-9)
        for i in range(VOCAB):
            step = np.zeros(VOCAB)
            step[i] = 1e-5
            slope = (after(at["w"] + step) - after(at["w"] - step)) / 2e-5
            np.testing.assert_allclose(grads[i], slope, rtol=1e-5, atol=1e-9)


def test_a_rater_learns_what_is_noise_without_being_told():
    """Half of each batch is random tokens; held out are clean sequences alone."""
    rng = np.random.default_rng(0)
    rater = transformer_rater(VOCAB, RaterConfig(width=16))
    config = RaterConfig(width=16, window=2, meta_rate=1e-2)
    training = rated_training(adamw_from_values, {"learning_rate": 0.03}, LOSS, rater, config)
    keys = jax.random.split(jax.random.key(0))
    state = training.init(MODEL.init(keys[0]), rater.init(keys[1]))
    step = jax.jit(training.step)
    for _ in range(60):
        noise = jnp.asarray(rng.integers(VOCAB, size=(2, 8, 13)))
        mixed = jnp.concatenate([counting(rng, (2, 8, 12)), noise], axis=1)
        state, _ = step(state, batch_of(mixed), batch_of(counting(rng, (16, 12))))
    noise = jnp.asarray(rng.integers(VOCAB, size=(200, 12)))
    sequences = jnp.concatenate([counting(rng, (200, 12))[:, :-1], noise])
    scores = np.asarray(rater.score(state.rater, sequences))
    assert auc(scores, np.arange(400) < 200) > 0.95


def test_the_area_under_the_curve():
    is_good = np.array([True, True, False, False])
    assert auc(np.array([3.0, 2.0, 1.0, 0.0]), is_good) == 1
    assert auc(np.array([0.0, 1.0, 2.0, 3.0]), is_good) == 0
    assert auc(np.array([1.0, 1.0, 1.0, 1.0]), is_good) == 0.5
    assert auc(np.array([3.0, 1.0, 2.0, 0.0]), is_good) == 0.75
