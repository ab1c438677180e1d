"""Self-evaluation: how good a run is, what a change did to it, and what it costs.

Everything is measured on the same held-out episodes every time, so that two measurements are
paired: the noise of which episodes were drawn cancels in their difference. Intervals are
Student's t over tasks, as in `metaopt.evaluate`. Losses are in the unit of the run (nats a
token, squared error), lower is better. numpy and scipy only: nothing is compiled.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from metaopt.statistics import Interval, t_interval


class Assessment(NamedTuple):
    """State of a run, and what the time since the last assessment was worth.

    Attributes:
      step: updates done.
      tokens: tokens (or examples) seen since the start.
      seconds: training time since the start, without that of the evaluations.
      flops: floating-point operations since the start; None if they are not known.
      loss: mean held-out loss.
      improvement: fall of the loss since the last assessment, paired over episodes; positive
        is better. None at the first.
      per_second: improvement a second of training since the last assessment.
      per_flop: improvement a floating-point operation since then.
      per_cost: 1 / (time × resources), per second and unit of resource, for the time since
        the last assessment.
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
      losses: ``[E]``, the held-out loss of every episode or sequence, always in one order.
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
        spent, fall = seconds - before.seconds, _fall(last_losses, losses)
        if flops is not None and before.flops is not None:
            operations = flops - before.flops
    return Assessment(
        step,
        tokens,
        seconds,
        flops,
        t_interval(np.asarray(losses, np.float64)),
        fall,
        _ratio(fall and fall.mean, spent),
        _ratio(fall and fall.mean, operations),
        _ratio(1.0, spent * resources),
    )


def _ratio(gain: float | None, spent: float | None) -> float | None:
    return gain / spent if gain is not None and spent is not None and spent > 0 else None


class Verdict(NamedTuple):
    """What a change did to the held-out loss.

    Attributes:
      outcome: ``'better'``, ``'worse'`` or, if the noise allows either, ``'noise'``.
      difference: mean loss after less mean loss before, over tasks; infinite if the outcome
        rests on losses that are not finite.
      ci95: half the width of its 95 % interval; NaN if there is none.
      n: number of tasks behind it.
    """

    outcome: Literal["better", "worse", "noise"]
    difference: float
    ci95: float
    n: int


def compare(
    before: np.ndarray,
    after: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    margin: float = 0.0,
) -> Verdict:
    """Whether held-out losses fell, rose, or did neither beyond noise.

    A change is ``'better'`` only if the whole 95 % interval of the mean difference is below
    ``-margin``, and ``'worse'`` only if it is above ``margin``: one that does nothing is taken
    for better in 2.5 % of cases, and so is at most one that gains no more than ``margin``. A
    single task tells nothing: that is noise.

    A loss after the change that is not finite is worse, whatever was before; one before it
    that is not, if all are finite after it, makes the change better.

    Args:
      before: ``[E]``, the loss of every held-out episode without the change.
      after: ``[E]``, the loss of the same episodes with it.
      groups: ``[E]``, the task of each episode; None if each is of its own. Differences of one
        task are averaged first: they are not independent.
      margin: the smallest difference that matters, in the unit of the loss. If it is NaN (a
        share of a loss that diverged), finite losses differ by noise only.

    Raises:
      ValueError: shapes differ, there is nothing to compare, or the margin is negative.
    """
    if margin < 0:
        raise ValueError(f"margin {margin} must not be negative")
    fall = _fall(before, after, groups)
    if not np.all(np.isfinite(after)):
        return Verdict("worse", math.inf, math.nan, fall.n)
    if not np.all(np.isfinite(before)):
        return Verdict("better", -math.inf, math.nan, fall.n)
    outcome = "noise"
    if fall.mean - fall.ci95 > margin:
        outcome = "better"
    elif fall.mean + fall.ci95 < -margin:
        outcome = "worse"
    return Verdict(outcome, -fall.mean, fall.ci95, fall.n)


def _fall(before, after, groups=None) -> Interval:
    """By how much losses fell, over the same episodes; NaN if one of them is not finite."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"not the same episodes: {before.shape} before, {after.shape} after")
    finite = np.isfinite([before, after]).all()
    return t_interval(before - after if finite else np.full(after.shape, np.nan), groups)
