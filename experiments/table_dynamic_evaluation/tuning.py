"""Tuning of `table_dynamic_evaluation`: rates and decays, for every stream apart."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from metaopt.types import Batch

MOST_RATES = 12


class Setting(NamedTuple):
    """A learning rate and a decay."""

    rate: float
    decay: float


def tune(
    scores: Callable[[list[Setting]], np.ndarray], rates: Sequence[float], decays: Sequence[float]
) -> tuple[list[Setting], np.ndarray]:
    """The best of all rates with all decays, for each stream.

    Where the best rate of a stream is an outermost of several, further ones are tried beyond
    it in the same ratio, up to `MOST_RATES`.

    Args:
      scores: settings to losses ``[streams, settings]``; one that is not finite is never best.
      rates: learning rates, above 0.
      decays: from 0 to 1.

    Returns:
      The settings, and their losses ``[streams]``.
    """
    settings: list[Setting] = []
    losses_of = None
    rates, more = sorted(rates), sorted(rates)
    while True:
        added = list(itertools.starmap(Setting, itertools.product(more, decays)))
        found = np.nan_to_num(scores(added), nan=np.inf)
        losses_of = found if losses_of is None else np.concatenate([losses_of, found], axis=1)
        settings += added
        best = [settings[i] for i in losses_of.argmin(axis=1)]
        if not 1 < len(rates) < MOST_RATES:
            break
        ends = {rates[0]: rates[0] ** 2 / rates[1], rates[-1]: rates[-1] ** 2 / rates[-2]}
        more = [beyond for end, beyond in ends.items() if end in {s.rate for s in best}]
        if not more:
            break
        rates = sorted([*rates, *more])
    return best, losses_of.min(axis=1)


def every_stream(segments: Batch, settings: Sequence[Setting]) -> tuple[Batch, np.ndarray]:
    """Every stream with every setting, ``[streams · settings, ...]``."""
    streams = len(segments.targets)
    repeated = jax.tree.map(lambda x: np.repeat(x, len(settings), axis=0), segments)
    return repeated, np.tile(np.array(settings), (streams, 1))
