"""A training as the closed loop sees it: pure functions of its settings, and snapshots.

Settings are a flat mapping of names to numbers and words. Those that the state holds as
`MetaState.hparams` change from step to step without a recompile; the others (the batch, the
layout of tasks, the optimiser ...) choose the compiled step. The data of a step is a pure
function of the settings and of the position in the data, counted in examples, so a `Snapshot`
is all that a rollback needs.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from metaopt.errors import UserError
from metaopt.optimizers.schedule_free import at_average
from metaopt.training.loop import StepFn, prefetch
from metaopt.types import Episode, MetaState, Metrics, Setting, Settings

Score = Literal["loss", "efficiency"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A positive number that is changed by factors.

    Attributes:
      low, high: bounds.
      factor: factor of the first trials; later ones take its square root, and so on.
      integer: whether it is rounded.
      multiple: number that an integer is a multiple of: the number of devices, say.
      score: what a change is judged by: the held-out ``loss`` after equally many examples, or
        ``efficiency``, its improvement a second.
      coupled: settings that change with it, with the power of its factor: a batch four times
        as large with ``{'outer_learning_rate': 0.5}`` goes with twice the rate.
    """

    low: float
    high: float
    factor: float = 8.0
    integer: bool = False
    multiple: int = 1
    score: Score = "loss"
    coupled: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not 0 < self.low <= self.high < math.inf or not 1 < self.factor < math.inf:
            raise UserError(
                f"a scale needs 0 < low <= high and a factor above 1, not low={self.low}, "
                f"high={self.high}, factor={self.factor}"
            )
        if self.multiple < 1 or self._bounds[0] > self._bounds[1]:
            raise UserError(
                f"no multiple of {self.multiple} is between low={self.low} and high={self.high}"
            )

    @property
    def _bounds(self) -> tuple[float, float]:
        """The least and the largest value, or multiple, within the bounds."""
        if not self.integer:
            return self.low, self.high
        size = self.multiple
        return math.ceil(self.low / size) * size, math.floor(self.high / size) * size

    def scaled(self, value: float, factor: float) -> float:
        """``value · factor`` within the bounds; an integer if it is one."""
        value, (least, largest) = value * factor, self._bounds
        if self.integer:
            value = round(value / self.multiple) * self.multiple
        return min(max(value, least), largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting that takes one of some values; ``score`` is as for `Scale`."""

    values: tuple[Setting, ...]
    score: Score = "loss"

    def __post_init__(self):
        if not self.values:
            raise UserError("a choice needs at least one value")


Space = Mapping[str, Scale | Choice]

SHARE_OF = "share of "
SHARE = Scale(low=1e-9, high=1e9, factor=4.0)
"""The weight of a domain in the data: 1 at first, or what the settings say."""


def share_of(domain: str) -> str:
    """The name of the setting that is the weight of a domain in the data."""
    return f"{SHARE_OF}{domain}"


def is_share(name: str) -> bool:
    """Whether a setting is the weight of a domain in the data; no step depends on it."""
    return name.startswith(SHARE_OF)


def check_settings(space: Space, settings: Settings) -> None:
    """Raises UserError if a setting that may be changed is missing or out of its bounds."""
    for name, axis in space.items():
        if name not in settings:
            raise UserError(f"setting {name!r} may be changed, but has no value to start from")
        value = settings[name]
        if isinstance(axis, Choice):
            if value not in axis.values:
                raise UserError(f"{name} is {value!r}: choose one of {axis.values}")
            continue
        if not (_is_number(value) and axis.low <= value <= axis.high):
            raise UserError(
                f"{name} is {value!r}; it may be changed by factors, so it must be a number from "
                f"{axis.low:g} to {axis.high:g}"
            )
        if unknown := axis.coupled.keys() - settings.keys():
            raise UserError(f"{name} is coupled to {sorted(unknown)[0]!r}, which is no setting")


def known_settings(space: Space, settings: Settings) -> dict[str, Setting]:
    """The settings among those from elsewhere that may be changed, within their bounds."""
    known: dict[str, Setting] = {}
    for name, axis in space.items():
        value = settings.get(name)
        if isinstance(axis, Choice):
            known |= {name: value} if value in axis.values else {}
        elif _is_number(value) and 0 < value <= sys.float_info.max:  # an int may be larger
            known[name] = axis.scaled(value, 1.0)
    return known


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


SCHEDULED = ("outer_learning_rate", "rates_learning_rate")
"""Scalars of a state that follow the schedule of the run."""
SCHEDULE_LEVELS = 200
"""Number of updates of a scheduled rate in a run; they cost next to nothing."""


class Workload(NamedTuple):
    """A training, in pure functions.

    Attributes:
      name: name in files.
      task: descriptors, by which the memory compares runs.
      start: ``settings -> state``, the state before the first step.
      step: ``settings -> step_fn``, which donates its state; the same function for settings
        that differ in scalars of the state alone.
      sample: ``(settings, position) -> episodes``; the position counts the examples before. A pure
        function, and thread-safe: if the steps wait for data, it is called from several threads
        at once (`metaopt.self_improvement.responses`). So are all samplers here: they draw from
        generators of their own, and share only what is read-only or a `functools.cache`.
      examples_per_step: of settings.
      evaluate: ``state -> float [E]``, the losses of the same held-out examples or tasks each
        time, lower is better.
      num_examples: length of the run.
      tokens_per_example: tokens, for rates.
      space: settings that may be changed, and how.
      schedule: function of the fraction of the run that is done: a factor on the rates that are
        `SCHEDULED`.
      scores: ``state -> {name: number}``, such as accuracies on a test set, noted with every
        assessment as ``scores``; None for none.
      execution_options: values of settings that change how a step is computed, but not its result
        beyond rounding: ``{"microbatch": (0, 8, 32), "tasks_at_a_time": (0, 1)}``, say.
      evaluation_examples: cost of an evaluation beside its seconds, in examples of training; it
        counts in the budget of a search and among the operations, and bounds how often the run is
        assessed (`LoopConfig.assessment_share`).
      groups: group of each of the E losses of ``evaluate``, a domain or a class, by which the
        strengths and weaknesses of the run are found; empty for none.
      predictions: ``state -> (probabilities [N, C], labels [N])`` on held-out examples, for the
        accuracy, precision and recall of a classifier; None for none.
      warmup_examples: examples at the start in which the rates are not yet what the settings say;
        no search begins in them.
      carry: ``(snapshot, settings) -> state``: the state with which the training continues from the
        snapshot under other settings, before its scalars are set. If not given, the state stays,
        but that of another ``optimizer`` is new.
      domains: names among ``groups`` whose part of the data may be changed. ``sample`` reads the
        weight of each, the setting ``share of NAME``, by which its part is multiplied.
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
    scores: Callable[[MetaState], Mapping[str, float]] | None = None
    execution_options: Mapping[str, Sequence[Setting]] = {}
    evaluation_examples: float = 0.0
    warmup_examples: int = 0
    groups: Sequence[str] = ()
    predictions: Callable[[MetaState], tuple[np.ndarray, np.ndarray]] | None = None
    carry: Callable[["Snapshot", Settings], MetaState] | None = None
    domains: Sequence[str] = ()

    @property
    def all_axes(self) -> Space:
        """All that may be changed: the space, and the share of each domain."""
        return {**self.space, **{share_of(name): SHARE for name in self.domains}}


class Snapshot(NamedTuple):
    """One point of a training: what a rollback restores.

    Attributes:
      state, settings: those of the next step.
      examples: examples gone through; also the position in the data.
      left_out: stretches of the data, ``(first, end)`` in examples, that no batch may touch.
    """

    state: MetaState
    settings: dict[str, Setting]
    examples: int
    left_out: frozenset[tuple[int, int]] = frozenset()


class Step(NamedTuple):
    """One step as it happened.

    Attributes:
      snapshot: snapshot after it; its state is donated to the next step.
      position: that of the batch in the data.
      metrics: on the device, not waited for.
      began: time at which its data was asked for, by the clock.
      data_seconds: seconds that it waited for them.
    """

    snapshot: Snapshot
    position: int
    metrics: Metrics
    began: float
    data_seconds: float


def begin(workload: Workload, settings: Settings) -> Snapshot:
    """The snapshot before the first step; raises UserError as `check_settings` does.

    The share of a domain is 1 if the settings do not say it.
    """
    settings = {share_of(name): 1.0 for name in workload.domains} | dict(settings)
    check_settings(workload.all_axes, settings)
    if missing := sorted(workload.execution_options.keys() - settings.keys()):
        raise UserError(f"{missing[0]!r} is an execution option, but has no value")
    state = with_scalars(workload.start(settings), settings)
    return Snapshot(state, settings, 0)


def copied(snapshot: Snapshot) -> Snapshot:
    """A snapshot whose state may be donated while this one stays."""
    return snapshot._replace(state=jax.tree.map(jnp.copy, snapshot.state))


def changed(workload: Workload, snapshot: Snapshot, changes: Settings) -> Snapshot:
    """The snapshot with other settings; its arrays are those of ``snapshot``.

    If the settings choose another optimiser, its state is a new one, for the present parameters.
    """
    settings, state = snapshot.settings | dict(changes), snapshot.state
    if workload.carry is not None:
        state = workload.carry(snapshot, settings)
    elif settings.get("optimizer") != snapshot.settings.get("optimizer"):
        fresh = workload.start(settings)
        opt_state = at_average(fresh.opt_state, state.meta_params)
        state = state._replace(opt_state=opt_state, hparams=fresh.hparams)
    return snapshot._replace(state=with_scalars(state, settings), settings=settings)


def with_scalars(state: MetaState, settings: Settings, level: float = 1.0) -> MetaState:
    """The state whose hparams are those of the settings, times a level if they are `SCHEDULED`."""
    hparams = dict(state.hparams)
    for name in hparams.keys() & settings.keys():
        value = np.float32(float(settings[name]) * (level if name in SCHEDULED else 1.0))
        before = hparams[name]
        committed = before.committed  # placed as before, or the step would compile again
        hparams[name] = jax.device_put(value, before.sharding) if committed else jnp.asarray(value)
    return state._replace(hparams=hparams)


def after_steps(examples: int, end: int, size: int) -> int:
    """Examples gone through after steps of ``size`` from ``examples`` to ``end`` or past it."""
    return examples + max(0, math.ceil((end - examples) / size)) * size


def steps(
    workload: Workload,
    snapshot: Snapshot,
    end: int,
    *,
    anneal: bool = False,
    check: Callable[[], bool] = lambda: False,
    workers: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Step]:
    """Steps until ``end`` examples are done, the state of the snapshot donated to the first.

    A batch with an example of `Snapshot.left_out` is passed over without a step.

    Args:
      workload, snapshot: training and start.
      end: number of examples at the end; the last step may pass it.
      anneal: whether to lower the scheduled rates to zero over these steps.
      check: called after every step; if it gives true, that was the last one.
      workers: number of threads that draw the data, twice as many batches ahead.
      clock: gives the time, in seconds.
    """
    settings, step_fn = snapshot.settings, workload.step(snapshot.settings)
    size = workload.examples_per_step(settings)
    positions = [
        position
        for position in range(snapshot.examples, end, size)
        if not any(first < position + size and position < last for first, last in snapshot.left_out)
    ]
    state, level = snapshot.state, None
    sampled = prefetch(
        lambda position: workload.sample(settings, position), positions, 2 * workers, workers
    )
    with contextlib.closing(sampled) as batches:
        for position in positions:
            began = clock()
            batch = next(batches)
            waited = clock() - began
            factor = workload.schedule(min(1.0, position / workload.num_examples))
            if anneal:
                factor *= (end - position) / (end - snapshot.examples)
            rounded = math.ceil(factor * SCHEDULE_LEVELS) / SCHEDULE_LEVELS
            if rounded != level:
                level = rounded
                state = with_scalars(state, settings, level)
            state, metrics = step_fn(state, batch)
            now = snapshot._replace(state=state, settings=dict(settings), examples=position + size)
            yield Step(now, position, metrics, began, waited)
            if check():
                break


def one_behind(found: Iterator[Step]) -> Iterator[tuple[Step | None, Step | None]]:
    """Each step with the one after it: while the device computes that one, look at this one.

    Before the first step and after the last one there is None.
    """
    return itertools.pairwise(itertools.chain([None], found, [None]))


def scalars_read(step_fn: StepFn, state: MetaState, episodes: Episode) -> frozenset[str]:
    """The names of ``state.hparams`` on which the next parameters or optimiser state depend.

    The step is traced for the episodes of one step, arrays or `jax.ShapeDtypeStruct`s, and not
    run. A scalar does not count if only the metrics depend on it, or if it is only passed on.
    """
    closed, (after, metrics) = jax.make_jaxpr(step_fn, return_shape=True)(state, episodes)
    no_metrics = jax.tree.map(lambda _: False, metrics)
    structure, read = jax.tree.structure((state, episodes)), frozenset()
    while True:  # until what the scalars that are read become depends on no further one
        hparams = {name: name in read for name in after.hparams}
        wanted = jax.tree.map(lambda _: True, after)._replace(hparams=hparams), no_metrics
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, jax.tree.leaves(wanted))
        found = jax.tree.unflatten(structure, used)[0].hparams
        if read >= (now := frozenset(name for name, is_used in found.items() if is_used)):
            return now
        read |= now
