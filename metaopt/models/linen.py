"""From a flax Linen module to the two pure functions of a `Model`."""

from typing import cast

import flax.linen as nn

from metaopt.types import Array, Key, Model, Params


def apply_module(module: nn.Module, params: Params, x: Array) -> Array:
    """The output of a module that has parameters and no other state."""
    return cast(Array, module.apply({"params": params}, x))


def as_model(module: nn.Module, example: Array) -> Model:
    """A module whose last layer is named ``head``, as a `Model`.

    Args:
      module: maps inputs to outputs, with parameters and no other state.
      example: inputs of the right shape and dtype, of any values.
    """

    def init(key: Key) -> Params:
        return module.init(key, example)["params"]

    def apply(params: Params, inputs: Array) -> Array:
        return apply_module(module, params, inputs)

    return Model(init, apply, head=("head",))
