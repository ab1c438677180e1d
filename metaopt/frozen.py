"""Losses with parameters that nothing moves, shared by all tasks and passed as arguments.

    fast, frozen = split(AdapterConfig(kind="norms"), params, key)
    loss_fn = FrozenLoss(next_token(model), frozen)      # of the fast parameters
    problem = Problem(family, model._replace(init=lambda key: fast), loss_fn)

A closure over large arrays would do as well, but a compiled function holds what it closes over as
constants of its own: half a gigabyte of them takes minutes and copies. `metaopt.fit`, `evaluate`
and whatever compiles a loss takes it apart by `unbound` and gives the arrays as an argument.
"""

from collections.abc import Callable
from typing import Any

from metaopt.types import Array, Batch, LossFn, Params, PyTree


class FrozenLoss:
    """A loss of some parameters of a model, the others beside them.

    Attributes:
      loss_fn: loss of all parameters.
      frozen: nested dicts of arrays, which have no derivative here.
    """

    def __init__(self, loss_fn: LossFn, frozen: Params):
        self.loss_fn, self.frozen = loss_fn, frozen

    def __call__(self, params: Params, batch: Batch) -> Array:
        """The loss of ``merge(frozen, params)``."""
        return self.loss_fn(merge(self.frozen, params), batch)


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
    whole = loss_fn.loss_fn  # and not the arrays beside it
    return lambda frozen: FrozenLoss(whole, frozen), loss_fn.frozen
