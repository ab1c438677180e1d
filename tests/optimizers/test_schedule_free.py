from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic
from optax import contrib

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import meta_sgd
from metaopt.meta_gradients import reverse
from metaopt.optimizers.outer import Optimizer, OuterConfig, outer_optimizer
from metaopt.optimizers.schedule_free import (
    ScheduleFreeState,
    at_average,
    gradient_point,
    schedule_free,
)
from metaopt.outer_step import init_state, make_meta_step
from metaopt.parallel import AXIS, parallel_step, replicate, split_over_devices
from metaopt.self_improvement.improving import reported_losses

CURVATURE = np.array([3.0, 1.0, 0.2])
START = np.array([1.0, -2.0, 0.5])
CONFIG = OuterConfig(optimizer="schedule_free", learning_rate=0.1, rates_learning_rate=0.05)
EPISODES = quadratic.episodes(4)
LEARNER = meta_sgd()
ESTIMATE = reverse(LEARNER, quadratic.loss, InnerLoop(num_steps=2))


def gradient(point):
    return jax.tree.map(lambda w: CURVATURE * w, point)


def walk(optimizers, params, state=None):
    """The parameters after a step with each of the optimisers, all of one state; and the state."""
    found = []
    for optimizer in optimizers:
        state = optimizer.init(params) if state is None else state
        updates, state = optimizer.update(gradient(gradient_point(state, params)), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


@pytest.mark.parametrize("warmup", [0, 3])
def test_x_is_that_of_optax_whose_parameters_are_y(warmup):
    """AdamW with clipping, decay and warm-up, in float64."""
    config = OuterConfig(
        optimizer="schedule_free", learning_rate=0.1, weight_decay=0.2, warmup_steps=warmup
    )
    with jax.enable_x64(True):
        params, peak = {"params": jnp.asarray(START)}, jnp.float64(0.1)
        rate = lambda count: peak * jnp.minimum(1.0, (count + 1) / (warmup + 1))  # noqa: E731
        theirs = contrib.schedule_free(
            optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.scale_by_adam(b1=0.0),
                optax.add_decayed_weights(0.2),
                optax.scale_by_learning_rate(rate),
            ),
            lambda count: rate(count - 1),  # optax counts these from 1
        )
        hparams = {name: jnp.float64(value) for name, value in config.hparams().items()}
        hparams |= {"outer_learning_rate": peak, "weight_decay": jnp.float64(0.2)}
        found, _ = walk([outer_optimizer(config)(hparams)] * 12, params)
        y, state = params, theirs.init(params)
        for ours in found:
            updates, state = theirs.update(gradient(y), state, y)
            y = optax.apply_updates(y, updates)
            x = contrib.schedule_free_eval_params(state, y)
            np.testing.assert_allclose(ours["params"], x["params"], rtol=1e-9)
    assert ours["params"].dtype == np.float64
    assert np.abs(np.asarray(ours["params"]) - START).min() > 0.1


def test_at_a_constant_rate_x_is_the_mean_of_all_z():
    optimizer = schedule_free(optax.sgd(0.1), lambda count, params: 0.1, beta=0.7)
    x = z = START
    steps = []
    for _ in range(8):
        z = z - 0.1 * CURVATURE * (0.3 * z + 0.7 * x)
        steps.append(z)
        x = np.mean(steps, axis=0)
    found, state = walk([optimizer] * 8, jnp.asarray(START, jnp.float32))
    np.testing.assert_allclose(found[-1], x, rtol=1e-5)
    np.testing.assert_allclose(state.z, z, rtol=1e-5)
    np.testing.assert_allclose(state.weight_sum, 8 * 0.1**2, rtol=1e-5)


def test_the_weights_are_the_squares_of_rates_that_may_change():
    rates = [0.1, 0.3, 0.05, 0.2]
    optimizers = [schedule_free(optax.sgd(r), lambda c, p, r=r: r, beta=1.0) for r in rates]
    z, x, steps = START, START, []
    for i, rate in enumerate(rates, start=1):
        z = z - rate * CURVATURE * x
        steps.append(z)
        x = np.average(steps, axis=0, weights=np.square(rates[:i]))
    found, _ = walk(optimizers, jnp.asarray(START, jnp.float32))
    np.testing.assert_allclose(found[-1], x, rtol=1e-5)


def tree(w):
    return {"params": jnp.asarray(w, jnp.float32), "log_rates": jnp.asarray(w, jnp.float32)}


def at_rates(params_rate, others_rate):
    rates = {"outer_learning_rate": params_rate, "rates_learning_rate": others_rate}
    return outer_optimizer(CONFIG)(CONFIG.hparams() | {k: jnp.float32(v) for k, v in rates.items()})


@pytest.mark.parametrize("before", [0, 4])
def test_at_a_rate_of_zero_x_stays(before):
    """From the start too, when the sum of the weights is zero; each part by its own rate."""
    found, state = walk([at_rates(0.1, 0.05)] * before, tree(START))
    now = found[-1] if found else tree(START)
    still, _ = walk([at_rates(0.0, 0.0)] * 3, now, state)
    jax.tree.map(np.testing.assert_array_equal, still[-1], now)
    half, _ = walk([at_rates(0.0, 0.05)] * 3, now, state)
    np.testing.assert_array_equal(half[-1]["params"], now["params"])
    assert np.abs(half[-1]["log_rates"] - now["log_rates"]).min() > 1e-3


def test_z_and_x_keep_their_dtypes():
    params = {"params": jnp.ones(3, jnp.bfloat16), "log_rates": jnp.ones(3)}
    (found,), state = walk([at_rates(0.1, 0.1)], params)
    for like in (found, state.z, gradient_point(state, found)):
        assert {name: x.dtype for name, x in like.items()} == {
            "params": jnp.bfloat16,
            "log_rates": jnp.float32,
        }


@pytest.mark.parametrize("optimizer", sorted({*get_args(Optimizer)} - {"schedule_free"}))
def test_all_others_take_their_gradients_at_the_parameters(optimizer):
    config = OuterConfig(optimizer=optimizer)
    params = tree(START)
    state = outer_optimizer(config)(config.hparams()).init(params)
    assert gradient_point(state, params) is params  # so their programs are what they were
    same = at_average(state, params)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (same, state)), strict=True))


def test_the_state_is_found_within_others_unless_there_are_several():
    params = jnp.asarray(START, jnp.float32)
    inner = schedule_free(optax.sgd(0.1), lambda count, params: 0.1, beta=0.5)
    moved = lambda s: s._replace(z=s.z + 2.0)  # noqa: E731
    clip, state = optax.chain(optax.clip(1.0), inner).init(params)
    np.testing.assert_allclose(gradient_point((clip, moved(state)), params), START + 1.0, rtol=1e-6)
    np.testing.assert_array_equal(at_average((clip, moved(state)), params)[1].z, params)
    with pytest.raises(UserError, match="2 states of schedule_free"):
        gradient_point(optax.chain(inner, inner).init(params), params)
    with pytest.raises(UserError, match="needs the parameters"):
        inner.update(params, state)


def test_it_has_no_cosine_unless_one_is_asked_for():
    ending = CONFIG.ending_at(100)
    assert ending.varied("adam", 1.0).decay_steps == 100  # whose schedule ends as any other's
    assert OuterConfig(optimizer="schedule_free", decay_steps=7).ending_at(100).decay_steps == 7
    assert OuterConfig().ending_at(100).decay_steps == 100


def new_state():
    hparams = CONFIG.hparams() | {"inner_learning_rate": jnp.float32(0.1)}
    outer = outer_optimizer(CONFIG)
    return init_state(jax.random.key(0), quadratic.PARAMS, LEARNER, outer, hparams)


@pytest.fixture(scope="module")
def trained():
    """After four steps on two devices, and the step."""
    devices = jax.devices()[:2]
    meta_step = make_meta_step(ESTIMATE, outer_optimizer(CONFIG), axis_name=AXIS)
    step, episodes = parallel_step(meta_step, devices), split_over_devices(EPISODES, 2)
    state = replicate(new_state(), devices)
    for _ in range(4):
        state, metrics = step(state, episodes)
    return state, metrics, step, episodes


def test_a_meta_step_takes_its_gradients_at_y_on_any_number_of_devices(trained):
    optimizer, state = outer_optimizer(CONFIG)(CONFIG.hparams()), new_state()
    x, opt_state = state.meta_params, state.opt_state
    hparams = {"inner_learning_rate": 0.1}
    for _ in range(4):
        z, beta = opt_state.z, opt_state.beta
        y = jax.tree.map(lambda x, z, beta=beta: (1 - beta) * z + beta * x, x, z)
        of_all = [
            ESTIMATE(y, hparams, jax.tree.map(lambda x, i=i: x[i], EPISODES), jax.random.key(0))
            for i in range(4)
        ]
        grads, metrics = jax.tree.map(lambda *x: sum(x) / 4, *of_all)
        updates, opt_state = optimizer.update(grads, opt_state, x)
        x = optax.apply_updates(x, updates)
    for found, expected in ((trained[0].meta_params, x), (trained[0].opt_state.z, opt_state.z)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected
        )
    np.testing.assert_allclose(trained[1]["loss"], metrics["loss"], rtol=1e-4)


def test_losses_that_a_step_reports_to_a_judge_are_those_of_x(trained):
    state, _, step, episodes = trained
    assert isinstance(state.opt_state, ScheduleFreeState)
    losses = reported_losses(step, lambda i: episodes, 1)
    found = losses(state)
    junk = jax.tree.map(lambda z: z + 5.0, state.opt_state.z)
    again = losses(state._replace(opt_state=state.opt_state._replace(z=junk)))
    np.testing.assert_array_equal(found, again)
    for i in range(4):
        episode = jax.tree.map(lambda x, i=i: x[i], EPISODES)
        x, key = jax.device_get(state.meta_params), jax.random.key(0)
        alone = ESTIMATE(x, {"inner_learning_rate": 0.1}, episode, key)[1]["loss"]
        np.testing.assert_allclose(found[i], alone, rtol=1e-5)
