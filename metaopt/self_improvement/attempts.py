"""An attempt: a stretch of training with a changed setting, from a copy of where it stands."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from metaopt.measure import compile_seconds
from metaopt.self_improvement.workload import (
    LeftOut,
    Score,
    Setting,
    Snapshot,
    Step,
    Workload,
    after_steps,
    changed,
    copied,
    steps,
)


class Change(NamedTuple):
    """What a proposer would do.

    Attributes:
      settings: their new values.
      setting: the one that matters; the others go with it.
      score: what it is judged by.
      reason: in words.
      way: 1 for more of the setting, -1 for less, 0 where there is no such order.
      level: of refinement; 0 while the search is coarse.
      rank: it waits for all of a lower rank that can be tried.
      parts: the changes that it is made of, where it is of several.
    """

    settings: dict[str, Setting]
    setting: str
    score: Score
    reason: str
    way: int = 0
    level: int = 0
    rank: int = 0
    parts: tuple["Change", ...] = ()


class Trial(NamedTuple):
    """A change, tried; ``change`` is None for the trial that changes nothing.

    Attributes:
      change: what was tried.
      after: the snapshot that it came to.
      losses: float64 ``[E]``, held out; not finite where it diverged or could not be run.
      seconds: of its steps, without compiling.
      examples: that it went through, with those to anneal.
      broken: the first stretch of the data that gave no number, ``(first, end)``.
      error: why it could not be run; nothing where it could.
    """

    change: Change | None
    after: Snapshot
    losses: np.ndarray
    seconds: float
    examples: int
    broken: tuple[int, int] | None = None
    error: str = ""


def try_change(
    workload: Workload,
    snapshot: Snapshot,
    change: Change | None,
    size: int,
    anneal: int,
    *,
    skip: LeftOut = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> Trial:
    """Goes on from a copy of the snapshot with the change, and measures where it comes to.

    Args:
      workload: the training.
      snapshot: where to start; its arrays stay as they are.
      change: what to try; None for nothing.
      size: examples to go through.
      anneal: examples after those, over which the rates go to zero.
      skip: as for `workload.steps`.
      check: called at every step; what it raises ends the trial.
    """
    settings = change.settings if change else {}
    started = changed(workload, copied(snapshot), settings)
    end = snapshot.examples + size
    after, seconds, broken = _run(workload, started, end, skip=skip, check=check)
    judged = after
    if anneal:
        end = after.examples + anneal
        judged, more, later = _run(
            workload, copied(after), end, anneal=True, skip=skip, check=check
        )
        seconds, broken = seconds + more, broken or later
    losses = np.asarray(workload.evaluate(judged.state), np.float64)
    return Trial(change, after, losses, seconds, judged.examples - snapshot.examples, broken)


def _run(
    workload: Workload,
    snapshot: Snapshot,
    end: int,
    *,
    anneal: bool = False,
    skip: LeftOut,
    check: Callable[[], None],
) -> tuple[Snapshot, float, tuple[int, int] | None]:
    """The snapshot at ``end``, seconds without compiling, the first stretch without a number."""
    compiled, start, broken = compile_seconds(), snapshot.examples, None
    began, ends, unseen = time.perf_counter(), [], None
    for step in steps(workload, snapshot, end, anneal=anneal, skip=skip):
        check()
        snapshot = step.snapshot
        if unseen:  # as in training: while the device computes this step, look at the one before
            broken = broken or _broken(unseen)
            ends.append(time.perf_counter())
        unseen = step
    if unseen:
        broken = broken or _broken(unseen)
        jax.block_until_ready(snapshot.state.step)
        ends.append(time.perf_counter())
    seconds = _seconds(began, ends, compile_seconds() - compiled)
    examples = after_steps(start, end, workload.examples_per_step(snapshot.settings))
    return snapshot._replace(examples=examples), seconds, broken


def _seconds(began: float, ends: list[float], compiling: float) -> float:
    """What steps took that came to their ends then; the first compiled, and waited for its data.

    It is the median of the others that counts: trials are short, and a machine that did something
    else for once should decide nothing.
    """
    if len(ends) < 2:
        return max(0.0, ends[-1] - began - compiling) if ends else 0.0
    return float(np.median(np.diff(ends)) * len(ends))


def _broken(step: Step) -> tuple[int, int] | None:
    """The stretch of the data of a step of which a scalar is no number."""
    metrics = jax.device_get(step.metrics)
    sound = all(np.isfinite(x) for x in metrics.values() if np.ndim(x) == 0)
    return None if sound else (step.position, step.snapshot.examples)


def is_bad(workload: Workload, snapshot: Snapshot, stretch: tuple[int, int]) -> bool:
    """Whether the batch there gives no number from this sound snapshot either.

    So it is the data that is at fault, and not where the training had come to.
    """
    there = copied(snapshot)._replace(examples=stretch[0])
    return (
        _run(workload, there, stretch[0] + 1, skip=frozenset(), check=lambda: None)[2] is not None
    )
