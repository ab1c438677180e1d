"""Self-evaluation: how good a run is, where it is strong and weak, and what it costs.

Everything is measured on the same held-out episodes every time, so that two measurements are
paired: the noise of which episodes were drawn cancels in their difference. Losses are in the
unit of the run (nats a token, squared error), lower is better. Nothing is compiled, and nothing
here decides anything: an assessment is a report.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from metaopt.errors import UserError
from metaopt.ranges import Checked, NotNegative
from metaopt.statistics import (
    Classification,
    Curve,
    Interval,
    RankAmongRuns,
    classification_of,
    paired_fall,
    t_interval,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig(Checked):
    """Weights of the cost of a run, ``loss · L + seconds · T + gib · M``.

    Attributes:
      loss: Weight of the held-out loss L, a unit of the loss.
      seconds: Weight of the training time T, a second.
      gib: Weight of the peak of the memory M, a GiB.
    """

    loss: NotNegative = 1.0
    seconds: NotNegative = 0.0
    gib: NotNegative = 0.0


class GroupLoss(NamedTuple):
    """Held-out loss of one group: a domain or a class.

    Attributes:
      group: its name.
      loss: mean over its losses.
      improvement: fall of that since the last assessment, over the same episodes; or None.
      difference: its mean loss less that of all other losses, see `difference`; None if there
        is no other group.
    """

    group: str
    loss: Interval
    improvement: Interval | None
    difference: Interval | None


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
      cost: what `CostConfig` weights; None if the memory counts and is not known.
      gib: peak of the memory of the process, in GiB; None if not known.
      groups: losses by group, in the order of the held-out data; empty if there are no groups.
      strengths: groups whose loss is below that of the others, see `strengths_and_weaknesses`.
      weaknesses: groups whose loss is above it.
      classes: how well classes are told apart on held-out data; None if there are none.
      rank: rank among past runs of similar tasks, at the end of a run; None otherwise.
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
    cost: float | None = None
    gib: float | None = None
    groups: Sequence[GroupLoss] = ()
    strengths: Sequence[str] = ()
    weaknesses: Sequence[str] = ()
    classes: Classification | None = None
    rank: RankAmongRuns | None = None


def assess(
    losses: np.ndarray,
    last: tuple[Assessment, np.ndarray] | None = None,
    *,
    step: int,
    tokens: int,
    seconds: float,
    flops: float | None = None,
    resources: float = 1.0,
    groups: Sequence[str] = (),
    gib: float | None = None,
    cost: CostConfig | None = None,
    predictions: tuple[np.ndarray, np.ndarray] | None = None,
) -> Assessment:
    """The assessment of a run now, against the last one if there is one.

    Args:
      losses: ``[E]``, held-out losses of all episodes or sequences, always in one order.
      last: the assessment before and its losses, of the same episodes.
      step, tokens, seconds, flops: see `Assessment`.
      resources: resources in use: number of devices, say, or GiB of memory.
      groups: ``[E]``, the group of each loss; empty for none.
      gib: peak of the memory up to now; that of the last assessment counts too, since a resumed
        process does not know it.
      cost: weights of the cost; `CostConfig` if not given.
      predictions: probabilities ``[N, C]`` and labels ``[N]`` of held-out examples, see
        `classification_of`.

    Returns:
      `Assessment`. An efficiency is None if nothing was spent or it is not known.

    Raises:
      ValueError: the losses are not of the same episodes as the last ones, or the predictions
        do not fit one another.
      UserError: the groups are not one for each loss.
    """
    spent, operations, fall, last_losses = seconds, None, None, None
    if last is not None:
        before, last_losses = last
        spent, fall = seconds - before.seconds, paired_fall(last_losses, losses)
        if flops is not None and before.flops is not None:
            operations = flops - before.flops
        gib = max((x for x in (gib, before.gib) if x is not None), default=None)
    loss, gain = t_interval(np.asarray(losses, np.float64)), fall and fall.mean
    worth = _ratio(gain, spent), _ratio(gain, operations), _ratio(1.0, spent * resources)
    found = by_group(losses, groups, last_losses)
    strengths, weaknesses = strengths_and_weaknesses(found)
    return Assessment(
        *(step, tokens, seconds, flops, loss, fall, *worth),
        cost=total_cost(cost or CostConfig(), loss=loss.mean, seconds=seconds, gib=gib),
        gib=gib,
        groups=found,
        strengths=strengths,
        weaknesses=weaknesses,
        classes=None if predictions is None else classification_of(*predictions),
    )


def _ratio(gain: float | None, spent: float | None) -> float | None:
    return gain / spent if gain is not None and spent is not None and spent > 0 else None


def curve_of(assessments: Sequence[Assessment]) -> Curve:
    """The learning curve, ``(tokens, held-out loss)``."""
    return [(point.tokens, point.loss.mean) for point in assessments]


def rank_in_words(rank: RankAmongRuns) -> str:
    """One line on how a run ended among past ones."""
    apart = f"{abs(rank.to_best):.3g} {'below' if rank.to_best < 0 else 'above'}"
    return (
        f"loss {rank.loss:.4g}, rank {rank.rank} of {rank.n + 1} runs of similar tasks at equal "
        f"tokens, {apart if rank.to_best else 'equal to'} the best of the others"
    )


def total_cost(
    weights: CostConfig, *, loss: float, seconds: float, gib: float | None
) -> float | None:
    """The cost of a run, in the unit of its loss if that has weight 1.

    Args:
      weights: of the three parts; one whose weight is 0 may be unknown, NaN or inf.
      loss: mean held-out loss.
      seconds: training time.
      gib: peak of the memory; None if it is not known.

    Returns:
      The sum; None if the memory counts and is not known.
    """
    if weights.gib and gib is None:
        return None
    parts = ((weights.loss, loss), (weights.seconds, seconds), (weights.gib, gib or 0.0))
    return math.fsum(weight * value for weight, value in parts if weight)


def by_group(
    losses: np.ndarray, groups: Sequence[str], last_losses: np.ndarray | None = None
) -> tuple[GroupLoss, ...]:
    """The losses of each group, in the order in which groups occur.

    Args:
      losses: ``[E]``, one for each held-out episode.
      groups: ``[E]``, the group of each; empty for none.
      last_losses: ``[E]``, losses of the same episodes at the last assessment.

    Raises:
      UserError: the groups are not one for each loss.
    """
    if not len(groups):
        return ()
    if len(groups) != len(losses):
        raise UserError(
            f"groups names {len(groups)} losses, but evaluate gives {len(losses)}: give the "
            "group of each loss, or none"
        )
    names, losses = np.asarray(groups, str), np.asarray(losses, np.float64)
    found = []
    for name in dict.fromkeys(map(str, groups)):
        mine = names == name
        fall = None if last_losses is None else paired_fall(last_losses[mine], losses[mine])
        other = None if mine.all() else difference(losses[mine], losses[~mine])
        found.append(GroupLoss(name, t_interval(losses[mine]), fall, other))
    return tuple(found)


def strengths_and_weaknesses(
    found: Sequence[GroupLoss],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Groups whose loss is below that of the others, and above, beyond the 95 % interval.

    Best and worst first. Of groups that do not differ, one in 20 is named by chance.
    """
    known = [(x.difference, x.group) for x in found if x.difference is not None]
    known.sort(key=lambda pair: pair[0].mean)
    strengths = tuple(group for apart, group in known if apart.mean + apart.ci95 < 0)
    weaknesses = tuple(group for apart, group in known if apart.mean - apart.ci95 > 0)
    return strengths, weaknesses[::-1]


def difference(values: np.ndarray, others: np.ndarray) -> Interval:
    """The mean of ``[n]`` values less that of ``[m]`` others, none of which are paired.

    The interval is Welch's, ``se² = s²/n + s'²/m``. If one side is a single value, it is taken to
    spread as the other side does: a domain with one loss is judged as if it were one more of the
    others. The interval is NaN if neither side has two values.

    References:
      Welch, 1947, "The Generalization of 'Student's' Problem when Several Different Population
      Variances are Involved".
    """
    n, m = len(values), len(others)
    apart = float(np.mean(values) - np.mean(others))
    if min(n, m) < 2:
        spread = values if n > m else others
        freedom = n + m - 2
        error2 = np.var(spread, ddof=1) * (1 / n + 1 / m) if freedom else math.nan
        method = "Student t"
    else:
        parts = np.var(values, ddof=1) / n, np.var(others, ddof=1) / m
        error2, method = sum(parts), "Welch t"
        weighted = parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)
        freedom = error2**2 / weighted if weighted > 0 else n + m - 2
    if not math.isfinite(error2):
        return Interval(apart, math.nan, n + m)
    half = special.stdtrit(freedom, 0.975) * math.sqrt(error2)
    return Interval(apart, float(half), n + m, method)
