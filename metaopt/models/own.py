"""A model of one's own: from Linen, NNX and Equinox modules, and pairs of functions."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from metaopt.errors import UserError
from metaopt.models.linen import find_head, from_linen
from metaopt.pytrees import entries, fill, is_smooth
from metaopt.types import Array, Model, PyTree


def as_model(
    module: Any, example: Array | None = None, head: str | Sequence[str] | None = None, **arguments
) -> Model:
    """What a user has, as a `Model`.

    Args:
      module: one of

        - a flax Linen module with parameters and no other state;
        - a flax NNX module. It is split into its `nnx.Param` s, as plain dicts, and the rest, which
          stays as it is; a call of it must not change the rest (call ``.eval()`` on a module with
          dropout or batch norm);
        - a pytree that can be called on a single example, such as an Equinox module. It is split
          into its floating-point arrays and the rest, and mapped over examples;
        - a pair of functions ``(init, apply)``: ``key -> params``, or ``(key, example) -> params``
          if there is an example, and ``(params, inputs) -> outputs``.
      example: inputs ``[S, ...]`` of the right shape and dtype, of any values. Linen needs it;
        with NNX it lets a call be checked.
      head: names of the layers that are the head, which is what ANIL adapts. None takes
        ``head`` if a layer has this name, and none else.
      arguments: arguments of the module's call beside the inputs, such as ``train=False``.

    Returns:
      A model. The ``init`` of a module that has its parameters already (NNX, Equinox) gives these
      for every key.

    Raises:
      UserError: it is none of these; or has no parameters, other collections beside them (running
        statistics), random numbers (dropout), or no layer of a name in ``head``.

    Example:
      >>> model = as_model(nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(1)]), jnp.zeros((1, 3)))
      >>> model = as_model((init, apply), head="head")
    """
    if isinstance(module, Model):
        return module
    if isinstance(module, nn.Module):
        if example is None:
            raise UserError(
                f"{type(module).__name__} is made for the shape of its inputs: give an example "
                "of them, as_model(module, jnp.zeros((1, 3)))"
            )
        return from_linen(module, example, head, **arguments)
    if "flax.nnx" in sys.modules and isinstance(module, sys.modules["flax.nnx"].Module):
        return _from_nnx(module, example, head, arguments)
    if isinstance(module, tuple) and len(module) == 2 and all(map(callable, module)):
        return _from_pair(*module, example, head, arguments)
    if callable(module) and any(map(_is_parameter, jax.tree.leaves(module))):
        return _from_pytree(module, head, arguments)
    raise UserError(
        "a model is a module of Linen, NNX or Equinox, or a pair of functions (init, apply), not "
        f"an object of type {type(module).__name__}: docs/own_model.md shows each"
    )


def _from_nnx(module: Any, example: Array | None, head: Any, arguments: dict[str, Any]) -> Model:
    from flax import nnx

    graph, variables, rest = nnx.split(module, nnx.Param, ...)
    params = nnx.to_pure_dict(variables)
    name = type(module).__name__
    if not params:
        raise UserError(f"{name} has no parameters to learn")

    def apply(params: PyTree, inputs: Array) -> Array:
        return nnx.merge(graph, params, rest)(inputs, **arguments)

    def changed(params: PyTree, rest: PyTree, inputs: Array) -> Array:
        before = jax.tree.leaves_with_path(rest)
        merged: Any = nnx.merge(graph, params, rest)
        outputs = merged(inputs, **arguments)
        after = jax.tree.leaves(nnx.state(merged, nnx.Not(nnx.Param)))
        names.extend(_path(p) for (p, a), b in zip(before, after, strict=True) if a is not b)
        return outputs

    names: list[str] = []
    if example is not None:
        jax.eval_shape(changed, params, rest, example)
    if names:
        raise UserError(
            f"{name} changes {', '.join(names)} when it is called, and a Model has parameters "
            "alone: call .eval() on it; docs/own_model.md shows what to do with running statistics "
            "and dropout"
        )
    return Model(lambda key: params, apply, find_head(name, head, entries(params)))


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")


def _from_pytree(module: Any, head: Any, arguments: dict[str, Any]) -> Model:
    params = jax.tree.map(lambda leaf: leaf if _is_parameter(leaf) else None, module)

    def apply(params: PyTree, inputs: Array) -> Array:
        whole = fill(module, params)
        return jax.vmap(lambda example: whole(example, **arguments))(inputs)

    head = find_head(type(module).__name__, head, entries(params))
    return Model(lambda key: params, apply, head)


def _from_pair(
    init: Callable, apply: Callable, example: Array | None, head: Any, arguments: dict[str, Any]
) -> Model:
    def initial(key):
        return init(key) if example is None else init(key, example)

    def outputs(params, inputs):
        return apply(params, inputs, **arguments)

    shapes = jax.eval_shape(initial, jax.random.key(0))
    return Model(initial, outputs, find_head("the pair of functions", head, entries(shapes)))


def _is_parameter(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and is_smooth(leaf)
