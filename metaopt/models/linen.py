"""From a flax Linen module to the two pure functions of a `Model`."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from flax.errors import InvalidRngError

from metaopt.errors import UserError
from metaopt.types import Array, Key, Model, Params


def apply_module(module: nn.Module, params: Params, x: Array) -> Array:
    """The output of a module that has parameters and no other state."""
    return cast(Array, module.apply({"params": params}, x))


def from_linen(
    module: nn.Module,
    example: Array | np.ndarray,
    head: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Model:
    """A module as a `Model`.

    Args:
      module: maps inputs to outputs, with parameters and no other state.
      example: inputs of the right shape and dtype, of any values.
      head, arguments: as for `metaopt.models.as_model`.

    Raises:
      UserError: the module has no parameters, or has other collections beside them (running
        statistics), or draws random numbers (dropout), or has no layer of a name in ``head``.
    """

    def init(key: Key) -> Params:
        return module.init(key, example, **arguments)["params"]

    def apply(params: Params, inputs: Array) -> Array:
        return cast(Array, module.apply({"params": params}, inputs, **arguments))

    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **arguments), example)
    name = type(module).__name__
    if others := sorted(set(shapes) - {"params"}):
        raise UserError(
            f"{name} keeps {', '.join(others)} beside its parameters, and a Model has parameters "
            "alone: docs/own_model.md shows what to do with running statistics"
        )
    if "params" not in shapes:
        raise UserError(f"{name} has no parameters to learn")
    head = find_head(name, head, tuple(shapes["params"]))
    try:
        jax.eval_shape(apply, shapes["params"], example)
    except InvalidRngError as error:
        raise UserError(
            f"{name} draws random numbers ({str(error).split(' (http')[0]}), and a Model has no "
            "key to draw from: docs/own_model.md shows what to do with dropout"
        ) from None
    return Model(init, apply, head)


def find_head(
    name: str, head: str | Sequence[str] | None, layers: Sequence[str]
) -> tuple[str, ...]:
    """The names of the layers of the head; None takes ``head`` if a layer has this name.

    Raises:
      UserError: there is no layer of a name.
    """
    if head is None:
        return ("head",) if "head" in layers else ()
    head = (head,) if isinstance(head, str) else tuple(head)
    if missing := [layer for layer in head if layer not in layers]:
        raise UserError(
            f"{name} has no layer {missing[0]!r} to be its head, only {', '.join(layers)}"
        )
    return head
