"""Models of which a part adapts: the other parameters are shared by all tasks, and arguments.

    model = adapting(config, AdapterConfig(kind="norms"), params)  # of metaopt.models.adapters
    problem = Problem(family, model, next_token(model))            # a FrozenLoss, see below

A closure over large arrays would do as well, but a compiled function holds what it closes over as
constants of its own: half a gigabyte of them takes minutes and copies. `metaopt.fit`, `evaluate`,
`adapt` and whatever compiles a loss takes it apart by `unbound` and gives the arrays as an
argument.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from metaopt.types import Array, Batch, LossFn, Model, Params, PyTree

Trunk = Callable[[Params, Array], Array]
"""``(frozen, inputs) -> floats``, see `metaopt.types.Model`."""


class FrozenLoss:
    """A loss of some parameters of a model, the others beside them.

    Attributes:
      loss_fn: loss of all parameters.
      frozen: nested dicts of arrays, which have no derivative here.
      trunk: what of the model comes before all that adapts, if there is something.
    """

    def __init__(self, loss_fn: LossFn, frozen: Params, trunk: Trunk | None = None):
        self.loss_fn, self.frozen, self.trunk = loss_fn, frozen, trunk

    def __call__(self, params: Params, batch: Batch) -> Array:
        """The loss of ``merge(frozen, params)``."""
        return self.loss_fn(merge(self.frozen, params), self.prepared(batch))

    @property
    def reads_on(self) -> bool:
        """Whether it is of a document that is read on, see `reads_on`."""
        return reads_on(self.loss_fn)

    def start(self, params: Params) -> PyTree:
        """The context before a document."""
        return self.loss_fn.start(params)  # type: ignore[attr-defined]

    def step(self, params: Params, batch: Batch, context: PyTree) -> tuple[Array, PyTree]:
        """The loss of one chunk of a document, and the context after it."""
        return self.loss_fn.step(merge(self.frozen, params), batch, context)  # type: ignore[attr-defined]

    def prepared(self, batch: Batch) -> Batch:
        """The batch with what the trunk makes of its inputs in their place."""
        if self.trunk is None or is_prepared(batch.inputs):
            return batch
        return batch._replace(inputs=self.trunk(self.frozen, batch.inputs))


def reads_on(loss_fn: Any) -> bool:
    """Whether a loss is of a document that is read on: it has `metaopt.losses.ReadingLoss.step`."""
    return loss_fn.reads_on if isinstance(loss_fn, FrozenLoss) else hasattr(loss_fn, "step")


def is_prepared(inputs: Array) -> bool:
    """Whether inputs of a model with a trunk are what that gives: tokens are integers."""
    return jnp.issubdtype(inputs.dtype, jnp.floating)


def prepared(loss_fn: Any, batch: Batch) -> Batch:
    """A batch that a loss is computed on again and again: its trunk is computed here, if any.

    Whoever steps on a batch several times, or differentiates there, calls this before. Without it
    the loss is the same, and takes longer.
    """
    return loss_fn.prepared(batch) if isinstance(loss_fn, FrozenLoss) else batch


def of_what_adapts(loss_fn: LossFn, model: Model) -> LossFn:
    """A loss of all parameters of a model as one of those that adapt, if it has others."""
    return loss_fn if model.frozen is None else FrozenLoss(loss_fn, model.frozen, model.trunk)


def whole(model: Model, params: Params) -> Params:
    """All parameters of a model, those that ``model.apply`` takes."""
    return params if model.frozen is None else merge(model.frozen, params)


def merge(below: PyTree, above: PyTree) -> PyTree:
    """Nested dicts laid over others: of an entry that both have, the upper one counts."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {k: merge(below[k], v) if k in below else v for k, v in above.items()}
    return {**below, **both}


Bind = Callable[[Any], Any]
"""``frozen -> loss``."""


def unbound(loss_fn: LossFn | None) -> tuple[Bind, PyTree]:
    """A loss taken apart: ``bind(frozen)`` is the loss, also where the arrays are traced.

    Returns:
      ``(bind, frozen)``; an empty tuple for a loss of another kind, or for None, which it gives.
    """
    if not isinstance(loss_fn, FrozenLoss):
        return lambda frozen: loss_fn, ()
    parts = loss_fn.loss_fn, loss_fn.trunk  # and not the arrays beside them
    return lambda frozen: FrozenLoss(parts[0], frozen, parts[1]), loss_fn.frozen
