import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.diagnostics.doctor import examine, to_dtype
from metaopt.diagnostics.finite_differences import directional_derivative
from metaopt.diagnostics.nonfinite import Failure, find_failure, run_inner_loop
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml, meta_sgd
from metaopt.measure import human_bytes
from metaopt.meta_gradients import first_order, mixed_mode, reverse

RATE = 0.3
HPARAMS = {"inner_learning_rate": RATE}
EPISODE = quadratic.episode()
KEY = jax.random.key(0)


def examined(
    estimator, learner=None, *, loss=quadratic.loss, num_steps=3, hparams=HPARAMS, **options
):
    inner = InnerLoop(
        num_steps=num_steps,
        unroll=False,
        **{k: options.pop(k) for k in ("batching", "query_loss") if k in options},
    )
    with jax.enable_x64(True):
        params, episode = (to_dtype(x, jnp.float64) for x in (quadratic.PARAMS, EPISODE))
        arguments = (learner or maml(), loss, inner, params, hparams, episode, KEY)
        return examine(estimator, *arguments, rounds=2, directions=2, **options)


def test_an_exact_estimator_is_found_exact():
    report = examined(mixed_mode, meta_sgd(num_steps=3), query_loss="mean")
    assert report.dtype == "float64"
    assert (report.estimator.name, report.reference.name) == ("mixed_mode", "reverse")
    assert report.agreement.error < 1e-14 and report.agreement.cosine > 1 - 1e-14
    assert set(report.parts) == {"params", "log_rates"}
    assert report.agrees() and report.failure is None
    assert report.confirmed(report.estimator) and report.confirmed(report.reference)
    assert report.error(report.reference) < 1e-7
    assert report.estimator.seconds.median > 0 and len(report.estimator.seconds.samples) == 2
    text = "\n".join(report.describe())
    assert "mixed_mode agrees with reverse to" in text
    assert "mixed_mode agrees with finite differences along 2 directions" in text
    assert human_bytes(report.estimator.temp) in text


def test_the_bias_of_first_order_is_its_closed_form():
    report = examined(first_order)
    path = quadratic.descend(quadratic.START, EPISODE.support, [RATE] * 3)
    biased = quadratic.gradient(path[-1], EPISODE.query)
    exact = quadratic.contraction(EPISODE.support, RATE, 3).T @ biased
    norm = np.linalg.norm
    np.testing.assert_allclose(
        report.agreement.error, norm(biased - exact) / norm(exact), rtol=1e-6
    )
    cosine = biased @ exact / norm(biased) / norm(exact)
    np.testing.assert_allclose(report.agreement.cosine, cosine, rtol=1e-6)
    assert not report.agrees()
    assert report.confirmed(report.reference) and report.confirmed(report.estimator) is False
    text = "\n".join(report.describe())
    assert "first_order differs from reverse" in text
    assert "first_order disagrees with finite differences" in text


def test_a_wrong_reference_is_found_out():
    def halved(learner, loss_fn, inner):
        estimate = reverse(learner, loss_fn, inner)

        def half(*arguments):
            grads, metrics = estimate(*arguments)
            return jax.tree.map(lambda g: g / 2, grads), metrics

        return half

    report = examined(reverse, reference=halved)
    np.testing.assert_allclose(report.agreement.error, 1.0, rtol=1e-12)
    np.testing.assert_allclose(report.agreement.cosine, 1.0, rtol=1e-12)
    assert report.confirmed(report.estimator) and report.confirmed(report.reference) is False


@pytest.mark.parametrize("query_loss", ["last", "mean", "annealed"])
@pytest.mark.parametrize("batching", ["same", "split"])
def test_finite_differences_are_of_the_objective_that_is_descended(query_loss, batching):
    hparams = HPARAMS | {"query_annealing": 0.3}
    report = examined(
        mixed_mode,
        meta_sgd(),
        num_steps=4,
        hparams=hparams,
        query_loss=query_loss,
        batching=batching,
    )
    assert (
        report.agrees()
        and report.confirmed(report.estimator)
        and report.confirmed(report.reference)
    )


def test_finite_differences_are_of_plain_optax():
    """A parameter that the support does not touch stays, whatever guards the inner loop has."""

    def steep(learning_rate):  # nearly the sign of a gradient
        return optax.stateless(
            lambda grads, _: jax.tree.map(lambda g: -learning_rate * jnp.tanh(1e14 * g), grads)
        )

    def loss(params, batch):
        is_query = len(batch.inputs) == len(EPISODE.query.inputs)
        return quadratic.loss(params, batch) + 100 * is_query * params["unused"].sum()

    params = quadratic.PARAMS | {"unused": jnp.array([2.0])}
    grads = jax.grad(loss)(params, EPISODE.support)
    updates, _ = steep(RATE).update(grads, optax.EmptyState(), params)
    after = optax.apply_updates(params, updates)
    assert after["unused"] == 2.0
    run = run_inner_loop(maml(steep), loss, InnerLoop(num_steps=1))
    found = run({"params": params}, HPARAMS, EPISODE).query_losses[0]
    np.testing.assert_allclose(found, loss(after, EPISODE.query), rtol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_one_derivative_that_is_not_finite_confirms_nothing(first):
    report = examined(mixed_mode)
    bad = np.array([np.nan, 0.0] if first else [0.0, np.nan])
    found = report._replace(
        differences=report.differences + bad, uncertainties=report.uncertainties + bad
    )
    assert not found.confirmed(found.estimator)
    gradient = report.estimator._replace(slopes=report.estimator.slopes + bad)
    assert report.confirmed(gradient) is False and report.confirmed(report.reference)


def test_what_is_no_meta_gradient_is_refused():
    def none_at_all(learner, loss_fn, inner):
        return None

    def of_another_shape(learner, loss_fn, inner):
        return lambda meta_params, hparams, episode, key: ({"params": jnp.zeros(())}, {})

    def gradient_alone(learner, loss_fn, inner):
        return lambda meta_params, hparams, episode, key: meta_params

    for estimator in (none_at_all, of_another_shape, gradient_alone):
        with pytest.raises(UserError, match=estimator.__name__):
            examined(estimator)


def fail(num_steps, learner=None, *, loss=quadratic.loss, **options):
    learner = learner or maml()
    meta_params = learner.init(quadratic.PARAMS)
    inner = InnerLoop(num_steps=num_steps, **options)
    return find_failure(learner, loss, inner, meta_params, HPARAMS, EPISODE)


def after(num_steps, then):
    """Gradient descent that does something else to its updates from a step on."""

    def optimizer(learning_rate):
        def update(updates, count, params=None):
            del params
            updates = jax.tree.map(lambda u: -learning_rate * u, updates)
            # Not `where`, in which the branch that is not taken spoils the derivative as well.
            return jax.lax.cond(
                count + 1 >= num_steps,
                lambda updates: jax.tree.map(then, updates),
                lambda updates: updates,
                updates,
            ), count + 1

        return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)

    return maml(optimizer)


def endless_slope(u):
    """The same updates, with a derivative of infinity times zero."""
    return u + 0 * jnp.sqrt(u - jax.lax.stop_gradient(u)).sum()


def test_the_derivative_of_radam_breaks_at_its_third_step():
    report = examined(mixed_mode, maml(optax.radam), num_steps=6)
    # Its rectification has a real root at the steps 1 and 2 and from step 5 on.
    assert report.failure == Failure("backward", (3, 4))
    assert report.describe()[0] == (
        "the forward pass is finite, the backward pass of inner steps 3, 4 is not"
    )


@pytest.mark.parametrize(
    ("num_steps", "options"), [(4, {}), (4, {"batching": "split"}), (3, {"query_loss": "mean"})]
)
def test_the_broken_steps_of_a_backward_pass_are_named(num_steps, options):
    found = fail(num_steps, after(3, endless_slope), **options)
    assert found == Failure("backward", tuple(range(3, num_steps + 1)))


def test_the_forward_pass_is_searched_first():
    broken = after(3, lambda u: jnp.inf * u)
    assert fail(4, broken) == Failure("parameters", (3,))
    assert fail(2, broken) == Failure("backward", ())  # it never gets there: nothing to find

    def capped(params, batch):
        """No number on the support once that has come down enough, nor ever on the query."""
        value = quadratic.loss(params, batch)
        is_query = len(batch.inputs) == len(EPISODE.query.inputs)
        return jnp.where(is_query | (value < limit), jnp.nan, value)

    path = quadratic.descend(quadratic.START, EPISODE.support, [RATE] * 2)
    values = [quadratic.value(w, EPISODE.support) for w in path]
    limit = (values[1] + values[2]) / 2
    assert fail(4, loss=capped) == Failure("inner loss", (3,))
    assert fail(2, loss=capped) == Failure("query loss", (2,))
    assert fail(4, loss=capped, query_loss="mean") == Failure("query loss", (1,))


def test_a_query_loss_without_a_gradient_is_told_from_the_steps():
    def kinked(params, batch):
        distance = jnp.sum((params["head"] - params["head"]) ** 2)
        is_query = len(batch.inputs) == len(EPISODE.query.inputs)
        return quadratic.loss(params, batch) + (jnp.sqrt(distance) if is_query else 0.0)

    assert fail(3, loss=kinked) == Failure("query gradient", (3,))


def test_an_estimator_that_breaks_alone_is_tried_at_shorter_runs():
    def breaks(learner, loss_fn, inner, *, at):
        if inner.num_steps == 1:
            raise UserError("not for a single step")
        estimate = reverse(learner, loss_fn, inner)
        scale = jnp.nan if inner.num_steps >= at else 1.0

        def estimator(*arguments):
            grads, metrics = estimate(*arguments)
            return jax.tree.map(lambda g: scale * g, grads), metrics

        return estimator

    report = examined(functools.partial(breaks, at=3), num_steps=4, batching="split")
    assert report.estimator.name == "breaks"
    assert report.failure == Failure("estimator", (3,))


def test_differences_choose_their_steps():
    dtype = np.dtype(np.float64)
    found, uncertainty = directional_derivative(lambda h: np.exp(3 * h), dtype)
    assert abs(found - 3) <= max(10 * uncertainty, 1e-9) and uncertainty < 1e-7
    # A kink closer than the longest steps.
    found, _ = directional_derivative(lambda h: 2 * h + 5 * max(h - 1e-4, 0), dtype)
    assert abs(found - 2) < 1e-7
    assert np.isnan(directional_derivative(lambda h: np.nan * h, dtype)).all()


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="directions is 0"):
        examine(
            reverse,
            maml(),
            quadratic.loss,
            InnerLoop(),
            quadratic.PARAMS,
            HPARAMS,
            EPISODE,
            KEY,
            directions=0,
        )
    mixed = {"head": jnp.zeros(3), "body": jnp.zeros(2, jnp.bfloat16)}
    with pytest.raises(UserError, match="bfloat16"):
        examine(reverse, maml(), quadratic.loss, InnerLoop(), mixed, HPARAMS, EPISODE, KEY)


def test_rounding_in_float32_is_called_what_it_is():
    inner = InnerLoop(num_steps=2)
    arguments = (maml(), quadratic.loss, inner, quadratic.PARAMS, HPARAMS, EPISODE, KEY)
    report = examine(mixed_mode, *arguments, rounds=0)
    assert report.dtype == "float32" and report.estimator.seconds is None
    assert report.agrees() and 0 <= report.agreement.error < 1e-5
    noisy = report._replace(differences=np.zeros(4), uncertainties=np.ones(4))
    assert noisy.confirmed(noisy.estimator) is None
    assert "too uncertain" in "\n".join(noisy.describe())
