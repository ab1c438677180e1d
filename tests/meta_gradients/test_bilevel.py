"""An inner loss that reads meta-parameters, another outer loss, a fixed start: every estimator."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import anil, fixed_start, learned_loss, maml, meta_sgd
from metaopt.losses import per_example
from metaopt.meta_gradients import (
    evolution,
    first_order,
    implicit,
    joint,
    mixed_mode,
    reptile,
    reverse,
    streaming,
    truncated,
)
from metaopt.types import Batch, Episode, Model

KEY = jax.random.key(0)
HPARAMS = {"inner_learning_rate": 0.1}
INNER = InnerLoop(num_steps=4)
FORMS = [
    INNER,
    InnerLoop(num_steps=4, unroll=False, remat=True),
    InnerLoop(num_steps=4, kept_states=2),
]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PARAMS = {"body": np.array([[0.5, -1.0, 2.0], [1.0, 0.3, -0.4]]), "head": np.array([0.7, -0.2])}


def network_loss(params, batch):
    return 0.5 * jnp.mean(
        (jnp.tanh(batch.inputs @ params["body"].T) @ params["head"] - batch.targets) ** 2
    )


def absolute_loss(params, batch):
    """An outer loss of another kind, smooth so that finite differences may judge it."""
    errors = jnp.tanh(batch.inputs @ params["body"].T) @ params["head"] - batch.targets
    return jnp.mean(jnp.sqrt(errors**2 + 0.1))


def decayed_and_weighted(meta_params, loss_fn):
    def loss(params, batch):
        weights = jax.nn.softmax(meta_params["data"])
        penalty = optax.tree.norm(params, squared=True)
        decay = jnp.exp(meta_params["log_decay"])
        return weights @ per_example(loss_fn)(params, batch) + decay / 2 * penalty

    return loss


EPISODE = jax.tree.map(
    lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else None), quadratic.episode()
)


def values(size=8):
    return {"log_decay": np.float64(-2.0), "data": 0.3 * np.arange(float(size))}


LEARNERS = {
    "maml": lambda: maml(),
    "maml, adam": lambda: maml(functools.partial(optax.adam, b1=0.5, eps_root=1e-2)),
    "meta_sgd": lambda: meta_sgd(),
    "fixed": lambda: maml(),
    "fixed, meta_sgd": lambda: meta_sgd(),
    "anil": lambda: anil(Model(lambda key: PARAMS, lambda params, x: x)),
}


def make(name, size=8):
    learner = learned_loss(LEARNERS[name](), decayed_and_weighted, values(size))
    return fixed_start(learner, PARAMS) if "fixed" in name else learner


def directional(run, meta_params):
    """The gradient and the central difference of the loss, along one direction."""
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda m: rng.normal(size=np.shape(m)), meta_params)
    grads, _ = run(meta_params)
    above, below = (
        run(jax.tree.map(lambda m, v, s=sign: m + s * 1e-6 * v, meta_params, direction))[1]["loss"]
        for sign in (1, -1)
    )
    pairs = zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    along = sum(np.vdot(*pair) for pair in pairs)
    return along, (above - below) / 2e-6


OF_EACH_KIND = ("maml, adam", "fixed, meta_sgd")  # these meet every form of the loop


@pytest.mark.parametrize(
    ("name", "inner"),
    [(name, form) for form in FORMS for name in (LEARNERS if form is INNER else OF_EACH_KIND)],
)
def test_reverse_and_mixed_mode_equal_finite_differences(name, inner):
    with jax.enable_x64(True):
        learner, found = make(name), {}
        meta_params = learner.init(PARAMS)
        assert set(meta_params) == set(learner.names)
        assert ("params" in meta_params) != ("fixed" in name)
        for estimator in (reverse, mixed_mode):
            estimate = estimator(learner, network_loss, inner, outer_loss=absolute_loss)
            run = jit(lambda m, estimate=estimate: estimate(m, HPARAMS, EPISODE, KEY))
            found[estimator] = run(meta_params)
            if estimator is reverse:
                along, slope = directional(run, meta_params)
                np.testing.assert_allclose(along, slope, rtol=1e-6)
        chex.assert_trees_all_close(found[mixed_mode], found[reverse], rtol=1e-10, atol=1e-14)
        assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(found[reverse][0]))


def test_truncated_evolution_and_first_order_see_the_inner_loss():
    with jax.enable_x64(True):
        learner = make("fixed")
        meta_params = learner.init()
        losses = {"outer_loss": absolute_loss}

        def run(estimator, inner=INNER, keys=KEY, **options):
            estimate = estimator(learner, network_loss, inner, **losses, **options)
            return jit(estimate)(meta_params, HPARAMS, EPISODE, keys)

        expected = run(reverse)
        chex.assert_trees_all_close(run(truncated), expected, rtol=1e-10)
        # One step: no curvature comes after it, and first order is exact.
        once = InnerLoop(num_steps=1)
        chex.assert_trees_all_close(run(first_order, once), run(reverse, once), rtol=1e-10)
        first, _ = run(first_order)
        assert 0.5 < first["log_decay"] / expected[0]["log_decay"] < 2
        windows, _ = run(truncated, window=2)
        assert 0.1 < windows["log_decay"] / expected[0]["log_decay"] < 2
        noisy = jax.vmap(
            evolution(learner, network_loss, INNER, num_pairs=16, sigma=1e-3, **losses),
            (None, None, None, 0),
        )
        drawn, _ = jit(noisy)(meta_params, HPARAMS, EPISODE, jax.random.split(KEY, 100))
        for name, draws in drawn.items():
            error = draws.std(0) / 10
            np.testing.assert_array_less(np.abs(draws.mean(0) - expected[0][name]), 5 * error)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("name, strength", [("maml", 2.0), ("anil", 2.0), ("fixed", 0.0)])
def test_implicit_is_the_finite_difference_where_the_inner_loop_converges(name, strength, solver):
    """Its loss is that of the solution, so it is compared with differences of its own metric."""
    with jax.enable_x64(True):
        learner, inner = make(name), InnerLoop(num_steps=1500, unroll=False)
        estimate = implicit(
            learner,
            network_loss,
            inner,
            outer_loss=absolute_loss,
            regularization=strength,
            solver=solver,
            num_solver_steps=20 if solver == "cg" else 1500,
        )
        hparams = {"inner_learning_rate": 0.2}
        run = jit(lambda m: estimate(m, hparams, EPISODE, KEY))
        meta_params = learner.init(PARAMS)
        along, slope = directional(run, meta_params)
        assert abs(slope) > 1e-3 and run(meta_params)[1]["residual"] < 1e-5
        np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_a_stream_is_scored_by_the_loss_and_not_by_what_its_steps_descend():
    """By hand: with weights on the data, and scored by another loss."""

    def scaled(meta_params, loss_fn):
        return lambda params, batch: jnp.exp(meta_params["log_scale"]) * loss_fn(params, batch)

    with jax.enable_x64(True):
        learner = learned_loss(maml(), scaled, {"log_scale": np.float64(0.3)})
        data = EPISODE
        estimate = streaming(learner, network_loss, InnerLoop(), outer_loss=absolute_loss)
        grads, metrics = jit(estimate)(learner.init(PARAMS), HPARAMS, data, KEY)

        def by_hand(params, log_scale):
            scores = []
            for batch in (data.support, data.query):
                for i in range(len(batch.inputs)):
                    segment = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
                    scores.append(absolute_loss(params, segment))
                    step = jax.grad(network_loss)(params, segment)
                    rate = 0.1 * jnp.exp(log_scale)
                    params = jax.tree.map(lambda p, g, r=rate: p - r * g, params, step)
            return jnp.mean(jnp.array(scores))

        score, expected = jit(jax.value_and_grad(by_hand, (0, 1)))(PARAMS, np.float64(0.3))
        np.testing.assert_allclose(metrics["loss"], score)
        chex.assert_trees_all_close((grads["params"], grads["log_scale"]), expected, rtol=1e-9)


def test_learned_losses_are_stacked_and_the_last_sees_the_others():
    def times(name):
        return lambda meta_params, loss_fn: lambda p, b: meta_params[name] * loss_fn(p, b)

    learner = learned_loss(maml(), times("a"), {"a": np.float32(2.0)})
    learner = learned_loss(learner, times("b"), {"b": np.float32(3.0)})
    meta_params = learner.init(quadratic.PARAMS)
    loss = learner.inner_loss(meta_params, quadratic.loss)
    batch = quadratic.episode().support
    expected = 6 * quadratic.loss(quadratic.PARAMS, batch)
    np.testing.assert_allclose(loss(quadratic.PARAMS, batch), expected, rtol=1e-6)


def test_the_losses_of_examples_have_the_mean_of_the_loss():
    batch = quadratic.episode().support
    found = per_example(quadratic.loss)(quadratic.PARAMS, batch)
    assert found.shape == (8,)
    np.testing.assert_allclose(found.mean(), quadratic.loss(quadratic.PARAMS, batch), rtol=1e-6)


def test_an_episode_needs_no_name():
    batch = Batch(jnp.ones((2, 3)), jnp.ones(2))
    found, _ = reverse(maml(), quadratic.loss, INNER)(
        {"params": quadratic.PARAMS}, HPARAMS, Episode(batch, batch), KEY
    )
    chex.assert_tree_all_finite(found)


FIXED = fixed_start(learned_loss(maml(), decayed_and_weighted, values()), PARAMS)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: fixed_start(maml(), PARAMS), "nothing to learn"),
        (lambda: fixed_start(maml, PARAMS), "call its function"),  # type: ignore[arg-type]
        (lambda: fixed_start(meta_sgd(), {"head": np.arange(3)}), "floating-point"),
        (lambda: learned_loss(maml(), {"decay": 1.0}, {}), "inner_loss is a function"),  # type: ignore
        (lambda: learned_loss(maml(), decayed_and_weighted, {"params": 1.0}), "another name"),
        (lambda: learned_loss(maml(), decayed_and_weighted, {"n": 3}), "floating-point"),
        (lambda: joint(maml(), network_loss, outer_loss=absolute_loss), "no outer_loss"),
        (lambda: reptile(maml(), network_loss, INNER, outer_loss=absolute_loss), "no outer_loss"),
        (lambda: joint(FIXED, network_loss), "log_decay"),
        (lambda: reptile(FIXED, network_loss, INNER), "log_decay"),
        (lambda: implicit(maml(), network_loss, INNER, regularization=0.0), "regularization=0"),
        (lambda: reverse(maml(), network_loss, INNER, outer_loss="mse"), "function"),  # type: ignore
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_implicit_names_what_its_solution_does_not_depend_on():
    learner = learned_loss(meta_sgd(), decayed_and_weighted, values())
    estimate = implicit(learner, network_loss, INNER)
    with pytest.raises(UserError, match="no gradient for log_rates:"):
        estimate(learner.init(PARAMS), HPARAMS, quadratic.episode(), KEY)
