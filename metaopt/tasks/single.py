"""A family of one task: for bilevel optimisation, where one training run is all there is."""

import jax
import jax.numpy as jnp

from metaopt.checks import check_episode, check_examples
from metaopt.types import Episode, Key, TaskFamily, TaskSplit


def one_episode(
    episode: Episode, *, valid: Episode | None = None, test: Episode | None = None
) -> TaskFamily:
    """The family whose every task is this episode.

    Args:
      episode: what the inner loop adapts on and is judged by, leaves ``[S, ...]``, ``[Q, ...]``.
      valid: episode of the validation split; None for the same.
      test: episode of the test split; None for the same.

    Raises:
      UserError: one of them is no single episode with examples.

    Example:
      >>> family = one_episode(Episode(Batch(x_train, y_train), Batch(x_valid, y_valid)))
    """

    def split(episode: Episode) -> TaskSplit:
        check_episode(episode)
        check_examples("support", episode.support)
        check_examples("query", episode.query)
        arrays = jax.tree.map(jnp.asarray, episode)

        def sample(key: Key, num_tasks: int) -> Episode:
            del key
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape)), arrays)

        return TaskSplit(sample)

    found = (episode if other is None else other for other in (None, valid, test))
    return TaskFamily("one episode", *map(split, found))
