"""Pytrees cut into parts: what can be differentiated, and the named entries at the top; digests."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.types import Array, PyTree


def partition(tree: PyTree) -> tuple[list[Any], Callable[..., PyTree]]:
    """Takes the leaves that have a derivative out of a tree (see `is_smooth`).

    Returns:
      ``(smooth, join)``: these leaves, and ``join(values)``, the tree with values in
      their places. ``join(values, cotangent=True)`` has None in place of the other
      leaves: what a rule of `jax.custom_vjp` says of what has no derivative.
    """
    leaves, structure = jax.tree.flatten(tree)
    smooth = [is_smooth(leaf) for leaf in leaves]

    def join(values: Sequence[Any], *, cotangent: bool = False) -> PyTree:
        given = iter(values)
        others = [None] * len(leaves) if cotangent else leaves
        filled = [next(given) if s else x for s, x in zip(smooth, others, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return [leaf for leaf, s in zip(leaves, smooth, strict=True) if s], join


def is_smooth(leaf: Any) -> bool:
    """Whether a leaf has a derivative: a floating-point or complex number or array."""
    is_number = isinstance(leaf, float | complex)
    dtype = getattr(leaf, "dtype", None) or (type(leaf) if is_number else None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def entry(path: tuple) -> str:
    """The top-level entry of a tree that the path of a leaf begins with, as text.

    A key of a dict, a field of a module, the index of a list; empty for a tree that is a leaf.
    """
    return jax.tree_util.keystr(path[:1], simple=True)


def entries(tree: PyTree) -> list[str]:
    """The top-level entries of a tree, each once, in the order of its leaves."""
    return list(dict.fromkeys(entry(path) for path, _ in jax.tree.leaves_with_path(tree)))


def take(tree: PyTree, names: Sequence[str] | None) -> PyTree:
    """The tree with None for every leaf outside the top-level entries of these names.

    None takes all. What is left has the leaves of those entries alone; `fill` puts them back.

    Raises:
      UserError: the tree has no entry of one of the names.
    """
    if names is None:
        return tree
    if missing := [name for name in names if name not in (there := entries(tree))]:
        raise UserError(
            f"the parameters have no entry {missing[0]!r} to adapt; their entries are "
            f"{', '.join(there)}: name those of the head in Model(init, apply, head=...)"
        )
    return jax.tree.map_with_path(lambda path, x: x if entry(path) in names else None, tree)


def put(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
    """Puts a leaf into nested dicts, which are made on the way to it."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def fill(tree: PyTree, taken: PyTree) -> PyTree:
    """The tree with the leaves of `taken` (see `take`) in place of its own."""
    return jax.tree.map(lambda own, new: own if new is None else new, tree, taken)


@jax.jit
def all_finite(tree: PyTree) -> Array:
    """Whether every number of a tree is finite: a boolean scalar."""
    smooth, _ = partition(tree)
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in smooth]))


def choose(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    """The one tree or the other, by a boolean scalar that may be traced."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def digest_of(tree: Any) -> str:
    """The digest of the dtypes and bytes of arrays, in whatever shape; keys are arrays too.

    Arrays of which other processes hold parts are left out.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            if is_key(leaf):
                digest.update(str(jax.random.key_impl(leaf)).encode())
                leaf = jax.random.key_data(leaf)
            if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                continue
            leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
        array = np.asarray(leaf)
        digest.update(str(array.dtype).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
