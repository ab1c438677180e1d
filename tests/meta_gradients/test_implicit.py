from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners import anil, maml, meta_sgd
from metaopt.losses import regression
from metaopt.meta_gradients import first_order, implicit, proximal, reverse
from metaopt.meta_gradients.implicit import conjugate_gradients, neumann_series
from metaopt.models import mlp
from metaopt.outer_step import mean_over_tasks
from metaopt.types import Batch, Episode

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time
EPISODE = quadratic.episode()
SUPPORT, QUERY = EPISODE.support, EPISODE.query
STRENGTH = 4.0  # above the largest curvature of the support, so that the series converges
HPARAMS = {"inner_learning_rate": 0.2}
LONG = InnerLoop(num_steps=60, unroll=False)


def solution(start, strength=STRENGTH):
    """``argmin_φ L_S(φ) + λ/2 ‖φ − θ‖²``."""
    matrix = quadratic.hessian(SUPPORT) + strength * np.eye(3)
    return start + np.linalg.solve(matrix, -quadratic.gradient(start, SUPPORT))


def run(inner=LONG, episode=EPISODE, **options):
    estimate = implicit(maml(), quadratic.loss, inner, **{"regularization": STRENGTH} | options)
    return jax.jit(estimate, compiler_options=QUICKLY)(
        {"params": quadratic.PARAMS}, HPARAMS, episode, KEY
    )


@pytest.mark.parametrize("solver, steps", [("cg", 3), ("neumann", 50)])
def test_on_a_quadratic_it_is_the_derivative_through_the_solution(solver, steps):
    assert np.linalg.eigvalsh(quadratic.hessian(SUPPORT)).max() < STRENGTH
    grads, metrics = run(solver=solver, num_solver_steps=steps)
    start = np.asarray(quadratic.START, np.float64)

    def outer(start):
        return quadratic.value(solution(start), QUERY)

    # A quadratic of the start: the central difference is exact at any distance.
    expected = [(outer(start + e) - outer(start - e)) / 2 for e in np.eye(3)]
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], outer(start), rtol=1e-5)
    assert metrics["residual"] < 1e-5
    # The loss that is reported is that of the support, without the term that is added.
    inner_loss = quadratic.value(solution(start), SUPPORT)
    np.testing.assert_allclose(metrics["inner_losses"][-1], inner_loss, rtol=1e-5)
    assert metrics["inner_losses"].shape == (60,)


def test_damping_is_added_to_the_regularisation_of_the_linear_system_alone():
    grads, metrics = run(num_solver_steps=3, damping=6.0)
    reached = solution(np.asarray(quadratic.START, np.float64))
    matrix = np.eye(3) + quadratic.hessian(SUPPORT) / (STRENGTH + 6.0)
    expected = np.linalg.solve(matrix, quadratic.gradient(reached, QUERY))
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], quadratic.value(reached, QUERY), rtol=1e-5)
    assert metrics["residual"] < 1e-5


def test_a_large_regularisation_is_first_order():
    hparams = {"inner_learning_rate": 1e-7}
    inner = InnerLoop(num_steps=3)
    meta_params = {"params": quadratic.PARAMS}
    found, _ = implicit(maml(), quadratic.loss, inner, regularization=1e7)(
        meta_params, hparams, EPISODE, KEY
    )
    expected, _ = first_order(maml(), quadratic.loss, inner)(meta_params, hparams, EPISODE, KEY)
    np.testing.assert_allclose(found["params"]["head"], expected["params"]["head"], rtol=1e-5)


def test_solvers_solve_and_say_how_well():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    matrix = jnp.asarray(basis @ np.diag([0.3, 0.5, 0.9, 1.0, 1.4, 1.6]) @ basis.T, jnp.float32)
    target = jnp.asarray(rng.normal(size=6), jnp.float32)
    expected = np.linalg.solve(matrix, target)
    for solve, steps in [(conjugate_gradients, 6), (conjugate_gradients, 40), (neumann_series, 60)]:
        found = jax.jit(solve, static_argnums=(0, 2))(lambda w: matrix @ w, target, steps)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    residuals = [run(num_solver_steps=steps)[1]["residual"] for steps in (1, 2, 3)]
    assert residuals[0] > 10 * residuals[1] > 100 * residuals[2]


def test_conjugate_gradients_stop_at_negative_curvature():
    matrix = jnp.diag(jnp.array([1.0, 2.0, -3.0]))
    target = jnp.array([1.0, 1.0, 1.0])
    first = conjugate_gradients(lambda w: matrix @ w, target, 1)
    np.testing.assert_array_equal(first, target)  # the very first direction: first order's answer
    many = conjugate_gradients(lambda w: matrix @ w, jnp.array([1.0, 0.5, 1e-3]), 50)
    assert np.isfinite(many).all() and np.abs(many).max() < 2


def test_nothing_to_descend_gives_zeros():
    query = Batch(QUERY.inputs * 0, QUERY.targets * 0)
    grads, metrics = run(episode=EPISODE._replace(query=query))
    assert not np.any(grads["params"]["head"]) and metrics["residual"] == 0


def test_tasks_are_vmapped():
    estimate = implicit(maml(), quadratic.loss, LONG, regularization=STRENGTH)
    tasks = quadratic.episodes(3), jax.random.split(KEY, 3)

    def mean(tasks_at_a_time):
        return mean_over_tasks(
            lambda episode, key: estimate({"params": quadratic.PARAMS}, HPARAMS, episode, key),
            tasks,
            tasks_at_a_time,
        )

    found, expected = (jax.jit(mean, static_argnums=0)(at_a_time) for at_a_time in (0, 1))
    np.testing.assert_allclose(found[0]["params"]["head"], expected[0]["params"]["head"], rtol=1e-4)


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_anil_equals_reverse_and_finite_differences_of_a_long_run(solver):
    rng = np.random.default_rng(0)
    model = mlp(2, 1, hidden=(3,), activation=jnp.tanh)
    loss, learner = regression(model), anil(model, optax.sgd)
    batches = (Batch(rng.normal(size=(n, 2)), rng.normal(size=(n, 1))) for n in (4, 5))
    episode = Episode(*batches, np.int32(0))
    params = jax.tree.map(np.float64, model.init(KEY))
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    with jax.enable_x64(True):
        options = {"regularization": 10.0, "solver": solver, "num_solver_steps": 40}
        hparams = {"inner_learning_rate": jnp.float64(0.05)}
        inner = InnerLoop(num_steps=150, unroll=False)
        found, expected = (
            jax.jit(estimate, compiler_options=QUICKLY)({"params": params}, hparams, episode, KEY)[
                0
            ]["params"]
            for estimate in (
                implicit(learner, loss, inner, **options),
                reverse(proximal(learner, 10.0), loss, inner),
            )
        )

        @partial(jax.jit, compiler_options=QUICKLY)
        def outer(step):
            start = jax.tree.map(lambda p, v: p + step * v, params, direction)

            def inner_loss(params, batch):
                far = sum(
                    jnp.vdot(*[a - b] * 2)
                    for a, b in zip(
                        *map(jax.tree.leaves, (params["head"], start["head"])), strict=True
                    )
                )
                return loss(params, batch) + 5.0 * far

            optimizer = learner.inner_opt({}, hparams)
            adapted = adapt(inner_loss, optimizer, start, episode.support, inner)
            return loss(adapted.params, episode.query)

        slope = (outer(1e-5) - outer(-1e-5)) / 2e-5
        along = sum(map(np.vdot, *map(jax.tree.leaves, (found, direction))))
        np.testing.assert_allclose(along, slope, rtol=1e-6)
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "learner, inner, options, message",
    [
        (meta_sgd(), LONG, {}, "log_rates"),
        (maml(), InnerLoop(batching="split"), {}, "batching='same'"),
        (maml(), InnerLoop(query_loss="mean"), {}, "query_loss='last'"),
        (maml(), LONG, {"regularization": 0.0}, "regularization=0"),
        (meta_sgd(), LONG, {"regularization": 0.0, "damping": 1.0}, "log_rates"),
        (maml(), LONG, {"damping": -1.0}, "damping"),
        (maml(), LONG, {"solver": "newton"}, "one of cg, neumann"),
        (maml(), LONG, {"num_solver_steps": 0}, "num_solver_steps"),
    ],
)
def test_what_has_no_implicit_gradient_is_refused(learner, inner, options, message):
    with pytest.raises(UserError, match=message):
        implicit(learner, quadratic.loss, inner, **options)
