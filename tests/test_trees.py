"""Parameters of any tree: every learner and estimator is the same program as with a dict."""

import dataclasses
import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic
from flax import nnx
from flax.core import FrozenDict

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners import anil, maml, meta_sgd, per_layer_per_step, per_step_parameters
from metaopt.meta_gradients import (
    evolution,
    first_order,
    implicit,
    joint,
    mixed_mode,
    reptile,
    reverse,
    truncated,
)
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.types import Model

BODY, HEAD = jnp.array([[0.5, -1.0, 2.0], [1.0, 0.3, -0.4]]), jnp.array([0.7, -0.2])
EPISODE = quadratic.episode()
HPARAMS = {"inner_learning_rate": 0.1}
KEY = jax.random.key(0)
INNER = InnerLoop(num_steps=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """Like an Equinox module: its fields are its leaves, and it can be called."""

    body: Any
    head: Any

    def __call__(self, inputs):
        return inputs @ self.body.T @ self.head


MAKE = {
    "dict": lambda body, head: {"body": body, "head": head},
    "FrozenDict": lambda body, head: FrozenDict({"body": body, "head": head}),
    "list": lambda body, head: [body, head],
    "tuple": lambda body, head: (body, head),
    "dataclass": Module,
    "nnx.State": lambda body, head: nnx.State(
        {"body": nnx.Param(jnp.asarray(body)), "head": nnx.Param(jnp.asarray(head))}
    ),
}
TREES = [name for name in MAKE if name != "dict"]
REFUSED = "nothing to give a gradient to"


def loss(params, batch):
    body, head = jax.tree.leaves(params)
    return 0.5 * jnp.mean((batch.inputs @ body.T @ head - batch.targets) ** 2)


def learners(tree):
    """Every learner, whose head and chosen parameters are the second leaf of a tree."""
    head = "1" if tree in ("list", "tuple") else "head"

    def second(params):
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, [False, True]) if len(leaves) == 2 else None

    return {
        "maml": maml(optax.adam),
        "anil": anil(Model(lambda _: {}, lambda _, x: x, head=(head,))),
        "meta_sgd": meta_sgd(num_steps=2),
        "per_layer_per_step": per_layer_per_step(num_steps=2),
        "per_step_parameters": per_step_parameters(maml(), second, num_steps=2),
    }


ESTIMATORS = {
    "reverse": reverse,
    "mixed_mode": mixed_mode,
    "first_order": first_order,
    "reptile": reptile,
    "joint": joint,
    "truncated": truncated,
    "implicit": implicit,
    "evolution": functools.partial(evolution, num_pairs=2),
}


def program(tree, learner, estimator):
    """The jaxpr of a meta-gradient, from the leaves of the meta-parameters to its own."""
    learner = learners(tree)[learner]
    try:
        estimate = ESTIMATORS[estimator](learner, loss, INNER)
    except UserError:
        return REFUSED
    meta_params = learner.init(MAKE[tree](BODY, HEAD))
    structure = jax.tree.structure(meta_params)

    def on_leaves(leaves):
        grads, metrics = estimate(jax.tree.unflatten(structure, leaves), HPARAMS, EPISODE, KEY)
        assert jax.tree.structure(grads) == structure
        return jax.tree.leaves(grads), metrics

    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(on_leaves)(jax.tree.leaves(meta_params))))


program_with_a_dict = functools.cache(functools.partial(program, "dict"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("tree", TREES)
def test_every_learner_and_estimator_is_the_same_program(tree, estimator):
    for learner in learners(tree):
        assert program(tree, learner, estimator) == program_with_a_dict(learner, estimator)
    assert program_with_a_dict("maml", estimator) is not REFUSED


@pytest.mark.parametrize("tree", TREES)
def test_a_meta_step_is_that_of_a_dict(tree):
    def after(tree):
        learner = learners(tree)["anil"]
        optimizer = outer_optimizer(OuterConfig(weight_decay=0.1))
        step = jax.jit(make_meta_step(reverse(learner, loss, INNER), optimizer))
        params = MAKE[tree](BODY, HEAD)
        hparams = OuterConfig().hparams() | HPARAMS
        state = init_state(KEY, params, learner, optimizer, hparams)
        state, _ = step(state, quadratic.episodes(2))
        assert jax.tree.structure(state.meta_params["params"]) == jax.tree.structure(params)
        return jax.tree.leaves(state.meta_params)

    chex.assert_trees_all_close(after(tree), after("dict"), rtol=1e-6)


def test_the_head_of_a_module_moves_alone():
    learner = learners("dataclass")["anil"]
    params = Module(BODY, HEAD)
    optimizer = learner.inner_opt(learner.init(params), HPARAMS)
    found = adapt(loss, optimizer, params, EPISODE.support, INNER).params
    np.testing.assert_array_equal(found.body, BODY)
    assert np.abs(found.head - HEAD).min() > 1e-4


OTHERS = {
    "counter": np.int32(3),
    "key": jax.random.key(0),
    "number": 3,
    "flag": np.bool_(True),
    "function": jnp.tanh,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("learner", learners("dict"))
def test_what_is_no_floating_point_array_is_named(learner, other):
    params = {"body": BODY, "head": HEAD, "other": OTHERS[other]}
    learner = learners("dict")[learner]
    with pytest.raises(UserError, match="other"):
        learner.init(params)
    for estimator in (reverse, reptile, joint, implicit, evolution, truncated):
        try:
            estimate = estimator(learner, loss, INNER)
        except UserError:
            continue  # refused for what the learner learns
        learned = {name: {} for name in learner.learned}
        with pytest.raises(UserError, match="other"):
            estimate({"params": params, **learned}, HPARAMS, EPISODE, KEY)


def test_no_parameters_are_refused():
    with pytest.raises(UserError, match="no arrays"):
        maml().init({})


NAMED = {
    "anil": lambda: anil(Model(lambda _: {}, lambda _, x: x, head=("output",))),
    "two names": lambda: anil(Model(lambda _: {}, lambda _, x: x, head=("head", "output"))),
    "nothing chosen": lambda: per_step_parameters(
        maml(), lambda params: jax.tree.map(lambda _: False, params), num_steps=2
    ),
    "another tree": lambda: per_step_parameters(
        maml(), lambda params: {"head": True, "output": True}, num_steps=2
    ),
}


@pytest.mark.parametrize("tree", MAKE)
@pytest.mark.parametrize("named", NAMED)
def test_names_that_match_no_parameters_are_refused_with_those_there_are(named, tree):
    there = "0, 1" if tree in ("list", "tuple") else "body, head"
    learner, params = NAMED[named](), MAKE[tree](BODY, HEAD)
    with pytest.raises(UserError, match=there):
        learner.init(params)
    if learner.adapted is not None:  # for those who go round `init`
        optimizer = learner.inner_opt({"params": params}, HPARAMS)
        with pytest.raises(UserError, match=there):
            adapt(loss, optimizer, params, EPISODE.support, INNER)
        with pytest.raises(UserError, match=there):
            implicit(learner, loss, INNER)({"params": params}, HPARAMS, EPISODE, KEY)
