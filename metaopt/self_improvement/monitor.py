"""What a training says about itself in real time, step by step, and when it is in trouble.

`Monitor.observe` takes the numbers of a step from the host; it looks at nothing on a
device but its memory, and costs some tens of microseconds. What it finds goes to
``monitor.jsonl``, to TensorBoard and to whoever decides what to do about it.
"""

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import jax

from metaopt.errors import UserError
from metaopt.files import Line, append_json_line, keep_json_lines, one_line
from metaopt.ranges import Checked, Count, Positive, Range, Seconds, Steps
from metaopt.resources import MemoryUse, memory_use
from metaopt.training.recorder import TensorBoard
from metaopt.training.runs import slug

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


CONSECUTIVE_CHECKS = {
    "nan": 1,
    "divergence": 2,
    "plateau": 2,
    "slow": 3,
    "memory": 1,
    "starved": 2,
    "idle": 2,
}
"""Checks in a row that raise an alarm; at plateau, slow and idle one every `min_history` steps."""
AT_ONCE = ("divergence", "starved")


class Alarm(NamedTuple):
    """One kind of trouble that began or ended.

    Attributes:
      kind: ``nan``, ``divergence``, ``plateau``, ``slow``, ``memory``, ``starved`` or ``idle``.
      step: at which it was seen.
      raised: True where it began, False where it ended.
      value: what was seen, in the unit of ``limit``.
      limit: what it was compared with; nats (the unit of the loss) for ``divergence``,
        standard errors for ``plateau``, seconds a token for ``slow``, shares for the others.
      message: both in words.
    """

    kind: str
    step: int
    raised: bool
    value: float
    limit: float
    message: str


class Latch:
    """Hysteresis: raised after ``looks`` scores above 1 in a row, cleared after some low ones."""

    def __init__(self, looks: int, at_once: float, clear_share: float, clear_looks: int):
        self._looks, self._at_once = looks, at_once
        self._clear_share, self._clear_looks = clear_share, clear_looks
        self.raised_at: int | None = None
        self._in_a_row = 0

    def update(self, step: int, score: float) -> bool:
        """Whether the state changed."""
        if self.raised_at is None:
            self._in_a_row = self._in_a_row + 1 if score > 1 else 0
            changed = self._in_a_row >= self._looks or score > self._at_once
        else:
            self._in_a_row = self._in_a_row + 1 if score < self._clear_share else 0
            changed = self._in_a_row >= self._clear_looks
        if changed:
            self.raised_at, self._in_a_row = (step if self.raised_at is None else None), 0
        return changed

    def forget_after(self, step: int) -> None:
        """An alarm raised after this step never was."""
        self._in_a_row = 0
        if self.raised_at is not None and self.raised_at > step:
            self.raised_at = None


class Alarms:
    """All alarms of one training; `update` is called once a step."""

    def __init__(self, config: MonitorConfig):
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        c = self.config
        self._loss, self._time, self._utilisation = History(c), History(c), History(c)
        self._latches = {
            kind: Latch(
                looks, c.at_once if kind in AT_ONCE else math.inf, c.clear_share, c.clear_looks
            )
            for kind, looks in CONSECUTIVE_CHECKS.items()
        }

    def new_work(self) -> None:
        """Forget how long steps took: from now on they do something else."""
        self._time, self._utilisation = History(self.config), History(self.config)
        for kind in ("slow", "starved", "idle"):
            self._latches[kind].forget_after(-1)

    def forget_after(self, step: int) -> None:
        """As if nothing had been observed after this step, within what is remembered."""
        for part in (self._loss, self._time, self._utilisation, *self._latches.values()):
            part.forget_after(step)

    @property
    def active(self) -> tuple[str, ...]:
        """The kinds that are raised."""
        return tuple(k for k, latch in self._latches.items() if latch.raised_at is not None)

    def update(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this step raised or cleared.

        Args:
          step: its number; steps come in order, but for what was forgotten.
          values: as `Monitor.observe` takes them, and ``seconds_per_token`` (or a step,
            where tokens are not counted), ``utilisation`` and ``memory_share``.
        """
        found = []
        for kind, reading in self._read(step, values):
            latch = self._latches[kind]
            if latch.update(step, reading.score):
                raised = latch.raised_at is not None
                message = reading.message if raised else f"{kind} is over: {reading.message}"
                found.append(Alarm(kind, step, raised, reading.value, reading.limit, message))
        return found

    def _read(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, Reading]]:
        loss, config = values.get("loss", math.nan), self.config
        yield "nan", not_finite(values)
        if math.isfinite(loss):
            if self._loss.values:
                yield "divergence", divergence(loss, self._loss, config)
            full = self._loss.push(step, loss) and len(self._loss.values) >= config.plateau_window
            if full and "divergence" not in self.active:
                yield "plateau", plateau(self._loss.last(config.plateau_window), config)
        if "memory_share" in values:
            yield "memory", memory(values["memory_share"], config)
        if not self._time.is_young and {"data_seconds", "step_seconds"} <= values.keys():
            seconds = values["data_seconds"], values["step_seconds"]
            yield "starved", starved(*seconds, config)
        if self._time.push(step, values.get("seconds_per_token", math.nan)):
            yield "slow", slow(self._time, config)
        if self._utilisation.push(step, values.get("utilisation", math.nan)):
            yield "idle", idle(self._utilisation, config)


class Monitor:
    """Watches one training. A context manager: leaving it writes what is not written yet.

    ``monitor.jsonl`` gets three kinds of lines, all with ``name``, ``step`` and ``seconds``
    since the monitor was made: ``kind`` ``"step"`` with the means of all values since the
    line before it (null for what was not finite) and how many ``steps`` those were; ``"alarm"``
    with an `Alarm`; ``"forget"`` where all after ``step`` was taken back. A line a
    second, whatever the length of a step, and one an alarm.

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
        """Go on after step ``start``; later lines of ``name`` are dropped.

        Args:
          config: thresholds.
          tokens_per_step: on all devices together.
          flops_per_step: floating-point operations, likewise.
          peak_flops: FLOP/s of all devices together, see `resources.peak_flops`. Without
            these two the utilisation is not known, and there is no alarm for idle devices.
          directory: of the run; None writes nothing. Only process 0 writes.
          name: of this training in the run.
          start: steps that were done before.
          num_steps: length of the training, for whoever watches it.
          read_memory: what is in use of the memory, and its limits.
        """
        self.config = config
        self._alarms = Alarms(config)
        self._peak_flops, self._read_memory = peak_flops, read_memory
        self._writer = None
        if directory is not None and jax.process_index() == 0:
            self._writer = _Writer(Path(directory), name, start, num_steps)
        self._memory_step = -math.inf
        self._memory: dict[str, float] = {}
        self._begin_line(start)
        self.new_work(tokens_per_step, flops_per_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._write_line()
        if self._writer is not None:
            self._writer.close()

    @property
    def active(self) -> tuple[str, ...]:
        """The kinds of alarms that are raised."""
        return self._alarms.active

    def new_work(self, tokens_per_step: float, flops_per_step: float | None = None) -> None:
        """From now on a step does other work (another batch, say): forget how long it took."""
        self._tokens_per_step, self._flops_per_step = tokens_per_step, flops_per_step
        self._alarms.new_work()

    def reset(self) -> None:
        """Forget all that was observed, and every alarm, as for a new training."""
        self._alarms.reset()

    def forget_after(self, step: int) -> None:
        """After a roll-back to ``step``: what is normal is again what it was then.

        Exact while the roll-back is not longer than ``history`` less ``window`` steps.
        Alarms raised after it never were; one that was cleared after it stays cleared.
        """
        self._alarms.forget_after(step)
        self._write_line()
        if self._writer is not None:
            self._writer.write("forget", step, {"active": list(self.active)})
        self._begin_line(step)
        self._memory_step = -math.inf

    def observe(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Takes the numbers of one step.

        Args:
          step: its number, from 1.
          values: floats on the host, all of them optional: ``loss``, ``grad_norm``,
            ``update_norm``; in seconds ``step_seconds`` (the whole step),
            ``data_seconds`` (of it, waiting for data) and ``collective_seconds``; any other.
            An alarm for which something is missing is silent.

        Returns:
          The alarms that were raised or cleared. Processes see different times, so what
          all of them must do alike, one of them has to decide.
        """
        shares = {}
        if step - self._memory_step >= self.config.memory_every:
            use, self._memory_step = self._read_memory(), step
            shares["memory_share"] = use.share
            self._memory = {k: v for k, v in use._asdict().items() if v is not None} | shares
        alarms = self._alarms.update(step, {**values, **self._rates(values), **shares})
        self._step, self._line_steps = step, self._line_steps + 1
        for key, value in values.items():
            self._sums[key] += value
            self._counts[key] += 1
        if alarms or time.monotonic() - self._line_began >= self.config.seconds_between_lines:
            self._write_line()
        if self._writer is not None:
            for alarm in alarms:
                self._writer.write("alarm", step, {"alarm": alarm._asdict()})
        return alarms

    def _rates(self, values: Mapping[str, float]) -> dict[str, float]:
        """What follows from the time of a step."""
        seconds = values.get("step_seconds", 0.0)
        if not 0.0 < seconds < math.inf:
            return {}
        tokens = self._tokens_per_step
        rates = {"seconds_per_token": seconds / tokens, "tokens_per_second": tokens / seconds}
        if self._flops_per_step is not None:
            rates["flops_per_second"] = self._flops_per_step / seconds
            if self._peak_flops is not None:
                rates["utilisation"] = rates["flops_per_second"] / self._peak_flops
        return rates

    def _begin_line(self, step: int) -> None:
        self._step, self._line_steps, self._line_began = step, 0, time.monotonic()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def _write_line(self) -> None:
        if self._line_steps == 0:
            return
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        if self._writer is not None:
            values = {"steps": self._line_steps} | means | self._rates(means) | self._memory
            self._writer.write("step", self._step, values | {"active": list(self.active)})
        self._begin_line(self._step)


class _Writer:
    """Lines of ``monitor.jsonl``, and the numbers among them as TensorBoard's curves."""

    def __init__(self, directory: Path, name: str, start: int, num_steps: int | None):
        self._path = directory / "monitor.jsonl"
        self._common = {"name": name} | ({"num_steps": num_steps} if num_steps else {})
        self._began = time.monotonic()
        with one_line(directory, "written"):
            directory.mkdir(parents=True, exist_ok=True)
        keep_json_lines(self._path, lambda x: x["name"] != name or x["step"] <= start, Line)
        self._tensorboard = TensorBoard(directory / "tensorboard" / f"{slug(name)}-monitor", start)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        line = {"kind": kind} | self._common | {"step": step} | dict(values)
        append_json_line(self._path, line | {"seconds": seconds})
        curves = {f"monitor/{key}": value for key, value in values.items()}
        if kind == "alarm":
            curves = {f"alarm/{values['alarm']['kind']}": float(values["alarm"]["raised"])}
        self._tensorboard.add_scalars(step, curves)

    def close(self) -> None:
        self._tensorboard.close()
