"""Rotary positions are relative; the ways to run the layers differ in nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.models import TransformerConfig, transformer
from metaopt.models.transformer import causal_attention, rope

CONFIG = TransformerConfig(vocab_size=11, width=8, num_layers=2, num_heads=2)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)


def loss_and_grad(model, params):
    def loss(params):
        log_probs = jax.nn.log_softmax(model.apply(params, TOKENS[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))(params)


def test_rope_makes_products_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    query, key = (rope(jnp.tile(x, (1, 12, 1, 1))) for x in (query, key))
    products = np.asarray(jnp.einsum("slhf,smhf->lm", query, key))
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1  # and does depend on it


def test_rope_is_a_rotation_and_none_at_the_first_position():
    x = jax.random.normal(jax.random.key(0), (2, 12, 3, 8))
    rotated = rope(x)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])


def test_attention_with_equal_scores_is_the_mean_of_what_is_in_reach():
    value = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    out = causal_attention(jnp.zeros_like(value), value, value, window=3)
    expected = [value[:, max(0, t - 2) : t + 1].mean(axis=1) for t in range(6)]
    np.testing.assert_allclose(out, jnp.stack(expected, axis=1), rtol=1e-5, atol=1e-6)


def test_remat_and_scan_change_neither_parameters_nor_values():
    reference = transformer(CONFIG)
    params = reference.init(jax.random.key(0))
    loss, grad = loss_and_grad(reference, params)
    assert set(params) == {"embed", "layer_0", "layer_1", "final_norm", "head"}
    for scan_layers, remat in [(False, True), (True, False), (True, True)]:
        model = transformer(replace(CONFIG, scan_layers=scan_layers, remat=remat))
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
