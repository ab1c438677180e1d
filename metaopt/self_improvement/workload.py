"""A training as the closed loop sees it: pure functions of its settings, and where it stands.

Settings are a flat mapping of names to numbers and words. Those that the state holds as
`MetaState.hparams` change from step to step without a recompile; the others (the batch, how
tasks are laid out, the optimiser ...) choose the compiled step. The data of a step is a pure
function of the settings and of the position in the data, counted in examples, so a
`Snapshot` is all that a roll-back needs.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.self_improvement.space import (
    Choice,
    Scale,
    Score,
    Setting,
    Settings,
    Space,
    check_settings,
    known_settings,
)
from metaopt.training.loop import StepFn, prefetch
from metaopt.types import Episode, MetaState, Metrics

__all__ = [
    "Choice",
    "Scale",
    "Score",
    "Setting",
    "Settings",
    "Snapshot",
    "Space",
    "Step",
    "Workload",
    "begin",
    "changed",
    "check_settings",
    "copied",
    "known_settings",
    "steps",
    "with_scalars",
]

SCHEDULE_LEVELS = 200  # a rate is renewed so many times in a run, which costs next to nothing


LeftOut = frozenset[tuple[int, int]]
"""Stretches of the data, ``(first, end)`` in examples, of which no batch is trained on."""


class Workload(NamedTuple):
    """A training, in pure functions.

    Attributes:
      name: as it stands in files.
      task: what it is like, for the memory to compare runs by.
      start: ``settings -> state``, the state before the first step.
      step: ``settings -> step_fn``, which donates its state; the same function for settings
        that differ in scalars of the state alone.
      sample: ``(settings, position) -> episodes``; the position counts the examples before.
      examples_per_step: of settings.
      evaluate: ``state -> float [E]``, the losses of always the same held-out examples or
        tasks, lower is better.
      num_examples: the length of the run.
      tokens_per_example: for rates.
      space: what may be changed, and how.
      schedule: the fraction of the run that is done to a factor on the ``scheduled`` rates.
      scheduled: names of settings that are in ``state.hparams``.
      window_loss: ``(state, settings, position, num_steps) -> scalar``, a training loss after so
        many more steps, differentiable in ``state.hparams``; None where there is no such
        function.
      scores: ``state -> {name: number}``, such as accuracies on a test: for the record of every
        assessment alone, where they stand as ``scores``; None for none.
      ways: settings by which a step is computed in another way, and comes to the same but for
        rounding, with the values that they may take.
      evaluation_examples: what an evaluation costs beside its seconds, as so many examples of
        training: it counts as they do, in the budget of a search and among the operations.
    """

    name: str
    task: Mapping[str, float | int | str]
    start: Callable[[Settings], MetaState]
    step: Callable[[Settings], StepFn]
    sample: Callable[[Settings, int], Episode]
    examples_per_step: Callable[[Settings], int]
    evaluate: Callable[[MetaState], np.ndarray]
    num_examples: int
    tokens_per_example: int
    space: Space
    schedule: Callable[[float], float] = lambda done: 1.0
    scheduled: tuple[str, ...] = ("outer_learning_rate", "rates_learning_rate")
    window_loss: Callable[..., jax.Array] | None = None
    scores: Callable[[MetaState], Mapping[str, float]] | None = None
    ways: Mapping[str, Sequence[Setting]] = {}
    evaluation_examples: float = 0.0


class Snapshot(NamedTuple):
    """Where a training stands: what a roll-back brings back.

    Attributes:
      state: the state.
      settings: that the next step is done with.
      examples: how many were gone through; also the position in the data.
    """

    state: MetaState
    settings: dict[str, Setting]
    examples: int


class Step(NamedTuple):
    """One step as it happened.

    Attributes:
      snapshot: after it; the step after this one is given its state to use up.
      position: in the data, of the batch.
      metrics: on the device, not waited for.
      began: when its data was asked for, by `time.perf_counter`.
      data_seconds: that it waited for them.
    """

    snapshot: Snapshot
    position: int
    metrics: Metrics
    began: float
    data_seconds: float


def begin(workload: Workload, settings: Settings) -> Snapshot:
    """The snapshot before the first step.

    Raises:
      UserError: a setting that may be changed has no value, or one out of its bounds.
    """
    check_settings(workload.space, settings)
    if missing := sorted(workload.ways.keys() - settings.keys()):
        raise UserError(f"{missing[0]!r} is a way to compute a step, but has no value")
    state = with_scalars(workload.start(settings), settings)
    return Snapshot(state, dict(settings), 0)


def copied(snapshot: Snapshot) -> Snapshot:
    """A snapshot whose state may be donated while this one stays."""
    return snapshot._replace(state=jax.tree.map(jnp.copy, snapshot.state))


def changed(workload: Workload, snapshot: Snapshot, changes: Settings) -> Snapshot:
    """The snapshot with other settings; its arrays are those of ``snapshot``.

    Where the settings choose another optimiser, its state starts anew.
    """
    settings = snapshot.settings | dict(changes)
    state = snapshot.state
    if settings.get("optimizer") != snapshot.settings.get("optimizer"):
        fresh = workload.start(settings)
        state = state._replace(opt_state=fresh.opt_state, hparams=fresh.hparams)
    return Snapshot(with_scalars(state, settings), settings, snapshot.examples)


def with_scalars(state: MetaState, settings: Settings, factors: Settings | None = None):
    """The state whose hparams are those of the settings, times the factors by name."""
    factors = factors or {}
    hparams = dict(state.hparams)
    for name in hparams.keys() & settings.keys():
        value = np.float32(float(settings[name]) * float(factors.get(name, 1.0)))
        before = hparams[name]
        # Placed as it was, or the step would compile again.
        placed = before.committed
        hparams[name] = jax.device_put(value, before.sharding) if placed else jnp.asarray(value)
    return state._replace(hparams=hparams)


def after_steps(examples: int, end: int, size: int) -> int:
    """The examples gone through after steps of ``size`` from ``examples`` to ``end``, or past."""
    return examples + max(0, math.ceil((end - examples) / size)) * size


def steps(
    workload: Workload,
    snapshot: Snapshot,
    end: int,
    *,
    anneal: bool = False,
    skip: LeftOut = frozenset(),
) -> Iterator[Step]:
    """Steps until ``end`` examples are done, the state of the snapshot donated to the first.

    Args:
      workload: the training.
      snapshot: where to start.
      end: how many examples to come to; the last step may pass it.
      anneal: lower the scheduled rates to zero over these steps.
      skip: stretches of the data; a batch with an example of one is gone past without a step.
    """
    settings, step_fn = snapshot.settings, workload.step(snapshot.settings)
    size = workload.examples_per_step(settings)
    positions = [
        position
        for position in range(snapshot.examples, end, size)
        if not any(first < position + size and position < last for first, last in skip)
    ]
    state, level = snapshot.state, None
    batches = prefetch(lambda position: workload.sample(settings, position), positions)
    try:
        for position in positions:
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            factor = workload.schedule(min(1.0, position / workload.num_examples))
            if anneal:
                factor *= (end - position) / (end - snapshot.examples)
            rounded = math.ceil(factor * SCHEDULE_LEVELS) / SCHEDULE_LEVELS
            if rounded != level:
                level = rounded
                state = with_scalars(state, settings, dict.fromkeys(workload.scheduled, level))
            state, metrics = step_fn(state, batch)
            now = Snapshot(state, dict(settings), position + size)
            yield Step(now, position, metrics, began, waited)
    finally:
        batches.close()
