import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.rematerialization.scan import planned_scan

LENGTH = 7


def run(scan, weights, start, xs):
    """A scan with float, integer and key state, float and integer inputs, and a closure."""

    def step(state, x):
        position, velocity, count, key = state
        x_float, x_int = x
        key, noise = jax.random.split(key)
        push = weights["a"] * jnp.tanh(position) + x_float * (x_int + count)
        push = push + 0.01 * jax.random.normal(noise, position.shape)
        velocity = 0.9 * velocity + push
        return (position + velocity * weights["b"], velocity, count + 1, key), jnp.sum(push**2)

    state = (start, jnp.zeros_like(start), jnp.int32(0), jax.random.key(3))
    (position, velocity, count, _), ys = scan(step, state, xs)
    return jnp.sum(jnp.sin(position)) + jnp.sum(velocity**2) + jnp.vdot(ys, ys) * 0.1, (count, ys)


def planned(kept):
    return lambda step, state, xs: planned_scan(step, state, xs, length=LENGTH, kept_states=kept)


def arguments(batch=()):
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(*batch, 3)) * 0.1, "b": rng.normal(size=batch) * 0.1}
    xs = (rng.normal(size=(*batch, LENGTH, 3)), rng.integers(0, 3, (*batch, LENGTH)))
    return weights, rng.normal(size=(*batch, 3)), xs


def gradients(scan):
    def total(weights, start, x_float, x_int):
        return run(scan, weights, start, (x_float, x_int))

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)


def assert_equal(found, expected, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, expected)


@pytest.mark.parametrize("kept", [1, 2, 3, 7, 9])
def test_values_and_derivatives_are_those_of_a_scan(kept):
    with jax.enable_x64(True):
        weights, start, xs = arguments()
        expected = jax.jit(gradients(jax.lax.scan))(weights, start, *xs)
        found = jax.jit(gradients(planned(kept)))(weights, start, *xs)
        assert np.abs(expected[1][2]).min() > 0
        assert_equal(found, expected, rtol=1e-12)


def test_it_maps_over_tasks():
    with jax.enable_x64(True):
        weights, start, xs = arguments(batch=(2,))
        expected = jax.jit(jax.vmap(gradients(jax.lax.scan)))(weights, start, *xs)
        found = jax.jit(jax.vmap(gradients(planned(3))))(weights, start, *xs)
        assert_equal(found, expected, rtol=1e-12)


def test_the_program_is_no_larger_for_more_steps():
    def program(length):
        def end(x):
            return planned_scan(lambda x, _: (jnp.sin(x), None), x, length=length, kept_states=4)[0]

        return jax.jit(jax.grad(end)).lower(1.0).as_text().count("\n")

    assert program(500) == program(10)
