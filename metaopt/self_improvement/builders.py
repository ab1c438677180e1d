"""Workloads of a meta-training and a plain training, and the loop in place of `train`."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import parallel
from metaopt.errors import UserError
from metaopt.indices import names_of
from metaopt.learners import maml
from metaopt.measure import count_flops
from metaopt.meta_gradients import joint
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import RATES, init_state, make_meta_step
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import (
    Scale,
    Setting,
    Settings,
    Space,
    Workload,
    is_share,
    share_of,
)
from metaopt.training.loop import StepFn, TrainConfig, Trained, Training
from metaopt.types import Batch, Episode, Learner, LossFn, MetaGradFn, MetaState, Model, Params

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
)
"""The loop of `improving_train`: on a good start it costs 3 % of the run, on a bad one 30 %."""
JUDGING_SHARE = 0.0025
"""What an evaluation may cost, as a fraction of the run, beyond the least number of tasks."""


def constant(_done: float) -> float:
    """No schedule."""
    return 1.0


def cosine(done: float) -> float:
    """From 1 at the start of a run to 0 at its end."""
    return float(0.5 * (1 + np.cos(np.pi * done)))


def default_settings(**settings: Setting) -> dict[str, Setting]:
    """Settings of `OuterConfig`, Adam's scalars and all tasks at once, with those given."""
    scalars = {name: float(value) for name, value in OuterConfig().hparams().items()}
    return {"optimizer": "adam", "tasks_at_a_time": 0, **scalars} | settings


def meta_training(
    name: str,
    *,
    params: Params,
    learner: Learner,
    estimate: Callable[[Settings], MetaGradFn],
    sample: Callable[[Settings, int], Episode],
    schedule: Callable[[float], float] = cosine,
    annealing_steps: int = 0,
    seed: int = 0,
    num_devices: int = 0,
    **fields: Any,
) -> Workload:
    """A workload of the outer step.

    Settings that it reads beside the scalars of the state: ``optimizer`` (see `OuterConfig`)
    and ``tasks_at_a_time``; the functions given here may read more.

    Args:
      name: name in files.
      params: initial parameters.
      learner: what is learned.
      estimate: ``settings -> estimator``.
      sample: ``(settings, position) -> episodes [T, ...]`` of one step, on the host.
      annealing_steps: as for `make_meta_step`; for an estimator with ``query_loss='annealed'``.
      seed: seed of what is drawn in a step.
      num_devices: number of devices; 0 for all.
      schedule, **fields: as for `Workload`.
    """
    devices = parallel.default_devices(num_devices)

    def outer_of(settings: Settings) -> OuterConfig:
        return OuterConfig(optimizer=settings.get("optimizer", "adam"))  # type: ignore[arg-type]

    def start(settings: Settings) -> MetaState:
        key, outer = jax.random.key(seed), outer_of(settings)
        hparams = outer.hparams() | {"inner_learning_rate": jnp.float32(0.0)}
        state = init_state(key, params, learner, outer_optimizer(outer), hparams)
        return parallel.replicate(state, devices)

    @functools.cache
    def compiled(chosen: tuple[tuple[str, Setting], ...]) -> StepFn:
        settings = dict(chosen)
        step = make_meta_step(
            estimate(settings),
            outer_optimizer(outer_of(settings)),
            tasks_at_a_time=int(settings.get("tasks_at_a_time", 0)),
            axis_name=parallel.AXIS,
            annealing_steps=annealing_steps,
        )
        return parallel.parallel_step(step, devices)

    scalars = {*OuterConfig(optimizer="lars").hparams(), "inner_learning_rate"}
    return Workload(
        name=name,
        start=start,
        step=lambda settings: compiled(
            tuple(sorted(x for x in settings.items() if x[0] not in scalars and not is_share(x[0])))
        ),
        sample=lambda settings, position: parallel.split_over_devices(
            sample(settings, position), len(devices)
        ),
        schedule=schedule,
        **fields,
    )


def plain_training(
    name: str,
    *,
    model: Model,
    loss_fn: LossFn,
    draw: Callable[..., Batch],
    held_out: Batch,
    space: Space,
    examples_at_a_time: int = 1,
    groups: Sequence[str] = (),
    domains: Sequence[str] = (),
    seed: int = 0,
    num_devices: int = 0,
    **fields: Any,
) -> Workload:
    """A workload of plain training, by gradients of the loss on batches.

    Settings that it reads: those of `meta_training`; ``batch_size``, a multiple of the number of
    devices; and ``microbatch``, the size of the parts of a batch of which a device computes
    ``tasks_at_a_time`` at a time (0 for the whole share of a device).

    Args:
      name, space: as for `Workload`.
      model: the model.
      loss_fn: its loss.
      draw: ``(position, number) -> examples [number, ...]``, a pure function, on the host. If there
        are domains, ``(position, number, shares)``, with the weight of each, float64 ``[D]``.
      held_out: examples ``[E, ...]`` that changes are judged by.
      examples_at_a_time: held-out examples of one loss; there are E / this many losses.
      groups: domain or class of each of these losses, see `Workload`; empty for none.
      domains: those whose part of the data may be changed, see `Workload`; empty for none.
      seed: seed of the initial parameters.
      num_devices: number of devices; 0 for all.
      **fields: others of `Workload`; ``schedule`` is `cosine` if not given.

    Raises:
      UserError: the held-out examples do not divide by ``examples_at_a_time``, or the groups are
        not one for each loss.
    """
    learner, devices = maml(), parallel.default_devices(num_devices)
    if isinstance(axis := space.get("batch_size"), Scale):
        multiple = math.lcm(axis.multiple, len(devices))
        space = {**space, "batch_size": dataclasses.replace(axis, multiple=multiple)}
    number, each = len(jax.tree.leaves(held_out)[0]), examples_at_a_time
    if number % each:
        raise UserError(f"{number} held-out examples do not divide by examples_at_a_time={each}")
    if len(groups) not in (0, number // each):
        raise UserError(f"groups has {len(groups)} names for {number // each} held-out losses")
    judged = jax.tree.map(lambda x: np.asarray(x).reshape(-1, each, *x.shape[1:]), held_out)
    losses_of = parallel.parallel_map(
        lambda params, batches: jax.lax.map(lambda x: loss_fn(params, x), batches, batch_size=64),
        devices,
    )

    def sample(settings: Settings, position: int) -> Episode:
        size = int(settings["batch_size"])
        parallel.check_divides(size, len(devices))
        micro = int(settings.get("microbatch", 0)) or size // len(devices)
        if size % micro:
            raise UserError(f"a batch of {size} cannot be divided into microbatches of {micro}")
        weights = np.array([float(settings.get(share_of(name), 1.0)) for name in domains])
        drawn = draw(position, size, weights) if domains else draw(position, size)
        batch = jax.tree.map(lambda x: np.asarray(x).reshape(-1, micro, *x.shape[1:]), drawn)
        # All of the batch is support: there is no inner loop to judge.
        nothing = jax.tree.map(lambda x: x[:, :0], batch)
        return Episode(batch, nothing, np.zeros(size // micro, np.int32))  # type: ignore[arg-type]

    return meta_training(
        name,
        params=model.init(jax.random.key(seed)),
        learner=learner,
        estimate=lambda settings: joint(learner, loss_fn),
        sample=sample,
        evaluate=lambda state: losses_of(state.meta_params["params"], judged),
        examples_per_step=lambda settings: int(settings["batch_size"]),
        space=space,
        groups=groups,
        domains=domains,
        seed=seed,
        num_devices=num_devices,
        **fields,
    )


def improving_train(
    training: Training,
    config: TrainConfig,
    directory: Path | str | None = None,
    *,
    searched: Sequence[str] = RATES,
    loop: LoopConfig | None = None,
    memory: Memory | None = None,
) -> Trained:
    """`train` under the closed loop: same arguments, and the scalars may change.

    A search multiplies the scalars of ``searched`` that are above 0 and that the updates read.
    Trials are judged by the losses that steps report (`reported_losses`) of batches of validation
    tasks, ``training.held_out``, whose cost counts as examples of training. If there are none,
    they are judged by ``training.evaluate``, whose cost counts in seconds; and if there is none,
    or it gives a single number, by batches from after the end of the run. Only ``num_steps`` of
    the config is used: ``loop`` has the schedule, and ``metrics.jsonl`` has one line an
    assessment. No search begins before the warm-up of the training is over.

    A state that has done steps already continues from there, as the second phase of a training
    does. It has a name of its own, such as ``"MAML++, from step 500"``.

    Args:
      training: what is trained. Its state is copied.
      config: its length.
      directory: directory of the run; a temporary one if not given.
      searched: names of ``state.hparams`` whose scalars a search may change.
      loop: schedule of the loop; `IMPROVING` if not given.
      memory: past runs; those of the same name are the most similar.

    Raises:
      UserError: ``searched`` names a scalar that is none of `RATES` and not in the state; the
        step cannot be traced, and there are no losses to judge by; and as for `loop.run`.
      Diverged, Interrupted: as for `loop.run`.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as directory:
            options = {"searched": searched, "loop": loop, "memory": memory}
            return improving_train(training, config, directory, **options)
    state, tasks_per_step = training.state, training.tasks_per_step
    hparams = {key: float(value) for key, value in state.hparams.items()}
    if unknown := sorted(set(searched) - {*hparams, *RATES}):
        raise UserError(
            f"{unknown[0]!r} is to be searched, but the state has no such scalar; it has "
            f"{', '.join(hparams)}"
        )
    start, initial = int(state.step), jax.tree.map(jnp.copy, state)
    if start >= config.num_steps:
        return Trained(initial)
    name = f"{training.name}, from step {start}" if start else training.name
    evaluate, evaluation_examples, groups = _judge(training, start, config.num_steps)
    workload = Workload(
        name=name,
        task={"name": name, "tasks_per_step": tasks_per_step},
        start=lambda settings: jax.tree.map(jnp.copy, initial),
        step=lambda settings: training.step_fn,
        sample=lambda settings, position: training.sample(start + position // tasks_per_step),
        examples_per_step=lambda settings: tasks_per_step * training.steps_per_call,
        evaluate=evaluate,
        num_examples=(config.num_steps - start) * tasks_per_step,
        tokens_per_example=training.tokens_per_task,
        space={key: RATE for key in searched if hparams.get(key, 0.0) > 0},
        evaluation_examples=evaluation_examples,
        warmup_examples=max(0, training.warmup_steps - start) * tasks_per_step,
        groups=groups,
    )
    outcome = run(
        workload,
        hparams,
        directory=directory,
        config=loop or IMPROVING,
        memory=memory,
        fingerprint=training.fingerprint,
    )
    return Trained(outcome.snapshot.state, outcome.from_checkpoint)


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
        metrics = step_fn(state, episodes)[1]
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
