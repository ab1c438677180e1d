"""The missing word in place of the next: a second self-supervised objective on the same text."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from metaopt.losses import IGNORED
from metaopt.ranges import Range, Vocabulary, check_value
from metaopt.types import Array, Batch, Episode, Key, TaskFamily, TaskSplit

Share = Annotated[float, Range(1e-6, 1.0)]


def missing_tokens(family: TaskFamily, vocab_size: int, rate: float = 0.15) -> TaskFamily:
    """A family of next-token tasks as one of missing tokens, support and query alike.

    Some tokens of each sequence are replaced by one that says that something is missing, V, one
    more than the vocabulary has. The targets are what was there, and -100 elsewhere, so
    `metaopt.losses.next_token` is their loss, of a model of ``V + 1`` tokens that sees both sides
    (``TransformerConfig(causal=False)``). Unlike in BERT no chosen token is left as it is or
    exchanged for another: what is judged here is the filled gap.

    Args:
      family: language tasks; batches of int32 ``[..., S, L]``.
      vocab_size: V.
      rate: share of the tokens that are missing; of each sequence the same number, at least 1.

    Raises:
      UserError: a number is out of range.

    References:
      Devlin et al., 2019. BERT. arXiv:1810.04805, section 3.1, task 1.
    """
    check_value("vocab_size", vocab_size, Vocabulary)
    check_value("rate", rate, Share)

    def sample(split: TaskSplit, key: Key, num_tasks: int) -> Episode:
        episode = split.sample(key, num_tasks)
        # The key of the tasks themselves is not used again.
        keys = jax.random.split(jax.random.fold_in(key, vocab_size), 2)
        parts = zip(keys, (episode.support, episode.query), strict=True)
        support, query = (
            hide(batch.inputs, choose(k, batch.inputs.shape, rate), vocab_size)
            for k, batch in parts
        )
        return Episode(support, query, episode.task)

    splits = (
        split._replace(sample=functools.partial(sample, split))
        for split in (family.train, family.valid, family.test)
    )
    return TaskFamily(f"{family.name}, missing tokens", *splits)


def choose(key: Key, shape: tuple[int, ...], rate: float) -> Array:
    """Which tokens are missing: bool of a shape ``[..., L]``, the same number in each sequence."""
    number = max(1, round(rate * shape[-1]))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, shape), axis=-1), axis=-1)
    return rank < number


def hide(tokens: Array, missing: Array, vocab_size: int) -> Batch:
    """Tokens ``[..., L]`` with some replaced by V, and what was there as targets."""
    inputs = jnp.where(missing, vocab_size, tokens).astype(jnp.int32)
    return Batch(inputs, jnp.where(missing, tokens, IGNORED).astype(jnp.int32))
