"""Fused attention is attention, in value and in every derivative that a meta-gradient takes.

Kernels run as plain JAX here. That they are Triton programs too is seen from their lowering.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import mixed_mode, reverse
from metaopt.models.attention import causal_attention
from metaopt.models.fused_attention import fused_attention
from metaopt.types import Batch, Episode


def pair(window=None, block=16):
    fused = functools.partial(fused_attention, window=window, block=block, interpret=True)
    return fused, functools.partial(causal_attention, window=window)


def arrays(number, length, features=16, dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(number, 1, 2, length, features)).astype(dtype))


def gradient(attention):
    def loss(weights, query, key, value):
        return jnp.sum(weights * jnp.sin(attention(query, key, value)))

    return jax.grad(loss, argnums=(1, 2, 3))


def forward(attention, at, along):
    return jax.jvp(attention, at[1:], along[1:])


def forward_over_reverse(attention, at, along):
    return jax.jvp(gradient(attention), at, along)


def reverse_over_reverse(attention, at, along):
    def product(*at):
        return sum(map(jnp.vdot, gradient(attention)(*at), along[1:]))

    return jax.grad(product, argnums=(0, 1, 2, 3))(*at)


def assert_equal_under(derivative, attentions, *arguments, **tolerances):
    found, expected = (jax.jit(functools.partial(derivative, f))(*arguments) for f in attentions)
    chex.assert_trees_all_close(found, expected, **tolerances)


@pytest.mark.parametrize(
    ("length", "window", "block"),
    [(48, None, 16), (41, 1, 16), (70, 20, 32)],
    ids=["causal", "padded", "window"],
)
@pytest.mark.parametrize("derivative", [forward, forward_over_reverse, reverse_over_reverse])
def test_every_derivative_is_that_of_plain_attention(derivative, length, window, block):
    """In float64, so it is the equations that are compared, and not what they round."""
    with jax.enable_x64(True):
        draws = arrays(8, length)
        at, along = draws[:4], draws[4:]
        assert_equal_under(derivative, pair(window, block), at, along, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_lower_precision_and_heads_of_any_size(dtype, tolerance):
    draws = arrays(8, 20, 6, dtype)
    at, along = draws[:4], draws[4:]
    out = fused_attention(*at[1:], interpret=True)  # one block, which is more than L
    assert out.dtype == dtype and out.shape == at[0].shape
    for derivative in (forward, forward_over_reverse):
        assert_equal_under(derivative, pair(), at, along, rtol=tolerance, atol=3 * tolerance)


def test_large_scores_do_not_overflow():
    """Those that are not visible are above the visible ones by more than exp can say."""
    weights, query, key, value, *along = arrays(8, 48, dtype=np.float32)
    at = (weights, 100 * np.abs(query), np.linspace(0, 20, 48)[:, None] * np.abs(key), value)
    at = tuple(x.astype(np.float32) for x in at)
    for derivative in (forward, forward_over_reverse, reverse_over_reverse):
        found = jax.jit(functools.partial(derivative, pair(20)[0]))(at, tuple(along))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("order", ["vmap of derivative", "derivative of vmap"])
def test_vmap(order):
    def derivative(attention, weights, query, key, value):
        def product(queries, key):
            def one(query):
                return sum(map(jnp.sum, gradient(attention)(weights, query, key, value)))

            return jnp.sum(jax.vmap(one)(queries))

        queries = jnp.stack([query, 2 * query])
        if order == "derivative of vmap":
            return jax.grad(product, argnums=(0, 1))(queries, key)
        return jax.vmap(jax.grad(product, argnums=(0, 1)), (0, None))(queries[:, None], key)

    with jax.enable_x64(True):
        assert_equal_under(derivative, pair(), *arrays(4, 20), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [mixed_mode, reverse])
def test_meta_gradients_of_scanned_layers_that_are_recomputed(estimator):
    def meta_gradient(attention):
        @jax.checkpoint
        def layer(x, params):
            heads = ((x @ params[name])[:, None] for name in ("query", "key", "value"))
            return x + attention(*heads)[:, 0] @ params["out"], None

        def loss(params, batch):
            return jnp.mean((jax.lax.scan(layer, batch.inputs, params)[0] - batch.targets) ** 2)

        rng = np.random.default_rng(0)
        names = ("query", "key", "value", "out")
        params = {name: rng.normal(size=(2, 16, 16)) / 4 for name in names}
        support, query = (Batch(*rng.normal(size=(2, 2, 20, 16))) for _ in range(2))
        learner = maml(optax.sgd)
        estimate = estimator(learner, loss, InnerLoop(num_steps=2))
        episode = Episode(support, query, np.int32(0))
        rates = {"inner_learning_rate": 0.5}
        return estimate(learner.init(params), rates, episode, jax.random.key(0))

    with jax.enable_x64(True):
        fused, plain = pair()
        chex.assert_trees_all_close(
            meta_gradient(fused), meta_gradient(plain), rtol=1e-9, atol=1e-12
        )


def lowered(derivative, attention, dtype):
    shape = jax.ShapeDtypeStruct((2, 3, 200, 32), dtype)
    traced = jax.jit(functools.partial(derivative, attention)).trace((shape,) * 4, (shape,) * 4)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_are_triton_programs_and_scores_stay_in_them(dtype):
    on_gpu = functools.partial(fused_attention, window=90, interpret=False)
    for derivative, least in ((forward, 2), (forward_over_reverse, 4), (reverse_over_reverse, 6)):
        try:
            text = lowered(derivative, on_gpu, dtype)
        except RuntimeError as error:  # JAX 0.12
            pytest.skip(f"this JAX lowers Pallas for a GPU only if there is one: {error}")
        assert text.count("__gpu$xla.gpu.triton") >= least
        assert "256x256" not in text and "200x200" not in text
    assert "200x200" in lowered(forward, causal_attention, dtype)


def test_products_have_the_precision_of_where_it_is_called():
    """Kernels are traced later, when the caller has left its context."""

    def gradient_at(precision):
        with jax.default_matmul_precision(precision):
            return jax.make_jaxpr(gradient(fused_attention))(*arrays(4, 20, dtype=np.float32))

    assert "highest" in str(gradient_at("highest"))
    assert "highest" not in str(gradient_at(None))


def test_what_it_refuses():
    query, key, value = arrays(3, 20, dtype=np.float32)
    for wrong in (
        lambda: fused_attention(query, key[:, :1], value),
        lambda: fused_attention(query, key, value.astype(np.float16)),
        lambda: fused_attention(query, key, value, block=24),
        lambda: fused_attention(query, key, value, window=0),
    ):
        with pytest.raises(UserError, match="attention"):
            wrong()


@pytest.mark.parametrize("outer", [jax.grad, jax.jacfwd])
def test_a_derivative_of_the_forward_mode_says_what_to_take(outer):
    query, key, value = arrays(3, 20, dtype=np.float32)

    def slope(query):
        attention = functools.partial(fused_attention, key=key, value=value)
        return jnp.sum(jax.jvp(attention, (query,), (value,))[1])

    with pytest.raises(UserError, match=r"jax\.grad first"):
        outer(slope)(query)
