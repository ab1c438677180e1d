"""Generation from a causal language model, one token at a time.

`generate` takes any model and runs it over the whole sequence for every token; `stream` takes a
transformer, which keeps what it has read, and gives each token as it is drawn.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.frozen import whole
from metaopt.indices import check_range
from metaopt.models import TransformerConfig, transformer, with_cache
from metaopt.models.stateful import Cache
from metaopt.ranges import CountOr0, Length, NotNegative, check_value
from metaopt.types import Array, Key, Model, Params

BLOCK = 64
"""Tokens of a prompt that `stream` reads at a time."""


def generate(
    model: Model,
    params: Params,
    prompt: Array,
    num_tokens: int,
    key: Key,
    temperature: float = 1.0,
    window: int | None = None,
) -> Array:
    """Continues a prompt with tokens drawn from ``softmax(logits / temperature)``.

    The model is run over the whole sequence, or its last ``window`` tokens, for every new token.
    It compiles once for each pair of lengths, whatever the prompt, key and temperature.

    Args:
      model: causal language model, int32 ``[1, L]`` to logits ``[1, L, V]``.
      params: its parameters, or those that adapt.
      prompt: integers ``[P]`` in [0, V), P at least 1.
      num_tokens: how many tokens to add.
      key: typed key; the same key gives the same tokens.
      temperature: 0 takes the likeliest token each time.
      window: number of tokens that the model sees at most, such as the length that it was trained
        on; None for all.

    Returns:
      int32 ``[P + num_tokens]``, the prompt first.

    Raises:
      UserError: on an empty prompt, one that is no vector of integers or holds a token
        that the model does not know, and on a negative num_tokens or temperature, or
        a window below 1.
    """
    check_value("num_tokens", num_tokens, CountOr0)
    check_value("temperature", temperature, NotNegative)
    if window is not None:
        check_value("window", window, Length)
    params, model = whole(model, params), Model(model.init, model.apply)  # can be hashed
    tokens = _checked_prompt(model, params, np.asarray(prompt))
    return _generate(model, params, tokens, num_tokens, key, temperature, window)


def _checked_prompt(model: Model, params: Params, prompt: np.ndarray) -> Array:
    if prompt.size == 0:
        raise UserError("the prompt is empty: give at least one token to continue from")
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise UserError(
            f"the prompt must be a vector of integers, not {prompt.dtype}{list(prompt.shape)}"
        )
    one = jax.ShapeDtypeStruct((1, prompt.size), jnp.int32)
    check_range("the prompt's tokens", prompt, jax.eval_shape(model.apply, params, one).shape[-1])
    return jnp.asarray(prompt, jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "window"))
def _generate(
    model: Model,
    params: Params,
    prompt: Array,
    num_tokens: int,
    key: Key,
    temperature: float,
    window: int | None,
) -> Array:
    size = len(prompt) + num_tokens if window is None else min(window, len(prompt) + num_tokens)

    def step(tokens: Array, position_and_key: tuple[Array, Key]) -> tuple[Array, None]:
        position, key = position_and_key
        begin = jnp.maximum(position - size, 0)
        seen = jax.lax.dynamic_slice_in_dim(tokens, begin, size)
        logits = model.apply(params, seen[None])[0, position - 1 - begin]
        return tokens.at[position].set(_draw(logits, key, temperature)), None

    positions = len(prompt) + jnp.arange(num_tokens)
    # Causality hides the padding from every position that is read.
    padded = jnp.pad(prompt, (0, num_tokens))
    return jax.lax.scan(step, padded, (positions, jax.random.split(key, num_tokens)))[0]


def stream(
    config: TransformerConfig,
    params: Params,
    prompt: Array | np.ndarray,
    num_tokens: int,
    key: Key,
    temperature: float = 1.0,
) -> Iterator[int]:
    """Continues a prompt, as `generate` does without a window, one token after the other.

    The prompt is read in blocks of `BLOCK` tokens; a token then costs one pass over the parameters.
    It compiles once for each room, which is a multiple of that.

    Args:
      config: the transformer.
      params: its parameters.
      prompt, num_tokens, key, temperature: see `generate`.

    Yields:
      The new tokens.

    Raises:
      UserError: see `generate`; or the positions of the model are learned for fewer tokens.
    """
    check_value("num_tokens", num_tokens, CountOr0)
    check_value("temperature", temperature, NotNegative)
    tokens = _checked_prompt(transformer(config), params, np.asarray(prompt))
    length, room = len(tokens), BLOCK * -(-(len(tokens) + num_tokens) // BLOCK)
    if config.positions == "learned" and length + num_tokens <= config.max_length:
        room = min(room, config.max_length)
    cache, logits = with_cache(config, room).start(1), None
    for begin in range(0, length, BLOCK):
        part = tokens[begin : begin + BLOCK]
        fits = min(BLOCK, room - begin)
        filled = jnp.pad(part, (0, fits - len(part)))[None]
        logits, cache = _read_block(config, params, cache, filled, jnp.int32(len(part)))
    token = None
    for key_of_token in jax.random.split(key, num_tokens):
        if token is not None:  # the last one is never read
            logits, cache = _read_block(config, params, cache, token[None, None], jnp.int32(1))
        assert logits is not None  # a prompt has a token
        token = _draw(logits, key_of_token, temperature)
        yield int(token)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read_block(
    config: TransformerConfig, params: Params, cache: Cache, tokens: Array, number: Array
) -> tuple[Array, Cache]:
    """The logits after the first ``number`` of the tokens ``[1, B]``; the others are forgotten."""
    logits, cache = with_cache(config, cache[0].keys.shape[2]).read(params, cache, tokens)
    over = tokens.shape[1] - number
    cache = tuple(past._replace(length=past.length - over) for past in cache)
    return jax.lax.dynamic_index_in_dim(logits[0], number - 1, keepdims=False), cache


@jax.jit
def _draw(logits: Array, key: Key, temperature: float) -> Array:
    """A token from ``softmax(logits / temperature)``, by Gumbel noise.

    It is multiplied through by the temperature: it is the greedy choice at 0, where a quotient
    would be NaN.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature * noise).astype(jnp.int32)
