"""What a training says about itself in real time, step by step, and when it is in trouble.

`Monitor.observe` takes the numbers of a step from the host; it looks at nothing on a
device but its memory, and costs some tens of microseconds. What it finds goes to
``monitor.jsonl``, to TensorBoard and to whoever decides what to do about it.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax

from metaopt.files import Line, append_json_line, keep_json_lines, one_line
from metaopt.resources import MemoryUse, memory_use
from metaopt.self_improvement.alarms import Alarm, Alarms
from metaopt.self_improvement.symptoms import MonitorConfig
from metaopt.training.recorder import TensorBoard
from metaopt.training.runs import slug

__all__ = ["Alarm", "Monitor", "MonitorConfig"]


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
        config: MonitorConfig = MonitorConfig(),  # noqa: B008
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
