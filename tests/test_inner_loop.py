import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt, away_from_zero
from metaopt.types import Batch

SUPPORT = quadratic.episode().support
RATE = 0.3


def test_sgd_on_a_quadratic_has_its_closed_form():
    probe = lambda params, _: params["head"]  # noqa: E731
    adapted = adapt(
        quadratic.loss,
        optax.sgd(RATE),
        quadratic.PARAMS,
        SUPPORT,
        InnerLoop(num_steps=4),
        probe=probe,
    )
    least = quadratic.minimum(SUPPORT)
    path = np.stack(
        [
            least + quadratic.contraction(SUPPORT, RATE, k) @ (quadratic.START - least)
            for k in range(5)
        ]
    )
    np.testing.assert_allclose(adapted.params["head"], path[-1], rtol=1e-5)
    np.testing.assert_allclose(adapted.probes, path[:-1], rtol=1e-5)
    before = [quadratic.value(w, SUPPORT) for w in path[:-1]]
    np.testing.assert_allclose(adapted.losses, before, rtol=1e-5)


def test_split_takes_one_batch_a_step():
    config = InnerLoop(num_steps=2, batching="split")
    adapted = adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, SUPPORT, config)
    w, losses = quadratic.START, []
    for part in (slice(0, 4), slice(4, 8)):
        batch = Batch(SUPPORT.inputs[part], SUPPORT.targets[part])
        losses.append(quadratic.value(w, batch))
        w = w - RATE * quadratic.gradient(w, batch)
    np.testing.assert_allclose(adapted.params["head"], w, rtol=1e-5)
    np.testing.assert_allclose(adapted.losses, losses, rtol=1e-5)


def test_what_is_kept_changes_neither_values_nor_gradients():
    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch.inputs @ params["head"]) - batch.targets) ** 2)

    def outcome(**config):
        config = InnerLoop(num_steps=3, **config)

        def objective(params):
            adapted = adapt(loss, optax.adam(0.1), params, SUPPORT, config)
            return loss(adapted.params, SUPPORT), adapted

        return jax.jit(jax.grad(objective, has_aux=True))(quadratic.PARAMS)

    expected = outcome()
    for config in [
        {"remat": True},
        {"unroll": False},
        {"unroll": False, "remat": True},
        {"unroll": False, "remat": True, "save_gradients": True},
        {"kept_states": 2},
        {"kept_states": 2, "kept_on": "host"},
        {"kept_on": "host"},
    ]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            outcome(**config),
            expected,
        )


@pytest.mark.parametrize(
    "config",
    [
        {"save_gradients": True},
        {"save_gradients": True, "remat": True, "kept_states": 2},
        {"save_gradients": True, "remat": True, "kept_dtype": "bfloat16"},
        {"save_gradients": True, "remat": True, "kept_on": "host"},
        {"kept_states": 0},
    ],
)
def test_contradictory_loops_are_refused(config):
    with pytest.raises(UserError, match=r"save_gradients|kept_states"):
        InnerLoop(**config)


def rate_gradient(loss, **config):
    """Losses of Adam's steps, and the derivative of the last by the start and the rate."""

    def objective(params, rate):
        config_ = InnerLoop(num_steps=6, **config)
        adapted = adapt(loss, optax.adam(rate, eps_root=1e-8), params, SUPPORT, config_)
        return loss(adapted.params, SUPPORT), adapted.losses

    found, losses = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
        quadratic.PARAMS, jnp.float32(0.1)
    )
    return losses, np.append(found[0]["head"], found[1])


@pytest.mark.parametrize("kept", [None, 2])
def test_states_kept_in_bfloat16_change_the_derivative_a_little_and_no_step(kept):
    def loss(params, batch):  # not quadratic: the Hessian is that of where the step is taken
        return jnp.mean(jnp.log(jnp.cosh(batch.inputs @ params["head"] - batch.targets)))

    losses, exact = rate_gradient(loss, remat=True)
    rounded_losses, rounded = rate_gradient(loss, kept_states=kept, kept_dtype="bfloat16")
    np.testing.assert_allclose(rounded_losses, losses, rtol=1e-6)
    assert 1e-5 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2e-2


def test_a_thousand_planned_steps_have_the_derivative_of_the_closed_form():
    def end(params):
        inner = InnerLoop(num_steps=1024, kept_states=15)
        return adapt(quadratic.loss, optax.sgd(1e-3), params, SUPPORT, inner).params

    with jax.enable_x64(True):
        start = {"head": jnp.asarray(quadratic.START, jnp.float64)}
        jacobian = jax.jit(jax.jacrev(end))(start)["head"]["head"]
    expected = quadratic.contraction(SUPPORT, 1e-3, 1024)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)  # of the closed form


@pytest.mark.parametrize("config", [{"kept_states": 2}, {"kept_dtype": "bfloat16"}])
def test_a_planned_loop_may_take_no_step(config):
    config = InnerLoop(num_steps=3, **config)
    adapted = adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, SUPPORT, config, num_steps=0)
    np.testing.assert_array_equal(adapted.params["head"], quadratic.START)


@pytest.mark.parametrize("batching", ["same", "split"])
def test_a_run_can_be_gone_on_with(batching):
    def go(params, opt_state, support, num_steps):
        config = InnerLoop(num_steps=num_steps, batching=batching)
        return adapt(quadratic.loss, optax.adam(0.1), params, support, config, opt_state=opt_state)

    parts = [SUPPORT, SUPPORT]
    if batching == "split":
        parts = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], SUPPORT) for i in (0, 1)]
    whole = go(quadratic.PARAMS, None, SUPPORT, 4)
    first = go(quadratic.PARAMS, None, parts[0], 2)
    second = go(first.params, first.opt_state, parts[1], 2)
    np.testing.assert_allclose(second.params["head"], whole.params["head"], rtol=1e-6)
    losses = np.concatenate([first.losses, second.losses])
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-6)


def still_loss(params, batch):
    """Of its three parameters one slides, one is at its minimum, and one is not there at all."""
    slides, rests, _ = params["w"]
    return 0.5 * jnp.mean((batch.inputs * slides - batch.targets) ** 2) + rests**2


STILL = {"w": jnp.array([0.5, 0.0, 5.0])}
INNER_OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "amsgrad": optax.amsgrad,
    "adamax": optax.adamax,
    "adabelief": optax.adabelief,
    "yogi": optax.yogi,
    "rmsprop": optax.rmsprop,
    "rmsprop eps outside": lambda rate: optax.rmsprop(rate, eps_in_sqrt=False),
    "rmsprop centred": lambda rate: optax.rmsprop(rate, centered=True, momentum=0.9),
    "adagrad": lambda rate: optax.adagrad(rate, initial_accumulator_value=0.0),
    "adadelta": optax.adadelta,
    "lars": optax.lars,
}


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_meta_gradients_are_finite_at_zero_gradients(name):
    batch = Batch(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]))

    def objective(params, rate):
        optimizer = INNER_OPTIMIZERS[name](rate)
        adapted = adapt(still_loss, optimizer, params, batch, InnerLoop(num_steps=2))
        return still_loss(adapted.params, batch) + adapted.params["w"][2] ** 2

    grads, rate_grad = jax.jit(jax.grad(objective, argnums=(0, 1)))(STILL, 0.1)
    assert np.isfinite(grads["w"]).all() and np.isfinite(rate_grad)
    # What the support does not touch stays, and so does its derivative (but for LARS,
    # whose steps grow with the norm of the layer).
    np.testing.assert_allclose(grads["w"][2], 2 * 5.0, rtol=1e-3 if name == "lars" else 1e-4)


@pytest.mark.parametrize("guard", [lambda g: g, away_from_zero])
def test_adam_needs_the_guard(guard):
    def step(params):
        optimizer = optax.adam(0.1)
        grads = guard(jax.grad(lambda params: jnp.sum(params["w"] ** 2))(params))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)["w"].sum()

    grads = jax.grad(step)({"w": jnp.array([1.0, 0.0])})["w"]
    assert np.isfinite(grads).all() == (guard is away_from_zero)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_guard_leaves_ordinary_gradients_alone(dtype):
    values = np.array([1.0, -3e-15, 1e-12, -0.1, 3e38, np.inf, -np.inf, np.nan])
    grads = jnp.concatenate([jnp.asarray(values, dtype), jnp.arange(9, dtype=dtype)[1:] / 7])
    guarded = away_from_zero({"g": grads})["g"]
    assert guarded.dtype == grads.dtype
    assert np.asarray(guarded).tobytes() == np.asarray(grads).tobytes()


def test_the_guard_moves_small_gradients_outwards_by_a_constant():
    grads = jnp.array([0.0, -0.0, 1e-17, -1e-17, -1e-16])
    guarded, tangents = jax.jvp(away_from_zero, (grads,), (jnp.ones(5),))
    assert (np.abs(guarded) >= 1e-16).all() and (np.abs(guarded) < 3e-16).all()
    np.testing.assert_array_equal(np.sign(guarded), [1, 1, 1, -1, -1])
    np.testing.assert_array_equal(tangents, 1)


def test_at_a_stationary_point_the_derivative_is_that_of_the_closed_form():
    support = SUPPORT._replace(targets=jnp.zeros(8))
    start = {"head": jnp.zeros(3)}  # where the gradient is zero and its derivative is not

    def end(params):
        inner = InnerLoop(num_steps=3)
        return adapt(quadratic.loss, optax.sgd(RATE), params, support, inner).params

    jacobian = jax.jacobian(end)(start)["head"]["head"]
    np.testing.assert_allclose(jacobian, quadratic.contraction(support, RATE, 3), atol=1e-6)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="num_steps is 0"):
        InnerLoop(num_steps=0)
    with pytest.raises(UserError, match="'halves'"):
        InnerLoop(batching="halves")  # pyright: ignore[reportArgumentType]
    config = InnerLoop(num_steps=3, batching="split")
    with pytest.raises(UserError, match="8 support examples cannot be split into 3"):
        adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, SUPPORT, config)
    same = InnerLoop()
    with pytest.raises(UserError, match="num_steps is -1"):
        adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, SUPPORT, same, num_steps=-1)
    with pytest.raises(UserError, match="split into 0"):
        adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, SUPPORT, config, num_steps=0)
    with pytest.raises(UserError, match="no examples"):
        nothing = jax.tree.map(lambda x: x[:0], SUPPORT)
        adapt(quadratic.loss, optax.sgd(RATE), quadratic.PARAMS, nothing, InnerLoop())
    half = jax.tree.map(lambda x: x.astype(jnp.float16), quadratic.PARAMS)
    with pytest.raises(UserError, match="bfloat16"):
        adapt(quadratic.loss, optax.sgd(RATE), half, SUPPORT, InnerLoop())
