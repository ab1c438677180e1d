"""The smallest language models: tables of the next token given the last one, or the last m."""

import jax.numpy as jnp

from metaopt.indices import NO_INDEX, as_tokens
from metaopt.ranges import Count, Vocabulary, check_value
from metaopt.types import Array, Key, Model, Params


def bigram(vocab_size: int) -> Model:
    """A table of logits, one row for each last token; `ngram` of order 1.

    ``logits[s, t] = table[inputs[s, t]]``. A token outside the vocabulary gives NaN, or a
    UserError where its value is known.
    """
    return ngram(vocab_size, 1)


def ngram(vocab_size: int, order: int) -> Model:
    """A table of logits, one row for each context of the last m tokens; all of it is the head.

    Contexts are numbered with their tokens as digits in base V, the latest last. The
    cross-entropy is convex in the table. It starts at zero, where every prediction is
    uniform and costs ``log(vocab_size)`` nats a token, and is least where the rows are the
    logs of the empirical transition frequencies (up to a constant a row). The first m - 1
    positions of a sequence have no whole context: their prediction stays uniform.

    Args:
      vocab_size: V, at least 2.
      order: m, tokens in a context, at least 1.

    Returns:
      A model from integers ``[S, L]`` to float32 logits ``[S, L, V]`` with params
      ``{'head': {'table': [V^m, V]}}``. A token outside the vocabulary gives NaN in every
      context that it is in, or a UserError where its value is known.

    Raises:
      UserError: if ``vocab_size`` is less than 2 or ``order`` less than 1.
    """
    check_value("vocab_size", vocab_size, Vocabulary)
    check_value("order", order, Count)

    def init(key: Key) -> Params:
        del key  # the start is the uniform distribution
        return {"head": {"table": jnp.zeros((vocab_size**order, vocab_size), jnp.float32)}}

    def apply(params: Params, tokens_SxL: Array) -> Array:
        tokens_SxL = as_tokens("tokens", tokens_SxL, vocab_size)
        length = tokens_SxL.shape[1]
        padded = jnp.pad(tokens_SxL, ((0, 0), (order - 1, 0)))
        contexts_SxL = jnp.zeros_like(tokens_SxL)
        for i in range(order):
            digits = padded[:, i : i + length]
            known = (digits < vocab_size) & (contexts_SxL < NO_INDEX)
            contexts_SxL = jnp.where(known, contexts_SxL * vocab_size + digits, NO_INDEX)
        logits_SxLxV = jnp.take(params["head"]["table"], contexts_SxL, axis=0)
        whole = jnp.arange(length) >= order - 1
        return jnp.where(whole[None, :, None], logits_SxLxV, 0.0)

    return Model(init, apply)
