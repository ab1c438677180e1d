"""What a meta-training run says about itself while it goes on, and when it must stop."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from metaopt.progress import Progress
from metaopt.runs import append_json_line, keep_json_lines, slug
from metaopt.types import Metrics

if TYPE_CHECKING:
    from metaopt.train import TrainConfig


class Diverged(RuntimeError):
    """The loss exploded or is no longer a number; the message says when, where, what to try."""


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps is done after this one; 0 is never."""
    return every > 0 and step % every == 0


class Recorder:
    """Watches the metrics of a run and writes them down. A context manager."""

    def __init__(
        self,
        directory: Path,
        name: str,
        config: "TrainConfig",
        *,
        start: int,
        notes: dict[str, Any],
        tasks_per_step: int,
        tokens_per_task: int,
    ):
        """Go on with ``metrics.jsonl`` after step ``start``; later lines of ``name`` are dropped.

        ``notes`` are what `notes` gave when the state of step ``start`` was saved.
        """
        self.name = name
        self._config, self._path = config, directory / "metrics.jsonl"
        self._tasks_per_step, self._tokens_per_task = tasks_per_step, tokens_per_task
        self._first_loss: float | None = notes.get("first_loss")
        self._began = time.monotonic() - notes.get("seconds", 0.0)
        self._mark: tuple[int, float] | None = None  # from where on throughput is measured
        self._throughput: dict[str, float] = {}
        self._tensorboard = None
        if jax.process_index() == 0:
            keep_json_lines(self._path, lambda x: x["name"] != name or x["step"] <= start)
            self._tensorboard = _tensorboard(directory / "tensorboard" / slug(name), start)
        self._progress = Progress(name, total=config.num_steps, start=start)

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
        """Wait for the metrics of a step, stop where they are unsound, log where it is due."""
        values = jax.device_get(metrics)
        loss = float(values["loss"])
        reference = abs(self._first_loss) if self._first_loss is not None else math.inf
        problem = _what_diverged(values, self._config.divergence_factor * reference)
        if problem:
            raise self.diverged(step, problem)
        if self._first_loss is None:
            self._first_loss = loss
        if is_due(step, self._config.log_every):
            self._measure_throughput(step)
            logged = {key: value.tolist() for key, value in values.items()}
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
            f"{self.name}: diverged at step {step}, {problem}. Try a smaller inner or outer "
            "learning rate or clip the meta-gradient; the checkpoints are from before"
        )

    def _measure_throughput(self, step: int) -> None:
        """Rates since the last mark; none for the very first step."""
        now = time.monotonic()
        if self._mark is not None and step > self._mark[0]:
            seconds_per_step = (now - self._mark[1]) / (step - self._mark[0])
            tasks_per_second = self._tasks_per_step / seconds_per_step
            self._throughput = {
                "tasks_per_second": tasks_per_second,
                "tokens_per_second": tasks_per_second * self._tokens_per_task,
            }
        self._mark = (step, now)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._tensorboard is None:
            return
        seconds = time.monotonic() - self._began
        line = {"name": self.name, "step": step} | values | {"seconds": round(seconds, 3)}
        append_json_line(self._path, line)
        for key, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(key, value, step)


def _what_diverged(metrics: dict[str, np.ndarray], limit: float) -> str | None:
    """Where a step went wrong, in words; None where it did not."""
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


def _tensorboard(directory: Path, start: int):
    from tensorboardX import SummaryWriter  # late, because reading results needs none

    return SummaryWriter(str(directory), purge_step=start + 1 if start else None)
