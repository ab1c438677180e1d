"""Self-evaluation: how good a run is, and what it costs.

Everything is measured on the same held-out episodes every time, so that two measurements are
paired: the noise of which episodes were drawn cancels in their difference. Losses are in the
unit of the run (nats a token, squared error), lower is better. Nothing is compiled.
"""

from typing import NamedTuple

import numpy as np

from metaopt.statistics import Interval, paired_fall, t_interval


class Assessment(NamedTuple):
    """State of a run, and what the time since the last assessment was worth.

    Attributes:
      step: updates done.
      tokens: tokens (or examples) seen since the start.
      seconds: training time since the start, without that of the evaluations.
      flops: floating-point operations since the start; None if they are not known.
      loss: mean held-out loss.
      improvement: fall of the loss since the last assessment, over the same episodes; or None.
      per_second: improvement a second of training since the last assessment.
      per_flop: improvement a floating-point operation since then.
      per_cost: 1 / (time × resources), per second and unit of resource, since then.
    """

    step: int
    tokens: int
    seconds: float
    flops: float | None
    loss: Interval
    improvement: Interval | None
    per_second: float | None
    per_flop: float | None
    per_cost: float | None


def assess(
    losses: np.ndarray,
    last: tuple[Assessment, np.ndarray] | None = None,
    *,
    step: int,
    tokens: int,
    seconds: float,
    flops: float | None = None,
    resources: float = 1.0,
) -> Assessment:
    """The assessment of a run now, against the last one if there is one.

    Args:
      losses: ``[E]``, held-out losses of all episodes or sequences, always in one order.
      last: the assessment before and its losses, of the same episodes.
      step, tokens, seconds, flops: see `Assessment`.
      resources: resources in use: number of devices, say, or GiB of memory.

    Returns:
      `Assessment`. An efficiency is None if nothing was spent or it is not known.

    Raises:
      ValueError: the losses are not of the same episodes as the last ones.
    """
    spent, operations, fall = seconds, None, None
    if last is not None:
        before, last_losses = last
        spent, fall = seconds - before.seconds, paired_fall(last_losses, losses)
        if flops is not None and before.flops is not None:
            operations = flops - before.flops
    loss, gain = t_interval(np.asarray(losses, np.float64)), fall and fall.mean
    worth = _ratio(gain, spent), _ratio(gain, operations), _ratio(1.0, spent * resources)
    return Assessment(step, tokens, seconds, flops, loss, fall, *worth)


def _ratio(gain: float | None, spent: float | None) -> float | None:
    return gain / spent if gain is not None and spent is not None and spent > 0 else None
