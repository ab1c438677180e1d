"""Integers from outside that index something, tokens and classes: one dtype, and no wrapping.

JAX takes index -1 for the last entry, as Python does, and computes with indices in their own
dtype, in which ``200 + 100`` is 44 for uint8. Whatever takes tokens or classes makes them
int32 here first. What it is to index is then told apart from what indexes nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metaopt.errors import UserError
from metaopt.types import Array

NO_INDEX = 2**31 - 1
"""The largest int32, which is outside every vocabulary: `jnp.take` gives NaN for it."""


def as_int32(name: str, x: Any) -> Array:
    """Integers of any dtype as int32; those that it cannot hold become `NO_INDEX`.

    Raises:
      UserError: they are no integers.
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise UserError(f"{name} must be integers, but their dtype is {x.dtype}")
    given, least = jnp.iinfo(x.dtype), -(2**31)
    if given.min >= least and given.max <= NO_INDEX:
        return jnp.asarray(x, jnp.int32)
    fits = (x >= max(given.min, least)) & (x <= NO_INDEX)
    return jnp.where(fits, x, NO_INDEX).astype(jnp.int32)


def as_tokens(name: str, x: Any, vocab_size: int | None = None) -> Array:
    """Tokens of any integer dtype as int32, negative ones as `NO_INDEX`.

    Args:
      name: of the tokens, for the error.
      x: integers of any shape.
      vocab_size: V, where it is known.

    Raises:
      UserError: they are no integers; or one is outside 0 to V - 1 and its value is known, which
        it is not in a compiled function.
    """
    tokens = as_int32(name, x)
    check_range(name, x, vocab_size)  # as it was given: whatever is computed may be traced
    return jnp.where(tokens < 0, NO_INDEX, tokens)


def check_range(name: str, x: Any, size: int | None, ignored: int | None = None) -> None:
    """Checks integers whose values are known; traced ones pass.

    Args:
      name: of the integers, for the error.
      x: of any shape.
      size: they must be from 0 to size - 1; None is not checked.
      ignored: one more number that they may be.

    Raises:
      UserError: one is outside.
    """
    unknown = isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True)
    if size is None or unknown:
        return
    values = np.asarray(x)
    outside = values[(values < 0) | (values >= size)]
    outside = outside if ignored is None else outside[outside != ignored]
    if outside.size:
        raise UserError(
            f"{name} must be from 0 to {size - 1}"
            + ("" if ignored is None else f" (or {ignored}, which is not counted)")
            + f", and {outside.size} of {values.size} are not, such as {outside[0]}"
        )


def names_of(indices: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """The name of each of ``indices [E]``; empty if there are none, or one of them has no name."""
    known = indices.size and indices.min() >= 0 and indices.max() < len(names)
    return tuple(names[int(index)] for index in indices) if known else ()
