"""The closed loop in place of `metaopt.training.loop.train`, with the same arguments."""

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.measure import count_flops
from metaopt.outer_step import RATES
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.workload import Scale, Workload
from metaopt.training.loop import StepFn, TrainConfig, Trained, TrainFn, Training, train
from metaopt.types import Episode, MetaState

RATE = Scale(low=1e-7, high=1e3)
HELD_OUT_BATCHES = 8


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
    Trials are judged by ``training.evaluate``, whose cost counts in seconds. If there is none, or
    it gives a single number, they are judged by the losses that steps report of batches from
    after the end of the run (`reported_losses`), whose cost counts as examples of training. Only
    ``num_steps`` of the config is used: ``loop`` has the schedule, and ``metrics.jsonl`` has one
    line an assessment.

    A state that has done steps already continues from there, as the second phase of a training
    does. It has a name of its own, such as ``"MAML++, from step 500"``.

    Args:
      training: what is trained. Its state is copied.
      config: its length.
      directory: directory of the run; a temporary one if not given.
      searched: names of ``state.hparams`` whose scalars a search may change.
      loop: schedule of the loop; `LoopConfig` if not given.
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
    start = int(state.step)
    initial = jax.tree.map(jnp.copy, state)
    if start >= config.num_steps:
        return Trained(initial)
    name = f"{training.name}, from step {start}" if start else training.name
    evaluate, evaluation_examples = training.evaluate, 0.0
    if evaluate is None or np.ndim(evaluate(state)) != 1:
        held_out = functools.cache(lambda i: training.sample(config.num_steps + i))
        evaluate = reported_losses(training.step_fn, held_out, HELD_OUT_BATCHES)
        share = _share_of_loss(name, training.step_fn, state, held_out(0))
        evaluation_examples = HELD_OUT_BATCHES * tasks_per_step * share
    workload = Workload(
        name=name,
        task={"name": name, "tasks_per_step": tasks_per_step},
        start=lambda settings: jax.tree.map(jnp.copy, initial),
        step=lambda settings: training.step_fn,
        sample=lambda settings, position: training.sample(start + position // tasks_per_step),
        examples_per_step=lambda settings: tasks_per_step * training.steps_per_call,
        evaluate=evaluate,  # type: ignore[arg-type]
        num_examples=(config.num_steps - start) * tasks_per_step,
        tokens_per_example=training.tokens_per_task,
        space={key: RATE for key, value in hparams.items() if key in searched and value > 0},
        evaluation_examples=evaluation_examples,
    )
    outcome = run(
        workload,
        hparams,
        directory=directory,
        config=loop,
        memory=memory,
        fingerprint=training.fingerprint,
    )
    return Trained(outcome.snapshot.state, outcome.from_checkpoint)


def reported_losses(
    step_fn: StepFn, batch: Callable[[int], Episode], number: int
) -> Callable[[MetaState], np.ndarray]:
    """``state -> float64 [number]``: the losses that a step reports of batches, without an update.

    Only what the ``loss`` of the step depends on is computed: no meta-gradient. A step that makes
    several updates in one call would make all but the last of them; give one with one update.

    Args:
      step_fn: step that can be traced, such as `jax.jit` and `jax.pmap` give.
      batch: ``i -> episodes``, for i below ``number``.
      number: number of batches.
    """
    loss = _loss_alone(step_fn)

    def losses(state: MetaState) -> np.ndarray:
        # One at a time: on several CPU devices none may be in flight behind another.
        return np.array([float(loss(state, batch(i))) for i in range(number)], np.float64)

    return losses


def _loss_alone(step_fn: StepFn) -> Callable[[MetaState, Episode], jax.Array]:
    return jax.jit(lambda state, episodes: step_fn(state, episodes)[1]["loss"])


def _share_of_loss(name: str, step_fn: StepFn, state: MetaState, episodes: Episode) -> float:
    """Share of its loss in the operations of a step; 1 if they cannot be counted."""
    loss = _loss_alone(step_fn)
    try:
        shapes = jax.eval_shape(loss, state, episodes)
    except jax.errors.JAXTypeError as error:
        raise UserError(
            f"the step of {name!r} cannot be traced, so its loss cannot be computed without an "
            "update; give evaluate, the held-out losses of a state"
        ) from error
    assert shapes.shape == ()
    try:
        alone = count_flops(loss, state, episodes).total
        return min(1.0, alone / count_flops(step_fn, state, episodes).total)
    except (UserError, ZeroDivisionError):
        return 1.0


def trainer(improve: bool) -> TrainFn:
    """`improving_train`, or plain `train`.

    The loop uses the `Memory` whose path or URL is in ``$METAOPT_MEMORY``, if it is set.
    """
    if not improve:
        return train
    where = os.environ.get("METAOPT_MEMORY")
    return functools.partial(improving_train, memory=Memory(where) if where else None)
