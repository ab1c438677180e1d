"""Checks of what users pass, made when a function is called or traced, never in what is compiled.

Each says in one line what is wrong and what to pass instead.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from metaopt.errors import UserError
from metaopt.frozen import reads_on
from metaopt.measure import equations
from metaopt.pytrees import entries, is_smooth
from metaopt.types import Array, Batch, Episode, Hparams, Learner, LossFn, MetaParams, Model, Params

HPARAMS = {
    "inner_learning_rate": "the learning rate of the inner optimizer",
    "query_annealing": "the weight of the last step under query_loss='annealed', from 0 (the mean "
    "over the steps) to 1, and set in training by make_meta_step(annealing_steps=...)",
}


def check_factory(factory: Any, which: Literal["inner", "outer"] = "inner") -> None:
    """Raises UserError if an optimiser is given in place of a function that makes one."""
    if isinstance(factory, optax.GradientTransformation) or not callable(factory):
        example = {
            "inner": "optax.sgd, not optax.sgd(0.1), or lambda rate: optax.adam(rate, b1=0.5)",
            "outer": "outer_optimizer(OuterConfig()), or lambda hparams: optax.adam(1e-3)",
        }[which]
        raise UserError(
            f"the {which} optimizer is made in every step, by a function of its scalars, and this "
            f"is an object of type {_kind(factory)}: give {example}"
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
    check_examples("support", support)
    if num_steps < 0:
        raise UserError(f"num_steps is {num_steps}: give the number of inner steps, 0 or more")


def check_loss(loss_fn: Any) -> None:
    """Raises UserError if a loss cannot be called, such as a `Model`."""
    if not callable(loss_fn):
        hint = "; metaopt.losses makes one of a model: losses.next_token(model)"
        raise UserError(
            "loss_fn must be a function (params, batch) -> scalar, not an object of type "
            f"{_kind(loss_fn)}{hint if isinstance(loss_fn, Model) else ''}"
        )


def check_learner(learner: Any) -> None:
    """Raises UserError if a learner is no `Learner`, such as the function that makes one."""
    if not isinstance(learner, Learner):
        raise UserError(
            f"a metaopt.Learner is needed here, not an object of type {type(learner).__name__}: "
            "call its function, as in reverse(maml(), loss_fn, inner)"
        )


def check_parts(
    learner: Any, loss_fn: Any, inner: Any, outer_loss: Any = None, *, reads: bool = False
) -> LossFn:
    """Checks what an estimator is bound to; ``reads`` if it takes documents that are read on.

    Returns:
      What the adapted parameters are judged by: ``outer_loss``, or ``loss_fn`` if it is None.

    Raises:
      UserError: the learner is no `Learner`, the inner loop is no `InnerLoop`, or a loss cannot be
        called, or is one that the estimator does not take.
    """
    check_learner(learner)
    judge = loss_fn if outer_loss is None else outer_loss
    for loss in (loss_fn, judge):
        check_loss(loss)
        if reads_on(loss) and not reads:
            raise UserError(
                "a document that is read on has no query apart from what is stepped on: use the "
                "estimator streaming, or joint"
            )
    if isinstance(inner, type) or not hasattr(inner, "num_steps"):
        what = "its class" if isinstance(inner, type) else f"an object of type {_kind(inner)}"
        raise UserError(
            f"the third argument of an estimator is a metaopt.InnerLoop, not {what}: give "
            "InnerLoop(num_steps=5)"
        )
    return scalar_loss(judge)


def check_call(
    learner: Learner,
    meta_params: MetaParams,
    hparams: Hparams,
    episode: Episode,
    *,
    needs_query: bool = True,
) -> None:
    """Checks what an estimator is called with; plain training needs no query.

    Raises:
      UserError: the meta-parameters are not those of the learner, or are not all floating-point;
        the hparams are no dict of scalars; or what is given is not one episode with examples.
    """
    check_meta_params(learner, meta_params)
    check_parameters(meta_params if len(meta_params) > 1 else next(iter(meta_params.values())))
    check_hparams(hparams)
    check_episode(episode)
    check_examples("support", episode.support)
    leaves = jax.tree.leaves(episode.query)
    if needs_query or not leaves or any(np.shape(leaf)[:1] != (0,) for leaf in leaves):
        check_examples("query", episode.query)


def check_hparams(hparams: Any) -> None:
    """Raises UserError if hparams are no dict of scalars."""
    if not isinstance(hparams, Mapping):
        raise UserError(
            f"hparams are a dict of scalars, not an object of type {_kind(hparams)}: give "
            "{'inner_learning_rate': 0.1}"
        )
    if wrong := [name for name, value in hparams.items() if np.ndim(value)]:
        raise UserError(
            f"hparams are scalars, and {wrong[0]!r} has {np.ndim(hparams[wrong[0]])} axes: learn "
            "rates of their own for parameters by the learner meta_sgd or per_layer_per_step"
        )


def check_examples(name: Literal["support", "query"], batch: Any) -> None:
    """Raises UserError if a batch has no examples, or not as many inputs as targets."""
    leaves = jax.tree.leaves(batch)
    shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves) or "none"
    if not leaves or any(0 in np.shape(leaf) for leaf in leaves):
        raise UserError(
            f"the {name} has no examples, its arrays are {shapes}: give at least one, or use the "
            "parameters as they are"
        )
    if isinstance(batch, Batch) and len({np.shape(leaf)[:1] for leaf in leaves}) > 1:
        raise UserError(
            f"the {name} must have as many inputs as targets along the first axis, and its arrays "
            f"are {shapes}"
        )


def scalar_loss(loss_fn: LossFn) -> LossFn:
    """The loss, which raises UserError when traced if it returns anything but a scalar."""

    def checked(params: Params, batch: Batch) -> Array:
        loss = loss_fn(params, batch)
        if isinstance(loss, tuple | list | dict | types.NoneType):
            raise UserError(
                f"a loss returns one scalar, and this one returns an object of type {_kind(loss)}: "
                "return the loss alone"
            )
        if jnp.ndim(loss):
            raise UserError(
                f"a loss returns one scalar, and this one returns an array {jnp.shape(loss)}: "
                "return its mean"
            )
        return loss

    return checked


def check_key(key: Any) -> None:
    """Raises UserError if a key is none, such as the seed of one."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or np.shape(key) == (2,)):
        raise UserError(f"a key is needed, not an object of type {_kind(key)}: jax.random.key(0)")


def check_episode(episode: Any) -> None:
    """Raises UserError if what is given is no episode, or more than one."""
    if not (hasattr(episode, "support") and hasattr(episode, "query")):
        raise UserError(
            "an estimator takes one metaopt.Episode(support, query), not an object of type "
            f"{_kind(episode)}"
        )
    if num_axes := np.ndim(getattr(episode, "task", 0)):
        raise UserError(
            "an estimator takes one episode, whose task is a scalar, and this one's task has "
            f"{num_axes} axes: take one of the batch, jax.tree.map(lambda x: x[0], episodes), or "
            "map over them by jax.vmap or metaopt.outer_step.mean_over_tasks"
        )


def check_meta_params(learner: Learner, meta_params: Any) -> None:
    """Raises UserError if the entries are not those that the learner learns."""
    expected = learner.names
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
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/') or 'they'} "
        f"({getattr(leaf, 'dtype', type(leaf).__name__)})"
        for path, leaf in jax.tree.leaves_with_path(params)
        if not is_smooth(leaf) or np.iscomplexobj(leaf)
    ]
    if not leaves:
        raise UserError("there are no parameters to learn: the tree of parameters has no arrays")
    if not wrong:
        return params
    raise UserError(
        f"parameters must be floating-point arrays, and {', '.join(wrong[:3])} "
        f"{'are' if len(wrong) > 1 else 'is'} not: give the others alone as parameters, and let "
        "the loss put these back (docs/own_model.md shows how)"
    )


def _kind(value: Any) -> str:
    return type(value).__name__


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
