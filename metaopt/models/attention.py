"""Attention and rotary positions, differentiable in both modes, in blocks or whole.

Arrays are ``[S, H, L, F]``: the sequences and heads lead, as the batched products of every
derivative want them, and nothing is transposed in between.
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.ranges import Checked, Length, Range
from metaopt.types import Array

Factor = Annotated[float, Range(1e-3, 1e6)]
ROPE_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked):
    """Rotary angles made smaller, for contexts longer than those of the first training.

    Attributes:
      kind: ``'linear'`` divides all frequencies by the factor (Chen et al., 2023,
        arXiv:2306.15595); ``'llama3'`` divides those whose wavelength is above
        ``original_length / low``, leaves those below ``original_length / high`` alone, and goes
        from one to the other between them (the released code of Llama 3.1).
      factor: what frequencies are divided by.
      low, high: ends of the range between, in waves per ``original_length``.
      original_length: tokens of a sequence in the first training.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: Factor = 1.0
    low: Factor = 1.0
    high: Factor = 4.0
    original_length: Length = 8192

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        """The frequencies, radians a token, as they are used."""
        if self.kind == "linear":
            return frequency / self.factor
        waves = self.original_length * frequency / (2 * math.pi)
        kept = np.clip((waves - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def rope(
    x_SxHxLxF: Array,
    base: float = ROPE_BASE,
    scaling: RopeScaling | None = None,
    first: Array | int = 0,
    longest: int | None = None,
) -> Array:
    """Rotary position embedding: turns feature pairs by angles that grow with the position.

    The pair ``(x[i], x[i + F/2])`` at position t is rotated by ``t * base ** (-2 i / F)``,
    so the product of a query and a key depends on their distance only.

    Args:
      x_SxHxLxF: queries or keys, with heads of an even size F.
      base: sets the longest wavelength, ``2 pi base`` tokens.
      scaling: makes the angles smaller; None leaves them.
      first: position of the first, that may be traced.
      longest: number of positions that there may be; None for L, from 0 on.

    Returns:
      The rotated array, of the same shape and dtype.

    References:
      Su et al., 2021. RoFormer: Enhanced Transformer with Rotary Position
      Embedding. arXiv:2104.09864, equation 15.
    """
    length, head_size = x_SxHxLxF.shape[2:]
    turns = _turns(longest or length, head_size, base, scaling)
    if longest is not None:
        turns = [jax.lax.dynamic_slice_in_dim(jnp.asarray(t), first, length) for t in turns]
    cos_LxF, sin_LxF = turns
    dtype = jnp.promote_types(x_SxHxLxF.dtype, jnp.float32)  # of bfloat16 the angles are too coarse
    a, b = jnp.split(x_SxHxLxF, 2, axis=-1)
    swapped = jnp.concatenate([b, a], axis=-1)
    cos, sin = (jnp.asarray(turn_LxF[None, None], dtype) for turn_LxF in (cos_LxF, sin_LxF))
    rotated = x_SxHxLxF * cos + swapped * sin
    return rotated.astype(x_SxHxLxF.dtype)


@functools.lru_cache(maxsize=16)
def _turns(
    length: int, head_size: int, base: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines, and sines with the sign that the other of a pair has: constants of a program.

    As operations of the program they would be computed for each sequence, head and derivative.
    """
    frequency_f = base ** (-np.arange(0, head_size, 2) / head_size)
    frequency_f = frequency_f if scaling is None else scaling(frequency_f)
    angle_Lxf = np.arange(length)[:, None] * frequency_f
    cos_Lxf, sin_Lxf = np.cos(angle_Lxf), np.sin(angle_Lxf)
    return np.concatenate([cos_Lxf, cos_Lxf], -1), np.concatenate([-sin_Lxf, sin_Lxf], -1)


def causal_attention(
    query_SxHxLxF: Array,
    key_SxHxLxF: Array,
    value_SxHxLxF: Array,
    window: int | None = None,
    block: int | None = None,
) -> Array:
    """Scaled dot-product attention of each token to itself and those before it.

    ``softmax(q k' / sqrt(F)) v`` with the softmax in float32 at least.

    Args:
      query_SxHxLxF: queries, with heads of size F.
      key_SxHxLxF: keys.
      value_SxHxLxF: values.
      window: how many tokens are in reach, itself included; None for all.
      block: B, how many queries are computed at a time and recomputed in the backward
        pass: scores take ``S H B L`` numbers and never ``S H L²``. None for all.

    Returns:
      ``[S, H, L, F]`` in the dtype of the values.

    References:
      Vaswani et al., 2017. Attention Is All You Need. arXiv:1706.03762, equation 1.
      Beltagy et al., 2020. Longformer. arXiv:2004.05150 (the sliding window).
    """
    S, H, L, F = query_SxHxLxF.shape
    attend = functools.partial(_attend_before, key_SxHxLxF, value_SxHxLxF, window or L)
    if block is None or block >= L:
        return attend(query_SxHxLxF, 0)
    num_blocks = -(-L // block)
    padding = (0, num_blocks * block - L)
    padded = jnp.pad(query_SxHxLxF, ((0, 0), (0, 0), padding, (0, 0)))
    blocks_NxSxHxBxF = jnp.moveaxis(padded.reshape(S, H, num_blocks, block, F), 2, 0)
    firsts_N = block * jnp.arange(num_blocks)
    one = jax.checkpoint(lambda _, args: (None, attend(*args)), prevent_cse=False)
    mixed_NxSxHxBxF = jax.lax.scan(one, None, (blocks_NxSxHxBxF, firsts_N))[1]
    return jnp.moveaxis(mixed_NxSxHxBxF, 0, 2).reshape(S, H, num_blocks * block, F)[:, :, :L]


def full_attention(query_SxHxLxF: Array, key_SxHxLxF: Array, value_SxHxLxF: Array) -> Array:
    """Scaled dot-product attention of each token to all; see `causal_attention`."""
    return _attend(key_SxHxLxF, value_SxHxLxF, None, query_SxHxLxF)


def cached_attention(
    query_SxHxBxF: Array,
    key_SxHxLxF: Array,
    value_SxHxLxF: Array,
    first: Array | int,
    window: int | None = None,
    begin: Array | int = 0,
) -> Array:
    """As `causal_attention`, of B queries alone, the first of them at the position ``first``.

    Keys and values are those of positions 0 to L - 1; what lies after a query, or before the
    position ``begin``, may be anything.
    """
    window = window or key_SxHxLxF.shape[2]
    return _attend_before(key_SxHxLxF, value_SxHxLxF, window, query_SxHxBxF, first, begin)


def _attend_before(
    key_SxHxLxF: Array,
    value_SxHxLxF: Array,
    window: int,
    query_SxHxBxF: Array,
    first: Array | int,
    begin: Array | int = 0,
) -> Array:
    """What B queries, at positions from ``first`` on, take from themselves and those before."""
    block, L = query_SxHxBxF.shape[2], key_SxHxLxF.shape[2]
    distance_BxL = first + jnp.arange(block)[:, None] - jnp.arange(L)[None, :]
    visible_BxL = (distance_BxL >= 0) & (distance_BxL < window)
    if not (isinstance(begin, int) and begin == 0):
        visible_BxL &= jnp.arange(L)[None, :] >= begin
    return _attend(key_SxHxLxF, value_SxHxLxF, visible_BxL, query_SxHxBxF)


def _attend(
    key_SxHxLxF: Array, value_SxHxLxF: Array, visible_BxL: Array | None, query_SxHxBxF: Array
) -> Array:
    """What B queries take from the keys that they see, or from all."""
    scaled_SxHxBxF = query_SxHxBxF / math.sqrt(query_SxHxBxF.shape[3])  # fewer than the scores
    scores_SxHxBxL = jnp.einsum("shbf,shlf->shbl", scaled_SxHxBxF, key_SxHxLxF)
    dtype = jnp.promote_types(scores_SxHxBxL.dtype, jnp.float32)
    scores_SxHxBxL = scores_SxHxBxL.astype(dtype)
    if visible_BxL is not None:
        # Added, so that no derivative has a mask of its own. Finite: infinities make NaNs there.
        hidden_BxL = jnp.where(visible_BxL, 0.0, float(jnp.finfo(dtype).min) / 2).astype(dtype)
        scores_SxHxBxL += hidden_BxL[None, None]
    weights = jax.nn.softmax(scores_SxHxBxL, axis=-1).astype(value_SxHxLxF.dtype)
    return jnp.einsum("shbl,shlf->shbf", weights, value_SxHxLxF)
