"""The host loop of a meta-training run: sample, step, watch, log, save, resume.

The step of a run is the number of meta-updates done, and the data of a step is a pure
function of it, so a run that is stopped and started again goes through bitwise the
same states as one that was never stopped. The device is never waited for: metrics are
looked at one step late, and the next episodes are sampled in the background.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.console import log
from metaopt.errors import Diverged, UserError
from metaopt.pytrees import all_finite
from metaopt.signals import Interrupted, StopSignals, exit_on_signal
from metaopt.training.checkpoint import Checkpoints, Restored
from metaopt.training.recorder import Recorder, is_due
from metaopt.training.runs import lock_directory, slug
from metaopt.training.types import Evaluate, StepFn, TrainConfig, Trained, TrainFn, Training
from metaopt.types import MetaState

__all__ = [
    "Diverged",
    "Evaluate",
    "Interrupted",
    "StepFn",
    "TrainConfig",
    "TrainFn",
    "Trained",
    "Training",
    "checkpoint_directory",
    "prefetch",
    "train",
]


def checkpoint_directory(directory: Path | str, name: str) -> Path:
    """Where `train` keeps the checkpoints of the training called ``name``."""
    return Path(directory) / "checkpoints" / slug(name)


def train(training: Training, config: TrainConfig, directory: Path | str | None = None) -> Trained:
    """Train until ``config.num_steps`` updates are done, from the latest checkpoint if any.

    Writes to ``directory``, which several trainings of one run may share: checkpoints and
    TensorBoard curves in folders named after this one, and ``metrics.jsonl``, one
    line every ``log_every`` steps (name, step, every scalar and vector that the step
    reports, tasks and tokens a second, seconds so far) and one an evaluation (name, step,
    ``valid_loss``). Without a directory nothing is written, and nothing can be resumed. Ctrl-C
    or SIGTERM finishes the step, saves and exits; a second one exits at once.

    Args:
      training: what is trained. Its state is donated.
      config: length, and intervals.
      directory: directory of the run.

    Raises:
      UserError: the checkpoints are of another config, training or state, or of a longer
        training, or cannot be read or written, or another process has the directory.
      Diverged: the loss is not finite or too large. The checkpoints stay as they were.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    if directory is None:
        return _train(training, config, None, _BestInMemory())
    directory = Path(directory)
    saved = checkpoint_directory(directory, training.name)
    with (
        lock_directory(directory),
        Checkpoints(
            saved, fingerprint=training.fingerprint, keep_last=config.keep_last
        ) as checkpoints,
    ):
        return _train(training, config, directory, checkpoints)


def _train(
    training: Training,
    config: TrainConfig,
    directory: Path | None,
    checkpoints: "Checkpoints | _BestInMemory",
) -> Trained:
    name, state, notes = training.name, training.state, {}
    if restored := checkpoints.restore_latest(state):
        state, notes = restored.state, restored.notes
    start = int(state.step)
    if restored and start > config.num_steps:
        raise UserError(
            f"the checkpoints of {name!r} in {directory} are of step {start}, past the end of "
            f"this training: raise num_steps from {config.num_steps}, or give a new directory"
        )
    if start < config.num_steps:
        if restored:
            log(f"{name}: resumes from the checkpoint of step {start}")
        recorder = Recorder(training, config, directory, start=start, notes=notes)
        batches = prefetch(training.sample, range(start, config.num_steps, training.steps_per_call))
        with recorder, StopSignals() as stop, contextlib.closing(batches) as episodes:
            state = _loop(training, config, recorder, checkpoints, stop, episodes, state)
        if stop.received is not None:
            exit_on_signal(name, int(state.step), config.num_steps, stop.received)
    best = checkpoints.restore_best(state) if config.eval_every else None
    state = best.state if best else state
    if not restored or start < config.num_steps:
        return Trained(state)
    step = int(state.step)
    log(f"{name}: taken from the checkpoint of step {step}{' (the best)' if best else ''}")
    return Trained(state, from_checkpoint=step)


def prefetch(
    sample: Callable[[int], Any], steps: Iterable[int], depth: int = 2, workers: int = 1
) -> Generator:
    """``sample(step)`` for each step in order, computed ahead in other threads.

    The results and their order do not depend on the number of threads, if ``sample`` is a pure
    function. What it raises is raised where its result would have been yielded.

    Args:
      sample: function of a step; with several workers it is called from several threads at once.
      steps: what it is called with.
      depth: number of results that are computed ahead.
      workers: number of threads.
    """
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="sample")
    remaining = iter(steps)
    try:
        pending = deque(pool.submit(sample, step) for step in itertools.islice(remaining, depth))
        while pending:
            episodes = pending.popleft().result()
            pending.extend(pool.submit(sample, step) for step in itertools.islice(remaining, 1))
            yield episodes
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _BestInMemory:
    """Takes the place of `Checkpoints` without a directory: a copy of the best state alone."""

    def __init__(self):
        self._best: Restored | None = None

    def save(self, state: MetaState, *, valid_loss: float, notes: dict[str, Any]) -> None:
        if not all_finite(state.meta_params):
            raise FloatingPointError("a meta-parameter is not finite")
        if valid_loss < (self._best.valid_loss if self._best else math.inf):
            self._best = Restored(jax.tree.map(jnp.copy, state), notes, valid_loss)

    def wait(self) -> None:
        pass

    def restore_latest(self, example: MetaState) -> Restored | None:
        del example
        return None

    def restore_best(self, example: MetaState) -> Restored | None:
        del example
        return self._best


def _loop(
    training: Training,
    config: TrainConfig,
    recorder: Recorder,
    checkpoints: Checkpoints | _BestInMemory,
    stop: StopSignals,
    batches: Iterable[Any],
    state: MetaState,
) -> MetaState:
    step, unseen = int(state.step), None
    for batch in batches:
        state, metrics = training.step_fn(state, batch)
        before, step = step, min(step + training.steps_per_call, config.num_steps)
        if unseen is not None:  # while the device computes this step, look at the one before
            recorder.record(*unseen)
        unseen = (step, metrics)
        stopping = stop.received is not None
        evaluating = is_due(before, step, config.eval_every)
        saving = is_due(before, step, config.checkpoint_every) or step == config.num_steps
        if not (stopping or evaluating or saving):
            continue
        recorder.record(*unseen)  # only a state whose metrics are sound is evaluated or saved
        unseen, valid_loss = None, math.inf
        if training.evaluate is not None and evaluating:
            valid_loss = float(np.mean(training.evaluate(state)))
            recorder.record_validation(step, valid_loss)
        try:
            checkpoints.save(state, valid_loss=valid_loss, notes=recorder.notes())
        except FloatingPointError as error:
            raise recorder.diverged(step, f"in the outer update: {error}") from error
        if stopping:
            break
    checkpoints.wait()
    return state
