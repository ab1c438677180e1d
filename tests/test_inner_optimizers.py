import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from metaopt import learners, meta_gradients
from metaopt.finite_differences import directional_derivative, normal_like
from metaopt.inner_loop import InnerLoop, adapt, away_from_zero
from metaopt.inner_optimizers import INNER_OPTIMIZERS, restore_zeros
from metaopt.types import Batch, Episode

RATE = 0.05
INNER = InnerLoop(num_steps=3)
QUICK = {"xla_backend_optimization_level": 0}
FIRST_STEPS = {  # of a gradient g, for parameters θ
    "sgd": lambda g, w: RATE * g,
    "momentum": lambda g, w: RATE * g,
    "nesterov": lambda g, w: RATE * 1.9 * g,
    "adagrad": lambda g, w: RATE * g / np.sqrt(g**2 + 1e-4 + 1e-7),
    "rmsprop": lambda g, w: RATE * g / np.sqrt(0.1 * g**2 + 1e-8),
    "adam": lambda g, w: RATE * g / (np.sqrt(g**2 + 1e-8) + 1e-8),
    "lars": lambda g, w: RATE * g * np.linalg.norm(w) / (np.linalg.norm(g) + 1e-6),
    "lamb": lambda g, w: RATE * np.sign(g) * np.linalg.norm(w) / np.sqrt(len(g)),
    "lion": lambda g, w: RATE * np.sign(g),
}


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_first_step_has_its_closed_form(name):
    support = quadratic.episode().support
    adapted = adapt(
        quadratic.loss,
        INNER_OPTIMIZERS[name](RATE),
        quadratic.PARAMS,
        support,
        InnerLoop(num_steps=1),
    )
    gradient = quadratic.gradient(quadratic.START, support)
    expected = quadratic.START - FIRST_STEPS[name](gradient, quadratic.START)
    np.testing.assert_allclose(adapted.params["head"], expected, rtol=2e-5)


def partly_still_loss(params, batch):
    """Of ``w`` one entry slides, one rests and one is not there; ``absent`` is not there at all."""
    slides, rests, _ = params["w"]
    return 0.5 * jnp.mean((batch.inputs * slides - batch.targets) ** 2) + rests**2


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_what_the_support_does_not_touch_stays_and_its_derivative_is_one(name):
    batch = Batch(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]))
    start = {"w": jnp.array([0.5, 0.0, 5.0]), "absent": jnp.array([1.0, -2.0])}

    def end(params):
        optimizer = INNER_OPTIMIZERS[name](RATE)
        return adapt(partly_still_loss, optimizer, params, batch, INNER).params

    def objective(params):
        adapted = end(params)
        return partly_still_loss(adapted, batch) + adapted["w"][2] ** 2 + adapted["absent"].sum()

    adapted, grads = jax.jit(lambda p: (end(p), jax.grad(objective)(p)), compiler_options=QUICK)(
        start
    )
    assert abs(adapted["w"][0] - 0.5) > 0.01
    np.testing.assert_allclose(adapted["w"][1:], [0.0, 5.0], atol=1e-6)
    np.testing.assert_allclose(adapted["absent"], [1.0, -2.0], atol=1e-9)
    assert np.isfinite(grads["w"]).all()
    np.testing.assert_allclose(grads["absent"], 1.0, rtol=1e-6)
    if name not in ("lars", "lamb"):  # whose steps grow with the norm of the array
        np.testing.assert_allclose(grads["w"][2], 2 * 5.0, rtol=1e-6)


def meta_gradient(name, estimator, episode):
    learner = learners.maml(INNER_OPTIMIZERS[name])
    estimate = estimator(learner, quadratic.loss, INNER)
    start = {"params": {"head": jnp.asarray(quadratic.START, episode.support.inputs.dtype)}}
    hparams = {"inner_learning_rate": RATE}
    grads, _ = jax.jit(estimate, compiler_options=QUICK)(start, hparams, episode, jax.random.key(0))
    return start, grads


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_meta_gradients_agree_with_finite_differences(name):
    with jax.enable_x64(True):
        episode: Episode = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else x.dtype),
            quadratic.episode(),
        )
        start, grads = meta_gradient(name, meta_gradients.reverse, episode)
        direction = normal_like(jax.random.key(1), start)

        @jax.jit
        def objective(step):
            params = jax.tree.map(lambda p, v: p + step * v, start, direction)["params"]
            optimizer = INNER_OPTIMIZERS[name](RATE)
            adapted = adapt(quadratic.loss, optimizer, params, episode.support, INNER)
            return quadratic.loss(adapted.params, episode.query)

        slope, uncertainty = directional_derivative(objective, np.dtype("float64"))
        product = float(jnp.vdot(grads["params"]["head"], direction["params"]["head"]))
    assert abs(slope) > 0.01 and uncertainty < 1e-6
    np.testing.assert_allclose(product, slope, rtol=1e-6)


@pytest.mark.parametrize(("name", "same"), [("lion", True), ("adam", False)])
def test_through_lion_and_no_other_maml_is_first_order_maml(name, same):
    episode = quadratic.episode()
    _, full = meta_gradient(name, meta_gradients.reverse, episode)
    _, first = meta_gradient(name, meta_gradients.first_order, episode)
    difference = np.abs(full["params"]["head"] - first["params"]["head"]).max()
    assert (difference < 1e-6) == same


def test_zeros_are_restored_and_their_derivative_goes_through():
    optimizer = restore_zeros()

    def restored(grads):
        return optimizer.update(away_from_zero(grads), optimizer.init(grads))[0]

    grads = np.array([0.0, -0.0, 1e-17, 1e-14, -0.3], np.float32)
    found, tangents = jax.jvp(restored, (jnp.asarray(grads),), (jnp.ones(5),))
    np.testing.assert_array_equal(found, [0, 0, 0, *grads[3:]])
    np.testing.assert_array_equal(tangents, 1)
