from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml, meta_sgd
from metaopt.meta_gradients import evolution, evolution_windows, reverse, truncated
from metaopt.outer_step import mean_over_tasks

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time
EPISODE = quadratic.episode()
HPARAMS = {"inner_learning_rate": 0.3}
RATES = meta_sgd(num_steps=4)
META_PARAMS = {"params": quadratic.PARAMS, "log_rates": {"head": jnp.zeros((4, 3))}}
ONE_BY_ONE = InnerLoop(num_steps=4, query_loss="mean", unroll=False)


def draws(estimate, meta_params, num_keys=1500):
    """The meta-gradient for many keys, flat: ``[keys, n]``."""
    keys = jax.random.split(KEY, num_keys)
    grads, metrics = jax.jit(jax.vmap(estimate, (None, None, None, 0)), compiler_options=QUICKLY)(
        meta_params, HPARAMS, EPISODE, keys
    )
    return {name: g["head"].reshape(num_keys, -1) for name, g in grads.items()}, metrics


def exact(estimate, meta_params):
    grads, _ = jax.jit(estimate, compiler_options=QUICKLY)(meta_params, HPARAMS, EPISODE, KEY)
    return {name: np.ravel(g["head"]) for name, g in grads.items()}


def errors(found, expected):
    """How far the mean is from what is expected, in its own standard errors."""
    return (found.mean(0) - expected) / (found.std(0) / np.sqrt(len(found)))


def assert_unbiased(found, expected):
    assert np.abs(errors(found, expected)).max() < 4
    # Precise enough that a wrong sign, or a scale off by two, could not pass.
    along = found @ expected / (expected @ expected)
    assert along.std() / np.sqrt(len(along)) < 0.1


@pytest.mark.parametrize("window", [None, 2])
def test_the_start_of_a_quadratic_has_no_bias_at_any_noise(window):
    # The query loss after gradient descent is a quadratic in the start, whose smoothed
    # gradient is its gradient: sigma is far from small here.
    meta_params = {"params": quadratic.PARAMS}
    found, _ = draws(
        evolution(maml(), quadratic.loss, ONE_BY_ONE, num_pairs=4, sigma=0.5, window=window),
        meta_params,
    )
    expected = exact(reverse(maml(), quadratic.loss, ONE_BY_ONE), meta_params)
    assert_unbiased(found["params"], expected["params"])


@pytest.mark.parametrize("reuse_noise", [False, True])
def test_windows_are_unbiased_where_truncation_is_not(reuse_noise):
    options = {"num_pairs": 4, "sigma": 0.01, "window": 1, "reuse_noise": reuse_noise}
    found, _ = draws(evolution(RATES, quadratic.loss, ONE_BY_ONE, **options), META_PARAMS)
    # Windows of one step: the mean over windows is the mean over steps.
    expected = exact(reverse(RATES, quadratic.loss, ONE_BY_ONE), META_PARAMS)
    biased = exact(truncated(RATES, quadratic.loss, ONE_BY_ONE, window=1), META_PARAMS)
    for name in META_PARAMS:
        assert_unbiased(found[name], expected[name])
        assert np.abs(errors(found[name], biased[name])).max() > 8


def test_one_pair_is_a_difference_along_its_noise():
    # Three numbers from one pair: g = ε (L⁺ − L⁻) / 2σ², and g'ε is the difference itself.
    sigma = 0.1
    windows = evolution_windows(
        maml(), quadratic.loss, InnerLoop(num_steps=2), num_pairs=1, sigma=sigma
    )
    meta_params = {"params": quadratic.PARAMS}
    carry = windows.init(meta_params, HPARAMS, EPISODE, KEY)
    grads, metrics, carry = jax.jit(windows.step, compiler_options=QUICKLY)(
        meta_params, HPARAMS, EPISODE, carry
    )
    noise = np.asarray(carry.noise_sum["params"]["head"][0], np.float64)
    ends = [
        quadratic.descend(quadratic.START + sign * noise, EPISODE.support, [0.3] * 2)[-1]
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(carry.params["head"][0], ends, rtol=1e-4)
    above, below = (quadratic.value(w, EPISODE.query) for w in ends)
    expected = noise * (above - below) / (2 * sigma**2)
    np.testing.assert_allclose(grads["params"]["head"], expected, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], (above + below) / 2, rtol=1e-5)
    assert 0.2 * sigma < np.abs(noise).max() < 5 * sigma


def test_noise_adds_up_over_windows_and_starts_again():
    windows = evolution_windows(RATES, quadratic.loss, ONE_BY_ONE, num_pairs=2, window=2)
    step = jax.jit(windows.step, compiler_options=QUICKLY)
    carry = windows.init(META_PARAMS, HPARAMS, EPISODE, KEY)
    sums = []
    for at in (0, 2, 0):
        assert carry.step == at
        _, metrics, carry = step(META_PARAMS, HPARAMS, EPISODE, carry)
        sums.append(jax.tree.map(np.asarray, carry.noise_sum))
    assert metrics["inner_losses"].shape == (2,)
    # The start meets one noise a run; the rates a new one in each window.
    np.testing.assert_array_equal(sums[0]["params"]["head"], sums[1]["params"]["head"])
    assert not np.allclose(sums[1]["params"]["head"], sums[2]["params"]["head"])
    rates = [np.sqrt(np.mean(s["log_rates"]["head"] ** 2)) / 0.01 for s in sums]
    np.testing.assert_allclose(rates, [1, np.sqrt(2), 1], rtol=0.3)


@pytest.mark.parametrize("batching", ["same", "split"])
def test_pairs_in_groups_and_one_window_are_all_of_them_at_once(batching):
    inner = InnerLoop(num_steps=4, batching=batching, unroll=False)

    def run(estimate):
        return jax.jit(estimate, compiler_options=QUICKLY)(META_PARAMS, HPARAMS, EPISODE, KEY)

    whole, in_groups, windows = (
        run(evolution(RATES, quadratic.loss, inner, num_pairs=3, **options))
        for options in (
            {},
            {"window": 4, "pairs_at_a_time": 2},
            {"window": 2, "pairs_at_a_time": 1},
        )
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), in_groups, whole
    )
    # What is reported is a whole run, all but unperturbed.
    _, unperturbed = run(reverse(RATES, quadratic.loss, inner))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05), windows[1], unperturbed)


def test_a_query_loss_without_derivative_gets_a_gradient():
    def stairs(params, batch):
        """The loss, and in the value alone its whole part of tenths."""
        loss = quadratic.loss(params, batch)
        return loss + jax.lax.stop_gradient(jnp.floor(loss * 10) / 10 - loss)

    meta_params = {"params": quadratic.PARAMS}
    estimate = evolution(maml(), stairs, ONE_BY_ONE, num_pairs=4, sigma=0.5)
    found, _ = draws(estimate, meta_params)
    expected = exact(reverse(maml(), quadratic.loss, ONE_BY_ONE), meta_params)["params"]
    np.testing.assert_allclose(found["params"].mean(0), expected, rtol=0.1)


def test_each_task_has_its_own_noise():
    estimate = evolution(RATES, quadratic.loss, ONE_BY_ONE, num_pairs=2, window=2)
    episodes = jax.tree.map(lambda x: jnp.stack([x, x]), EPISODE)
    keys = jax.random.split(KEY)

    @partial(jax.jit, compiler_options=QUICKLY)
    def at(keys):
        grads, _ = mean_over_tasks(
            lambda episode, key: estimate(META_PARAMS, HPARAMS, episode, key), (episodes, keys)
        )
        return grads["params"]["head"]

    each = [at(jnp.stack([key, key])) for key in keys]
    assert not np.allclose(*each)
    np.testing.assert_allclose(at(keys), np.mean(each, axis=0), rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"window": 3}, "windows of 3"),
        ({"pairs_at_a_time": 17}, "pairs_at_a_time is 17"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        evolution(RATES, quadratic.loss, ONE_BY_ONE, **options)
