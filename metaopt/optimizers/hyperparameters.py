"""Hyperparameters that are learned while a model trains: their scope and their guards.

All are learned as logarithms, so that one meta-rate serves values of any size, and every move
is a factor: no factor is larger than a cap, in one update and in all.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.types import Array, Params, PyTree

Scope = Literal["scalar", "per_layer", "per_parameter"]
"""One value for all parameters, one a layer (`layer_name`), or one a parameter."""


def check_scope(scope: str) -> None:
    """Raises UserError for a scope that there is not."""
    if scope not in get_args(Scope):
        raise UserError(f"scope is {scope!r}: choose one of {', '.join(get_args(Scope))}")


def check_factors(max_step_factor: float, max_factor: float) -> None:
    """Raises UserError where a cap on a factor would let nothing move, or is not a number."""
    for name, factor in (("max_step_factor", max_step_factor), ("max_factor", max_factor)):
        if not 1 < factor < math.inf:
            raise UserError(f"{name} is {factor}; a cap on a factor is a number above 1")


def layer_name(path: tuple) -> str:
    """The layer of a leaf: the first key of its path, and the second too below ``params``.

    So the layers of a model's parameters are their top-level entries, and of meta-parameters
    ``params/embed``, ``params/head`` ..., ``log_rates``.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(names[:2] if names[:1] == ["params"] else names[:1])


def float_dtype(params: Params) -> jnp.dtype:
    """Of what is learned beside parameters: float32, or theirs where it is wider."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def constant(scope: Scope, params: Params, value: float | Array) -> PyTree:
    """A value for every one that the scope has: ``[]``, ``{layer: []}`` or like the parameters."""
    value = jnp.asarray(value, float_dtype(params))
    if scope == "scalar":
        return jnp.array(value)
    if scope == "per_parameter":
        return jax.tree.map(lambda p: jnp.full(jnp.shape(p), value), params)
    return {layer_name(path): jnp.array(value) for path, _ in jax.tree.leaves_with_path(params)}


def total(scope: Scope, tree: PyTree) -> PyTree:
    """The sums of a tree of arrays over all that shares a value: the transpose of `spread`."""
    if scope == "per_parameter":
        return tree
    sums: dict[str, Array] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = layer_name(path) if scope == "per_layer" else ""
        sums[name] = sums.get(name, jnp.zeros((), leaf.dtype)) + leaf.sum()
    return sums if scope == "per_layer" else sums[""]


def spread(scope: Scope, values: PyTree, tree: PyTree) -> PyTree:
    """The value that is in force for each leaf of a tree: scalars, or arrays of its shape."""
    if scope == "per_parameter":
        return values
    if scope == "scalar":
        return jax.tree.map(lambda _: values, tree)
    return jax.tree.map_with_path(lambda path, _: values[layer_name(path)], tree)


def moved(
    logs: PyTree, steps: PyTree, *, max_step_factor: float, max_factor: float, start: PyTree
) -> PyTree:
    """``logs + steps``, no farther than the caps allow from where they are and from the start."""
    step_cap, cap = math.log(max_step_factor), math.log(max_factor)

    def move(log, step, start):
        new = log + jnp.clip(step, -step_cap, step_cap).astype(log.dtype)
        return jnp.clip(new, start - cap, start + cap)

    return jax.tree.map(move, logs, steps, start)
