"""Causal attention and rotary positions, twice differentiable, in blocks or whole."""

import functools
import math

import jax
import jax.numpy as jnp

from metaopt.types import Array


def rope(x_SxLxHxF: Array, base: float = 10_000.0) -> Array:
    """Rotary position embedding: turns feature pairs by angles that grow with the position.

    The pair ``(x[i], x[i + F/2])`` at position t is rotated by ``t * base ** (-2 i / F)``,
    so the product of a query and a key depends on their distance only.

    Args:
      x_SxLxHxF: queries or keys, with heads of an even size F.
      base: sets the longest wavelength, ``2 pi base`` tokens.

    Returns:
      The rotated array, of the same shape and dtype.

    References:
      Su et al., 2021. RoFormer: Enhanced Transformer with Rotary Position
      Embedding. arXiv:2104.09864, equation 15.
    """
    length, head_size = x_SxLxHxF.shape[1], x_SxLxHxF.shape[3]
    dtype = jnp.promote_types(x_SxLxHxF.dtype, jnp.float32)  # bfloat16 cannot count positions
    frequency_f = base ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
    angle_Lxf = jnp.arange(length, dtype=dtype)[:, None] * frequency_f[None, :]
    cos, sin = jnp.cos(angle_Lxf)[None, :, None, :], jnp.sin(angle_Lxf)[None, :, None, :]
    a, b = jnp.split(x_SxLxHxF, 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_SxLxHxF.dtype)


def causal_attention(
    query_SxLxHxF: Array,
    key_SxLxHxF: Array,
    value_SxLxHxF: Array,
    window: int | None = None,
    block: int | None = None,
) -> Array:
    """Scaled dot-product attention of each token to itself and those before it.

    ``softmax(q k' / sqrt(F)) v`` with the softmax in float32 at least.

    Args:
      query_SxLxHxF: queries, with heads of size F.
      key_SxLxHxF: keys.
      value_SxLxHxF: values.
      window: how many tokens are in reach, itself included; None for all.
      block: B, how many queries are computed at a time and recomputed in the backward
        pass: scores take ``S H B L`` numbers and never ``S H L²``. None for all.

    Returns:
      ``[S, L, H, F]`` in the dtype of the values.

    References:
      Vaswani et al., 2017. Attention Is All You Need. arXiv:1706.03762, equation 1.
      Beltagy et al., 2020. Longformer. arXiv:2004.05150 (the sliding window).
    """
    S, L, H, F = query_SxLxHxF.shape
    attend = functools.partial(_attend, key_SxLxHxF, value_SxLxHxF, window or L)
    if block is None or block >= L:
        return attend(query_SxLxHxF, 0)
    num_blocks = -(-L // block)
    padding = (0, num_blocks * block - L)
    padded = jnp.pad(query_SxLxHxF, ((0, 0), padding, (0, 0), (0, 0)))
    blocks_NxSxBxHxF = padded.reshape(S, num_blocks, block, H, F).swapaxes(0, 1)
    firsts_N = block * jnp.arange(num_blocks)
    one = jax.checkpoint(lambda _, args: (None, attend(*args)), prevent_cse=False)
    mixed_NxSxBxHxF = jax.lax.scan(one, None, (blocks_NxSxBxHxF, firsts_N))[1]
    return mixed_NxSxBxHxF.swapaxes(0, 1).reshape(S, num_blocks * block, H, F)[:, :L]


def _attend(
    key_SxLxHxF: Array, value_SxLxHxF: Array, window: int, query_SxBxHxF: Array, first: Array | int
) -> Array:
    """What B queries, at positions from ``first`` on, take from keys and values."""
    block, F = query_SxBxHxF.shape[1], query_SxBxHxF.shape[3]
    scores_SxHxBxL = jnp.einsum("sbhf,slhf->shbl", query_SxBxHxF, key_SxLxHxF)
    dtype = jnp.promote_types(scores_SxHxBxL.dtype, jnp.float32)
    scores_SxHxBxL = scores_SxHxBxL.astype(dtype) / math.sqrt(F)
    positions_L = jnp.arange(key_SxLxHxF.shape[1])
    distance_BxL = first + jnp.arange(block)[:, None] - positions_L[None, :]
    visible_BxL = (distance_BxL >= 0) & (distance_BxL < window)
    # A finite mask: infinities make NaNs of their own in the derivatives of softmax.
    masked = jnp.where(visible_BxL[None, None], scores_SxHxBxL, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(masked, axis=-1).astype(value_SxLxHxF.dtype)
    return jnp.einsum("shbl,slhf->sbhf", weights, value_SxLxHxF)
