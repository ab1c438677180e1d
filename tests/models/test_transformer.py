"""The ways to run the layers differ in nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import TransformerConfig, transformer

CONFIG = TransformerConfig(vocab_size=11, width=8, num_layers=2, num_heads=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)


def loss_and_grad(model, params):
    def loss(params):
        log_probs = jax.nn.log_softmax(model.apply(params, TOKENS[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))(params)


WAYS = [
    {"scan_layers": False, "remat": True},
    {"scan_layers": True, "remat": False},
    {"scan_layers": True, "remat": True, "attention_block": 3},
    {"scan_layers": True, "remat": True, "fused_attention": True, "attention_block": 16},
]


def test_the_ways_to_compute_change_neither_parameters_nor_values():
    reference = transformer(CONFIG)
    params = reference.init(jax.random.key(0))
    loss, grad = loss_and_grad(reference, params)
    assert set(params) == {"embed", "layer_0", "layer_1", "final_norm", "head"}
    for way in WAYS:
        model = transformer(replace(CONFIG, **way))
        jax.tree.map(np.testing.assert_array_equal, model.init(jax.random.key(0)), params)
        other_loss, other_grad = loss_and_grad(model, params)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other_grad, grad
        )


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    exact = transformer(replace(CONFIG, activation="swiglu"))
    rounded = transformer(replace(CONFIG, activation="swiglu", compute_dtype="bfloat16"))
    params = rounded.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    a, b = (jax.jit(model.apply)(params, TOKENS) for model in (exact, rounded))
    assert b.dtype == jnp.float32
    error = float(jnp.max(jnp.abs(a - b)))
    assert 0 < error < 0.1, error


def test_a_tied_head_is_the_embedding():
    model = transformer(replace(CONFIG, tie_head=True))
    params = model.init(jax.random.key(0))
    assert model.head == () and "head" not in params
    untied = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    expected = transformer(CONFIG).apply(untied, TOKENS)
    np.testing.assert_allclose(model.apply(params, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_learned_positions_tell_equal_tokens_apart_and_rotary_ones_do_not_move_the_first():
    model = transformer(replace(CONFIG, positions="learned", max_length=9))
    params = model.init(jax.random.key(0))
    assert params["positions"]["embedding"].shape == (9, 8)
    same = jnp.full((1, 9), 3)
    apart = model.apply(params, same)[0]
    assert (jnp.abs(apart[1:] - apart[:-1]).max(-1) > 1e-3).all()
    rotary = transformer(CONFIG).apply(transformer(CONFIG).init(jax.random.key(0)), same)[0]
    np.testing.assert_allclose(rotary, jnp.broadcast_to(rotary[0], rotary.shape), atol=1e-5)
    with pytest.raises(UserError, match="10 tokens, and positions are learned for 9"):
        model.apply(params, jnp.full((1, 10), 3))
