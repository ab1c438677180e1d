import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic
from optax import contrib

from metaopt import learners, meta_gradients
from metaopt.diagnostics.finite_differences import directional_derivative
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.optimizers.inner import INNER_OPTIMIZERS
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
        direction = optax.tree.random_like(jax.random.key(1), start)

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


def rated(module, *names):
    return {name: functools.partial(getattr(module, name), RATE) for name in names}


# All that optax has, but for Sophia and SAM, which are called in ways of their own.
OPTAX = {
    **rated(optax, "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw"),
    **rated(optax, "adamw", "adan", "amsgrad", "fromage", "lamb", "lars", "lion"),
    **rated(optax, "novograd", "optimistic_adam_v2", "optimistic_gradient_descent", "polyak_sgd"),
    **rated(optax, "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi"),
    **rated(contrib, "acprop", "ademamix", "adopt", "dadapt_adamw", "galore", "madgrad", "momo"),
    **rated(contrib, "momo_adam", "muon", "prodigy", "schedule_free_adamw", "schedule_free_sgd"),
    **rated(contrib, "simplified_ademamix"),
    "cocob": contrib.cocob,
    "lbfgs": lambda: optax.lbfgs(RATE, linesearch=optax.scale_by_zoom_linesearch(3)),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=0),
    "mechanize": lambda: contrib.mechanize(optax.sgd(RATE)),
    "plateau": lambda: optax.chain(optax.sgd(RATE), contrib.reduce_on_plateau()),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    ),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(RATE)),
    "centred": lambda: optax.rmsprop(RATE, centered=True, momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(RATE),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(RATE, 5)),
}
PARTLY = {
    "w": jnp.array([0.5, 0.0, 5.0]),
    "matrix": jnp.array([[0.1, 0.2], [0.0, -0.3]]),
    "absent": jnp.array([[1.0, -2.0], [3.0, 0.0]]),
}
PAIR = Batch(jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]))


def with_matrix_loss(params, batch):
    product = batch.inputs @ params["matrix"] - 1
    return partly_still_loss(params, batch) + jnp.mean(product**2)


def in_plain_optax(optimizer, params, batch, num_steps):
    optimizer = optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)
    for _ in range(num_steps):
        value, grads = jax.value_and_grad(with_matrix_loss)(params, batch)
        updates, state = optimizer.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=lambda params: with_matrix_loss(params, batch),
        )
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in OPTAX] + [(n, "bfloat16") for n in ("adam", "lion", "rprop")],
)
def test_adapt_ends_where_plain_optax_ends(name, dtype):
    params, pair = jax.tree.map(lambda x: x.astype(dtype), (PARTLY, PAIR))
    with jax.disable_jit():  # operation by operation: nothing is compiled, and all is bitwise
        expected = in_plain_optax(OPTAX[name](), params, pair, 2)
        found = adapt(with_matrix_loss, OPTAX[name](), params, pair, InnerLoop(num_steps=2))
    for a, b in zip(
        *map(jax.tree.leaves, ((found.params, found.opt_state), expected)), strict=True
    ):
        if not jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["sgd", "lars", "adam", "schedule_free_sgd"])
@pytest.mark.parametrize("rate", [np.float32(0.1), jnp.float32(0.1)])
def test_the_state_keeps_its_dtype_whatever_the_rate_is(name, rate):
    module = contrib if name.startswith("schedule") else optax
    params, pair = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARTLY, PAIR))
    optimizer = getattr(module, name)(rate)
    found = adapt(with_matrix_loss, optimizer, params, pair, InnerLoop(num_steps=2, unroll=False))
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(found.opt_state) == dtypes(optimizer.init(params))
    assert dtypes(found.params) == dtypes(params)


NOT_DIFFERENTIABLE = {
    "radam": "NaN: a root of what may be negative",
    "adafactor": "NaN: its eps to the power of -1.5 is infinite in float32",
    "lbfgs": "a line search is a while loop",
    "galore": "a singular value decomposition of what is not moved",
    "muon": "slow to compile; see tests/test_muon.py",
}


@pytest.mark.parametrize("name", sorted(set(OPTAX) - set(NOT_DIFFERENTIABLE)))
def test_derivatives_are_finite_where_the_support_touches_nothing(name):
    def objective(params):
        found = adapt(with_matrix_loss, OPTAX[name](), params, PAIR, InnerLoop(num_steps=2))
        return with_matrix_loss(found.params, PAIR) + found.params["absent"].sum()

    grads = jax.jit(jax.grad(objective), compiler_options=QUICK)(PARTLY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
