"""Metrics of a meta-training run: written down, and watched for divergence."""

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from metaopt.console import is_first_process, log, printable
from metaopt.errors import Diverged
from metaopt.files import Line, append_json_line, keep_json_lines
from metaopt.training.progress import Progress
from metaopt.training.runs import slug
from metaopt.training.types import TrainConfig, Training
from metaopt.types import Metrics

TAGS = {"loss": "loss/train", "valid_loss": "loss/validation"}
"""TensorBoard's names of the losses: what is before the slash is shown side by side."""
SECONDS_BETWEEN_FLUSHES = 30.0  # of TensorBoard's curves, each of which waits for the disk


def is_due(before: int, step: int, every: int) -> bool:
    """Whether steps ``before + 1`` to ``step`` hold a multiple of ``every``; 0 is never."""
    return every > 0 and step // every > before // every


class Recorder:
    """Watches the metrics of a run and writes them down. A context manager."""

    def __init__(
        self,
        training: Training,
        config: TrainConfig,
        directory: Path | None,
        *,
        start: int,
        notes: dict[str, Any],
    ):
        """Append to ``metrics.jsonl`` from step ``start``; later lines of the name are dropped.

        Args:
          training: what is recorded; its name and its sizes are read.
          config: interval of the lines, length, and limit of the loss.
          directory: directory of the run; None writes nothing.
          start: step of the state that the run starts from, or is resumed from.
          notes: what `notes` gave when that state was saved.
        """
        self.name = name = training.name
        self._training, self._config, self._seen = training, config, start
        self._first_loss: float | None = notes.get("first_loss")
        self._began = time.monotonic() - notes.get("seconds", 0.0)
        self._mark: tuple[int, float] | None = None  # from where on throughput is measured
        self._throughput: dict[str, float] = {}
        self._path = self._tensorboard = None
        self._curves, self._start = Path(), start
        if directory is not None and is_first_process():
            self._path = directory / "metrics.jsonl"
            keep_json_lines(self._path, lambda x: x["name"] != name or x["step"] <= start, Line)
            self._curves = directory / "tensorboard" / slug(name)
        self._progress = Progress(name, total=config.num_steps, start=start, first="compiling")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self._progress.__exit__()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def notes(self) -> dict[str, Any]:
        """What a resumed run needs beside the state."""
        return {"first_loss": self._first_loss, "seconds": time.monotonic() - self._began}

    def record(self, step: int, metrics: Metrics) -> None:
        """Wait for the metrics of a step, stop if they are unsound, log if it is due."""
        values = jax.device_get(metrics)
        loss = float(values["loss"])
        reference = abs(self._first_loss) if self._first_loss is not None else math.inf
        problem = _what_diverged(values, self._config.divergence_factor * reference)
        if problem:
            raise self.diverged(step, problem)
        if self._first_loss is None:
            self._first_loss = loss
        before, self._seen = self._seen, step
        if is_due(before, step, self._config.log_every):
            self._measure_throughput(step)
            logged = {k: value.tolist() for k, value in values.items() if k != "task_losses"}
            self._write(step, logged | self._throughput)
        elif self._mark is None:  # not before the first step, which is the one that compiles
            self._mark = (step, time.monotonic())
        self._progress.update(step, loss=loss, **self._throughput)

    def record_validation(self, step: int, loss: float) -> None:
        """Log a validation loss; the time it took is not the training's."""
        self._write(step, {"valid_loss": loss if math.isfinite(loss) else None})
        self._mark = (step, time.monotonic())

    def diverged(self, step: int, problem: str) -> Diverged:
        """The error to raise."""
        return Diverged(
            f"{printable(self.name)}: diverged at step {step}, {problem}. Try a smaller inner or "
            "outer learning rate or clip the meta-gradient; the checkpoints are from before"
        )

    def _measure_throughput(self, step: int) -> None:
        """Rates since the last mark; none for the very first step."""
        now = time.monotonic()
        if self._mark is not None and step > self._mark[0]:
            seconds_per_step = (now - self._mark[1]) / (step - self._mark[0])
            tasks_per_second = self._training.tasks_per_step / seconds_per_step
            self._throughput = {
                "tasks_per_second": tasks_per_second,
                "tokens_per_second": tasks_per_second * self._training.tokens_per_task,
            }
        self._mark = (step, now)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._path is None:
            return
        if self._tensorboard is None:  # late: its import may take seconds
            self._tensorboard = TensorBoard(self._curves, self._start)
        seconds = time.monotonic() - self._began
        line = {"name": self.name, "step": step} | values | {"seconds": round(seconds, 3)}
        append_json_line(self._path, line)
        self._tensorboard.add_scalars(step, {TAGS.get(k, k): v for k, v in values.items()})


class TensorBoard:
    """Curves for TensorBoard. If they cannot be written, that is logged once.

    Written from this thread: that of tensorboardX's own writer ends on a full disk, and
    then the training waits for it.
    """

    def __init__(self, directory: Path, start: int):
        """Go on after step ``start``; what was written of later steps is hidden."""
        from tensorboardX.record_writer import RecordWriter  # late: reading results needs none

        self._directory, self._file, self._flushed = directory, None, time.monotonic()
        with self._or_without():
            directory.mkdir(parents=True, exist_ok=True)
            place = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            self._file = RecordWriter(str(directory / f"events.out.tfevents.{place}"))
            self._write(file_version="brain.Event:2")
            if start:
                self._write(step=start + 1, session_log={"status": "START"})

    def add_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """A point on the curve of each value that is a finite number."""
        from tensorboardX import summary

        with self._or_without():
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._write(step=step, summary=summary.scalar(name, value))
            if self._file and time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is not written yet."""
        with self._or_without():
            if self._file:
                self._file.close()
        self._file = None

    def _write(self, **event: Any) -> None:
        from tensorboardX.proto import event_pb2

        if self._file:
            whole = event_pb2.Event(wall_time=time.time(), **event)  # type: ignore[attr-defined]
            self._file.write(whole.SerializeToString())

    @contextlib.contextmanager
    def _or_without(self):
        try:
            yield
        except OSError as error:
            log(f"warning: no TensorBoard curves in {self._directory} from here on ({error})")
            if self._file:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None


def _what_diverged(metrics: dict[str, np.ndarray], limit: float) -> str | None:
    """What diverged in a step, in words; None if nothing did."""
    inner_losses, loss = metrics["inner_losses"], float(metrics["loss"])
    broken = np.flatnonzero(~np.isfinite(inner_losses))
    if broken.size:
        first = int(broken[0])
        return (
            f"in inner step {first + 1} of {inner_losses.size}: "
            f"the support loss before it is {inner_losses[first]}"
        )
    if not math.isfinite(loss):
        return f"in the query loss: it is {loss}"
    if loss > limit:
        return f"in the query loss: {loss:.4g} is above the limit of {limit:.4g}"
    if not np.isfinite(metrics["grad_norm"]):
        return f"in the outer update: the norm of the meta-gradient is {metrics['grad_norm']}"
    return None
