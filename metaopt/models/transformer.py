"""A transformer: pre-norm, rotary positions, no biases; decoder-only unless told otherwise.

Its options cover the families of Llama, Qwen2 and GPT-2: see `metaopt.pretrained`.

The parameters are ``embed``, ``layer_0``, ``layer_1``, ..., ``final_norm`` and, if
not tied, ``head``. Their names, shapes and first values do not depend on how the
layers are run (unrolled or scanned, recomputed or not), so one checkpoint fits all.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.indices import as_tokens
from metaopt.models.attention import (
    ROPE_BASE,
    RopeScaling,
    cached_attention,
    causal_attention,
    full_attention,
    rope,
)
from metaopt.models.linen import apply_module
from metaopt.models.primitives import RMS_EPSILON, gelu, layer_norm, matmul, rms_norm
from metaopt.ranges import Checked, Heads, Layers, Length, Range, Vocabulary, Width
from metaopt.types import Array, Key, Model, Params

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}  # None: as the parameters are


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """Shape of a transformer, and how it is computed.

    Raises UserError where a field is out of range, or ``width`` does not divide into
    ``num_heads`` heads of an even size.

    Attributes:
      vocab_size: V, at least 2.
      width: D, of the residual stream.
      num_layers: blocks of attention and MLP.
      num_heads: H; divides ``width`` into heads of an even size, unless ``head_width`` is given.
      num_kv_heads: heads of keys and values, each shared by ``num_heads / num_kv_heads`` heads of
        queries (Ainslie et al., 2023, arXiv:2305.13245); None for as many as heads of queries.
      head_width: F, features of a head; None for ``width / num_heads``.
      mlp_width: hidden width of the MLP. None gives ``4 * width`` for GELU, and for
        SwiGLU two thirds of it, rounded up to a multiple of 8, which makes the
        number of parameters about equal (Shazeer, 2020).
      activation: ``'gelu'`` or ``'swiglu'``.
      window: a token attends to itself and the ``window - 1`` tokens before it;
        None for all before it.
      attention_block: queries that attend at a time, recomputed in the backward pass, so
        that memory grows with the length of a sequence and not with its square. None
        takes all at once, which is quicker while their scores are small.
      fused_attention: attend in the kernels of `metaopt.models.fused_attention`, for GPUs, which
        never store scores; ``attention_block`` is then their block, 64 if it is None.
      scan_layers: run the layers as a `jax.lax.scan`, which compiles one layer for
        all of them, rather than unrolled, which runs faster where nothing is remat.
      remat: keep only the input of each layer for the backward pass, and compute
        the rest of the layer again. On CPU it takes ``scan_layers`` as well: XLA
        merges the recomputation of unrolled layers away, and no memory is saved.
      compute_dtype: ``'float32'`` or ``'bfloat16'`` for the layers and the residual
        stream. Parameters, softmax, final norm and head are float32 in either.
      tie_head: use the embedding as the head; the model then has no head for ANIL.
      positions: ``'rotary'``: queries and keys are turned by where they are (Su et al., 2021);
        ``'learned'``: a vector for each position is added to the embedding, as in GPT-2.
      max_length: longest sequence with learned positions.
      rope_base: base of the rotary angles, see `metaopt.models.attention.rope`.
      rope_scaling: makes the rotary angles smaller.
      norm: ``'rms'``, or ``'layer'`` (mean taken off, and a bias), as in GPT-2.
      norm_epsilon: what norms add to the mean square.
      biases: of the products ``'none'``, those of ``'qkv'`` as in Qwen2, of all in ``'attention'``,
        or of ``'all'`` in a block, as in GPT-2; all zero at the start.
      causal: a token sees itself and those before it. False: all of its sequence, for tokens that
        are missing (`metaopt.tasks.missing_tokens`) and never for the next one, which it would see.
    """

    vocab_size: Vocabulary
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 4
    mlp_width: Annotated[int, Range(1, 2**20)] | None = None
    activation: Literal["gelu", "swiglu"] = "gelu"
    window: Length | None = None
    attention_block: Length | None = None
    fused_attention: bool = False
    scan_layers: bool = False
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    tie_head: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    max_length: Length = 1024
    num_kv_heads: Heads | None = None
    head_width: Width | None = None
    rope_base: Annotated[float, Range(1, 1e9)] = ROPE_BASE
    rope_scaling: RopeScaling | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: Annotated[float, Range(1e-12, 1)] = RMS_EPSILON
    biases: Literal["none", "qkv", "attention", "all"] = "none"
    causal: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.head_width is None and self.width % self.num_heads:
            raise UserError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.head_size % 2 and self.positions == "rotary":
            given = f"width {self.width} / num_heads {self.num_heads} gives"
            raise UserError(
                f"{given if self.head_width is None else 'head_width gives'} heads of an odd size, "
                f"{self.head_size}: rotary positions need an even one"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}"
            )
        if not self.causal and (self.window or self.attention_block or self.fused_attention):
            raise UserError(
                "causal=False takes all tokens at once: leave out window, attention_block and "
                "fused_attention"
            )
        block = self.attention_block or 64
        if self.fused_attention and (block < 16 or block & (block - 1)):
            raise UserError(
                f"attention_block {block} with fused_attention: it is a power of two from 16 on"
            )

    @property
    def head_size(self) -> int:
        """F, features of a head."""
        return self.head_width or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    def has_bias(self, product: str) -> bool:
        """Whether a product of a block, by the name of its parameters, has a bias."""
        with_bias = {"none": (), "qkv": ("qkv",), "attention": ("qkv", "attention_out")}
        return self.biases == "all" or product in with_bias[self.biases]


def _over_tokens(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of the rows of a matrix as one of the tokens of ``[S, L, D]``.

    XLA's CPU backend transposes the gradient of a product with two leading axes, which costs half
    the time of a meta-step or more.
    """

    def apply(x_SxLxD: Array) -> Array:
        S, L, D = x_SxLxD.shape
        return function(x_SxLxD.reshape(S * L, D)).reshape(S, L, -1)

    return apply


class Norm(nn.Module):
    """`nn.RMSNorm` or `nn.LayerNorm` with derivative rules of ours; at least float32 inside."""

    config: TransformerConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[..., D]`` to the same in ``dtype``, or in that of the parameters."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        accurate = jnp.promote_types(jnp.promote_types(x.dtype, scale.dtype), jnp.float32)
        x, scale, epsilon = x.astype(accurate), scale.astype(accurate), self.config.norm_epsilon
        if self.config.norm == "rms":
            return rms_norm(x, scale, epsilon).astype(self.dtype or accurate)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(accurate)
        return layer_norm(x, scale, bias, epsilon).astype(self.dtype or accurate)


class Past(NamedTuple):
    """What a layer keeps of the tokens so far.

    Attributes:
      keys, values: ``[S, G, C, F]`` with room for C tokens; G heads.
      length: number of tokens that are there, int32 scalar.
    """

    keys: Array
    values: Array
    length: Array

    def followed_by(self, keys: Array, values: Array) -> "Past":
        """With keys and values ``[S, G, B, F]`` of B more tokens, for which there is room."""
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=self.length, axis=2
        )
        whole = (
            put(self.keys, keys.astype(self.keys.dtype)),
            put(self.values, values.astype(self.values.dtype)),
        )
        return Past(*whole, self.length + keys.shape[2])


class Recent(NamedTuple):
    """What a layer keeps of the tokens in its window.

    Attributes:
      keys, values: ``[S, G, C, F]`` of the last C tokens, the latest last; keys as they are before
        they are turned by where they are, since that moves on.
      length: number of them that are there, int32 scalar: the last ones.
    """

    keys: Array
    values: Array
    length: Array


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    config: TransformerConfig

    def dense(self, features: int, name: str, scale: float = 1.0) -> Callable[[Array], Array]:
        """A matrix product with weights of variance ``scale / fan_in`` at the start."""
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        dtype = COMPUTE_DTYPES[self.config.compute_dtype]
        dense = nn.Dense(
            features,
            use_bias=self.config.has_bias(name),
            dtype=dtype,
            kernel_init=init,
            dot_general=lambda x, weights, *_, **__: matmul(x, weights),
            name=name,
        )
        beside = self.variables.get("params", {}).get(name, {})
        if "down" not in beside:
            return _over_tokens(dense)
        down, up = (jnp.asarray(beside[part], dtype) for part in ("down", "up"))
        # Of low rank, see `metaopt.models.adapters`.
        return _over_tokens(lambda x: (y := dense(x)) + matmul(matmul(x, down), up).astype(y.dtype))

    @nn.compact
    def __call__(
        self, x_SxLxD: Array, past: Past | Recent | None = None
    ) -> tuple[Array, Past | Recent | None]:
        """Maps the residual stream ``[S, L, D]`` to the next; with the tokens before, if given."""
        dtype = COMPUTE_DTYPES[self.config.compute_dtype]
        norm = functools.partial(Norm, self.config, dtype=dtype)
        mixed_SxLxD, past = self.attention(norm(name="attention_norm")(x_SxLxD), past)
        x_SxLxD += mixed_SxLxD
        x_SxLxD += self.mlp(norm(name="mlp_norm")(x_SxLxD))
        return x_SxLxD, past

    @property
    def residual_scale(self) -> float:
        """Of the variance of what each of the two branches of each layer adds to the stream."""
        return 1 / (2 * self.config.num_layers)

    def attention(
        self, x_SxLxD: Array, past: Past | Recent | None
    ) -> tuple[Array, Past | Recent | None]:
        """Self-attention, with rotary positions unless they are learned."""
        S, L, D = x_SxLxD.shape
        query, key, value = self.heads(x_SxLxD)
        if past is None:
            query, key = self.turned(query), self.turned(key)
            mixed_SxHxLxF = self.attend(query, *self.shared(key, value))
        elif isinstance(past, Recent):
            mixed_SxHxLxF, past = self.attend_recent(query, key, value, past)
        else:
            first, longest = past.length, past.keys.shape[2]
            query, key = (self.turned(x, first, longest) for x in (query, key))
            past = past.followed_by(key, value)
            key, value = self.shared(past.keys, past.values)
            mixed_SxHxLxF = cached_attention(query, key, value, first, self.config.window)
        mixed_SxLxHF = mixed_SxHxLxF.swapaxes(1, 2).reshape(S, L, -1)
        return self.dense(D, "attention_out", self.residual_scale)(mixed_SxLxHF), past

    def attend_recent(
        self, query: Array, key: Array, value: Array, past: Recent
    ) -> tuple[Array, Recent]:
        """Attention to the tokens of the window, most of which came before."""
        keys, values = (
            jnp.concatenate([before, new.astype(before.dtype)], axis=2)
            for before, new in ((past.keys, key), (past.values, value))
        )
        kept, L = past.keys.shape[2], key.shape[2]
        query = self.turned(query, kept, kept + L)
        shared = self.shared(self.turned(keys), values)
        mixed = cached_attention(query, *shared, kept, self.config.window, begin=kept - past.length)
        length = jnp.minimum(past.length + L, kept)
        return mixed, Recent(keys[:, :, L:], values[:, :, L:], length)

    def turned(self, x: Array, first: Array | int = 0, longest: int | None = None) -> Array:
        """Queries or keys turned by where they are, unless positions are learned."""
        if self.config.positions != "rotary":
            return x
        return rope(x, self.config.rope_base, self.config.rope_scaling, first, longest)

    def shared(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Keys and values of as many heads as there are of queries."""
        times = self.config.num_heads // self.config.kv_heads
        if times == 1:
            return key, value
        return jnp.repeat(key, times, axis=1), jnp.repeat(value, times, axis=1)

    def heads(self, x_SxLxD: Array) -> tuple[Array, ...]:
        """Queries ``[S, H, L, F]``, and keys and values of as many heads as they have."""
        S, L, _ = x_SxLxD.shape
        H, G, F = self.config.num_heads, self.config.kv_heads, self.config.head_size
        qkv = self.dense((H + 2 * G) * F, "qkv")(x_SxLxD)
        if G == H:
            return tuple(jnp.moveaxis(qkv.reshape(S, L, 3, H, F), (2, 3), (0, 2)))
        return tuple(jnp.split(qkv.reshape(S, L, -1, F).swapaxes(1, 2), (H, H + G), axis=1))

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Attention of ``[S, H, L, F]``, whole, in blocks or fused."""
        window, block = self.config.window, self.config.attention_block
        if not self.config.causal:
            return full_attention(query, key, value)
        if not self.config.fused_attention:
            return causal_attention(query, key, value, window, block)
        from metaopt.models.fused_attention import fused_attention  # imports Pallas

        return fused_attention(query, key, value, window=window, block=block or 64)

    def mlp(self, x_SxLxD: Array) -> Array:
        """A hidden layer: GELU, or SwiGLU (Shazeer, 2020, arXiv:2002.05202, equation 6)."""
        hidden = mlp_width(self.config)
        up = self.dense(hidden, "up")(x_SxLxD)
        if self.config.activation == "swiglu":
            activated = jax.nn.silu(self.dense(hidden, "gate")(x_SxLxD)) * up
        else:
            activated = gelu(up)
        mixed = self.dense(x_SxLxD.shape[-1], "mlp_out", self.residual_scale)(activated)
        beside = self.variables.get("params", {})
        if "second_up" not in beside:
            return mixed
        # A second MLP, see `metaopt.models.adapters`.
        up, out = (beside[name]["kernel"].astype(x_SxLxD.dtype) for name in SECOND_MLP)
        second = _over_tokens(lambda x: matmul(gelu(matmul(x, up)), out))
        return mixed + second(x_SxLxD).astype(mixed.dtype)


SECOND_MLP = ("second_up", "second_out")
"""Names of the matrices of a second MLP of a block, which most have none of."""


def mlp_width(config: TransformerConfig) -> int:
    """The hidden width of the MLP, where the config leaves it open."""
    if config.mlp_width is not None:
        return config.mlp_width
    return 8 * math.ceil(config.width / 3) if config.activation == "swiglu" else 4 * config.width


def _init(config: TransformerConfig, key: Key) -> Params:
    """Parameters at the start, drawn layer by layer however the layers are run."""
    embed_key, head_key, norm_key, *layer_keys = jax.random.split(key, config.num_layers + 3)
    init_embedding = nn.initializers.normal(config.width**-0.5)
    shape, stream = (config.vocab_size, config.width), jnp.zeros((1, 1, config.width))
    params: Params = {"embed": {"embedding": init_embedding(embed_key, shape)}}
    for i, layer_key in enumerate(layer_keys):
        params[f"layer_{i}"] = Block(config).init(layer_key, stream)["params"]
    params["final_norm"] = Norm(config).init(norm_key, stream)["params"]
    if config.positions == "learned":
        where_key = jax.random.fold_in(embed_key, 1)
        of_length = init_embedding(where_key, (config.max_length, config.width))
        params["positions"] = {"embedding": of_length}
    if not config.tie_head:
        params["head"] = {"kernel": init_embedding(head_key, shape).T}
    return params


def embed(
    config: TransformerConfig, params: Params, tokens_SxL: Array, first: Array | int = 0
) -> Array:
    """The residual stream before the first layer."""
    embedding_VxD = params["embed"]["embedding"]
    tokens_SxL = as_tokens("tokens", tokens_SxL, config.vocab_size)
    x_SxLxD = jnp.take(embedding_VxD, tokens_SxL, axis=0)
    if config.positions == "learned":
        x_SxLxD += _positions(params["positions"]["embedding"], first, tokens_SxL.shape[1])
    return x_SxLxD.astype(COMPUTE_DTYPES[config.compute_dtype] or embedding_VxD.dtype)


def _positions(of_length: Array, first: Array | int, length: int) -> Array:
    if length > len(of_length):
        raise UserError(
            f"{length} tokens, and positions are learned for {len(of_length)}: raise max_length, "
            "or take rotary positions"
        )
    return jax.lax.dynamic_slice_in_dim(of_length, first, length)[None]


def read_out(config: TransformerConfig, params: Params, x_SxLxD: Array) -> Array:
    """The logits of the residual stream after the last layer."""
    x_SxLxD = apply_module(Norm(config), params["final_norm"], x_SxLxD)
    embedding_VxD = params["embed"]["embedding"]
    head_DxV = embedding_VxD.T if config.tie_head else params["head"]["kernel"]
    return _over_tokens(lambda x_NxD: matmul(x_NxD, head_DxV))(x_SxLxD)


def run_layers(
    config: TransformerConfig,
    params: Params,
    x_SxLxD: Array,
    first: int = 0,
    end: int | None = None,
) -> Array:
    """The layers from ``first`` on, those before ``end``, one after the other."""

    def layer(x_SxLxD: Array, params: Params) -> tuple[Array, None]:
        return cast(tuple[Array, None], Block(config).apply({"params": params}, x_SxLxD))

    if config.remat:  # the body of a scan needs no guard against merging the recomputation
        layer = jax.checkpoint(layer, prevent_cse=not config.scan_layers)
    of_layers = [
        params[f"layer_{i}"] for i in range(first, config.num_layers if end is None else end)
    ]
    if config.scan_layers and of_layers:
        if len({jax.tree.structure(x) for x in of_layers}) > 1:
            raise UserError("scan_layers takes layers that are alike: let all or none be adapted")
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers)
        return jax.lax.scan(layer, x_SxLxD, stacked)[0]
    for params_of_layer in of_layers:
        x_SxLxD, _ = layer(x_SxLxD, params_of_layer)
    return x_SxLxD


def transformer(config: TransformerConfig) -> Model:
    """A transformer language model, decoder-only unless the config says ``causal=False``.

    Every matrix starts normal with variance ``1 / fan_in`` (``1 / D`` for embedding
    and head), and the two that write to the residual stream with
    ``1 / (2 num_layers)`` of it, so that the stream does not grow with depth.

    Args:
      config: shape and mode of computation.

    Returns:
      A model from integers ``[S, L]`` to float32 logits ``[S, L, V]``. A token outside
      the vocabulary gives NaN, or a UserError where its value is known; so does a sequence longer
      than ``max_length`` with learned positions.
    """

    def apply(params: Params, tokens_SxL: Array) -> Array:
        x_SxLxD = run_layers(config, params, embed(config, params, tokens_SxL))
        return read_out(config, params, x_SxLxD)

    return Model(
        init=functools.partial(_init, config),
        apply=apply,
        head=() if config.tie_head else ("head",),
    )
