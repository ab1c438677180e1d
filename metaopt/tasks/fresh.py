"""Families whose every episode is a new task: what synthetic families have in common."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metaopt.types import Batch, Episode, Key, PyTree, TaskFamily, TaskSplit

AT_A_TIME = 64
"""Most tasks that are drawn in one call: one program draws any number from there on."""


def fresh_tasks(
    name: str,
    draw_examples: Callable[..., Batch],
    num_support: int,
    data: Sequence[PyTree] | None = None,
) -> TaskFamily:
    """The family whose every episode is a new task, drawn from its key alone.

    The three splits have the same distribution, or that of their data, and, under the same key,
    different episodes. ``sample`` is compiled once for data of equal shapes and all ``num_tasks``
    from `AT_A_TIME` on, and once for each number below.

    Args:
      name: the name of the family.
      draw_examples: ``key -> Batch`` of S + Q examples of one task; with ``data``,
        ``(key, data of the split) -> Batch``.
      num_support: S; the first S examples are the support, the others the query.
      data: arrays that the training, validation and test tasks are drawn from.
    """

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def draw(key: Key, data: tuple) -> tuple[Batch, Batch]:
        inputs, targets = draw_examples(key, *data)
        support = Batch(inputs[:num_support], targets[:num_support])
        return support, Batch(inputs[num_support:], targets[num_support:])

    def sample(split: int, key: Key, num_tasks: int) -> Episode:
        most = num_tasks if isinstance(key, Tracer) else AT_A_TIME
        of_split = () if data is None else (data[split],)
        parts = [draw(keys, of_split) for keys in _task_keys(split, key, num_tasks, most)]
        support, query = parts[0] if len(parts) == 1 else _joined(parts, num_tasks)
        return Episode(support, query, jnp.arange(num_tasks, dtype=jnp.int32))

    train, valid, test = (TaskSplit(functools.partial(sample, split)) for split in range(3))
    return TaskFamily(name, train, valid, test)


@functools.partial(jax.jit, static_argnames=("num_tasks", "most"))
def _task_keys(split: int, key: Key, num_tasks: int, most: int) -> tuple[Key, ...]:
    """The key of each task, in groups of ``most``; the last one is filled up with other keys."""
    keys = jax.random.split(jax.random.fold_in(key, split), num_tasks)
    if num_tasks <= most:
        return (keys,)
    filled = jnp.concatenate([keys, keys[: -num_tasks % most]])
    return tuple(filled.reshape(-1, most))


def _joined(parts: list, num_tasks: int):
    """The groups, one after the other, without what filled up the last one."""
    on_host = jax.device_get(parts)
    return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)[:num_tasks]), *on_host)
