"""Rotary positions are relative; attention in blocks is attention, and to all is of no order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.models.attention import causal_attention, full_attention, rope


def test_rope_makes_products_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    query, key = (rope(jnp.tile(x, (1, 1, 12, 1))) for x in (query, key))
    products = np.asarray(jnp.einsum("shlf,shmf->lm", query, key))
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1  # and does depend on it


def test_rope_is_a_rotation_and_none_at_the_first_position():
    x = jax.random.normal(jax.random.key(0), (2, 3, 12, 8))
    rotated = rope(x)
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(rotated[:, :, 0], x[:, :, 0])


def test_attention_with_equal_scores_is_the_mean_of_what_is_in_reach():
    value = jax.random.normal(jax.random.key(0), (1, 2, 6, 4))
    out = causal_attention(jnp.zeros_like(value), value, value, window=3)
    expected = [value[:, :, max(0, t - 2) : t + 1].mean(axis=2) for t in range(6)]
    np.testing.assert_allclose(out, jnp.stack(expected, axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_in_blocks_is_attention(window):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 2, 10, 4))

    def total(query, key, value, block):
        mixed = causal_attention(query, key, value, window, block)
        return jnp.sum(jnp.sin(mixed)), mixed

    of = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    expected = of(query, key, value, None)
    for block in (4, 5):  # 10 is and is not a multiple
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            of(query, key, value, block),
            expected,
        )


def test_attention_to_all_is_causal_attention_of_the_last_and_has_no_order():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 2, 7, 4))
    full = full_attention(query, key, value)
    causal = causal_attention(query, key, value)
    np.testing.assert_allclose(full[:, :, -1], causal[:, :, -1], rtol=1e-5, atol=1e-6)
    turned = full_attention(query, key[:, :, ::-1], value[:, :, ::-1])
    np.testing.assert_allclose(turned, full, rtol=1e-5, atol=1e-6)
