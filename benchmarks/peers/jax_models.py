"""The models of metaopt as plain functions of `jax.numpy`, in the way that most people write them.

They take metaopt's parameters and compute the same functions, with none of its rewritings:
einsum, `jax.lax.conv_general_dilated`, `jax.nn.gelu` and softmax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.problems import Sizes

Params = dict[str, Any]
RMS_EPSILON, BATCH_EPSILON = 1e-6, 1e-5
NUM_CONV_LAYERS = 4


def make_loss(sizes: Sizes) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """``(params, inputs, targets) -> scalar``: squared error, or cross-entropy in nats."""
    if sizes.name == "sinusoid":
        return lambda params, x, y: jnp.mean((mlp(params, x) - y) ** 2)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        return transformer(sizes, params, x) if sizes.name == "lm" else conv(params, x)

    def cross_entropy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(apply(params, x))
        return -jnp.mean(jnp.take_along_axis(log_probs, y[..., None], axis=-1))

    return cross_entropy


def dense(params: Params, x: jax.Array) -> jax.Array:
    """A product with a kernel, and a bias."""
    return jnp.dot(x, params["kernel"]) + params["bias"]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Two hidden layers with ReLU, ``[S, 1]`` to ``[S, 1]``: `metaopt.models.mlp`."""
    x = jax.nn.relu(dense(params["layer_0"], x))
    x = jax.nn.relu(dense(params["layer_1"], x))
    return dense(params["head"], x)


def rms_norm(params: Params, x: jax.Array) -> jax.Array:
    """Root-mean-square norm of ``[S, L, D]`` with a learned scale."""
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + RMS_EPSILON) * params["scale"]


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions of ``[S, L, H, F]``."""
    length, size = x.shape[1], x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angle = jnp.arange(length)[:, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(num_heads: int, params: Params, x: jax.Array) -> jax.Array:
    """Causal self-attention of ``[S, L, D]``."""
    S, L, D = x.shape
    qkv = jnp.einsum("sld,de->sle", x, params["qkv"]["kernel"])
    q, k, v = (part.reshape(S, L, num_heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("slhf,smhf->shlm", rotate(q), rotate(k)) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((L, L), bool)), scores, -jnp.inf)
    mixed = jnp.einsum("shlm,smhf->slhf", jax.nn.softmax(scores), v)
    return jnp.einsum("sld,de->sle", mixed.reshape(S, L, D), params["attention_out"]["kernel"])


def transformer(sizes: Sizes, params: Params, tokens: jax.Array) -> jax.Array:
    """A language model, tokens ``[S, L]`` to logits ``[S, L, V]``: `metaopt.models.transformer`."""
    x = params["embed"]["embedding"][tokens]
    for i in range(sizes.num_layers):
        layer = params[f"layer_{i}"]
        x = x + attention(sizes.num_heads, layer, rms_norm(layer["attention_norm"], x))
        up = jnp.einsum("sld,de->sle", rms_norm(layer["mlp_norm"], x), layer["up"]["kernel"])
        x = x + jnp.einsum("sle,ed->sld", jax.nn.gelu(up), layer["mlp_out"]["kernel"])
    return jnp.einsum("sld,dv->slv", rms_norm(params["final_norm"], x), params["head"]["kernel"])


def conv(params: Params, x: jax.Array) -> jax.Array:
    """Images ``[S, height, width, 1]`` to logits ``[S, V]``: `metaopt.models.conv`."""
    layout = ("NHWC", "HWIO", "NHWC")
    for i in range(NUM_CONV_LAYERS):
        layer = params[f"layer_{i}"]
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (2, 2), "SAME", dimension_numbers=layout
        )
        mean, variance = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
        x = (x - mean) * jax.lax.rsqrt(variance + BATCH_EPSILON)
        x = jax.nn.relu(x * layer["scale"] + layer["bias"])
    return dense(params["head"], jnp.mean(x, axis=(1, 2)))
