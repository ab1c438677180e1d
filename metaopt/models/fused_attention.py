"""Fused causal attention for GPUs, differentiable twice in every order that meta-gradients take.

Scores are made in blocks inside of Pallas kernels and never stored: memory is O(L), where that of
`metaopt.models.attention.causal_attention` is O(L²), or O(L B) in blocks.

Fused kernels usually come as a `jax.custom_vjp`, which has no forward mode and no second
derivative, and so serve neither mixed mode nor reverse mode. Here attention and its gradient are
two primitives, and the derivative of each is one too, a linear map that knows its transpose. With
c = 1 / sqrt(F), a dot for a tangent, ⟨a, b⟩ summed over the features, and sums over visible keys:

    A   s = c q k',  lse = log Σ exp(s),  p = exp(s - lse),  o = p v
    Ȧ   ṡ = c (q̇ k' + q k̇'),  μ = Σ p ṡ,  ȯ = Σ (p ∘ ṡ) v + p v̇ - μ o,  d(lse) = μ
    B   δ = ⟨g, o⟩,  ds = p ∘ (g v' - δ),  dq = c ds k,  dk = c ds' q,  dv = p' g
    Ḃ   ṗ = p ∘ (ṡ - μ),  δ̇ = ⟨ġ, o⟩ + ⟨g, ȯ⟩,
        dṡ = ṗ ∘ (g v' - δ) + p ∘ (ġ v' + g v̇' - δ̇),
        dq̇ = c (dṡ k + ds k̇),  dk̇ = c (dṡ' q + ds' q̇),  dv̇ = ṗ' g + p' ġ

The transpose of Ȧ is B: reverse mode. The derivative of B is Ḃ: forward over reverse, which is
mixed mode. The transpose of Ḃ needs no kernel of its own, and is reverse over reverse: Ḃ at ġ = 0
is a Hessian, that of ⟨g, o⟩, and so its own transpose; and B is linear in g, with transpose Ȧ.

References:
  Dao, 2023. FlashAttention-2. arXiv:2307.08691, algorithms 1 and 2 (A and B).
  Kemaev et al., 2025. Scalable Meta-Learning via Mixed-Mode Differentiation.
  arXiv:2505.00793 (why Ḃ is all that a meta-gradient needs).
  Beltagy et al., 2020. Longformer. arXiv:2004.05150 (the sliding window).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from metaopt.errors import UserError
from metaopt.types import Array

Arrays = tuple[Array, ...]


class Plan(NamedTuple):
    """What kernels are compiled for: arguments of `fused_attention`, c, precision of products."""

    block: int
    window: int
    interpret: bool
    scale: float
    precision: str | None

    @property
    def for_tangents(self) -> "Plan":
        """With half the block, since these kernels hold twice as many arrays."""
        return self._replace(block=max(16, self.block // 2))


def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | None = None,
    block: int = 64,
    interpret: bool | None = None,
) -> Array:
    """Scaled dot-product attention of each token to itself and those before it, in one kernel.

    ``softmax(q k' / sqrt(F)) v`` with softmax and sums in float32 at least. Products are made
    in the dtype of the arguments, and those of float32 in what `jax.default_matmul_precision`
    says, which on a GPU is TF32 unless it is set to ``'highest'``.

    It has `jax.grad` and `jax.jvp`, `jax.grad` and `jax.jvp` of `jax.grad`, which are reverse and
    mixed mode, and `jax.vmap` of all these. It has no derivative of `jax.jvp` and no third one.

    Args:
      query: floating-point ``[S, H, L, F]``.
      key: of the same shape and dtype.
      value: of the same shape and dtype.
      window: how many tokens are in reach, itself included; None for all.
      block: B, queries and keys in a block, a power of two from 16 on. L is padded to a
        multiple of it, and F to such a power. A kernel takes up to 6 B F numbers of shared memory:
        at B = 64, 96 KiB for heads of 64 in float32.
      interpret: whether to run as plain JAX, slowly; None for where there is no GPU.

    Returns:
      ``[S, H, L, F]`` in the dtype of the values.

    Raises:
      UserError: shapes or dtypes differ, block or window are no such numbers, or a derivative
        is taken that it does not have.
    """
    _check(query, key, value, window, block)
    S, H, L, F = query.shape
    block = min(block, max(16, pl.next_power_of_2(L)))
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    plan = Plan(block, min(window or L, L), interpret, 1 / math.sqrt(F), precision)

    def pad(x: Array) -> Array:  # the padded keys are after all queries
        padding = (0, -L % block), (0, max(16, pl.next_power_of_2(F)) - F)
        return jnp.pad(x.reshape(S * H, L, F), ((0, 0), *padding))

    out, _ = attend_p.bind(pad(query), pad(key), pad(value), plan=plan)
    return out[:, :L, :F].reshape(S, H, L, F)


def _check(query: Array, key: Array, value: Array, window: int | None, block: int) -> None:
    kinds = [f"{x.dtype}{list(x.shape)}" for x in (query, key, value)]
    if len(set(kinds)) > 1 or query.ndim != 4 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise UserError(
            "fused attention takes query, key and value of one floating-point dtype and one "
            f"shape [S, H, L, F], not {', '.join(kinds)}"
        )
    if block < 16 or block & (block - 1):
        raise UserError(f"the block of fused attention is a power of two from 16 on, not {block}")
    if window is not None and window < 1:
        raise UserError(f"a window of attention has one token or more, not {window}")


# The four maps. From here on N = S H, and L and F are padded.


def _attend(q: Array, k: Array, v: Array, *, plan: Plan) -> Arrays:
    """A: the output [N, L, F] and the logsumexp of the scores [N, L]."""
    dtype = _sum_dtype(q)

    def step(carry, own, other, visible):  # the softmax of the keys so far
        top, total, out = carry
        (q,), (k, v) = own, other
        s = jnp.where(visible, plan.scale * _dot(plan, q, k.T), jnp.finfo(dtype).min)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        p = jnp.where(visible, jnp.exp(s - new_top[:, None]), 0)
        shrink = jnp.exp(top - new_top)
        out = shrink[:, None] * out + _dot(plan, p.astype(v.dtype), v)
        return new_top, shrink * total + jnp.sum(p, axis=1), out

    def finish(carry, own):
        top, total, out = carry
        return out / total[:, None], top + jnp.log(total)

    lse = jax.ShapeDtypeStruct(q.shape[:2], dtype)
    start = (lse, jnp.finfo(dtype).min), (lse, 0), (v, 0)
    return _sweep(plan, step, start, (v, lse), (q,), (k, v), finish)


def _attend_dot(q, k, v, out, lse, q_dot, k_dot, v_dot, *, plan: Plan) -> Arrays:
    """Ȧ: the tangents of output and logsumexp."""
    plan = plan.for_tangents

    def step(carry, own, other, visible):
        q, q_dot, _, lse = own
        (k, v), other_dot = other[:2], other[2:]

        def unnormalised(q, k, v):  # whose derivatives at a fixed logsumexp are μ and ȯ + μ o
            p = _probabilities(plan, visible, q, k, lse)
            return jnp.sum(p, axis=1), _dot(plan, p.astype(v.dtype), v)

        return _add(carry, jax.jvp(unnormalised, (q, k, v), (q_dot, *other_dot))[1])

    def finish(carry, own):
        mu, mixed = carry
        return mixed - mu[:, None] * own[2], mu

    own, other = (q, q_dot, out, lse), (k, v, k_dot, v_dot)
    return _sweep(plan, step, ((lse, 0), (v, 0)), (v, lse), own, other, finish)


def _backward(q, k, v, out, lse, g, *, plan: Plan) -> Arrays:
    """B: the cotangents of q, k, v, where g is that of the output."""
    return _cotangents(plan, (q, g, lse, _row_dot(g, out)), (k, v))


def _backward_dot(q, k, v, out, lse, g, q_dot, k_dot, v_dot, out_dot, mu, g_dot, *, plan: Plan):
    """Ḃ: the tangents of the cotangents of q, k, v."""
    delta_dot = _row_dot(g_dot, out) + _row_dot(g, out_dot)
    rows = (q, g, lse, _row_dot(g, out), q_dot, g_dot, mu, delta_dot)
    return _cotangents(plan.for_tangents, rows, (k, v, k_dot, v_dot), tangents=True)


def _cotangents(plan: Plan, rows: Arrays, columns: Arrays, tangents: bool = False) -> Arrays:
    """B of what queries (rows) and keys (columns) have; or Ḃ, if tangents follow in both.

    One kernel goes over keys and one over queries, so that no two programs add to one block.
    """
    q, k, v = rows[0], *columns[:2]
    query_step, key_step = (_adding(plan, part, tangents) for part in (_query_part, _key_part))
    return (
        *_sweep(plan, query_step, ((q, 0),), (q,), rows, columns),
        *_sweep(plan, key_step, ((k, 0), (v, 0)), (k, v), columns, rows, by_key=True),
    )


# What a block of queries and one of keys give. The kernels of tangents hold the `jax.jvp` of
# these, so the equations of Ȧ and Ḃ are not written a second time.


def _adding(plan: Plan, part: Callable, tangents: bool) -> Callable:
    def step(carry, own, other, visible):
        at, m, n = functools.partial(part, plan, visible), len(own) // 2, len(other) // 2
        if not tangents:
            return _add(carry, at(own, other))
        return _add(carry, jax.jvp(at, (own[:m], other[:n]), (own[m:], other[n:]))[1])

    return step


def _probabilities(plan: Plan, visible: Array, q: Array, k: Array, lse: Array) -> Array:
    return jnp.where(visible, jnp.exp(plan.scale * _dot(plan, q, k.T) - lse[:, None]), 0)


def _score_cotangent(plan: Plan, visible: Array, rows: Arrays, columns: Arrays) -> Arrays:
    """The probabilities and c ds."""
    (q, g, lse, delta), (k, v) = rows, columns
    p = _probabilities(plan, visible, q, k, lse)
    return p, plan.scale * p * (_dot(plan, g, v.T) - delta[:, None])


def _query_part(plan: Plan, visible: Array, rows: Arrays, columns: Arrays) -> Arrays:
    """What the keys give to dq."""
    k, ds = columns[0], _score_cotangent(plan, visible, rows, columns)[1]
    return (_dot(plan, ds.astype(k.dtype), k),)


def _key_part(plan: Plan, visible: Array, columns: Arrays, rows: Arrays) -> Arrays:
    """What the queries give to dk and dv."""
    (q, g), (p, ds) = rows[:2], _score_cotangent(plan, visible, rows, columns)
    return _dot(plan, ds.astype(q.dtype).T, q), _dot(plan, p.astype(g.dtype).T, g)


def _sum_dtype(x: Array):
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(plan: Plan, a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=plan.precision, preferred_element_type=_sum_dtype(a))


def _row_dot(a: Array, b: Array) -> Array:
    return jnp.sum(a.astype(_sum_dtype(a)) * b, axis=2)


def _add(carry: Arrays, parts: Arrays) -> Arrays:
    return tuple(a + b for a, b in zip(carry, parts, strict=True))


def _sweep(
    plan: Plan,
    step: Callable[[Arrays, Arrays, Arrays, Array], Arrays],
    start: tuple,
    out_like: tuple,
    own: Arrays,
    other: Arrays,
    finish: Callable[[Arrays, Arrays], Arrays] = lambda carry, own: carry,
    by_key: bool = False,
) -> Arrays:
    """One kernel: each block of one side goes over those blocks of the other that it can see.

    Args:
      plan: of its block and window.
      step: ``(carry, own block, other block, visible [queries, keys]) -> carry``.
      start: for each carry, an array whose blocks it is like, and the number it begins as.
      out_like: arrays whose shapes and dtypes the results have.
      own: arrays ``[N, L]`` and ``[N, L, F]``, of which a program has one block.
      other: such arrays, over whose blocks it goes.
      finish: ``(carry, own block) -> results``.
      by_key: whether ``own`` are of keys and ``other`` of queries, or the reverse.
    """
    N, L, F = own[0].shape
    block, dtype = plan.block, _sum_dtype(own[0])
    size, num_blocks = np.int32(block), np.int32(L // block)  # as program_id: x64 has int64
    params = triton.CompilerParams(num_warps=4 if F <= 64 else 8, num_stages=2)

    def kernel(own_refs, other_refs, *out_refs):
        i = lax.rem(pl.program_id(0), num_blocks)
        mine = tuple(ref[...] for ref in own_refs)
        if by_key:
            last = lax.div((i + 1) * block + plan.window - 2, size)
            blocks = i, jnp.minimum(last + 1, num_blocks)
        else:
            blocks = lax.div(jnp.maximum(i * block - plan.window + 1, 0), size), i + 1

        def body(j, carry):
            theirs = tuple(ref[pl.ds(j * block, block)] for ref in other_refs)
            query, key = (j, i) if by_key else (i, j)
            position = jnp.arange(block, dtype=jnp.int32)
            distance = (query - key) * block + position[:, None] - position[None, :]
            return step(carry, mine, theirs, (distance >= 0) & (distance < plan.window))

        carry = tuple(jnp.full((block, *x.shape[2:]), value, dtype) for x, value in start)
        results = finish(lax.fori_loop(*blocks, body, carry), mine)
        for ref, result in zip(out_refs, results, strict=True):
            ref[...] = result.astype(ref.dtype)

    def part(x, length):  # a block of own, or all of other, for a program
        def index(program):
            i = lax.rem(program, num_blocks) if length == block else 0
            return (lax.div(program, num_blocks), i, *(0,) * (x.ndim - 2))

        return pl.BlockSpec((None, length, *x.shape[2:]), index)

    call = pl.pallas_call(
        kernel,
        grid=(N * (L // block),),
        in_specs=(tuple(part(x, block) for x in own), tuple(part(x, L) for x in other)),
        out_specs=tuple(part(x, block) for x in out_like),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_like),
        compiler_params=params,
        interpret=plan.interpret,
    )
    return tuple(call(own, other))


# Primitives of the four. A `jax.custom_jvp` has no transpose of its own for the linear part, and
# `jax.checkpoint` drops its rule, so that a second derivative would enter the kernel.


def _primitive(name: str, evaluate: Callable, shapes: Callable) -> core.Primitive:
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(evaluate, static_argnames="plan"))
    primitive.def_abstract_eval(lambda *args, plan: shapes(*args))

    def batch(args, axes, *, plan):  # the batch joins N
        pairs = list(zip(args, axes, strict=True))
        size = next(x.shape[axis] for x, axis in pairs if axis is not None)
        args = (batching.bdim_at_front(x, axis, size) for x, axis in pairs)
        outs = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in args), plan=plan)
        return [x.reshape(size, -1, *x.shape[1:]) for x in outs], [0] * len(outs)

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=True))
    return primitive


attend_p = _primitive(
    "attend", _attend, lambda q, k, v: [v, q.update(shape=q.shape[:2], dtype=_sum_dtype(q))]
)
attend_dot_p = _primitive("attend_dot", _attend_dot, lambda *args: args[3:5])
backward_p = _primitive("attend_backward", _backward, lambda *args: args[:3])
backward_dot_p = _primitive("attend_backward_dot", _backward_dot, lambda *args: args[:3])


def _attend_jvp(primals, tangents, *, plan):
    outs, dots = attend_p.bind(*primals, plan=plan), map(ad.instantiate_zeros, tangents)
    return outs, attend_dot_p.bind(*primals, *outs, *dots, plan=plan)


def _backward_jvp(primals, tangents, *, plan):
    outs, dots = backward_p.bind(*primals, plan=plan), map(ad.instantiate_zeros, tangents)
    return outs, backward_dot_p.bind(*primals, *dots, plan=plan)


def _attend_dot_transpose(residuals, bars, plan):
    # The logsumexp does not leave this file, and its cotangent is zero.
    return backward_p.bind(*residuals, bars[0], plan=plan)


def _backward_dot_transpose(residuals, bars, plan):
    # What reaches q, k, v through output and logsumexp is in the Hessian.
    *_, out, lse, g = residuals
    out_dot, mu = attend_dot_p.bind(*residuals[:5], *bars, plan=plan)
    dots = (*bars, out_dot, mu, jnp.zeros_like(g))
    hessian = backward_dot_p.bind(*residuals, *dots, plan=plan)
    return [*hessian, jnp.zeros_like(out), jnp.zeros_like(lse), out_dot]


def _linear(primitive: core.Primitive, split: int, transpose: Callable) -> None:
    """Makes a primitive linear in the arguments after the first ``split``, its residuals."""

    def jvp(primals, tangents, *, plan):
        if not all(isinstance(dot, ad.Zero) for dot in tangents[:split]):
            raise UserError(
                "fused attention has no derivative of its forward-mode derivative, nor a third "
                "one: take jax.grad first and jax.jvp or jax.grad of it, or plain attention"
            )
        dots = map(ad.instantiate_zeros, tangents[split:])
        linear = functools.partial(primitive.bind, *primals[:split], plan=plan)
        return linear(*primals[split:]), linear(*dots)

    def transposed(cotangents, *args, plan):
        bars = transpose(args[:split], [ad.instantiate_zeros(x) for x in cotangents], plan)
        asked = zip(args[split:], bars, strict=True)
        return [None] * split + [bar if ad.is_undefined_primal(x) else None for x, bar in asked]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transposed


ad.primitive_jvps[attend_p] = _attend_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
_linear(attend_dot_p, 5, _attend_dot_transpose)
_linear(backward_dot_p, 6, _backward_dot_transpose)
