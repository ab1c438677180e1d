"""Alarms with hysteresis.

An alarm is raised when its score (see `symptoms`) has been above 1 for so many looks in
a row, and cleared when it has been below `MonitorConfig.clear_share` for so many.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from metaopt.self_improvement import symptoms
from metaopt.self_improvement.symptoms import History, MonitorConfig, Reading

LOOKS = {"nan": 1, "divergence": 2, "plateau": 2, "slow": 3, "memory": 1, "starved": 2, "idle": 2}
"""Looks in a row that raise an alarm; at plateau, slow and idle one every `min_history` steps."""
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
            for kind, looks in LOOKS.items()
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
        yield "nan", symptoms.not_finite(values)
        if math.isfinite(loss):
            if self._loss.values:
                yield "divergence", symptoms.divergence(loss, self._loss, config)
            full = self._loss.push(step, loss) and len(self._loss.values) >= config.plateau_window
            if full and "divergence" not in self.active:
                yield "plateau", symptoms.plateau(self._loss.last(config.plateau_window), config)
        if "memory_share" in values:
            yield "memory", symptoms.memory(values["memory_share"], config)
        if not self._time.is_young and {"data_seconds", "step_seconds"} <= values.keys():
            seconds = values["data_seconds"], values["step_seconds"]
            yield "starved", symptoms.starved(*seconds, config)
        if self._time.push(step, values.get("seconds_per_token", math.nan)):
            yield "slow", symptoms.slow(self._time, config)
        if self._utilisation.push(step, values.get("utilisation", math.nan)):
            yield "idle", symptoms.idle(self._utilisation, config)
