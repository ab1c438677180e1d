"""Watches the steps of a training for damage, and keeps the last snapshot that is sound."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from metaopt.console import log
from metaopt.self_improvement.alarms import LOOKS, Alarm, MonitorConfig
from metaopt.self_improvement.monitor import Monitor
from metaopt.self_improvement.workload import Snapshot, Step, Workload, copied

DAMAGE = ("nan", "divergence")
"""Alarms after which the state is not gone on with."""
LOOKS_AHEAD = max(LOOKS[kind] for kind in DAMAGE)
"""Steps after a snapshot in which damage to it shows."""


class Damage(NamedTuple):
    """The alarm that a state is damaged, and the data of the step at which it was seen."""

    alarm: Alarm
    stretch: tuple[int, int] | None = None


class Sentinel:
    """A `Monitor`, and a snapshot to go back to. A context manager, as the monitor is.

    The loss of a step says nothing about the state that it leaves, and divergence is called
    out at the second look, so a snapshot is only trusted some steps later.
    """

    def __init__(
        self,
        workload: Workload,
        start: Snapshot,
        alarms: list[Alarm],
        *,
        directory: Path,
        config: MonitorConfig,
        keep_every: int,
        flops_per_example: float | None = None,
        **monitor: Any,
    ):
        """Begins at a snapshot, which is taken for sound.

        Args:
          workload: the training.
          start: where it stands.
          alarms: those that are raised are added to it.
          directory: of the run.
          config: thresholds of the monitor.
          keep_every: steps from one snapshot to the next.
          flops_per_example: for the monitor; None where it is not known.
          monitor: further arguments of `Monitor`.
        """
        self._workload, self._alarms, self._keep_every = workload, alarms, keep_every
        self._flops_per_example = flops_per_example
        size = workload.examples_per_step(start.settings)
        self._monitor = Monitor(
            config,
            tokens_per_step=size * workload.tokens_per_example,
            directory=directory,
            name=workload.name,
            start=int(start.state.step),
            num_steps=workload.num_examples // size,
            **monitor,
        )
        self.trust(start)
        self.new_work(start)

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._monitor.__exit__(*error)

    def trust(self, snapshot: Snapshot) -> None:
        """From now on this is the snapshot to go back to."""
        self.good, self._candidate = copied(snapshot), None

    def keep(self, number: int, snapshot: Snapshot) -> None:
        """Offers the snapshot after a step; one of `keep_every` is kept until it is trusted."""
        if number % self._keep_every == 0 and self._candidate is None:
            self._candidate = number, copied(snapshot)

    def back(self) -> Snapshot:
        """The snapshot to go back to, bit for bit; all after it was never observed."""
        self._candidate = None
        self._monitor.forget_after(int(self.good.state.step))
        self.new_work(self.good)
        return copied(self.good)

    def new_work(self, snapshot: Snapshot) -> None:
        """A step is no longer what it was: how long steps took is forgotten."""
        size = self._workload.examples_per_step(snapshot.settings)
        flops = self._flops_per_example
        self._monitor.new_work(
            size * self._workload.tokens_per_example, None if flops is None else size * flops
        )

    def observe(
        self, number: int, step: Step, seconds: float | None = None
    ) -> tuple[Mapping[str, float], Damage | None]:
        """Waits for the metrics of a step; the scalars among them, and the damage, if any.

        Args:
          number: of the step.
          step: as it happened.
          seconds: that it took; up to now where it is not given.
        """
        metrics = jax.device_get(step.metrics)
        seconds = time.perf_counter() - step.began if seconds is None else seconds
        values = {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}
        times = {"step_seconds": seconds, "data_seconds": step.data_seconds}
        raised = [alarm for alarm in self._monitor.observe(number, values | times) if alarm.raised]
        for alarm in raised:
            if alarm.kind not in {before.kind for before in self._alarms}:
                log(f"{self._workload.name}, step {number}: {alarm.kind}: {alarm.message}")
            self._alarms.append(alarm)
        damage = [alarm for alarm in raised if alarm.kind in DAMAGE]
        if damage:
            return values, Damage(damage[0], (step.position, step.snapshot.examples))
        if self._candidate is not None and number >= self._candidate[0] + LOOKS_AHEAD:
            self.good, self._candidate = self._candidate[1], None
        return values, None
