"""How well a pretrained model predicts a text, segment by segment."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.errors import UserError
from metaopt.losses import NATS_TO_BITS
from metaopt.models import TransformerConfig, reader
from metaopt.models.reader import Cache
from metaopt.pretrained.model import Pretrained
from metaopt.ranges import CountOr0, Length, check_value
from metaopt.statistics import Score, t_interval
from metaopt.types import Array, Params


class Segments(NamedTuple):
    """The losses of the segments of a text.

    Attributes:
      nats: sum over the tokens of each, float64 ``[n]``.
      num_tokens: number of tokens predicted in each, int ``[n]``.
      num_bytes: bytes that they stand for, int ``[n]``.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray


def score(
    found: Pretrained,
    tokens: np.ndarray,
    length: int = 256,
    context: int = 0,
    update: Callable[[int], None] = lambda done: None,
) -> Score:
    """The loss of a model on a text, in bits a byte.

    Args:
      found: the model.
      tokens: the text, integers ``[n]``, two at least. All but the first are predicted once.
      length: tokens of a segment. Without context the first of each is predicted from one token.
      context: tokens that are read before each segment and not counted again, a multiple of
        ``length``; fewer where the text begins.
      update: called with the number of segments that are done.

    Raises:
      UserError: the text is too short, or a number is out of range.
    """
    segments = segment_losses(found, tokens, length, context, update)
    bits = segments.nats * NATS_TO_BITS
    mean = bits.sum() / segments.num_bytes.sum()
    # Of a ratio: the interval of what is left of each segment, in bytes of a mean segment.
    left = (bits - mean * segments.num_bytes) / segments.num_bytes.mean()
    ci95 = t_interval(left).ci95 if len(left) > 1 else float("nan")
    return Score(float(mean), ci95, "bits/byte", int(segments.num_tokens.sum()))


def segment_losses(
    found: Pretrained,
    tokens: np.ndarray,
    length: int,
    context: int,
    update: Callable[[int], None] = lambda done: None,
) -> Segments:
    """The losses of all segments; see `score`."""
    check_value("length", length, Length)
    check_value("context", context, CountOr0)
    if context % length:
        raise UserError(f"context {context} is no multiple of length {length}: give one that is")
    if len(tokens) < 2:
        raise UserError(f"a text of {len(tokens)} tokens holds nothing to predict: give 2")
    num_tokens = len(tokens) - 1
    count = -(-num_tokens // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: len(tokens)] = tokens
    blocks, config = padded[:-1].reshape(count, 1, length), found.config
    following = padded[1:].reshape(count, length)
    start, nats = reader(config).start, np.zeros(count)
    counted = np.minimum(length, num_tokens - length * np.arange(count))
    for i in range(count):
        cache = start(1, context + length)
        for block in blocks[max(0, i - context // length) : i]:
            cache = _read(config, found.params, cache, block)
        nats[i] = _loss(config, found.params, cache, blocks[i], following[i], counted[i])
        update(i + 1)
    parts = np.split(np.asarray(tokens[1:]), np.cumsum(counted)[:-1])
    return Segments(nats, counted, np.array([len(found.codec.decode(part)) for part in parts]))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(config: TransformerConfig, params: Params, cache: Cache, tokens: Array) -> Cache:
    return reader(config).read(params, cache, tokens)[1]


@functools.partial(jax.jit, static_argnames=("config",))
def _loss(
    config: TransformerConfig,
    params: Params,
    cache: Cache,
    tokens: Array,
    following: Array,
    counted: Array,
) -> Array:
    """The sum of the losses of the first tokens of a segment, nats."""
    logits = reader(config).read(params, cache, tokens)[0][0]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return jnp.where(jnp.arange(len(each)) < counted, each, 0).sum()
