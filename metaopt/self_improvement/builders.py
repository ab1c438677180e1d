"""Workloads of a meta-training and a plain training."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import parallel
from metaopt.errors import UserError
from metaopt.learners import maml
from metaopt.meta_gradients import joint
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.workload import (
    Scale,
    Setting,
    Settings,
    Space,
    Workload,
    is_share,
    share_of,
)
from metaopt.training.loop import StepFn
from metaopt.types import Batch, Episode, Learner, LossFn, MetaGradFn, MetaState, Model, Params


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
