"""Where a run stands among like runs: learning curves at equal tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Curve = Sequence[tuple[float, float]]
"""A learning curve: ``(tokens, held-out loss)``, tokens since the start of the run."""


class Standing(NamedTuple):
    """Where a run stands among like runs that saw as many tokens.

    Attributes:
      tokens: at which they are compared: those of the run now.
      loss: the run's.
      rank: 1 for the best; as many are strictly better as it says, plus one.
      quantile: share of the like runs that this one is ahead of, ties half: 1 is the best.
      to_best: its loss less that of the best of them; negative is ahead.
      to_median: its loss less their median.
      n: like runs compared with.
    """

    tokens: float
    loss: float
    rank: int
    quantile: float
    to_best: float
    to_median: float
    n: int


def standing(present: Curve, history: Sequence[Curve]) -> Standing | None:
    """Compare a run with the history of like runs at equal tokens.

    The loss of a past run at the tokens of the present one is interpolated linearly in
    log(1 + tokens). A run that stopped before, or was first measured after, is left out:
    nothing is extrapolated. A loss that is not finite counts as infinite.

    Args:
      present: the curve of this run; its point of most tokens is compared.
      history: curves of like runs.

    Returns:
      `Standing`, or None where no like run can be compared.

    Raises:
      ValueError: tokens are negative or not finite.
    """
    if not present:
        return None
    tokens, losses = _ordered(present)
    at, loss = tokens[-1], losses[-1]
    found = np.array([_loss_at(at, *_ordered(past)) for past in history if past])
    past = found[~np.isnan(found)]
    if not past.size:
        return None
    ahead = float(np.mean(past > loss) + 0.5 * np.mean(past == loss))
    return Standing(
        tokens=float(at),
        loss=float(loss),
        rank=1 + int(np.sum(past < loss)),
        quantile=ahead,
        to_best=_less(loss, np.min(past)),
        to_median=_less(loss, np.median(past)),
        n=past.size,
    )


def _less(loss: float, other: float) -> float:
    """Their difference; none between two infinite ones."""
    return 0.0 if loss == other else float(loss - other)


def _ordered(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in rising order, the last word where several are equal, and their losses."""
    points = np.array(sorted(dict(curve).items()), np.float64)
    if not np.all(np.isfinite(points[:, 0])) or points[0, 0] < 0:
        raise ValueError("the tokens of a learning curve must be finite and not negative")
    return points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], np.inf)


def _loss_at(at: float, tokens: np.ndarray, losses: np.ndarray) -> float:
    """The interpolated loss; NaN outside of the curve."""
    if not tokens[0] <= at <= tokens[-1]:
        return math.nan
    return float(np.interp(np.log1p(at), np.log1p(tokens), losses))  # infinite beside infinite
