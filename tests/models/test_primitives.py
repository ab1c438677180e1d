"""Hand-written derivative rules: equal to autodiff's, in every mode and to the third order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.models.primitives import batch_norm, gelu, matmul, rms_norm


def plain_batch_norm(x, scale, bias):
    centred = x - x.mean(0, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 1e-5) * scale + bias


def plain_rms_norm(x, scale):
    return nn.RMSNorm().apply({"params": {"scale": scale}}, x)


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]


CASES = {
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=True), [(3, 5)]),
    "rms_norm": (rms_norm, plain_rms_norm, [(3, 5), (5,)]),
    "batch_norm": (batch_norm, plain_batch_norm, [(6, 3), (1, 3), (1, 3)]),
    "matmul, wide": (matmul, jnp.matmul, [(4, 3), (3, 5)]),
    "matmul, narrow": (matmul, jnp.matmul, [(4, 5), (5, 3)]),
}


def derivatives(function, args, directions):
    """The value, and derivatives in each mode and in their combinations."""
    everywhere = tuple(range(len(args)))

    def loss(*args):
        return jnp.sum(jnp.sin(function(*args)))

    grad = jax.grad(loss, everywhere)

    def slope(*args):  # a function of the gradient, to differentiate again
        return sum(jnp.vdot(g, d) for g, d in zip(grad(*args), directions, strict=True))

    curvature = jax.grad(slope, everywhere)
    return {
        "value": function(*args),
        "forward": jax.jvp(function, args, directions)[1],
        "reverse": grad(*args),
        "forward over reverse": jax.jvp(grad, args, directions)[1],
        "reverse over reverse": curvature(*args),
        "reverse over forward": jax.grad(
            lambda *args: jax.jvp(loss, args, directions)[1], everywhere
        )(*args),
        "third order": jax.jvp(curvature, args, directions)[1],
        "vmap": jax.vmap(grad)(*(jnp.stack([a, b]) for a, b in zip(args, directions, strict=True))),
    }


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_is_that_of_autodiff(name):
    function, plain, shapes = CASES[name]
    with jax.enable_x64(True):
        args = tuple(x.astype(jnp.float64) for x in arrays(*shapes))
        directions = tuple(jnp.cos(3 * x) for x in args)
        found, expected = (
            jax.jit(lambda f=f: derivatives(f, args, directions))() for f in (function, plain)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
        )


def test_at_zero_nothing_is_nan():
    zeros, one = jnp.zeros((4, 3)), jnp.ones((1, 3))
    for function in (lambda x: rms_norm(x, one[0]), lambda x: batch_norm(x, one, one), gelu):
        hessian = jax.jvp(jax.grad(lambda x, f=function: f(x).sum()), (zeros,), (zeros + 1,))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(hessian))
