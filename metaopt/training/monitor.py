"""Monitoring of a training: rates, anomaly scores, and alarms with hysteresis.

Every kind of anomaly has a score that is 1 at its limit and grows with the trouble. What is
normal is taken from a bounded history, kept with its steps so that a rollback can discard what
came after it. `Monitor.observe` takes the numbers of a step from the host; on a device it
reads only the memory in use, and it costs some tens of microseconds.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from metaopt.console import is_first_process
from metaopt.files import Line, append_json_line, keep_json_lines, one_line
from metaopt.ranges import Checked, Positive, Range, Seconds
from metaopt.resources import MemoryUse, memory_use
from metaopt.training.recorder import TensorBoard
from metaopt.training.runs import slug

WINDOW = 32  # steps over which a median and a spread (largest less median) are taken
HISTORY = 512  # steps that are remembered, to compare with the best window among them
MIN_HISTORY = 8  # steps before the first comparison, and between two summaries
PLATEAU_WINDOW = 400  # steps; the mean loss of their second half is compared with the first's
MEMORY_INTERVAL = 2  # steps between two readings of the memory

CONSECUTIVE_CHECKS = dict(nan=1, divergence=2, plateau=2, slow=3, memory=1, starved=2, idle=2)
"""Checks in a row that raise an alarm; plateau, slow and idle are checked each `MIN_HISTORY`."""
IMMEDIATE, IMMEDIATE_FACTOR = ("divergence",), 10.0
"""Alarms that one score above the factor raises; the limit of divergence in its first steps. One
batch that is waited for, on a busy machine, is not worth a response."""
CLEAR_SHARE, CLEAR_CHECKS = 0.8, 5  # score below which, so often in a row, an alarm is cleared
SPEED = ("slow", "starved", "idle")  # alarms about the time of a step
TINY = 1e-6  # rise of a loss that is always allowed: at 0, rounding is infinitely much more

Factor = Annotated[float, Range(1.001, 1e12)]
Share = Annotated[float, Range(1e-9, 0.999)]


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Checked):
    """Thresholds of the alarms, and the interval of the lines.

    Attributes:
      divergence_factor: the loss diverges above this many times the best median, plus ...
      divergence_spreads: ... this many spreads.
      plateau_errors: standard errors of a difference in loss; a smaller improvement is noise.
      slow_factor: limit of the seconds a token, as a multiple of their best median.
      memory_share: limit of the share of the host's or a device's memory in use.
      starved_share: limit of the share of the step time spent waiting for data.
      idle_utilisation: least median share of the peak FLOP/s.
      least_step_seconds: time of a step below which the alarms about speed are silent: dispatching
        and the noise of the machine are then most of it.
      seconds_between_lines: time over which a line of ``monitor.jsonl`` and the points in
        TensorBoard are means; 0 writes a line a step.
    """

    divergence_factor: Factor = 1.5
    divergence_spreads: Positive = 3.0
    plateau_errors: Positive = 2.0
    slow_factor: Factor = 1.5
    memory_share: Share = 0.9
    starved_share: Share = 0.5
    idle_utilisation: Share = 0.01
    least_step_seconds: Seconds = 0.02
    seconds_between_lines: Seconds = 1.0


class Alarm(NamedTuple):
    """One kind of anomaly that began or ended.

    Attributes:
      kind: ``nan``, ``divergence``, ``plateau``, ``slow``, ``memory``, ``starved`` or ``idle``.
      step: step at which it was seen.
      raised: True if it began, False if it ended.
      value: what was seen, in the unit of ``limit``.
      limit: what it was compared with; in the unit of the loss for ``divergence``, standard
        errors for ``plateau``, seconds a token for ``slow``, shares for the others.
      message: both in words.
    """

    kind: str
    step: int
    raised: bool
    value: float
    limit: float
    message: str


class Reading(NamedTuple):
    """Result of one check of one kind; ``score`` is 1 at the limit, more is worse."""

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

    def __init__(self):
        self.values: deque[tuple[int, float]] = deque(maxlen=HISTORY)
        self.summaries: deque[Summary] = deque(maxlen=HISTORY // MIN_HISTORY)

    def push(self, step: int, value: float) -> bool:
        """Adds a finite value; True if that gave a summary of at least `MIN_HISTORY` values."""
        if not math.isfinite(value):
            return False
        self.values.append((step, value))
        is_early = self.summaries and step - self.summaries[-1].step < MIN_HISTORY
        if self.is_young or is_early:
            return False
        self.summaries.append(self._summary())
        return True

    def _summary(self) -> Summary:
        recent = self.last(WINDOW)
        median = statistics.median(recent)
        return Summary(median, max(recent) - median, self.values[-1][0])

    @property
    def is_young(self) -> bool:
        """Whether there are too few values to say what is normal."""
        return len(self.values) < MIN_HISTORY

    @property
    def best(self) -> Summary:
        """The summary with the lowest median; of all values as long as there are too few."""
        return min(self.summaries, default=None) or self._summary()

    def last(self, count: int) -> list[float]:
        """The newest values, newest first; fewer if there are fewer."""
        return [value for _, value in itertools.islice(reversed(self.values), count)]

    def noted(self) -> dict[str, Any]:
        """All of it as JSON, for a checkpoint; `restore` reads it."""
        return {"values": list(self.values), "summaries": list(self.summaries)}

    def restore(self, noted: Mapping[str, Any]) -> None:
        """Becomes what `noted` said."""
        self.values.extend((step, value) for step, value in noted["values"])
        self.summaries.extend(Summary(*summary) for summary in noted["summaries"])

    def discard_after(self, step: int) -> None:
        """Brings back what there was after this step."""
        while self.values and self.values[-1][0] > step:
            self.values.pop()
        while self.summaries and self.summaries[-1].step > step:
            self.summaries.pop()


def divergence(loss: float, history: History, config: MonitorConfig) -> Reading:
    """How far the loss is above its best median, relative to what noise would explain."""
    best = history.best
    allowed = (config.divergence_factor - 1) * abs(best.median)
    allowed += config.divergence_spreads * best.spread
    if history.is_young:
        allowed *= IMMEDIATE_FACTOR
    excess, limit = loss - best.median, best.median + allowed
    where = "above" if loss > limit else "below"
    message = f"the loss, {loss:.4g}, is {where} {limit:.4g}; its best median is {best.median:.4g}"
    return Reading(excess / max(allowed, TINY), loss, limit, message)


def plateau(newest_first: list[float], config: MonitorConfig) -> Reading:
    """Whether the mean of the second half improves on the first by more than its standard error."""
    after, before = np.split(np.array(newest_first), [len(newest_first) // 2])
    means, limit = (statistics.fmean(before), statistics.fmean(after)), config.plateau_errors
    error = math.sqrt(before.var() / len(before) + after.var() / len(after))
    gain = means[0] - means[1]
    errors = gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0
    message = (
        f"in {len(newest_first)} steps the mean loss went from {means[0]:.4g} to {means[1]:.4g}, "
        f"an improvement of {errors:.2g} standard errors (limit {limit:g})"
    )
    return Reading(limit / errors if errors > 0 else math.inf, errors, limit, message)


class Latch:
    """Hysteresis of one kind of alarm; ``raised_at`` is the step at which it was raised."""

    def __init__(self, kind: str):
        self._checks = CONSECUTIVE_CHECKS[kind]
        self._immediate = IMMEDIATE_FACTOR if kind in IMMEDIATE else math.inf
        self.raised_at: int | None = None
        self._in_a_row = 0

    def update(self, step: int, score: float) -> bool:
        """Whether the state changed."""
        raised = self.raised_at is not None
        counts = score < CLEAR_SHARE if raised else score > 1
        self._in_a_row = self._in_a_row + 1 if counts else 0
        changed = self._in_a_row >= (CLEAR_CHECKS if raised else self._checks)
        if changed or (not raised and score > self._immediate):
            self.raised_at, self._in_a_row = (None if raised else step), 0
            return True
        return False

    def noted(self) -> list[int | None]:
        """All of it as JSON, for a checkpoint; `restore` reads it."""
        return [self.raised_at, self._in_a_row]

    def restore(self, noted: Sequence[Any]) -> None:
        """Becomes what `noted` said."""
        self.raised_at, self._in_a_row = noted

    def discard_after(self, step: int) -> None:
        """Clears an alarm that was raised after this step."""
        self._in_a_row = 0
        if self.raised_at is not None and self.raised_at > step:
            self.raised_at = None


class Monitor(contextlib.AbstractContextManager):
    """Watches one training. A context manager: leaving it writes what is not yet written.

    ``monitor.jsonl`` gets three kinds of lines, all with ``name``, ``step`` and ``seconds``
    since the monitor was made: ``kind`` ``"step"`` with the means of all values since the
    line before it (null for NaN or inf) and the number of ``steps``; ``"alarm"`` with an
    `Alarm`; ``"forget"`` if all after ``step`` was discarded.

    Example::

        with Monitor(tokens_per_step=4096, directory=run.directory) as monitor:
            for step in range(1, num_steps + 1):
                ...
                for alarm in monitor.observe(step, {"loss": loss, "step_seconds": seconds}):
                    print(alarm.message)
    """

    def __init__(
        self,
        config: MonitorConfig = MonitorConfig(),
        *,
        tokens_per_step: float,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        directory: Path | str | None = None,
        name: str = "train",
        start: int = 0,
        num_steps: int | None = None,
        read_memory: Callable[[], MemoryUse] = memory_use,
    ):
        """Continues after step ``start``; later lines of ``name`` are dropped.

        Args:
          config: thresholds.
          tokens_per_step, flops_per_step: tokens and operations on all devices together.
          peak_flops: FLOP/s of all devices together, see `peak_flops`. Without these two the
            utilisation is not known, and there is no alarm for idle devices.
          directory: directory of the run; None writes nothing. Only process 0 writes.
          name: name of this training in the run.
          start: steps that were done before.
          num_steps: length of the training, for whoever watches it.
          read_memory: gives the memory in use and its limits.
        """
        self._config, self._loss = config, History()
        self._latches = {kind: Latch(kind) for kind in CONSECUTIVE_CHECKS}
        self._peak_flops, self._read_memory = peak_flops, read_memory
        self._common = {"name": name} | ({"num_steps": num_steps} if num_steps else {})
        self._path, self._began = None, time.monotonic()
        if directory is not None and is_first_process():
            directory = Path(directory)
            self._path = directory / "monitor.jsonl"
            with one_line(directory, "written"):
                directory.mkdir(parents=True, exist_ok=True)
            keep_json_lines(self._path, lambda x: x["name"] != name or x["step"] <= start, Line)
            curves = directory / "tensorboard" / f"{slug(name)}-monitor"
            self._tensorboard = TensorBoard(curves, start)
        self._memory_step, self._memory = -math.inf, {}
        self._begin_line(start)
        self.reset_speed(tokens_per_step, flops_per_step)

    def __exit__(self, *_) -> None:
        self._write_line()
        if self._path is not None:
            self._tensorboard.close()

    @property
    def active(self) -> tuple[str, ...]:
        """The kinds of alarms that are raised."""
        return tuple(k for k, latch in self._latches.items() if latch.raised_at is not None)

    def reset_speed(self, tokens_per_step: float, flops_per_step: float | None = None) -> None:
        """Forgets how long a step took: from now on it does other work, on another batch, say."""
        self._tokens_per_step, self._flops_per_step = tokens_per_step, flops_per_step
        self._time, self._utilisation = History(), History()
        for kind in SPEED:
            self._latches[kind].discard_after(-1)

    def noted(self) -> dict[str, Any]:
        """What is normal and which alarms are raised, as JSON, for a checkpoint."""
        latches = {kind: latch.noted() for kind, latch in self._latches.items()}
        histories = [part.noted() for part in (self._loss, self._time, self._utilisation)]
        read_at = self._memory_step if self._memory_step > -math.inf else None
        return {"latches": latches, "histories": histories, "memory_step": read_at}

    def restore(self, noted: Mapping[str, Any] | None) -> None:
        """What `noted` said, if anything, so that a resumed run raises the same alarms."""
        if noted is None:
            return
        for part, found in zip(
            (self._loss, self._time, self._utilisation), noted["histories"], strict=True
        ):
            part.restore(found)
        for kind, found in noted["latches"].items():
            self._latches[kind].restore(found)
        if noted["memory_step"] is not None:
            self._memory_step = noted["memory_step"]

    def discard_after(self, step: int) -> None:
        """After a rollback to ``step``: what is normal is again what it was then.

        Exact if the rollback is not longer than `HISTORY` less `WINDOW` steps. Alarms raised
        after it are discarded; one that was cleared after it stays cleared.
        """
        for part in (self._loss, self._time, self._utilisation, *self._latches.values()):
            part.discard_after(step)
        self._write_line()
        self._write("forget", step, {"active": list(self.active)})
        self._begin_line(step)
        self._memory_step = -math.inf

    def observe(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Takes the numbers of one step.

        Args:
          step: number of the step, from 1.
          values: floats on the host, all of them optional: ``loss``, ``grad_norm``,
            ``update_norm``; in seconds ``step_seconds`` (the whole step),
            ``data_seconds`` (of it, waiting for data) and ``collective_seconds``; any other.
            An alarm for which something is missing is silent.

        Returns:
          The alarms that were raised or cleared. Processes see different times, so what all
          of them must do alike, one of them has to decide.
        """
        known = {**values, **self._rates(values)}
        if step - self._memory_step >= MEMORY_INTERVAL:
            use, self._memory_step = self._read_memory(), step
            self._memory = {k: v for k, v in use._asdict().items() if v is not None}
            known["memory_share"] = self._memory["memory_share"] = use.share
        alarms = []
        for kind, (score, value, limit, message) in self._read(step, known):
            latch = self._latches[kind]
            if latch.update(step, score):
                raised = latch.raised_at is not None
                message = message if raised else f"{kind} is over: {message}"
                alarms.append(Alarm(kind, step, raised, value, limit, message))
        self._step, self._line_steps = step, self._line_steps + 1
        self._sums.update(values)
        self._counts.update(values.keys())
        if alarms or time.monotonic() - self._line_began >= self._config.seconds_between_lines:
            self._write_line()
        for alarm in alarms:
            point = {f"alarm/{alarm.kind}": float(alarm.raised)}
            self._write("alarm", step, {"alarm": alarm._asdict()}, point)
        return alarms

    def _read(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, Reading]]:
        loss, config = values.get("loss", math.nan), self._config
        name, value = next((v for v in values.items() if not math.isfinite(v[1])), ("", 0.0))
        message = f"{name} is {value}" if name else "all values are finite"
        yield "nan", Reading(math.inf if name else 0.0, value, math.inf, message)
        if math.isfinite(loss):
            if self._loss.values:
                yield "divergence", divergence(loss, self._loss, config)
            full = self._loss.push(step, loss) and len(self._loss.values) >= PLATEAU_WINDOW
            if full and "divergence" not in self.active:
                yield "plateau", plateau(self._loss.last(PLATEAU_WINDOW), config)
        if (share := values.get("memory_share")) is not None:
            limit = config.memory_share
            message = f"{share:.0%} of the memory is in use (limit {limit:.0%})"
            yield "memory", Reading(share / limit, share, limit, message)
        timed = {"data_seconds", "step_seconds"} <= values.keys()
        if not self._time.is_young and timed and not self._is_short(values["step_seconds"]):
            share = min(1.0, values["data_seconds"] / max(values["step_seconds"], 1e-12))
            limit = config.starved_share
            odds = share / max(1 - share, 1e-12)
            message = f"{share:.0%} of the step is spent waiting for data (limit {limit:.0%})"
            yield "starved", Reading(odds * (1 - limit) / limit, share, limit, message)
        has_time = self._time.push(step, values.get("seconds_per_token", math.nan))
        last = self._time.summaries[-1].median if self._time.summaries else math.inf
        is_short = self._is_short(last * self._tokens_per_step)
        if has_time and not is_short:
            now, factor = last, config.slow_factor
            limit = factor * self._time.best.median
            message = f"{now:.3g} s a token; the limit of {limit:.3g} is {factor:g}x the best"
            yield "slow", Reading(now / max(limit, 1e-30), now, limit, message)
        is_silent = is_short or "starved" in self.active  # who waits for data is idle, too
        if self._utilisation.push(step, values.get("utilisation", math.nan)) and not is_silent:
            now, limit = self._utilisation.summaries[-1].median, config.idle_utilisation
            message = f"the devices reach {now:.2%} of their peak FLOP/s (limit {limit:.2%})"
            yield "idle", Reading(limit / max(now, 1e-30), now, limit, message)

    def _is_short(self, seconds: float) -> bool:
        """Whether a step of this time is too short for alarms about speed."""
        return seconds < self._config.least_step_seconds

    def _rates(self, values: Mapping[str, float]) -> dict[str, float]:
        """What follows from the time of a step."""
        seconds = values.get("step_seconds", 0.0)
        if not 0.0 < seconds < math.inf:
            return {}
        tokens, flops = self._tokens_per_step, self._flops_per_step
        rates = {"seconds_per_token": seconds / tokens, "tokens_per_second": tokens / seconds}
        if flops is not None:
            rates["flops_per_second"] = flops / seconds
            if self._peak_flops is not None:
                rates["utilisation"] = flops / seconds / self._peak_flops
        return rates

    def _begin_line(self, step: int) -> None:
        self._step, self._line_steps, self._line_began = step, 0, time.monotonic()
        self._sums, self._counts = Counter(), Counter()

    def _write_line(self) -> None:
        if self._line_steps > 0:
            means = {key: total / self._counts[key] for key, total in self._sums.items()}
            values = {"steps": self._line_steps} | means | self._rates(means) | self._memory
            points = {f"monitor/{key}": value for key, value in values.items()}
            self._write("step", self._step, values | {"active": list(self.active)}, points)
            self._begin_line(self._step)

    def _write(self, kind: str, step: int, values: Mapping, points: Mapping[str, float] = {}):
        """Writes a line of ``monitor.jsonl`` and points on curves of TensorBoard."""
        if self._path is not None:
            seconds = round(time.monotonic() - self._began, 3)
            line = {"kind": kind} | self._common | {"step": step} | dict(values)
            append_json_line(self._path, line | {"seconds": seconds})
            self._tensorboard.add_scalars(step, points)
