"""The host loop of a meta-training run: sample, step, watch, log, save, resume.

The step of a run is the number of meta-updates done, and the data of a step is a pure
function of it, so a run that is stopped and started again goes through bitwise the
same states as one that was never stopped. The device is never waited for: metrics are
looked at one step late, and the next episodes are sampled in the background.
"""

import contextlib
import itertools
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, Self

import numpy as np

from metaopt.console import log
from metaopt.ranges import Checked, Count, Range, Steps, StepsOr0
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import of_training
from metaopt.training.recorder import Diverged, Recorder, is_due
from metaopt.training.runs import lock_directory, slug
from metaopt.types import Episode, MetaState, Metrics

__all__ = [
    "Diverged",
    "Interrupted",
    "StepFn",
    "TrainConfig",
    "TrainFn",
    "checkpoint_directory",
    "prefetch",
    "train",
]

SAME_SIGNAL = 0.2  # seconds in which another one is the first once more

StepFn = Callable[[MetaState, Episode], tuple[MetaState, Metrics]]
Evaluate = Callable[[MetaState], float | np.ndarray]
"""``state -> loss`` on held-out tasks, lower is better; or the losses of all of them, ``[E]``."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """How long a run is and how often it does what. All but the last count meta-updates.

    Attributes:
      num_steps: length of the run.
      log_every: one line of metrics.
      eval_every: one evaluation and a checkpoint with its loss; 0 is never.
      checkpoint_every: one checkpoint; another is written at the end.
      keep_last: how many checkpoints are kept, beside the best evaluated one.
      divergence_factor: the run stops where the query loss is larger than this many
        times the first one; infinity never stops it on that account.
    """

    num_steps: Steps
    log_every: Steps = 10
    eval_every: StepsOr0 = 0
    checkpoint_every: Steps = 100
    keep_last: Count = 3
    divergence_factor: Annotated[float, Range(1.001, math.inf)] = 5.0


def checkpoint_directory(directory: Path | str, name: str) -> Path:
    """Where `train` keeps the checkpoints of the training called ``name``."""
    return Path(directory) / "checkpoints" / slug(name)


class Interrupted(SystemExit):
    """The run was asked to stop, and saved; its code is 128 plus the signal: 130 or 143."""


def train(
    state: MetaState,
    step_fn: StepFn,
    sample: Callable[[int], Episode],
    *,
    config: TrainConfig,
    directory: Path | str,
    name: str,
    tasks_per_step: int,
    tokens_per_task: int,
    fingerprint: dict[str, Any],
    evaluate: Evaluate | None = None,
) -> MetaState:
    """Train until ``config.num_steps`` updates are done, from the latest checkpoint if any.

    Writes to ``directory``, which several trainings of one run may share: checkpoints and
    TensorBoard curves in folders named after this one, and ``metrics.jsonl``, one
    line every ``log_every`` steps (name, step, every scalar and vector that ``step_fn``
    reports, tasks and tokens a second, seconds so far) and one an evaluation (name, step,
    ``valid_loss``). Ctrl-C or SIGTERM finishes the step, saves and leaves; a second one
    leaves at once.

    Args:
      state: the state at step 0. It is donated.
      step_fn: compiled meta-update that donates the state. Its metrics hold at least
        ``loss``, ``grad_norm`` (scalars) and ``inner_losses`` ([K]).
      sample: ``step -> episodes``, placed where ``step_fn`` wants them; a pure function.
        It is called from another thread, so it must not talk to other processes.
      config: when to do what.
      directory: of the run.
      name: of this training in it.
      tasks_per_step: on all devices together.
      tokens_per_task: support and query together.
      fingerprint: the config that decides the states; a checkpoint of another is refused, and
        so is one of another start, other first tasks or another step
        (`metaopt.training.fingerprint`).
      evaluate: what the best checkpoint is chosen by; it must not donate the state.

    Returns:
      The state after ``num_steps`` updates, or the restored one if it is there already.

    Raises:
      UserError: the checkpoints are of another config, training or state, or cannot be read
        or written, or another process has the directory.
      Diverged: the loss is not finite or too large. The checkpoints stay as they were.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    directory = Path(directory)
    with (
        lock_directory(directory),
        Checkpoints(
            checkpoint_directory(directory, name),
            fingerprint=fingerprint,
            digests=of_training(step_fn, state, sample(0)),
            keep_last=config.keep_last,
        ) as checkpoints,
    ):
        restored = checkpoints.restore_latest(state)
        state, notes = (restored.state, restored.notes) if restored else (state, {})
        start = int(state.step)
        if start >= config.num_steps:
            return state
        if start > 0:
            log(f"{name}: going on from step {start}")
        throughput = {"tasks_per_step": tasks_per_step, "tokens_per_task": tokens_per_task}
        recorder = Recorder(directory, name, config, start=start, notes=notes, **throughput)
        batches = prefetch(sample, range(start, config.num_steps))
        with recorder, StopSignals() as stop, contextlib.closing(batches) as episodes:
            host = _Host(config, recorder, checkpoints, stop)
            state = _loop(state, step_fn, episodes, host, evaluate)
        if stop.received is not None:
            exit_on_signal(name, int(state.step), config.num_steps, stop.received)
        return state


TrainFn = Callable[..., MetaState]
"""`train`, or what takes its arguments and gives what it gives."""


def prefetch(sample: Callable[[int], Any], steps: Iterable[int], depth: int = 2) -> Generator:
    """``sample(step)`` for each step in order, computed up to ``depth`` ahead in one thread.

    What ``sample`` raises is raised where its result would have been yielded.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample")
    remaining = iter(steps)
    try:
        pending = deque(pool.submit(sample, step) for step in itertools.islice(remaining, depth))
        while pending:
            episodes = pending.popleft().result()
            pending.extend(pool.submit(sample, step) for step in itertools.islice(remaining, 1))
            yield episodes
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Host(NamedTuple):
    """What goes on around the steps."""

    config: TrainConfig
    recorder: Recorder
    checkpoints: Checkpoints
    stop: "StopSignals"


def _loop(
    state: MetaState,
    step_fn: StepFn,
    episodes: Iterable[Episode],
    host: _Host,
    evaluate: Evaluate | None,
) -> MetaState:
    config, recorder = host.config, host.recorder
    step, unseen = int(state.step), None
    for batch in episodes:
        state, metrics = step_fn(state, batch)
        step += 1
        if unseen is not None:  # while the device computes this step, look at the one before
            recorder.record(*unseen)
        unseen = (step, metrics)
        stopping = host.stop.received is not None
        evaluating = is_due(step, config.eval_every)
        saving = is_due(step, config.checkpoint_every) or step == config.num_steps
        if not (stopping or evaluating or saving):
            continue
        recorder.record(*unseen)  # only a state whose metrics are sound is evaluated or saved
        unseen, valid_loss = None, math.inf
        if evaluate is not None and evaluating:
            valid_loss = float(np.mean(evaluate(state)))
            recorder.record_validation(step, valid_loss)
        _save(host, state, valid_loss)
        if stopping:
            break
    host.checkpoints.wait()
    return state


def _save(host: _Host, state: MetaState, valid_loss: float) -> None:
    try:
        host.checkpoints.save(state, valid_loss=valid_loss, notes=host.recorder.notes())
    except FloatingPointError as error:
        problem = f"in the outer update: {error}"
        raise host.recorder.diverged(int(state.step), problem) from error


def exit_on_signal(name: str, step: int, num_steps: int, signum: int) -> NoReturn:
    """Says that a training was stopped by a signal, and leaves; all must be saved by then."""
    log(
        f"{name}: stopped by {signal.Signals(signum).name} after step {step} of {num_steps}, "
        "saved; run the same command again to go on"
    )
    raise Interrupted(128 + signum)


class StopSignals:
    """Notes the first SIGINT or SIGTERM; a second one goes to the old handlers.

    So that one acts at once, unless it is the first once more: `timeout` and `uv run`, for
    two, deliver a signal twice within microseconds. Outside the main thread, where Python allows no
    handlers, it notes nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, signum: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signum, now
        elif now - self._received_at > SAME_SIGNAL:
            self.__exit__()
            signal.raise_signal(signum)
