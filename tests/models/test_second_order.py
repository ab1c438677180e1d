"""Hessian-vector products, forward over reverse, against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.models import TransformerConfig, conv, recurrent, transformer

TOKENS = np.random.default_rng(0).integers(0, 7, (2, 6)).astype(np.int32)
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 1))

MODELS = {
    "transformer": (
        lambda: transformer(
            TransformerConfig(
                vocab_size=7,
                width=8,
                num_layers=2,
                num_heads=2,
                activation="swiglu",
                attention_block=4,
                scan_layers=True,
                remat=True,
            )
        ),
        TOKENS,
    ),
    "grouped heads": (
        lambda: transformer(
            TransformerConfig(
                vocab_size=7,
                width=6,
                num_layers=1,
                num_heads=4,
                num_kv_heads=2,
                head_width=2,
                norm="layer",
                biases="all",
            )
        ),
        TOKENS,
    ),
    "gru": (lambda: recurrent(7, 4, "gru"), TOKENS),
    "conv": (lambda: conv((16, 16, 1), 3, filters=2, downsample="max_pool"), IMAGES),
}


@pytest.mark.parametrize("name", MODELS)
def test_hessian_vector_product_equals_finite_differences(name):
    make, inputs = MODELS[name]
    model = make()
    params = model.init(jax.random.key(0))
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

        def loss(params):
            outputs = model.apply(params, jnp.asarray(inputs))
            assert outputs.dtype == jnp.float64  # the parameters set the precision
            return -jnp.mean(jax.nn.log_softmax(outputs)[..., 0])

        grad = jax.jit(jax.grad(loss))
        product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, direction)
        step = 1e-6
        above, below = (
            grad(jax.tree.map(lambda p, v, s=sign: p + s * step * v, params, direction))
            for sign in (1, -1)
        )
        expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)
        size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * size),
            product,
            expected,
        )
