from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml, meta_sgd
from metaopt.meta_gradients import reverse, truncated, truncated_windows
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.outer_step import mean_over_tasks

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time
EPISODE = quadratic.episode()
HPARAMS = {"inner_learning_rate": 0.3}
LEARNER = meta_sgd(partial(optax.sgd, momentum=0.9), num_steps=4)
LOG_RATES = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
META_PARAMS = {"params": quadratic.PARAMS, "log_rates": {"head": jnp.asarray(LOG_RATES)}}


def assert_close(found, expected, **tolerances):
    tolerances = {"rtol": 1e-5, "atol": 1e-6} | tolerances
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), found, expected)


def run(estimate, meta_params=META_PARAMS):
    return jax.jit(estimate, compiler_options=QUICKLY)(meta_params, HPARAMS, EPISODE, KEY)


def by_hand(window, query_loss, batching):
    """The mean of the windows' losses, the state between them behind a stop-gradient."""

    def objective(meta_params):
        params, trace, losses = meta_params["params"]["head"], jnp.zeros(3), []
        for k in range(4):
            if k and k % window == 0:
                params, trace = jax.lax.stop_gradient((params, trace))
            part = slice(2 * k, 2 * k + 2) if batching == "split" else slice(None)
            batch = jax.tree.map(lambda x, part=part: x[part], EPISODE.support)
            trace = 0.9 * trace + jax.grad(quadratic.loss)({"head": params}, batch)["head"]
            params = params - 0.3 * jnp.exp(meta_params["log_rates"]["head"][k]) * trace
            if query_loss == "mean" or (k + 1) % window == 0:
                losses.append(quadratic.loss({"head": params}, EPISODE.query))
        return sum(losses) / len(losses)

    return jax.grad(objective)(META_PARAMS)


@pytest.mark.parametrize(
    "window, options",
    [
        (1, {}),
        (2, {"batching": "split", "unroll": False}),
        (2, {"query_loss": "mean", "remat": True}),
    ],
)
def test_each_window_has_the_gradient_through_its_own_steps(window, options):
    inner = InnerLoop(num_steps=4, **options)
    grads, metrics = run(truncated(LEARNER, quadratic.loss, inner, window=window))
    assert_close(grads, by_hand(window, inner.query_loss, inner.batching))
    expected, of_run = run(reverse(LEARNER, quadratic.loss, inner))
    assert_close(metrics, of_run)  # the inner run is that of reverse, momentum and all
    assert not np.allclose(grads["log_rates"]["head"], expected["log_rates"]["head"], rtol=0.05)


@pytest.mark.parametrize("options", [{}, {"query_loss": "mean", "batching": "split"}])
@pytest.mark.parametrize("learner", [maml(), LEARNER])
def test_one_window_is_reverse(learner, options):
    meta_params = {name: META_PARAMS[name] for name in ("params", *learner.learned)}
    inner = InnerLoop(num_steps=4, **options)
    expected = run(reverse(learner, quadratic.loss, inner), meta_params)
    for window in (None, 4):
        found = run(truncated(learner, quadratic.loss, inner, window=window), meta_params)
        assert_close(found, expected, rtol=1e-6)


def test_mixed_mode_serves_within_windows():
    inner = InnerLoop(num_steps=4)
    found, expected = (
        run(truncated(LEARNER, quadratic.loss, inner, window=2, grad_fn=grad_fn))
        for grad_fn in (forward_over_reverse, jax.value_and_grad)
    )
    assert_close(found, expected)


def test_windows_one_at_a_time_go_on_and_start_again():
    inner = InnerLoop(num_steps=4)
    windows = truncated_windows(LEARNER, quadratic.loss, inner, window=2)
    step = jax.jit(windows.step, compiler_options=QUICKLY)
    carry = windows.init(META_PARAMS, HPARAMS, EPISODE, KEY)
    found = []
    for at in (0, 2, 0):
        assert carry.step == at
        grads, metrics, carry = step(META_PARAMS, HPARAMS, EPISODE, carry)
        found.append((grads, metrics))
    assert metrics["inner_losses"].shape == (2,)
    assert_close(found[2], found[0], rtol=0, atol=0)
    assert not np.any(found[1][0]["params"]["head"])  # the start is in the first window only
    grads, metrics = run(truncated(LEARNER, quadratic.loss, inner, window=2))
    assert_close(jax.tree.map(lambda a, b: (a + b) / 2, found[0][0], found[1][0]), grads)
    assert_close(found[1][1]["loss"], metrics["loss"])

    # A run that starts again does so on what it is given then.
    other = jax.tree.map(lambda x: 2 * x, META_PARAMS)
    _, metrics, _ = step(other, HPARAMS, EPISODE, carry._replace(step=jnp.int32(0)))
    assert_close(metrics["inner_losses"][0], quadratic.loss(other["params"], EPISODE.support))


def test_tasks_are_vmapped():
    estimate = truncated(LEARNER, quadratic.loss, InnerLoop(num_steps=4), window=2)
    episodes = quadratic.episodes(3)
    keys = jax.random.split(KEY, 3)

    def mean(tasks_at_a_time):
        return mean_over_tasks(
            lambda episode, key: estimate(META_PARAMS, HPARAMS, episode, key),
            (episodes, keys),
            tasks_at_a_time,
        )

    assert_close(jax.jit(mean, static_argnums=0)(0), jax.jit(mean, static_argnums=0)(1))


@pytest.mark.parametrize("window", [0, 3, 8])
def test_a_window_must_divide_the_steps(window):
    with pytest.raises(UserError, match=f"windows of {window}; make the window a divisor"):
        truncated(LEARNER, quadratic.loss, InnerLoop(num_steps=4), window=window)


def test_the_initialisation_alone_is_refused():
    with pytest.raises(UserError, match=r"first window only.*reverse"):
        truncated(maml(), quadratic.loss, InnerLoop(num_steps=4), window=2)


def test_a_support_that_cannot_be_split_is_refused():
    inner = InnerLoop(num_steps=6, batching="split")
    with pytest.raises(UserError, match="8 support examples"):
        run(truncated(LEARNER, quadratic.loss, inner, window=3))


def test_windows_refuse_weights_of_a_whole_run():
    inner = InnerLoop(num_steps=4, query_loss="annealed")
    with pytest.raises(UserError, match="or the estimator reverse"):
        truncated(meta_sgd(), quadratic.loss, inner, window=2)
