"""An optimiser that moves a part of the parameters alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.pytrees import fill
from metaopt.types import Params, PyTree

Adapts = Callable[[tuple[str, ...]], bool]
"""``path -> whether the leaf there moves``; a path is the keys on the way to it, as text."""


def on_part(
    optimizer: optax.GradientTransformation, adapts: Adapts
) -> optax.GradientTransformationExtraArgs:
    """The optimiser on the leaves that a predicate chooses; the others do not move.

    It sees the whole tree, with None for every other leaf: of those no gradient is computed in a
    compiled function, and no state is kept. What a line search is given beside the gradient is cut
    likewise.

    Args:
      optimizer: any.
      adapts: which leaves move, such as `metaopt.models.AdapterConfig.adapts`.

    Raises:
      UserError: from ``init`` and ``update``: it chooses none.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def part(tree: PyTree) -> PyTree:
        return chosen(tree, adapts)

    def update(updates, state, params=None, **extra):
        if "grad" in extra:
            extra["grad"] = part(extra["grad"])
        if value_fn := extra.get("value_fn"):
            extra["value_fn"] = lambda moved: value_fn(fill(params, moved))
        before = None if params is None else part(params)
        moved, state = optimizer.update(part(updates), state, before, **extra)
        return fill(jax.tree.map(jnp.zeros_like, updates), moved), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optimizer.init(part(params)), update
    )


def chosen(tree: PyTree, adapts: Adapts) -> PyTree:
    """The tree with None for every leaf that a predicate does not choose.

    Raises:
      UserError: it chooses none.
    """
    found = jax.tree.map_with_path(lambda p, leaf: leaf if adapts(path_of(p)) else None, tree)
    if not jax.tree.leaves(found):
        names = ", ".join(dict.fromkeys(path_of(p)[0] for p, _ in jax.tree.leaves_with_path(tree)))
        raise UserError(f"nothing of the parameters is chosen to adapt; their entries are {names}")
    return found


def listing(params: Params, adapts: Adapts) -> str:
    """What adapts, in words: a line a leaf, and how many parameters that is of all."""
    leaves = jax.tree.leaves_with_path(chosen(params, adapts))
    lines = [f"{'/'.join(path_of(p))} {list(jnp.shape(leaf))}" for p, leaf in leaves]
    number = sum(jnp.size(leaf) for _, leaf in leaves)
    total = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    return "\n".join([*lines, f"{number:,} of {total:,} parameters adapt"])


def path_of(path: tuple) -> tuple[str, ...]:
    """A path of `jax.tree.leaves_with_path` as text."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
