from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.errors import UserError
from metaopt.optimizers.self_tuned import current_rate, current_values, self_tuned
from metaopt.outer_step import init_state, make_meta_step
from metaopt.types import Episode, Learner

QUICK = {"xla_backend_optimization_level": 0}
PARAMS = {"embed": jnp.array([1.0, -2.0]), "head": {"w": jnp.array([[0.5, 3.0]])}}
CURVATURE = {"embed": jnp.array([1.0, 0.05]), "head": {"w": jnp.array([[0.3, 0.01]])}}


def quadratic(params):
    terms = jax.tree.map(lambda a, p: 0.5 * jnp.sum(a * p**2), CURVATURE, params)
    return sum(jax.tree.leaves(terms))


def linear(params):
    return sum(jnp.sum(jnp.sin(1.0 + p.size) * p) for p in jax.tree.leaves(params))


def train(optimizer, loss, num_steps, params=PARAMS, noise=0.0):
    """Parameters, states before every step stacked, and the state after the last."""
    state = optimizer.init(params)

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params)
        drawn = optax.tree.random_like(key, grads)
        grads = jax.tree.map(lambda g, e: g + noise * e, grads, drawn)
        updates, after = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), after), state

    keys = jax.random.split(jax.random.key(0), num_steps)
    (params, last), states = jax.lax.scan(step, (params, state), keys)
    return params, states, last


run = jax.jit(train, static_argnums=(0, 1, 2), compiler_options=QUICK)


def barely(base, **options):
    """Tuned by so little that rates stay what they are."""
    return self_tuned(base, meta_rate=1e-12, **options)


def _64(x):
    return x.astype(jnp.float64)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_one_step_back_is_the_finite_difference():
    """γ = 0: g·h is the derivative of this loss with respect to the log-rate of the last step."""
    with jax.enable_x64(True):
        start = jax.tree.map(_64, PARAMS)
        base = optax.trace(0.9)
        tuned = barely(base, learning_rate=0.3, trace_decay=0.0, weight_decay=0.1)
        before, _, state = run(tuned, quadratic, 2, start)
        directions, _ = base.update(jax.grad(quadratic)(before), state.base, before)

        def next_loss(log_rate):
            rate = 0.3 * np.exp(log_rate)
            return quadratic(
                jax.tree.map(lambda p, u: p - rate * (u + 0.1 * p), before, directions)
            )

        after, _, state = run(tuned, quadratic, 3, start)
        found = dot(jax.grad(quadratic)(after), state.traces["learning_rate"])
        h = 1e-6
        np.testing.assert_allclose(found, (next_loss(h) - next_loss(-h)) / (2 * h), rtol=1e-8)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_the_trace_is_exact_where_there_is_no_curvature(name):
    """γ = 1 on a linear loss: dθ/dρ by `jax.jvp` through the whole run, momentum and decay too."""
    with jax.enable_x64(True):
        params = jax.tree.map(_64, PARAMS)
        given = {"learning_rate": 0.1, "weight_decay": 0.3}

        def last(rho):
            values = given | {name: given[name] * jnp.exp(rho)}
            sgd = optax.chain(
                optax.trace(0.9),
                optax.add_decayed_weights(values["weight_decay"]),
                optax.scale(-values["learning_rate"]),
            )
            return train(sgd, linear, 7, params)[0]

        _, expected = jax.jvp(last, (jnp.zeros(()),), (jnp.ones(()),))
        tuned = barely(
            optax.trace(0.9), tuned=("learning_rate", "weight_decay"), trace_decay=1.0, **given
        )
        found = run(tuned, linear, 7, params)[2].traces[name]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), found, expected)


def test_additive_and_multiplicative_are_the_published_rules():
    with jax.enable_x64(True):
        kappa, rate = 1e-3, 0.2
        for rule in ("additive", "multiplicative"):
            tuned = self_tuned(
                optax.identity(), learning_rate=rate, rule=rule, meta_rate=kappa, trace_decay=0.0
            )
            params = jax.tree.map(_64, PARAMS)
            first = jax.grad(quadratic)(params)
            params = jax.tree.map(lambda p, g: p - rate * g, params, first)
            second = jax.grad(quadratic)(params)
            product = dot(first, second)
            if rule == "additive":
                expected = rate + kappa * product
            else:
                cosine = product / jnp.sqrt(dot(first, first) * dot(second, second))
                expected = rate * jnp.exp(kappa * cosine)
            found = current_rate(run(tuned, quadratic, 2, jax.tree.map(_64, PARAMS))[2])
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("rule", ["additive", "multiplicative", "adam", "lion"])
def test_scopes_agree_on_what_is_alone(rule):
    """With one layer of one parameter every scope is the same."""
    rates = []
    for scope in ("scalar", "per_layer", "per_parameter"):
        tuned = self_tuned(optax.identity(), learning_rate=0.1, scope=scope, rule=rule)
        params = {"embed": jnp.array([2.0])}
        _, _, state = run(tuned, lambda p: 0.5 * jnp.sum(p["embed"] ** 2), 3, params)
        rates.append(np.ravel(jax.tree.leaves(current_rate(state))[0])[0])
    assert rates[0] > 0.1
    np.testing.assert_allclose(rates, rates[0], rtol=1e-6)


def test_scopes_have_their_shapes_and_move_apart():
    tuned = {
        scope: run(
            self_tuned(optax.identity(), learning_rate=1.5, scope=scope, meta_rate=0.1),
            quadratic,
            6,
        )[2]
        for scope in ("per_layer", "per_parameter")
    }
    layers = current_rate(tuned["per_layer"])
    assert set(layers) == {"embed", "head"}
    assert layers["embed"] < 1.5 < layers["head"]  # 1.5 overshoots along the curvature of 1 alone
    each = current_rate(tuned["per_parameter"])
    assert jax.tree.map(jnp.shape, each) == jax.tree.map(jnp.shape, PARAMS)
    assert each["embed"][0] < 1.5 < each["embed"][1]


@pytest.mark.parametrize(
    "base, best, off",
    [(optax.identity(), 1.0, [1 / 30, 3.0]), (optax.scale_by_adam(), 0.03, [1 / 30, 30.0])],
    ids=["sgd", "adam"],
)
def test_starts_far_off_end_near_the_best_fixed_rate(base, best, off):
    """An ill-conditioned quadratic with noisy gradients. From 3.0 on, gradient descent diverges."""

    def end(optimizer):
        params, _, state = train(optimizer, quadratic, 1000, noise=0.03)
        return quadratic(params), state

    @partial(jax.jit, compiler_options=QUICK)
    @jax.vmap
    def tuned(rate):
        loss, state = end(self_tuned(base, learning_rate=rate))
        return loss, current_rate(state)

    @partial(jax.jit, compiler_options=QUICK)
    @jax.vmap
    def fixed(rate):
        return end(optax.chain(base, optax.scale(-rate)))[0]

    starts = best * jnp.array(off)
    losses, rates = tuned(starts)
    grid = jnp.nan_to_num(fixed(best * 3.0 ** jnp.arange(-2, 2)), nan=jnp.inf)
    untuned = jnp.nan_to_num(fixed(starts), nan=jnp.inf)
    assert np.all(losses < 3 * grid.min()) and np.all(losses < 0.1 * untuned)
    assert np.all((best / 2 < rates) & (rates < best * 2))


def test_absurd_weight_decay_is_taken_back():
    """The loss pulls to 1, the decay to 0."""

    def loss(params):
        return 0.5 * jnp.sum((params["w"] - 1.0) ** 2)

    params = {"w": jnp.ones(3)}
    given = {"learning_rate": 0.1, "weight_decay": 3.0}
    tuned = self_tuned(optax.identity(), tuned=("weight_decay",), **given)
    end, _, state = run(tuned, loss, 200, params)
    left = current_values(state)
    assert left["weight_decay"] < 0.05 and left["learning_rate"] == jnp.float32(0.1)
    assert loss(end) < 0.01 < loss({"w": jnp.full(3, 1 / (1 + 3.0))})


def test_caps_hold():
    tuned = self_tuned(
        optax.identity(), learning_rate=1e-4, meta_rate=5.0, max_step_factor=1.5, max_factor=4.0
    )
    _, states, last = run(tuned, quadratic, 8)
    rates = np.append(states.values["learning_rate"], current_rate(last)) / 1e-4
    assert np.all(rates[1:] / rates[:-1] < 1.5001)
    np.testing.assert_allclose(rates[-1], 4.0, rtol=1e-5)
    np.testing.assert_allclose(rates[3] / rates[2], 1.5, rtol=1e-5)


def test_what_is_not_finite_teaches_nothing():
    tuned = self_tuned(optax.scale_by_adam(), learning_rate=0.1)
    _, _, state = run(tuned, quadratic, 3)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    _, after = jax.jit(tuned.update, compiler_options=QUICK)(bad, state, PARAMS)
    for name in ("log_factors", "traces", "meta"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_in_the_outer_step_with_donation_and_a_rate_that_changes():
    """Built anew in each step from the hparams of the state, as the outer optimiser is."""

    def outer_opt(hparams):
        tuned = self_tuned(optax.scale_by_adam(), learning_rate=hparams["outer_learning_rate"])
        return optax.chain(optax.clip_by_global_norm(hparams["clip_norm"]), tuned)

    def estimate(meta_params, hparams, episode, key):
        loss, grads = jax.value_and_grad(lambda m: quadratic(m["params"]))(meta_params)
        return grads, {"loss": loss, "inner_losses": jnp.zeros(0)}

    learner = Learner(lambda p: {"params": p}, lambda m: m["params"], lambda m, h: optax.identity())
    hparams = {"outer_learning_rate": 0.01, "clip_norm": 10.0}
    state = init_state(jax.random.key(0), PARAMS, learner, outer_opt, hparams)
    step = jax.jit(make_meta_step(estimate, outer_opt), donate_argnums=0, compiler_options=QUICK)
    none = jnp.zeros((1, 1))
    episodes = Episode(none, none, jnp.zeros(1, jnp.int32))
    for _ in range(5):
        state, metrics = step(state, episodes)
    learned = current_rate(state.opt_state) / 0.01
    assert learned > 1.05
    state.hparams["outer_learning_rate"] = jnp.float32(0.002)
    state, _ = step(state, episodes)
    assert step._cache_size() == 1
    assert 1 < current_rate(state.opt_state) / 0.002 / learned < 1.11
    assert np.isfinite(metrics["update_norm"])


def test_layers_of_meta_parameters_are_those_of_the_model():
    tuned = self_tuned(optax.identity(), learning_rate=0.1, scope="per_layer")
    masked = optax.masked(tuned, {"params": True, "log_rates": False})
    state = masked.init({"params": PARAMS, "log_rates": PARAMS})
    assert set(current_rate(state)) == {"params/embed", "params/head"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scope": "each"}, "scope is 'each'"),
        ({"rule": "sgd"}, "rule is 'sgd'"),
        ({"tuned": ()}, "at least 1"),
        ({"tuned": ("momentum",)}, "learning_rate, weight_decay"),
        ({"tuned": ("weight_decay",)}, "cannot start at 0"),
        ({"trace_decay": 1.1}, "trace_decay is 1.1"),
        ({"meta_rate": 0.0}, "meta_rate is 0.0"),
        ({"max_factor": 1.0}, "max_factor is 1.0"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        self_tuned(optax.identity(), learning_rate=0.1, **options)


def test_a_state_without_a_tuned_part_is_refused():
    with pytest.raises(UserError, match="0 parts made by self_tuned"):
        current_rate(optax.adam(0.1).init(PARAMS))
    with pytest.raises(UserError, match="needs the parameters"):
        tuned = self_tuned(optax.identity(), learning_rate=0.1)
        tuned.update(PARAMS, tuned.init(PARAMS))
