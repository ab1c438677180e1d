"""Generation from a causal language model, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.indices import check_range
from metaopt.ranges import CountOr0, Length, NotNegative, check_value
from metaopt.types import Array, Key, Model, Params


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
      params: its parameters.
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
        # The Gumbel-max draw from softmax(logits / temperature), multiplied through by
        # the temperature: it is the greedy choice at 0, where a quotient would be NaN.
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        return tokens.at[position].set(jnp.argmax(logits + temperature * noise)), None

    positions = len(prompt) + jnp.arange(num_tokens)
    # Causality hides the padding from every position that is read.
    padded = jnp.pad(prompt, (0, num_tokens))
    return jax.lax.scan(step, padded, (positions, jax.random.split(key, num_tokens)))[0]
