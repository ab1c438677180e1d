"""The smallest language model: the next token given the last one."""

import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.types import Array, Key, Model, Params


def bigram(vocab_size: int) -> Model:
    """A table of logits, one row for each last token; all of it is the head.

    ``logits[s, t] = table[inputs[s, t]]``. The cross-entropy is convex in the
    table. It starts at zero, where every prediction is uniform and costs
    ``log(vocab_size)`` nats a token, and is least where the rows are the logs of
    the empirical transition frequencies (up to a constant a row).

    Args:
      vocab_size: V, at least 2.

    Returns:
      A model from int32 ``[S, L]`` to float32 logits ``[S, L, V]`` with params
      ``{'head': {'table': [V, V]}}``. A token outside the vocabulary gives NaN.

    Raises:
      UserError: if ``vocab_size`` is less than 2.
    """
    if vocab_size < 2:
        raise UserError(f"vocab_size is {vocab_size}: a language model needs at least 2 tokens")

    def init(key: Key) -> Params:
        del key  # the start is the uniform distribution
        return {"head": {"table": jnp.zeros((vocab_size, vocab_size), jnp.float32)}}

    def apply(params: Params, tokens_SxL: Array) -> Array:
        return jnp.take(params["head"]["table"], tokens_SxL, axis=0)

    return Model(init, apply)
