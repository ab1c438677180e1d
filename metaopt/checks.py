"""Checks of what users pass, made when a function is traced: compiled programs have none.

Each says in one line what was wrong and what to pass in its place.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from metaopt.errors import UserError
from metaopt.measure import equations
from metaopt.pytrees import entries
from metaopt.types import Array, Batch, Episode, Hparams, Learner, MetaParams, Model, Params

HPARAMS = {
    "inner_learning_rate": "the learning rate of the inner optimizer",
    "query_annealing": "the weight of the last step under query_loss='annealed', from 0 (the mean "
    "over the steps) to 1, and set in training by make_meta_step(annealing_steps=...)",
}


def check_factory(factory: Any, which: Literal["inner", "outer"] = "inner") -> None:
    """Raises UserError where an optimiser is given in place of what makes one."""
    if isinstance(factory, optax.GradientTransformation) or not callable(factory):
        example = {
            "inner": "optax.sgd, not optax.sgd(0.1), or lambda rate: optax.adam(rate, b1=0.5)",
            "outer": "outer_optimizer(OuterConfig()), or lambda hparams: optax.adam(1e-3)",
        }[which]
        raise UserError(
            f"the {which} optimizer is made in every step, by a function of its scalars, and this "
            f"is an object of type {type(factory).__name__}: give {example}"
        )


def check_adapt(
    loss_fn: Any, optimizer: Any, params: Params, support: Batch, num_steps: int
) -> None:
    """Checks what the inner loop is given.

    Raises:
      UserError: the loss cannot be called, the optimiser is none (`optax.sgd` itself), the
        parameters are not all floating-point or are float16, the support has no examples, or
        the number of steps is negative.
    """
    check_loss(loss_fn)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UserError(
            "inner steps are taken by an optax.GradientTransformation, not by an object of type "
            f"{type(optimizer).__name__}: give optax.sgd(0.1) rather than optax.sgd"
        )
    check_parameters(params)
    if any(0 in np.shape(leaf) for leaf in jax.tree.leaves(support)):
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(support))
        raise UserError(
            f"the support has no examples to adapt on, its arrays are {shapes}: give at least one, "
            "or use the parameters as they are"
        )
    if num_steps < 0:
        raise UserError(f"num_steps is {num_steps}: give the number of inner steps, 0 or more")


def check_loss(loss_fn: Any) -> None:
    """Raises UserError where a loss cannot be called, such as a `Model`."""
    if not callable(loss_fn):
        hint = (
            "; metaopt.losses makes one of a model: losses.next_token(model)"
            if isinstance(loss_fn, Model)
            else ""
        )
        raise UserError(
            "loss_fn must be a function (params, batch) -> scalar, not an object of type "
            f"{type(loss_fn).__name__}{hint}"
        )


def check_parts(learner: Any, loss_fn: Any) -> None:
    """Checks what an estimator is bound to.

    Raises:
      UserError: the learner is no `Learner`, or the loss cannot be called.
    """
    if not isinstance(learner, Learner):
        raise UserError(
            f"an estimator takes a metaopt.types.Learner, not an object of type "
            f"{type(learner).__name__}: call its function, as in reverse(maml(), loss_fn, inner)"
        )
    check_loss(loss_fn)


def check_call(learner: Learner, meta_params: MetaParams, episode: Episode) -> None:
    """Checks what an estimator is called with.

    Raises:
      UserError: the meta-parameters are not those of the learner, their parameters are not all
        floating-point, or what is given is not one episode.
    """
    check_meta_params(learner, meta_params)
    check_parameters(meta_params["params"])
    if not (hasattr(episode, "support") and hasattr(episode, "query")):
        raise UserError(
            "an estimator takes one metaopt.types.Episode(support, query, task), not an object of "
            f"type {type(episode).__name__}"
        )
    if num_axes := np.ndim(getattr(episode, "task", 0)):
        raise UserError(
            "an estimator takes one episode, whose task is a scalar, and this one's task has "
            f"{num_axes} axes: take one of the batch, jax.tree.map(lambda x: x[0], episodes), or "
            "map over them by jax.vmap or metaopt.outer_step.mean_over_tasks"
        )


def check_meta_params(learner: Learner, meta_params: Any) -> None:
    """Raises UserError where the entries are not those that the learner learns."""
    expected = ("params", *learner.learned)
    found = tuple(meta_params) if isinstance(meta_params, Mapping) else entries(meta_params)
    if set(found) != set(expected) or not isinstance(meta_params, Mapping):
        raise UserError(
            f"the meta-parameters of this learner are a dict of {', '.join(expected)}, and these "
            f"have {', '.join(found) or 'nothing'}: give learner.init(params)"
        )


def check_parameters(params: Params) -> Params:
    """The parameters themselves, if all their leaves are floating-point arrays.

    Raises:
      UserError: some are not (a step counter, a key, a function), or there are none, or some are
        float16, in which the square of a gradient is soon zero or infinite.
    """
    leaves = jax.tree.leaves(params)
    if any(getattr(leaf, "dtype", None) == jnp.float16 for leaf in leaves):
        raise UserError(
            "parameters are float16, whose range is too small for inner steps and their "
            "derivatives: use bfloat16 or float32"
        )
    if leaves and all(map(_is_floating, leaves)):
        return params
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/') or 'they'} "
        f"({getattr(leaf, 'dtype', type(leaf).__name__)})"
        for path, leaf in jax.tree.leaves_with_path(params)
        if not _is_floating(leaf)
    ]
    if not wrong:
        raise UserError("there are no parameters to learn: the tree of parameters has no arrays")
    raise UserError(
        f"parameters must be floating-point arrays, and {', '.join(wrong[:3])} "
        f"{'are' if len(wrong) > 1 else 'is'} not: give the others alone as parameters, and let "
        "the loss put these back (docs/own_model.md shows how)"
    )


def _is_floating(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None) or (type(leaf) if isinstance(leaf, float) else None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def hparam(hparams: Hparams, name: str) -> Array | float:
    """The scalar of this name.

    Raises:
      UserError: it is not given.
    """
    if name in hparams:
        return hparams[name]
    raise UserError(
        f"hparams has no {name!r}, which is {HPARAMS[name]}; it has "
        f"{', '.join(map(repr, hparams)) or 'nothing'}"
    )


def forward_mode(what: str, derivative: Callable) -> Callable:
    """A derivative in forward mode, checked when it is traced.

    A rule of `jax.custom_vjp` that is left in it makes JAX raise only when the program is lowered,
    where nothing of ours can catch it.

    Args:
      what: the name of the estimator.
      derivative: a function of arrays that takes one.

    Returns:
      The same function. It raises UserError where such a rule is left.
    """

    def checked(*arguments):
        program, shapes = jax.make_jaxpr(derivative, return_shape=True)(*arguments)
        if any(e.primitive.name == "custom_lin" for e in equations(program.jaxpr)):
            raise UserError(
                f"{what} takes the derivative of the inner gradient in forward mode, and the loss "
                "has a function with a rule of jax.custom_vjp that has none: use the estimator "
                "reverse, or give the function a rule of jax.custom_jvp"
            )
        leaves = core.jaxpr_as_fun(program)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return checked
