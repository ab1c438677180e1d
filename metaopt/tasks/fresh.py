"""Families whose every episode is a new task: what synthetic families have in common."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit


def fresh_tasks(name: str, draw_examples: Callable[[Key], Batch], num_support: int) -> TaskFamily:
    """The family whose every episode is a new task, drawn from its key alone.

    The three splits have the same distribution and, under the same key, different
    episodes. ``sample`` is jitted, once for all splits and each ``num_tasks``.

    Args:
      name: the name of the family.
      draw_examples: ``key -> Batch`` of S + Q examples of one task.
      num_support: S; the first S examples are the support, the others the query.
    """

    def draw_episode(key: Key) -> tuple[Batch, Batch]:
        inputs, targets = draw_examples(key)
        support = Batch(inputs[:num_support], targets[:num_support])
        return support, Batch(inputs[num_support:], targets[num_support:])

    @functools.partial(jax.jit, static_argnames="num_tasks")
    def sample(split: int, key: Key, num_tasks: int) -> Episode:
        keys = jax.random.split(jax.random.fold_in(key, split), num_tasks)
        support, query = jax.vmap(draw_episode)(keys)
        return Episode(support, query, jnp.arange(num_tasks, dtype=jnp.int32))

    train, valid, test = (TaskSplit(functools.partial(sample, split)) for split in range(3))
    return TaskFamily(name, train, valid, test)
