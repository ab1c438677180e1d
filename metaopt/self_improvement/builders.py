"""Builders of workloads: a meta-training, or a plain training."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import parallel
from metaopt.errors import UserError
from metaopt.learners import maml
from metaopt.meta_gradients import joint
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.workload import Scale, Setting, Settings, Space, Workload
from metaopt.training.loop import StepFn
from metaopt.types import Batch, Episode, Learner, LossFn, MetaGradFn, MetaState, Model, Params


def constant(done: float) -> float:
    """No schedule."""
    del done
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
    task: Mapping[str, float | int | str],
    params: Params,
    learner: Learner,
    estimate: Callable[[Settings], MetaGradFn],
    sample: Callable[[Settings, int], Episode],
    evaluate: Callable[[MetaState], np.ndarray],
    examples_per_step: Callable[[Settings], int],
    num_examples: int,
    tokens_per_example: int,
    space: Space,
    schedule: Callable[[float], float] = cosine,
    execution_options: Mapping[str, Sequence[Setting]] | None = None,
    annealing_steps: int = 0,
    seed: int = 0,
    num_devices: int = 0,
) -> Workload:
    """A workload of the outer step.

    Settings that it reads beside the scalars of the state: ``optimizer`` (see `OuterConfig`)
    and ``tasks_at_a_time``; the functions given here may read more.

    Args:
      name, task, evaluate, examples_per_step, num_examples, tokens_per_example, space: as for
        `Workload`.
      params: initial parameters.
      learner: what is learned.
      estimate: ``settings -> estimator``.
      sample: ``(settings, position) -> episodes [T, ...]`` of one step, on the host.
      schedule: schedule of the outer rates over the run.
      execution_options: as for `Workload`; ``{"tasks_at_a_time": (0, 1)}``, say.
      annealing_steps: as for `make_meta_step`; for an estimator with ``query_loss='annealed'``.
      seed: seed of what is drawn in a step.
      num_devices: number of devices; 0 for all.
    """
    devices = parallel.default_devices(num_devices)

    def start(settings: Settings) -> MetaState:
        outer = _outer(settings)
        hparams = outer.hparams() | {"inner_learning_rate": jnp.float32(0.0)}
        key = jax.random.key(seed)
        state = init_state(key, params, learner, outer_optimizer(outer), hparams)
        return parallel.replicate(state, devices)

    @functools.cache
    def compiled(chosen: tuple[tuple[str, Setting], ...]) -> StepFn:
        settings = dict(chosen)
        step = make_meta_step(
            estimate(settings),
            outer_optimizer(_outer(settings)),
            tasks_at_a_time=int(settings.get("tasks_at_a_time", 0)),
            axis_name=parallel.AXIS,
            annealing_steps=annealing_steps,
        )
        return parallel.parallel_step(step, devices)

    scalars = {*OuterConfig(optimizer="lars").hparams(), "inner_learning_rate"}

    def static(settings: Settings) -> tuple[tuple[str, Setting], ...]:
        return tuple(sorted((k, v) for k, v in settings.items() if k not in scalars))

    return Workload(
        name=name,
        task=task,
        start=start,
        step=lambda settings: compiled(static(settings)),
        sample=lambda settings, position: parallel.split_over_devices(
            sample(settings, position), len(devices)
        ),
        examples_per_step=examples_per_step,
        evaluate=evaluate,
        num_examples=num_examples,
        tokens_per_example=tokens_per_example,
        space=space,
        schedule=schedule,
        execution_options=execution_options or {},
    )


def _outer(settings: Settings) -> OuterConfig:
    return OuterConfig(optimizer=settings.get("optimizer", "adam"))  # type: ignore[arg-type]


def plain_training(
    name: str,
    *,
    task: Mapping[str, float | int | str],
    model: Model,
    loss_fn: LossFn,
    draw: Callable[[int, int], Batch],
    held_out: Batch,
    num_examples: int,
    tokens_per_example: int,
    space: Space,
    schedule: Callable[[float], float] = cosine,
    execution_options: Mapping[str, Sequence[Setting]] | None = None,
    examples_at_a_time: int = 1,
    seed: int = 0,
    num_devices: int = 0,
) -> Workload:
    """A workload of plain training, by gradients of the loss on batches.

    Settings that it reads: those of `meta_training`; ``batch_size``, a multiple of the number of
    devices; and ``microbatch``, the size of the parts of a batch of which a device computes
    ``tasks_at_a_time`` at a time (0 for the whole share of a device).

    Args:
      name, task, num_examples, tokens_per_example, space: as for `Workload`.
      model: the model.
      loss_fn: its loss.
      draw: ``(position, number) -> examples [number, ...]``, a pure function, on the host.
      held_out: examples ``[E, ...]`` that changes are judged by.
      schedule: schedule of the rate over the run.
      execution_options: as for `Workload`; microbatches, say:
        ``{"microbatch": (0, 8, 32), "tasks_at_a_time": (0, 1)}``.
      examples_at_a_time: held-out examples of one loss; there are E / this many losses.
      seed: seed of the initial parameters.
      num_devices: number of devices; 0 for all.

    Raises:
      UserError: the held-out examples do not divide by ``examples_at_a_time``.
    """
    learner, devices = maml(), parallel.default_devices(num_devices)
    num_held_out = len(jax.tree.leaves(held_out)[0])
    if num_held_out % examples_at_a_time:
        raise UserError(
            f"{num_held_out} held-out examples do not divide by examples_at_a_time="
            f"{examples_at_a_time}"
        )
    groups = jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, examples_at_a_time, *x.shape[1:]), held_out
    )
    losses_of = parallel.parallel_map(
        lambda params, batches: jax.lax.map(
            lambda batch: loss_fn(params, batch), batches, batch_size=64
        ),
        devices,
    )

    def sample(settings: Settings, position: int) -> Episode:
        size = int(settings["batch_size"])
        parallel.check_divides(size, len(devices))
        micro = int(settings.get("microbatch", 0)) or size // len(devices)
        if size % micro:
            raise UserError(f"a batch of {size} cannot be divided into microbatches of {micro}")
        batch = jax.tree.map(
            lambda x: np.asarray(x).reshape(size // micro, micro, *x.shape[1:]),
            draw(position, size),
        )
        # All of the batch is support: there is no inner loop to judge.
        nothing = jax.tree.map(lambda x: x[:, :0], batch)
        return Episode(batch, nothing, np.zeros(size // micro, np.int32))  # type: ignore[arg-type]

    return meta_training(
        name,
        task=task,
        params=model.init(jax.random.key(seed)),
        learner=learner,
        estimate=lambda settings: joint(learner, loss_fn),
        sample=sample,
        evaluate=lambda state: losses_of(state.meta_params["params"], groups),
        examples_per_step=lambda settings: int(settings["batch_size"]),
        num_examples=num_examples,
        tokens_per_example=tokens_per_example,
        space=_on_devices(space, len(devices)),
        schedule=schedule,
        execution_options=execution_options,
        seed=seed,
        num_devices=num_devices,
    )


def _on_devices(space: Space, num_devices: int) -> Space:
    """The space with batch sizes that divide by the devices."""
    axis = space.get("batch_size")
    if not isinstance(axis, Scale):
        return space
    multiple = math.lcm(axis.multiple, num_devices)
    return {**space, "batch_size": dataclasses.replace(axis, multiple=multiple)}
