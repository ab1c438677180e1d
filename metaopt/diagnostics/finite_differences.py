"""Derivatives of a scalar function of a pytree by finite differences alone."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from metaopt.types import Array


def directional_derivative(
    value_at: Callable[[Array], Array], dtype: np.dtype
) -> tuple[float, float]:
    """``d value_at(h) / dh`` at 0 by central differences, and its uncertainty.

    Long steps see the curvature, short ones the rounding, and a kink (a ReLU, Adam at a
    gradient of zero) may lie in between: of nine steps those three neighbours
    count that agree best, and their spread is the uncertainty.

    Args:
      value_at: a scalar of the step, which is a number of the dtype.
      dtype: dtype of the computation; the steps are powers of its rounding unit.

    Returns:
      ``(derivative, uncertainty)``, both NaN where no three neighbours are finite.
    """
    eps = float(jnp.finfo(dtype).eps)
    steps = np.geomspace(eps**0.2, eps**0.55, 9).astype(dtype)
    slopes = [(float(value_at(h)) - float(value_at(-h))) / (2 * float(h)) for h in steps]
    triples = np.stack([slopes[:-2], slopes[1:-1], slopes[2:]])
    triples = triples[:, np.isfinite(triples).all(axis=0)]
    if not triples.size:
        return float("nan"), float("nan")
    spreads = np.ptp(triples, axis=0)
    best = int(np.argmin(spreads))
    return float(np.median(triples[:, best])), float(spreads[best])
