"""What trouble looks like: thresholds, the past that they are relative to, and scores.

Every kind of trouble is a score that is 1 at its limit and grows with the trouble. What
is normal is taken from a bounded past that is kept with its steps, so that a roll-back
can forget what came after it.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from metaopt.errors import UserError
from metaopt.ranges import Checked, Count, Positive, Range, Seconds, Steps

TINY = 1e-6
"""What a loss may rise in any case: at a loss of 0 any rounding is infinitely much more."""

Factor = Annotated[float, Range(1.001, 1e12)]
PartOf = Annotated[float, Range(1e-9, 0.999)]


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Checked):
    """Thresholds of the alarms, and how often what is done.

    Attributes:
      window: steps over which a median and a spread (largest less median) are taken.
      history: steps that are remembered, to compare with the best window among them.
      min_history: steps before the first comparison, and between two summaries.
      divergence_factor: the loss diverges above this many times the best median, where ...
      divergence_spreads: ... this many spreads are added to that limit.
      plateau_window: steps; the mean loss of their second half is compared with the first's.
      plateau_errors: standard errors of that difference; an improvement below is noise.
      slow_factor: of the best median of the seconds a token.
      memory_share: of the memory of the host or a device.
      starved_share: of the step time, spent waiting for data.
      idle_utilisation: achieved share of the peak FLOP/s, as the median of a window.
      at_once: so many times the limit raise divergence and starved input without waiting
        for a second step; the limit of divergence while ``min_history`` is not reached.
      clear_share: of the limit, below which an alarm is cleared ...
      clear_looks: ... when so many looks in a row found that.
      memory_every: steps from one reading of the memory to the next.
      seconds_between_lines: a line in ``monitor.jsonl`` and points in TensorBoard are means
        over this time; 0 is a line a step.
    """

    window: Count = 32
    history: Count = 512
    min_history: Count = 8
    divergence_factor: Factor = 1.5
    divergence_spreads: Positive = 3.0
    plateau_window: Count = 400
    plateau_errors: Positive = 2.0
    slow_factor: Factor = 1.5
    memory_share: PartOf = 0.9
    starved_share: PartOf = 0.5
    idle_utilisation: PartOf = 0.01
    at_once: Positive = 10.0
    clear_share: PartOf = 0.8
    clear_looks: Steps = 5
    memory_every: Steps = 2
    seconds_between_lines: Seconds = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.min_history <= self.window <= self.history >= self.plateau_window:
            raise UserError(
                f"min_history {self.min_history} must not exceed window {self.window}, nor "
                f"window and plateau_window {self.plateau_window} the history {self.history}"
            )


class Reading(NamedTuple):
    """What one look at one kind of trouble found; ``score`` is 1 at the limit, more is worse."""

    score: float
    value: float
    limit: float
    message: str


class Summary(NamedTuple):
    """Median of a window, and its spread: the largest value less the median."""

    median: float
    spread: float
    step: int


class History:
    """The last values of one quantity, and summaries of windows of them. Bounded."""

    def __init__(self, config: MonitorConfig):
        self._window, self._every = config.window, config.min_history
        self.values: deque[tuple[int, float]] = deque(maxlen=config.history)
        self.summaries: deque[Summary] = deque(maxlen=config.history // config.min_history)

    def push(self, step: int, value: float) -> bool:
        """Adds a finite value; True where that gave a summary of a full enough window."""
        if not math.isfinite(value):
            return False
        self.values.append((step, value))
        early = len(self.values) <= self._every
        if not early and step - self.summaries[-1].step < self._every:
            return False
        if early:  # of fewer values than a summary should have: replaced, not kept
            self.summaries.clear()
        self._summarise()
        return not self.is_young

    def _summarise(self) -> None:
        recent = self.last(self._window)
        median = statistics.median(recent)
        self.summaries.append(Summary(median, max(recent) - median, self.values[-1][0]))

    @property
    def is_young(self) -> bool:
        """Whether there are too few values to say what is normal."""
        return len(self.values) < self._every

    @property
    def best(self) -> Summary:
        """The summary with the lowest median."""
        return min(self.summaries)

    def last(self, count: int) -> list[float]:
        """The newest values, newest first; fewer where there are fewer."""
        return [self.values[-i][1] for i in range(1, min(count, len(self.values)) + 1)]

    def forget_after(self, step: int) -> None:
        """As if nothing after this step had been pushed."""
        for entries, step_of in ((self.values, lambda e: e[0]), (self.summaries, lambda e: e.step)):
            while entries and step_of(entries[-1]) > step:
                entries.pop()
        if self.values and not self.summaries:  # back among the first few values
            self._summarise()


def not_finite(values: Mapping[str, float]) -> Reading:
    """Score infinity where any value is NaN or infinite, 0 elsewhere."""
    for name, value in values.items():
        if not math.isfinite(value):
            return Reading(math.inf, value, math.inf, f"{name} is {value}")
    return Reading(0.0, 0.0, math.inf, "all values are finite")


def divergence(loss: float, history: History, config: MonitorConfig) -> Reading:
    """How far the loss is above the best median there was, against what noise would explain."""
    best = history.best
    allowed = (config.divergence_factor - 1) * abs(best.median)
    allowed += config.divergence_spreads * best.spread
    if history.is_young:
        allowed *= config.at_once
    excess, limit = loss - best.median, best.median + allowed
    score = excess / max(allowed, TINY)
    where = "above" if loss > limit else "below"
    message = f"the loss, {loss:.4g}, is {where} {limit:.4g}; its best median is {best.median:.4g}"
    return Reading(score, loss, limit, message)


def plateau(newest_first: list[float], config: MonitorConfig) -> Reading:
    """Whether the mean of the second half improves on the first by more than its standard error."""
    half = len(newest_first) // 2
    after, before = newest_first[:half], newest_first[half:]
    means = statistics.fmean(before), statistics.fmean(after)
    variance = sum(
        sum((x - mean) ** 2 for x in part) / len(part) ** 2
        for mean, part in zip(means, (before, after), strict=True)
    )
    gain, error, limit = means[0] - means[1], math.sqrt(variance), config.plateau_errors
    errors = gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0
    score = limit / errors if errors > 0 else math.inf
    message = (
        f"in {len(newest_first)} steps the mean loss went from {means[0]:.4g} to {means[1]:.4g}, "
        f"an improvement of {errors:.2g} standard errors (limit {limit:g})"
    )
    return Reading(score, errors, limit, message)


def starved(data_seconds: float, step_seconds: float, config: MonitorConfig) -> Reading:
    """Time waited for data against the rest of the step, at the share that is the limit 1."""
    share, limit = min(1.0, data_seconds / max(step_seconds, 1e-12)), config.starved_share
    odds = share / max(1 - share, 1e-12)
    message = f"{share:.0%} of the step is spent waiting for data (limit {limit:.0%})"
    return Reading(odds * (1 - limit) / limit, share, limit, message)


def slow(history: History, config: MonitorConfig) -> Reading:
    """The newest median of the time against the best one."""
    now, limit = history.summaries[-1].median, config.slow_factor * history.best.median
    message = f"{now:.3g} s a token; the limit of {limit:.3g} is {config.slow_factor:g}x the best"
    return Reading(now / max(limit, 1e-30), now, limit, message)


def idle(history: History, config: MonitorConfig) -> Reading:
    """The share of the peak FLOP/s that is reached, as a median."""
    now, limit = history.summaries[-1].median, config.idle_utilisation
    message = f"the devices reach {now:.2%} of their peak FLOP/s (limit {limit:.2%})"
    return Reading(limit / max(now, 1e-30), now, limit, message)


def memory(share: float, config: MonitorConfig) -> Reading:
    """The share in use of the memory of the host or of the fullest device."""
    limit = config.memory_share
    return Reading(
        share / limit, share, limit, f"{share:.0%} of the memory is used (limit {limit:.0%})"
    )
