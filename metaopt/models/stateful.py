"""Transformers that read on, with all keys and values or with those of a window.

    model = with_window(TransformerConfig(vocab_size=256, window=128))
    logits, context = model.read(params, model.start(1), tokens)   # then the next tokens

A recurrent model that reads on is `metaopt.models.recurrent.with_memory`.
"""

from typing import Any, cast

import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.models.transformer import (
    COMPUTE_DTYPES,
    Block,
    Past,
    Recent,
    TransformerConfig,
    embed,
    read_out,
    transformer,
)
from metaopt.types import Array, Params, Stateful

Cache = tuple[Past, ...]
"""What all layers keep of the tokens so far."""


def with_cache(config: TransformerConfig, room: int) -> Stateful:
    """A transformer that keeps the keys and values of all tokens; its context is a `Cache`.

    Args:
      config: the transformer.
      room: number of tokens that there is room for. More give nonsense: count them.

    Raises:
      UserError: the config says ``causal=False``; or positions are learned for fewer tokens.
    """
    _check_causal(config)
    if config.positions == "learned" and room > config.max_length:
        raise UserError(f"{room} tokens, and positions are learned for {config.max_length}")

    def start(sequences: int, dtype: Any = jnp.float32) -> Cache:
        def empty() -> Past:  # arrays of its own, so that they can be donated
            return Past(*_empty(config, sequences, room, dtype), jnp.zeros((), jnp.int32))

        return tuple(empty() for _ in range(config.num_layers))

    def read(params: Params, context: Cache, tokens_SxB: Array) -> tuple[Array, Cache]:
        x_SxBxD = embed(config, params, tokens_SxB, context[0].length)
        return _through_layers(config, params, x_SxBxD, context)

    return Stateful(transformer(config).init, start, read)


def with_window(config: TransformerConfig) -> Stateful:
    """A transformer that keeps the keys and values of its window alone, however much it reads.

    Token by token it is ``transformer(config)`` over everything so far. Each layer reaches
    ``window - 1`` tokens back, all of them together further.

    Args:
      config: the transformer, with a ``window`` and rotary positions: they depend on distances
        alone, so that a position may grow without end.

    Raises:
      UserError: it has none; or the config says ``causal=False``.
    """
    _check_causal(config)
    if config.window is None or config.positions != "rotary":
        raise UserError("to read on in constant memory takes a window and rotary positions")
    kept = config.window - 1

    def start(sequences: int, dtype: Any = jnp.float32) -> tuple[Recent, ...]:
        def empty() -> Recent:
            return Recent(*_empty(config, sequences, kept, dtype), jnp.zeros((), jnp.int32))

        return tuple(empty() for _ in range(config.num_layers))

    def read(params: Params, context: tuple[Recent, ...], tokens_SxB: Array):
        return _through_layers(config, params, embed(config, params, tokens_SxB), context)

    return Stateful(transformer(config).init, start, read)


def _check_causal(config: TransformerConfig) -> None:
    if not config.causal:
        raise UserError("causal=False sees all tokens at once: it cannot read on")


def _empty(config: TransformerConfig, sequences: int, room: int, dtype: Any) -> tuple[Array, Array]:
    dtype = COMPUTE_DTYPES[config.compute_dtype] or dtype
    shape = sequences, config.kv_heads, room, config.head_size
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def _through_layers(config: TransformerConfig, params: Params, x_SxBxD: Array, context: Any):
    after = []
    for i, past in enumerate(context):
        layer = {"params": params[f"layer_{i}"]}
        x_SxBxD, past = cast(tuple[Array, Any], Block(config).apply(layer, x_SxBxD, past))
        after.append(past)
    return read_out(config, params, x_SxBxD), tuple(after)
