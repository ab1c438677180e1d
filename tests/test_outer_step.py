from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml, meta_sgd
from metaopt.meta_gradients import reverse
from metaopt.optimizers.outer import Optimizer, OuterConfig, outer_optimizer
from metaopt.optimizers.schedule_free import gradient_point
from metaopt.outer_step import init_state, make_meta_step, mean_over_tasks
from metaopt.parallel import AXIS, parallel_step, replicate, split_over_devices

KEY = jax.random.key(0)
EPISODES = quadratic.episodes(4)
LEARNER = meta_sgd()
OUTER_OPT = outer_optimizer(OuterConfig())
HPARAMS = OuterConfig().hparams() | {"inner_learning_rate": 0.1}
exact = reverse(LEARNER, quadratic.loss, InnerLoop(num_steps=2))


def noisy(meta_params, hparams, episode, key):
    """An estimator that uses its key: the exact one plus noise."""
    grads, metrics = exact(meta_params, hparams, episode, key)
    noise = jax.random.normal(key, (3,))
    return jax.tree.map(lambda g: g + noise, grads), metrics | {"noise": noise}


def new_state(outer_opt=OUTER_OPT, learner=LEARNER, **hparams):
    return init_state(KEY, quadratic.PARAMS, learner, outer_opt, HPARAMS | hparams)


def assert_close(found, expected):
    def numbers(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def one_device():
    """The state and metrics after a step of all tasks at once on one device."""
    return jax.jit(make_meta_step(noisy, OUTER_OPT))(new_state(), EPISODES)


@pytest.mark.parametrize("tasks_at_a_time", [1, 2])
def test_groups_of_tasks_change_nothing(tasks_at_a_time, one_device):
    step = make_meta_step(noisy, OUTER_OPT, tasks_at_a_time=tasks_at_a_time)
    assert_close(jax.jit(step)(new_state(), EPISODES), one_device)


def test_the_weights_of_the_query_losses_go_to_the_last_with_the_steps():
    estimate = reverse(LEARNER, quadratic.loss, InnerLoop(num_steps=2, query_loss="annealed"))

    def seen(meta_params, hparams, episode, key):
        grads, metrics = estimate(meta_params, hparams, episode, key)
        return grads, metrics | {"annealing": hparams["query_annealing"]}

    step, state = jax.jit(make_meta_step(seen, OUTER_OPT, annealing_steps=2)), new_state()
    for expected in (0, 0.5, 1, 1):
        state, metrics = step(state, EPISODES)
        np.testing.assert_allclose(metrics["annealing"], expected)
    assert set(state.hparams) == set(HPARAMS)  # nothing that a search would take for a rate
    with pytest.raises(UserError, match="annealing_steps"):
        make_meta_step(estimate, OUTER_OPT)(new_state(), EPISODES)


@pytest.mark.parametrize("tasks_at_a_time", [0, 1, 2, 6])
def test_mean_over_tasks_is_the_mean(tasks_at_a_time):
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    found = mean_over_tasks(
        lambda x, i: {"square": x**2, "first": x[0] * i}, (x, jnp.arange(6.0)), tasks_at_a_time
    )
    np.testing.assert_allclose(found["square"], (x**2).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["first"], (x[:, 0] * np.arange(6)).mean(), rtol=1e-5)


@pytest.mark.parametrize("tasks_at_a_time", [-1, 4, 12])
def test_groups_that_do_not_divide_are_refused(tasks_at_a_time):
    with pytest.raises(UserError, match=f"6 tasks a device cannot be taken {tasks_at_a_time} at"):
        mean_over_tasks(lambda x: x, (jnp.zeros(6),), tasks_at_a_time)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_step_on_n_devices_is_that_on_one_whatever_is_drawn(num_devices, one_device):
    devices = jax.devices()[:num_devices]
    step = parallel_step(make_meta_step(noisy, OUTER_OPT, axis_name=AXIS), devices)
    episodes = split_over_devices(EPISODES, num_devices)
    assert_close(step(replicate(new_state(), devices), episodes), one_device)


def test_forgetting_the_average_over_devices_raises(one_device):
    episodes = split_over_devices(EPISODES, 2)

    def over_two(axis_name):
        step = make_meta_step(noisy, OUTER_OPT, axis_name=axis_name)
        return jax.vmap(step, in_axes=(None, 0), axis_name=AXIS, out_axes=None)

    assert_close(jax.jit(over_two(AXIS))(new_state(), episodes), one_device)
    with pytest.raises(ValueError, match=r"mapped output .* but out_axes is None"):
        jax.eval_shape(over_two(None), new_state(), episodes)


def test_a_step_is_traced_once_though_hparams_change_and_donates_its_state():
    traces = []

    def counted(*args):
        traces.append(None)
        return exact(*args)

    devices = jax.devices()[:2]
    step = parallel_step(make_meta_step(counted, OUTER_OPT, axis_name=AXIS), devices)
    episodes = split_over_devices(EPISODES, 2)
    first = replicate(new_state(), devices)
    state, _ = step(first, episodes)
    after_one = len(traces)
    assert first.meta_params["params"]["head"].is_deleted()
    assert not quadratic.PARAMS["head"].is_deleted()
    before = np.asarray(state.meta_params["params"]["head"])
    changed = jax.tree.map(lambda x: 0.0 * x, state.hparams)
    state, _ = step(state._replace(hparams=replicate(changed, devices)), episodes)
    np.testing.assert_array_equal(state.meta_params["params"]["head"], before)  # all rates are zero
    assert int(state.step) == 2 and len(traces) == after_one


def apply_outer(config, gradients, params=None, **hparams):
    """The updates of the outer optimiser at each of the gradients in turn."""
    optimizer = outer_optimizer(config)(config.hparams() | hparams)
    params = params or jax.tree.map(jnp.zeros_like, gradients[0])
    state, found = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        found.append(updates)
    return found


def test_weight_decay_touches_the_parameters_only():
    params = {"params": {"w": jnp.array([2.0])}, "log_rates": {"w": jnp.array([2.0])}}
    zero = jax.tree.map(jnp.zeros_like, params)
    (updates,) = apply_outer(OuterConfig(learning_rate=0.1, weight_decay=0.5), [zero], params)
    np.testing.assert_allclose(updates["params"]["w"], [-0.1 * 0.5 * 2.0], rtol=1e-6)
    np.testing.assert_array_equal(updates["log_rates"]["w"], [0.0])


def test_rates_decay_pulls_back_what_is_learned_beside_the_parameters():
    params = {"params": {"w": jnp.array([2.0])}, "log_rates": {"w": jnp.array([2.0])}}
    zero = jax.tree.map(jnp.zeros_like, params)
    (updates,) = apply_outer(OuterConfig(rates_learning_rate=0.1, rates_decay=0.5), [zero], params)
    np.testing.assert_allclose(updates["log_rates"]["w"], [-0.1 * 0.5 * 2.0], rtol=1e-6)
    np.testing.assert_array_equal(updates["params"]["w"], [0.0])


def test_parameters_and_what_is_learned_beside_them_have_rates_of_their_own():
    one = {"params": {"w": jnp.ones(1)}, "log_rates": {"w": jnp.ones(1)}}
    config = OuterConfig(learning_rate=0.1, rates_learning_rate=0.3, clip_norm=jnp.inf)
    (updates,) = apply_outer(config, [one])  # Adam's first step is of length one
    np.testing.assert_allclose(updates["params"]["w"], [-0.1], rtol=1e-5)
    np.testing.assert_allclose(updates["log_rates"]["w"], [-0.3], rtol=1e-5)
    (updates,) = apply_outer(config, [one], outer_learning_rate=0.0)
    np.testing.assert_array_equal(updates["params"]["w"], [0.0])
    np.testing.assert_allclose(updates["log_rates"]["w"], [-0.3], rtol=1e-5)


def test_gradients_are_clipped_to_a_norm_that_may_change():
    gradients = [{"params": jnp.array([x])} for x in (1e4, 1.0)]
    for norm in (1.0, 10.0):
        found = apply_outer(OuterConfig(), gradients, clip_norm=jnp.float32(norm))
        clipped = [{"params": jnp.array([x])} for x in (norm, 1.0)]
        expected = apply_outer(OuterConfig(clip_norm=1e9), clipped)
        np.testing.assert_allclose(found[1]["params"], expected[1]["params"], rtol=1e-5)


def test_rates_warm_up_and_decay_as_half_a_cosine():
    config = OuterConfig(learning_rate=2.0, warmup_steps=2, decay_steps=6, final_fraction=0.1)
    found = [-u["params"][0] for u in apply_outer(config, [{"params": jnp.ones(1)}] * 8)]
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(5) / 4)) / 2
    expected = 2.0 * np.array([1 / 3, 2 / 3, *cosine, 0.1])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    config = OuterConfig(learning_rate=2.0, warmup_steps=1)
    found = [-u["params"][0] for u in apply_outer(config, [{"params": jnp.ones(1)}] * 3)]
    np.testing.assert_allclose(found, [1.0, 2.0, 2.0], rtol=1e-4)
    with pytest.raises(UserError, match="decay_steps=5 must exceed warmup_steps=5"):
        OuterConfig(warmup_steps=5, decay_steps=5)


def test_meta_training_on_a_quadratic_finds_its_least_loss():
    learner, inner = maml(), InnerLoop(num_steps=2)
    outer_opt = outer_optimizer(OuterConfig(learning_rate=0.1, decay_steps=150, clip_norm=1e3))
    step = make_meta_step(reverse(learner, quadratic.loss, inner), outer_opt)
    hparams = OuterConfig(learning_rate=0.1, clip_norm=1e3).hparams()
    state = init_state(
        KEY, quadratic.PARAMS, learner, outer_opt, hparams | {"inner_learning_rate": 0.1}
    )
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: step(s, EPISODES), state, length=150))
    _, metrics = run(state)
    # The mean over tasks of |X_Q (M θ + (I - M) θ*_S) - y_Q|² is a least-squares problem in θ.
    rows, targets = [], []
    for i in range(4):
        support, query = jax.tree.map(lambda x, i=i: x[i], (EPISODES.support, EPISODES.query))
        left = quadratic.contraction(support, 0.1, 2)
        rows.append(query.inputs @ left)
        offset = query.inputs @ (np.eye(3) - left) @ quadratic.minimum(support)
        targets.append(query.targets - offset)
    rows, targets = np.concatenate(rows), np.concatenate(targets)
    best = np.linalg.lstsq(rows, targets, rcond=None)[0]
    least = 0.5 * np.mean((rows @ best - targets) ** 2)
    np.testing.assert_allclose(metrics["loss"][-1], least, rtol=1e-3)
    assert metrics["loss"][0] > 1.2 * least
    assert metrics["grad_norm"][-1] < 0.01 * metrics["grad_norm"][0]


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_each_optimiser_descends_a_quadratic(optimizer):
    config = OuterConfig(optimizer=optimizer, learning_rate=0.1, clip_norm=1e3)
    opt = outer_optimizer(config)(config.hparams())
    meta_params = {"params": jnp.array([3.0, -2.0])}
    state = opt.init(meta_params)
    for _ in range(60):  # the gradient of half the square is the point itself
        gradient = gradient_point(state, meta_params)
        updates, state = opt.update(gradient, state, meta_params)
        meta_params = jax.tree.map(jnp.add, meta_params, updates)
    assert float(jnp.linalg.norm(meta_params["params"])) < 0.75 * 13**0.5


def test_momentum_is_read_from_the_state():
    config = OuterConfig(optimizer="momentum", learning_rate=1.0, clip_norm=1e3)
    gradient = {"params": jnp.ones(2)}
    for momentum in (0.0, 0.5):
        opt = outer_optimizer(config)(config.hparams() | {"momentum": jnp.float32(momentum)})
        _, state = opt.update(gradient, opt.init(gradient), gradient)
        updates, _ = opt.update(gradient, state, gradient)
        np.testing.assert_allclose(updates["params"], -(1 + momentum))
    assert "momentum" not in OuterConfig().hparams()


@pytest.mark.parametrize("wrong", [{"optimizer": "newton"}, {"momentum": 1.0}])
def test_an_optimiser_that_is_not_there_is_refused(wrong):
    with pytest.raises(UserError):
        OuterConfig(**wrong)
