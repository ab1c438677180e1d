"""What a training is: the arguments of `metaopt.training.loop.train` and its substitutes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from metaopt.ranges import Checked, Count, Range, Steps, StepsOr0
from metaopt.training.fingerprint import Fingerprint
from metaopt.types import MetaState, Metrics, Settings

StepFn = Callable[[MetaState, Any], tuple[MetaState, Metrics]]
"""``(state, batch) -> (state, metrics)``: one call, of one meta-update or several."""
Evaluate = Callable[[MetaState], float | np.ndarray]
"""``state -> loss`` on held-out tasks, lower is better; or the losses of all of them, ``[E]``."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Length of a training and how often it does what; all but the last two in meta-updates.

    Attributes:
      num_steps: length of the training.
      log_every: interval between lines of metrics.
      eval_every: interval between evaluations, each with a checkpoint; 0 is never.
      checkpoint_every: interval between checkpoints; another is written at the end.
      keep_last: number of checkpoints that are kept, beside the best evaluated one.
      divergence_factor: limit of the query loss, as a multiple of the first one, beyond which the
        training stops; infinity is no limit.
    """

    num_steps: Steps
    log_every: Steps = 10
    eval_every: StepsOr0 = 0
    checkpoint_every: Steps = 100
    keep_last: Count = 3
    divergence_factor: Annotated[float, Range(1.001, math.inf)] = 5.0


class Variant(NamedTuple):
    """A training as other settings make it; the settings are those of `Variants`.

    Attributes:
      step_fn: as for `Training`.
      sample: ``tasks before -> batch``, as for `Training` but that it counts tasks.
      carry: ``(state of another variant, tasks before, whether its optimiser is another one) ->
        state`` of this one. The schedule of its optimiser is where it should be after so many
        tasks; of another optimiser all else is new.
    """

    step_fn: StepFn
    sample: Callable[[int], Any]
    carry: Callable[[MetaState, int, bool], MetaState]


class Variants(NamedTuple):
    """What a training could be changed in, beside the scalars of its state.

    Attributes:
      settings: ``optimizer`` (a name of `metaopt.optimizers.outer.Optimizer`), ``tasks_per_step``,
        ``precision`` (of `jax.default_matmul_precision`; ``default`` leaves it), and what changes
        how a step is computed, ``tasks_at_a_time`` and ``remat``, as they are. One that may not be
        changed is not there.
      make: settings, all of them, to the variant. It raises UserError if they do not fit one
        another, the devices or the memory.
      multiple: what ``tasks_per_step`` is a multiple of: the devices, and the tasks at a time.
    """

    settings: Settings
    make: Callable[[Settings], Variant]
    multiple: int = 1


class Training(NamedTuple):
    """One training, ready to be run.

    Attributes:
      name: name in files and messages; several trainings may share a directory.
      state: state to start from. A train function may donate it.
      step_fn: compiled call that donates the state. Its metrics hold at least ``loss``,
        ``grad_norm`` (scalars) and ``inner_losses`` ([K]).
      sample: ``step -> batch`` for the call that begins after that many meta-updates, placed
        where ``step_fn`` wants it; a pure function. It is called from other threads, under the
        closed loop from several at once, so it must be thread-safe (as all samplers here are)
        and not talk to other processes. From the end of the training on, the batch is of one
        update.
      tasks_per_step: tasks of a meta-update, on all devices together.
      tokens_per_task: tokens of support and query together.
      fingerprint: what decides the states; a checkpoint of another is refused.
      evaluate: loss that the best checkpoint is chosen by; it must not donate the state.
      steps_per_call: meta-updates in one call.
      held_out: ``i -> batch`` of tasks of the validation split for one meta-update, for whoever
        compares states by the losses that a step reports of them; None if there is none.
      warmup_steps: meta-updates at the start in which the outer rate is not yet its own.
      groups: name of the task of each loss that ``evaluate`` gives; empty if they have none.
      task_names: names of the tasks of ``held_out`` by their number, `Episode.task`; likewise.
      variants: what else could be changed, for whoever improves it; None for nothing.
    """

    name: str
    state: MetaState
    step_fn: StepFn
    sample: Callable[[int], Any]
    tasks_per_step: int
    tokens_per_task: int
    fingerprint: Fingerprint
    evaluate: Evaluate | None = None
    steps_per_call: int = 1
    held_out: Callable[[int], Any] | None = None
    warmup_steps: int = 0
    groups: tuple[str, ...] = ()
    task_names: tuple[str, ...] = ()
    variants: Variants | None = None


class Trained(NamedTuple):
    """What a training gives.

    Attributes:
      state: best evaluated state, or the last one if none was evaluated.
      from_checkpoint: step of the checkpoint that holds the result, if nothing had to be trained;
        None otherwise.
    """

    state: MetaState
    from_checkpoint: int | None = None


TrainFn = Callable[[Training, TrainConfig, Path | None], Trained]
"""`metaopt.training.loop.train`, or what takes its place."""
