"""Pytrees cut into the leaves that can be differentiated and those that cannot."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metaopt.types import PyTree


def partition(tree: PyTree) -> tuple[list[Any], Callable[..., PyTree]]:
    """Takes the leaves of an inexact dtype out of a tree of arrays.

    Returns:
      ``(smooth, join)``: those leaves, and ``join(values)``, the tree with values in
      their places. ``join(values, cotangent=True)`` has None in place of the other
      leaves: what a rule of `jax.custom_vjp` says of what has no derivative.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_smooth = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in map(_array, leaves)]

    def join(values: Sequence[Any], *, cotangent: bool = False) -> PyTree:
        given = iter(values)
        others = [None] * len(leaves) if cotangent else leaves
        filled = [next(given) if s else x for s, x in zip(is_smooth, others, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return [leaf for leaf, s in zip(leaves, is_smooth, strict=True) if s], join


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
