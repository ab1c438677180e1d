"""From a flax Linen module to the two pure functions of a `Model`."""

from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from flax.errors import InvalidRngError

from metaopt.errors import UserError
from metaopt.types import Array, Key, Model, Params


def apply_module(module: nn.Module, params: Params, x: Array) -> Array:
    """The output of a module that has parameters and no other state."""
    return cast(Array, module.apply({"params": params}, x))


def as_model(
    module: nn.Module, example: Array, head: str | Sequence[str] | None = None, **arguments: Any
) -> Model:
    """A module as a `Model`.

    Args:
      module: maps inputs to outputs, with parameters and no other state.
      example: inputs of the right shape and dtype, of any values.
      head: the names of the layers that are the head, which is what ANIL adapts. None takes
        ``head`` where a layer has this name, and none else.
      arguments: of the module's call beside the inputs, such as ``train=False``.

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
    layers = tuple(shapes["params"])
    head = (head,) if isinstance(head, str) else head
    if missing := [layer for layer in head or () if layer not in layers]:
        raise UserError(f"{name} has no layer {missing[0]!r} to be its head, only {layers}")
    try:
        jax.eval_shape(apply, shapes["params"], example)
    except InvalidRngError as error:
        raise UserError(
            f"{name} draws random numbers ({str(error).split(' (http')[0]}), and a Model has no "
            "key to draw from: docs/own_model.md shows what to do with dropout"
        ) from None
    discovered = ("head",) if "head" in layers else ()
    return Model(init, apply, head=discovered if head is None else tuple(head))
