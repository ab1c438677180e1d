"""What users pass by mistake: one line, when a learner or an estimator is made or first traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners import (
    anil,
    fixed_start,
    learned_loss,
    maml,
    meta_sgd,
    per_layer_per_step,
    per_step_parameters,
)
from metaopt.meta_gradients import (
    evolution,
    evolution_windows,
    first_order,
    implicit,
    joint,
    mixed_mode,
    proximal,
    reptile,
    reverse,
    streaming,
    truncated,
    truncated_windows,
)
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.parallel import default_devices
from metaopt.types import Batch, Model

ESTIMATORS = [
    reverse,
    mixed_mode,
    first_order,
    reptile,
    joint,
    truncated,
    implicit,
    functools.partial(evolution, num_pairs=1),
    streaming,
]
INNER = InnerLoop(num_steps=2)
HPARAMS = {"inner_learning_rate": 0.1}
EPISODE = quadratic.episode()
KEY = jax.random.key(0)
MODEL = Model(lambda key: quadratic.PARAMS, lambda params, x: x @ params["head"])
META_PARAMS = {"params": quadratic.PARAMS}


def refused(match):
    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_an_estimator_is_called_with_by_mistake(estimator, compiled):
    estimate = estimator(maml(), quadratic.loss, INNER)
    run = jax.jit(estimate) if compiled else estimate
    rates = {"log_rates": quadratic.PARAMS}
    with refused("mean_over_tasks"):
        run(META_PARAMS, HPARAMS, quadratic.episodes(2), KEY)
    with refused("Episode"):
        run(META_PARAMS, HPARAMS, EPISODE.support, KEY)
    with refused(r"learner.init\(params\)"):
        run(quadratic.PARAMS, HPARAMS, EPISODE, KEY)
    with refused("log_rates"):
        run(META_PARAMS | rates, HPARAMS, EPISODE, KEY)
    if estimator is not joint:
        with refused("inner_learning_rate"):
            run(META_PARAMS, {"learning_rate": 0.1}, EPISODE, KEY)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, truncated_windows, evolution_windows])
def test_what_an_estimator_is_made_of_by_mistake(estimator):
    with refused("function"):
        estimator(maml, quadratic.loss, INNER)
    with refused("losses.next_token"):
        estimator(maml(), MODEL, INNER)


def decayed(meta_params, loss_fn):
    def loss(params, batch):
        penalty = optax.tree.norm(params, squared=True)
        return loss_fn(params, batch) + jnp.exp(meta_params["log_decay"]) * penalty

    return loss


LEARNERS = {
    "maml": maml(),
    "anil": anil(MODEL),
    "meta_sgd": meta_sgd(),
    "per_layer_per_step": per_layer_per_step(num_steps=2),
    "per_step_parameters": per_step_parameters(
        maml(), lambda params: jax.tree.map(lambda _: True, params), num_steps=2
    ),
    "learned_loss": learned_loss(maml(), decayed, {"log_decay": 0.0}),
    "fixed_start": fixed_start(learned_loss(maml(), decayed, {"log_decay": 0.0}), quadratic.PARAMS),
}
SUPPORT = EPISODE.support
UNEQUAL = Batch(SUPPORT.inputs, SUPPORT.targets[:3])
EMPTY = Batch(SUPPORT.inputs[:0], SUPPORT.targets[:0])
GUESSES = {
    "a batch of episodes": ({"episode": quadratic.episodes(2)}, "mean_over_tasks"),
    "a pair of batches": ({"episode": (SUPPORT, EPISODE.query)}, "Episode"),
    "a rate for hparams": ({"hparams": 0.1}, "inner_learning_rate"),
    "nothing for hparams": ({"hparams": None}, "inner_learning_rate"),
    "a rate a parameter": ({"hparams": {"inner_learning_rate": np.ones(3)}}, "meta_sgd"),
    "nothing for meta-parameters": ({"meta_params": None}, r"learner.init\(params\)"),
    "an array for meta-parameters": ({"meta_params": jnp.ones(3)}, r"learner.init\(params\)"),
    "unequal support": ({"episode": EPISODE._replace(support=UNEQUAL)}, "as many inputs"),
    "unequal query": ({"episode": EPISODE._replace(query=UNEQUAL)}, "as many inputs"),
    "no support": ({"episode": EPISODE._replace(support=EMPTY)}, "no examples"),
    "no query": ({"episode": EPISODE._replace(query=None)}, "no examples"),
}
LOSSES = {
    "a vector": (lambda p, b: (b.inputs @ p["head"] - b.targets) ** 2, "return its mean"),
    "a pair": (lambda p, b: (quadratic.loss(p, b), 1), "the loss alone"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_guess_on_every_learner_and_estimator_is_answered_in_one_line(name, estimator):
    learner = LEARNERS[name]
    try:
        estimate = estimator(learner, quadratic.loss, INNER)
    except UserError:
        return  # not defined for this learner
    right = {
        "meta_params": learner.init(quadratic.PARAMS),
        "hparams": HPARAMS,
        "episode": EPISODE,
        "key": KEY,
    }

    def trace(estimate, **wrong):
        jax.eval_shape(lambda: estimate(**right | wrong))

    for guess, (wrong, words) in GUESSES.items():
        with refused(words) as found:
            trace(estimate, **wrong)
        assert "\n" not in str(found.value), guess
    for loss, words in LOSSES.values():
        with refused(words):
            trace(estimator(learner, loss, INNER))
    trace(estimate)  # the guesses were wrong, and this is not


@pytest.mark.parametrize("estimator", [*ESTIMATORS, truncated_windows, evolution_windows])
@pytest.mark.parametrize("wrong", [5, InnerLoop, {"num_steps": 5}])
def test_what_is_no_inner_loop(estimator, wrong):
    with refused("InnerLoop"):
        estimator(maml(), quadratic.loss, wrong)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: anil("head"), "metaopt.Model"),
        (lambda: meta_sgd(num_steps=0), "num_steps is 0"),
        (lambda: meta_sgd(num_steps=2.5), "num_steps is 2.5"),
        (lambda: per_layer_per_step(num_steps=True), "num_steps is True"),
        (lambda: per_step_parameters(maml, lambda p: p, num_steps=2), "call its function"),
        (lambda: per_step_parameters(maml(), ["head"], num_steps=2), "takes a function"),
        (lambda: per_step_parameters(maml(), lambda p: p, num_steps=0), "num_steps is 0"),
        (lambda: proximal(maml, 1.0), "call its function"),
        (lambda: proximal(maml(), "1"), "regularization is '1'"),
        (lambda: evolution(maml(), quadratic.loss, INNER, num_pairs=1.5), "num_pairs is 1.5"),
        (lambda: maml().init(MODEL), "floating-point"),
        (lambda: maml().init(None), "no arrays"),
    ],
)
def test_what_a_learner_is_made_of_by_mistake(make, words):
    with refused(words):
        make()


def test_numbers_are_parameters_too():
    assert meta_sgd().init({"scale": 1.0})["log_rates"]["scale"].shape == ()


def test_a_seed_is_no_key():
    estimate = evolution(maml(), quadratic.loss, INNER, num_pairs=1)
    with refused("jax.random.key"):
        estimate(META_PARAMS, HPARAMS, EPISODE, 0)


@pytest.mark.parametrize(
    "make",
    [maml, meta_sgd, functools.partial(per_layer_per_step, num_steps=2), lambda o: anil(MODEL, o)],
)
@pytest.mark.parametrize("wrong", [optax.sgd(0.1), optax.adam(0.1), "sgd", 0.1])
def test_an_optimizer_where_a_function_is_meant(make, wrong):
    with refused("optax.sgd"):
        make(wrong)


def test_an_outer_optimizer_where_a_function_is_meant():
    estimate = reverse(maml(), quadratic.loss, INNER)
    with refused("outer_optimizer"):
        make_meta_step(estimate, optax.adam(1e-3))
    with refused("outer_optimizer"):
        init_state(KEY, quadratic.PARAMS, maml(), optax.adam(1e-3), HPARAMS)


def test_what_a_curve_is_called_with_by_mistake():
    curves = make_curves(maml(), quadratic.loss, INNER, 2, default_devices(1))
    with refused(r"learner.init\(params\)"):
        curves(quadratic.PARAMS, HPARAMS, quadratic.episodes(2))
    with refused("one episode"):
        curves(META_PARAMS, HPARAMS, jax.tree.map(lambda x: x[None], quadratic.episodes(2)))


@pytest.mark.parametrize(
    ("loss_fn", "optimizer", "params", "match"),
    [
        (quadratic.loss, optax.sgd, quadratic.PARAMS, r"optax.sgd\(0.1\)"),
        (MODEL, optax.sgd(0.1), quadratic.PARAMS, "losses.next_token"),
        (quadratic.loss, optax.sgd(0.1), {"head": np.arange(3)}, "floating-point"),
    ],
)
def test_what_adapt_is_given_by_mistake(loss_fn, optimizer, params, match):
    with refused(match):
        adapt(loss_fn, optimizer, params, EPISODE.support, INNER)


def test_a_learner_that_learns_other_entries_than_it_says():
    learner = maml()._replace(learned=("rates",))
    outer = outer_optimizer(OuterConfig())
    with refused("rates"):
        init_state(KEY, quadratic.PARAMS, learner, outer, OuterConfig().hparams())


@pytest.mark.parametrize("rate", [0, 0.0, np.float32(0), jnp.float32(0)])
def test_reptile_at_a_rate_of_zero(rate):
    estimate = reptile(maml(), quadratic.loss, INNER)
    with refused("above 0"):
        estimate(META_PARAMS, {"inner_learning_rate": rate}, EPISODE, KEY)
    grads, metrics = jax.jit(estimate)(META_PARAMS, {"inner_learning_rate": rate}, EPISODE, KEY)
    assert not np.any(grads["params"]["head"])  # it has not moved
    assert np.isfinite(metrics["loss"])


@jax.custom_vjp
def cosine(x):
    return jnp.cos(x)


cosine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-g * jnp.sin(x),))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


# Its rule calls another function with a rule of its own, as fused kernels do.
sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * cosine(x),))


@jax.custom_jvp
def forward_sine(x):
    return jnp.sin(x)


forward_sine.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] * jnp.cos(x[0])))


def loss_through(function):
    return lambda params, batch: quadratic.loss({"head": function(params["head"])}, batch)


@pytest.mark.parametrize("estimator", [mixed_mode, implicit])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_rule_without_a_forward_derivative_is_said_to_need_reverse(estimator, compiled):
    estimate = estimator(maml(), loss_through(sine), INNER)
    with refused("reverse"):
        (jax.jit(estimate) if compiled else estimate)(META_PARAMS, HPARAMS, EPISODE, KEY)
    for function in (cosine, forward_sine):  # whose rules are differentiable in either mode
        estimate = estimator(maml(), loss_through(function), INNER)
        jax.eval_shape(estimate, META_PARAMS, HPARAMS, EPISODE, KEY)
    estimate = reverse(maml(), loss_through(sine), INNER)
    jax.eval_shape(estimate, META_PARAMS, HPARAMS, EPISODE, KEY)


def test_other_errors_of_forward_mode_are_those_of_jax():
    def broken(params, batch):
        raise TypeError("of the loss itself")

    with pytest.raises(TypeError, match="of the loss itself"):
        mixed_mode(maml(), broken, INNER)(META_PARAMS, HPARAMS, EPISODE, KEY)
