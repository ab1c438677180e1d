"""A transformer that reads on and keeps what it has read, for generation and long texts."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.models.transformer import (
    COMPUTE_DTYPES,
    Block,
    Past,
    TransformerConfig,
    embed,
    read_out,
)
from metaopt.types import Array, Params

Cache = tuple[Past, ...]
"""What all layers keep of the tokens so far."""


class Reader(NamedTuple):
    """A transformer that reads on, and keeps what it needs of what it has read.

    Attributes:
      start: ``(sequences, room) -> cache`` with room for a number of tokens.
      read: ``(params, cache, tokens [S, B]) -> (logits [S, B, V], cache)``. The logits are those
        that the model gives for all tokens so far at once. More tokens than there is room for give
        nonsense: count them.
    """

    start: Callable[[int, int], Cache]
    read: Callable[[Params, Cache, Array], tuple[Array, Cache]]


def reader(config: TransformerConfig) -> Reader:
    """The transformer of a config as one that reads on, for generation and for long texts.

    Raises:
      UserError: the config says ``causal=False``, or when read, see `transformer`.
    """
    if not config.causal:
        raise UserError("causal=False sees all tokens at once: it cannot read on")

    def start(sequences: int, room: int) -> Cache:
        if config.positions == "learned" and room > config.max_length:
            raise UserError(f"{room} tokens, and positions are learned for {config.max_length}")
        dtype = COMPUTE_DTYPES[config.compute_dtype] or jnp.float32
        shape = sequences, config.kv_heads, room, config.head_size

        def empty() -> Past:  # arrays of its own, so that they can be donated
            return Past(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

        return tuple(empty() for _ in range(config.num_layers))

    def read(params: Params, cache: Cache, tokens_SxB: Array) -> tuple[Array, Cache]:
        x_SxBxD, after = embed(config, params, tokens_SxB, cache[0].length), []
        for i, past in enumerate(cache):
            layer = {"params": params[f"layer_{i}"]}
            x_SxBxD, past = cast(tuple[Array, Past], Block(config).apply(layer, x_SxBxD, past))
            after.append(past)
        return read_out(config, params, x_SxBxD), tuple(after)

    return Reader(start, read)
