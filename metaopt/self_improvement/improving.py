"""The closed loop in place of `train`: what ``--improve`` does to any training."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.indices import names_of
from metaopt.measure import count_flops
from metaopt.optimizers.outer import Optimizer
from metaopt.optimizers.schedule_free import at_average
from metaopt.outer_step import RATES
from metaopt.self_improvement.loop import LoopConfig, Outcome, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import (
    Choice,
    Scale,
    Setting,
    Settings,
    Snapshot,
    Workload,
)
from metaopt.training.loop import StepFn, TrainConfig, Trained, Training
from metaopt.training.types import Variant
from metaopt.types import Episode, MetaState

RATE = Scale(low=1e-7, high=1e3)
LEAST_HELD_OUT, MOST_HELD_OUT = 12, 64
"""The least and the largest number of held-out tasks that trials are judged by."""
IMPROVING = LoopConfig(
    phases=(0.0,),
    shares=(0.25,),
    margins=(0.002,),
    trials=TrialConfig(examples=0.008, least_steps=3, probe=0.03),
    assess_every=0.25,
    assessment_share=0.01,
    options_share=0.02,
)
"""The loop of `improving_train`: on a good start it costs 3 % of the run, on a bad one 30 %."""
MOST_BATCH_FACTOR = 4.0
"""The factor of the first trials of another batch."""
JUDGING_SHARE = 0.0025
"""What an evaluation may cost, as a fraction of the run, beyond the least number of tasks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """What `improving_train` may change in a training, as an experiment declares it.

    What no update reads is not tried, nor what `Variants` of the training rules out.

    Attributes:
      scalars: Names of ``state.hparams`` that are multiplied by factors, if they are above 0.
      optimizers: Outer optimisers to choose from, beside the training's own.
      most_batch: Largest factor by which the tasks of a step may be more or fewer; 1 for none.
        The outer rate goes with its root.
      precisions: Of matrix products, beside the default one, such as ``BF16_BF16_F32``
        (`jax.default_matmul_precision`); on accelerators alone.
      options: Whether it may be changed how a step is computed: how many tasks at a time, and
        whether the inner steps are computed again in the backward pass.
    """

    scalars: Sequence[str] = RATES
    optimizers: tuple[Optimizer, ...] = ("adam", "muon", "schedule_free")
    most_batch: float = 8.0
    precisions: tuple[str, ...] = ()
    options: bool = True


SEARCHED = Searched()
RATES_ALONE = Searched(optimizers=(), most_batch=1.0, precisions=(), options=False)
"""For trainings whose optimiser and batch are what they are about."""


def improving_train(
    training: Training,
    config: TrainConfig,
    directory: Path | str | None = None,
    *,
    searched: Searched = SEARCHED,
    loop: LoopConfig | None = None,
    memory: Memory | None = None,
) -> Trained:
    """`train` under the closed loop: same arguments, and what is ``searched`` may change.

    Trials are judged by the losses that steps report (`reported_losses`) of batches of validation
    tasks, ``training.held_out``, whose cost counts as examples of training. If there are none,
    they are judged by ``training.evaluate``, whose cost counts in seconds; and if there is none,
    or it gives a single number, by batches from after the end of the run. Only ``num_steps`` of
    the config is used: ``loop`` has the schedule, and ``metrics.jsonl`` has one line an
    assessment. No search begins before the warm-up of the training is over. If the tasks of a step
    become more or fewer, there are fewer or more steps: the tasks of the run stay as many.

    A state that has done steps already continues from there, as the second phase of a training
    does. It has a name of its own, such as ``"MAML++, from step 500"``.

    Args:
      training: what is trained. Its state is copied.
      config: its length.
      directory: directory of the run; a temporary one if not given.
      searched: what may change.
      loop: schedule of the loop; `IMPROVING` if not given.
      memory: past runs; those of the same name are the most similar.

    Returns:
      `Trained`, with a state that the training's own optimiser continues.

    Raises:
      UserError: ``searched`` names a scalar that is none of `RATES` and not in the state; the
        step cannot be traced, and there are no losses to judge by; the state carries documents on
        from step to step; and as for `loop.run`.
      Diverged, Interrupted: as for `loop.run`.
    """
    if jax.tree.leaves(training.state.carry):
        raise UserError(
            f"{training.name} carries documents on from step to step, and the closed loop compares "
            "states on others: train it without"
        )
    if directory is None:
        with tempfile.TemporaryDirectory() as directory:
            options = {"searched": searched, "loop": loop, "memory": memory}
            return improving_train(training, config, directory, **options)
    state, tasks_per_step = training.state, training.tasks_per_step
    hparams = {key: float(value) for key, value in state.hparams.items()}
    if unknown := sorted(set(searched.scalars) - {*hparams, *RATES}):
        raise UserError(
            f"{unknown[0]!r} is to be searched, but the state has no such scalar; it has "
            f"{', '.join(hparams)}"
        )
    start, initial = int(state.step), jax.tree.map(jnp.copy, state)
    if start >= config.num_steps:
        return Trained(initial)
    name = f"{training.name}, from step {start}" if start else training.name
    evaluate, evaluation_examples, groups = _judge(training, start, config.num_steps)
    varied = _Varied(training, initial, searched)
    workload = Workload(
        name=name,
        task={"name": name, "tasks_per_step": tasks_per_step} | varied.task,
        start=varied.start,
        step=varied.step,
        sample=varied.sample,
        examples_per_step=varied.examples_per_step,
        evaluate=lambda state: evaluate(varied.as_at_first(state)),
        num_examples=(config.num_steps - start) * tasks_per_step,
        tokens_per_example=training.tokens_per_task,
        space={
            **{name: RATE for name in searched.scalars if hparams.get(name, 0.0) > 0},
            **varied.space,
        },
        execution_options=varied.execution_options,
        evaluation_examples=evaluation_examples,
        warmup_examples=max(0, training.warmup_steps - start) * tasks_per_step,
        groups=groups,
        carry=varied.carry,
    )
    outcome = run(
        workload,
        varied.settings | hparams,
        directory=directory,
        config=loop or IMPROVING,
        memory=memory,
        fingerprint=training.fingerprint,
    )
    return Trained(varied.returned(outcome, config.num_steps), outcome.from_checkpoint)


class _Varied:
    """A training whose settings change, as a `Workload` takes it.

    Attributes:
      settings: What it starts with, beside the scalars.
      space: Which of these may change, and how.
      execution_options: Those that change how a step is computed, with their values.
      task: What tells its runs from others, for the memory.
    """

    def __init__(self, training: Training, initial: MetaState, searched: Searched):
        self._training, self._initial = training, initial
        self._variant = functools.cache(self._made)
        variants, size = training.variants, training.tasks_per_step
        found = dict(variants.settings) if variants else {}
        # Several processes would each decide by its own clock.
        is_alone, most = jax.process_count() == 1, searched.most_batch
        self.space: dict[str, Scale | Choice] = {}
        if variants and is_alone and "tasks_per_step" in found and most > 1:
            self.space["tasks_per_step"] = Scale(
                low=max(1.0, size / most),
                high=size * most,
                factor=min(MOST_BATCH_FACTOR, most),
                integer=True,
                multiple=variants.multiple,
                score="efficiency",
                coupled={"outer_learning_rate": 0.5},
            )
        choices = {
            "precision": (searched.precisions if is_alone else (), "efficiency"),
            "optimizer": (searched.optimizers, "loss"),
        }
        for name, (others, score) in choices.items():
            if name in found and set(others) - {found[name]}:
                values = tuple(dict.fromkeys([found[name], *others]))
                self.space[name] = Choice(values=values, score=score)
        options: dict[str, tuple[Setting, ...]] = {}
        if is_alone and searched.options and "tasks_at_a_time" in found:
            options["tasks_at_a_time"] = tuple(dict.fromkeys([found["tasks_at_a_time"], 0, 1]))
        if is_alone and searched.options and "remat" in found:
            options["remat"] = (False, True)
        self.execution_options: dict[str, tuple[Setting, ...]] = options
        changing = [*self.space, *options]
        self.settings = {name: found[name] for name in found if name in changing}
        self.task = {"optimizer": str(found["optimizer"])} if "optimizer" in found else {}

    def _made(self, chosen: tuple[tuple[str, Setting], ...]) -> Variant:
        variants = self._training.variants
        assert variants is not None  # or nothing could be chosen
        return variants.make({**variants.settings, **dict(chosen)})

    def _of(self, settings: Settings) -> Variant | None:
        """The variant; None for the training as it is."""
        if not self._differing(settings):
            return None
        return self._variant(self._chosen(settings))

    def _chosen(self, settings: Settings) -> tuple[tuple[str, Setting], ...]:
        return tuple((name, settings[name]) for name in self.settings)

    def start(self, settings: Settings) -> MetaState:
        first = Snapshot(jax.tree.map(jnp.copy, self._initial), self.settings, 0)
        return self.carry(first, settings)

    def examples_per_step(self, settings: Settings) -> int:
        size = int(settings.get("tasks_per_step", self._training.tasks_per_step))
        return size * self._training.steps_per_call

    def step(self, settings: Settings) -> StepFn:
        variant = self._of(settings)
        return variant.step_fn if variant else self._training.step_fn

    def sample(self, settings: Settings, position: int) -> Any:
        if variant := self._of(settings):
            return variant.sample(position)
        size = self._training.tasks_per_step
        return self._training.sample(int(self._initial.step) + position // size)

    def carry(self, snapshot: Snapshot, settings: Settings) -> MetaState:
        """The state with which the training continues under other settings."""
        old = snapshot.settings
        changes = {name for name in self.settings if old[name] != settings[name]}
        if not changes & {"optimizer", "tasks_per_step"}:
            return snapshot.state
        variant = self._variant(self._chosen(settings))
        return variant.carry(snapshot.state, snapshot.examples, "optimizer" in changes)

    def as_at_first(self, state: MetaState) -> MetaState:
        """The state with what the step of the training itself takes, of whatever optimiser it is.

        Of no account for the losses that the step reports, and none to go on from.
        """
        hparams = {name: state.hparams[name] for name in self._initial.hparams}
        return state._replace(opt_state=self._initial.opt_state, hparams=hparams)

    def returned(self, outcome: Outcome, num_steps: int) -> MetaState:
        """The state at the end, for the optimiser and the batch that the training began with.

        Its step is that of as many tasks. Its scalars are those at the end, also where they were
        found for another optimiser: those of the start may be far off.
        """
        snapshot, size = outcome.snapshot, self._training.tasks_per_step
        state = self.carry(snapshot, {**snapshot.settings, **self.settings})
        changes = {name for decision in outcome.decisions for name in decision.changes}
        if "tasks_per_step" in changes | self._differing(snapshot.settings):
            step = min(num_steps, int(self._initial.step) + snapshot.examples // size)
            step = jax.device_put(np.int32(step), state.step.sharding)
            state = state._replace(step=step)  # type: ignore[arg-type]
        hparams = {name: state.hparams[name] for name in self._initial.hparams}
        return state._replace(hparams=hparams)

    def _differing(self, settings: Settings) -> set[str]:
        return {name for name in self.settings if settings[name] != self.settings[name]}


def _judge(
    training: Training, start: int, num_steps: int
) -> tuple[Callable[[MetaState], np.ndarray], float, tuple[str, ...]]:
    """What trials are judged by, its cost in examples, and the group of each of its losses."""
    evaluate = training.evaluate
    if not training.held_out and evaluate and np.ndim(evaluate(training.state)) == 1:
        return evaluate, 0.0, training.groups  # type: ignore[return-value]
    past_the_end = lambda i: training.sample(num_steps + i)  # noqa: E731
    held_out = functools.cache(training.held_out or past_the_end)
    cost, each = _share_of_loss(training, held_out), training.tasks_per_step
    least, most = (-(-tasks // each) for tasks in (LEAST_HELD_OUT, MOST_HELD_OUT))
    number = min(most, max(least, int(JUDGING_SHARE * (num_steps - start) / cost)))
    losses = reported_losses(training.step_fn, held_out, number)
    return losses, number * each * cost, _groups(training, held_out, number)


def _groups(training: Training, held_out: Callable[[int], Episode], number: int) -> tuple[str, ...]:
    """The name of the task of each loss that steps report of held-out batches, if they have names.

    A step that reports no loss of each task gives one a batch, which is of no task.
    """
    if training.held_out is None or not training.task_names:
        return ()
    metrics = jax.eval_shape(training.step_fn, training.state, held_out(0))[1]
    if "task_losses" not in metrics:
        return ()
    tasks = np.concatenate([np.ravel(held_out(i).task) for i in range(number)])
    return names_of(tasks, training.task_names)


def reported_losses(
    step_fn: StepFn, batch: Callable[[int], Episode], number: int
) -> Callable[[MetaState], np.ndarray]:
    """``state -> float64 [number * T]``: losses that a step reports of batches, without an update.

    They are those of each task if the step reports ``task_losses``, else one a batch. Only what
    they depend on is computed: no meta-gradient. The step can be
    traced, as those of `jax.jit` and `jax.pmap` can, and makes one update: of several in one call
    it would make all but the last. ``batch`` gives the episodes of i, for i below ``number``.
    """
    loss = _loss_alone(step_fn)
    # One at a time: on several CPU devices none may be in flight behind another.
    return lambda state: np.concatenate(
        [np.atleast_1d(np.asarray(loss(state, batch(i)), np.float64)) for i in range(number)]
    )


def _loss_alone(step_fn: StepFn) -> Callable[[MetaState, Episode], jax.Array]:
    def losses(state: MetaState, episodes: Episode) -> jax.Array:
        opt_state = at_average(state.opt_state, state.meta_params)
        metrics = step_fn(state._replace(opt_state=opt_state), episodes)[1]
        return metrics.get("task_losses", metrics["loss"])

    return jax.jit(losses)


def _share_of_loss(training: Training, batch: Callable[[int], Episode]) -> float:
    """Share of its loss in the operations of a step; 1 if they cannot be counted."""
    step, loss = training.step_fn, _loss_alone(training.step_fn)
    try:
        alone, all_of_it = (count_flops(f, training.state, batch(0)).total for f in (loss, step))
        return min(1.0, alone / all_of_it)
    except (UserError, ZeroDivisionError):
        return 1.0
    except jax.errors.JAXTypeError as error:
        raise UserError(
            f"the step of {training.name!r} cannot be traced, so its loss cannot be computed "
            "without an update; give evaluate, the held-out losses of a state"
        ) from error
