import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.measure import compile_for, compiled_memory
from metaopt.meta_gradients import mixed_mode
from metaopt.rematerialization.scan import planned_scan
from metaopt.types import Batch, Episode

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


def planned(kept, **store):
    return lambda step, state, xs: planned_scan(
        step, state, xs, length=LENGTH, kept_states=kept, **store
    )


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


@pytest.mark.parametrize(
    ("kept", "where"), [(1, "device"), (2, "device"), (3, "host"), (7, "device"), (9, "host")]
)
def test_values_and_derivatives_are_those_of_a_scan(kept, where):
    with jax.enable_x64(True):
        weights, start, xs = arguments()
        expected = jax.jit(gradients(jax.lax.scan))(weights, start, *xs)
        found = jax.jit(gradients(planned(kept, kept_on=where)))(weights, start, *xs)
        assert np.abs(expected[1][2]).min() > 0
        assert_equal(found, expected, rtol=1e-12)


@pytest.mark.parametrize("where", ["device", "host"])
def test_it_maps_over_tasks(where):
    with jax.enable_x64(True):
        weights, start, xs = arguments(batch=(2,))
        expected = jax.jit(jax.vmap(gradients(jax.lax.scan)))(weights, start, *xs)
        found = jax.jit(jax.vmap(gradients(planned(3, kept_on=where))))(weights, start, *xs)
        assert_equal(found, expected, rtol=1e-12)


def test_a_thousand_steps_have_the_derivative_of_a_scan():
    with jax.enable_x64(True):
        matrix = jnp.array([[0.6, -0.8], [0.8, 0.6]])  # a rotation: no step is forgotten

        def end(scan, matrix, start):
            def step(x, _):
                x = matrix @ x
                return x + 0.01 * jnp.sin(x), None

            return jnp.sum(scan(step, start)[0])

        def scan(step, start):
            return jax.lax.scan(step, start, length=1024)

        def planned(step, start):
            return planned_scan(step, start, length=1024, kept_states=14)

        args = (matrix, jnp.array([0.3, 0.4]))
        expected, found = (
            jax.jit(jax.grad(lambda *a, s=s: end(s, *a), argnums=(0, 1)))(*args)
            for s in (scan, planned)
        )
        assert np.abs(expected[1]).min() > 1e-3
        assert_equal(found, expected, rtol=1e-9)


def test_rounded_states_give_exact_values_and_the_derivatives_at_rounded_states():
    def step(state, _):
        x, v = state
        v = 0.9 * v - 0.1 * jnp.sin(x)
        return (x + v, v), jnp.sum(x * v)

    def end(scan, start):
        (x, _), ys = scan(step, start)
        return jnp.sum(x**2) + jnp.sum(ys)

    def rounded(state):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), state)

    start = (jnp.linspace(0.2, 2.0, 5), jnp.linspace(-1.0, 1.0, 5))
    found, found_bar = jax.value_and_grad(
        lambda start: end(
            lambda step, start: planned_scan(
                step, start, length=LENGTH, kept_states=LENGTH, kept_dtype="bfloat16"
            ),
            start,
        )
    )(start)
    value, exact_bar = jax.value_and_grad(
        lambda start: end(lambda step, start: jax.lax.scan(step, start, length=LENGTH), start)
    )(start)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    states = [start]
    for _ in range(LENGTH):
        states.append(step(states[-1], None)[0])
    bar = (2 * states[-1][0], jnp.zeros(5))
    for k in reversed(range(LENGTH)):
        _, pull = jax.vjp(lambda state: step(state, None), rounded(states[k]) if k else start)
        (bar,) = pull((bar, 1.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found_bar, bar
    )
    error = max(float(jnp.abs(a - b).max()) for a, b in zip(found_bar, exact_bar, strict=True))
    assert 1e-5 < error < 1e-2 * float(jnp.abs(exact_bar[0]).max())


def temp_bytes(size, **store):
    def end(x):
        state, _ = planned_scan(lambda x, _: (jnp.sin(x), None), x, length=12, **store)
        return jnp.sum(state)

    x = jax.ShapeDtypeStruct((size,), jnp.float32)
    return compiled_memory(compile_for(jax.grad(end), x)).temp


def test_a_rounded_state_takes_half_the_bytes():
    def bytes_per_state(**store):
        few, many = (temp_bytes(100_000, kept_states=kept, **store) for kept in (4, 10))
        return (many - few) / 6

    assert bytes_per_state() == pytest.approx(400_000, rel=0.01)
    assert bytes_per_state(kept_dtype="bfloat16") == pytest.approx(200_000, rel=0.01)


@pytest.mark.parametrize("map_tasks", [lambda f: f, jax.vmap])
def test_states_on_the_host_are_written_and_read_by_slices(map_tasks):
    """As what a scan stacks is, which the compiler for GPUs lays out on the host."""
    batch = () if map_tasks is not jax.vmap else (2,)
    weights, start, xs = arguments(batch)
    mapped = map_tasks(gradients(planned(3, kept_on="host")))
    traced = jax.jit(mapped).trace(weights, start, *xs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('"pinned_host"') >= 4 * 3  # leaves; first layout, forward and backward run
    assert text.count('_xla_buffer_placement = "device"') >= 4
    assert "scatter" not in text
    assert "pinned_host" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_the_program_is_no_larger_for_more_steps():
    def program(length):
        def end(x):
            return planned_scan(lambda x, _: (jnp.sin(x), None), x, length=length, kept_states=4)[0]

        return jax.jit(jax.grad(end)).lower(1.0).as_text().count("\n")

    assert program(500) == program(10)


def test_constants_of_the_loss_are_no_inputs_of_mixed_mode():
    angles = np.linspace(0.1, 1.0, 3, dtype=np.float32)

    def loss_fn(params, batch):
        return jnp.sum((jnp.cos(jnp.asarray(angles)) * params * batch.inputs - batch.targets) ** 2)

    batch = Batch(jnp.ones((3,)), jnp.arange(3.0))
    episode = Episode(batch, batch, jnp.int32(0))
    hparams = {"inner_learning_rate": jnp.float32(0.1)}
    found = []
    for kept in (None, 2):
        inner = InnerLoop(num_steps=4, unroll=False, kept_states=kept)
        estimate = jax.jit(mixed_mode(maml(), loss_fn, inner))
        found.append(estimate({"params": jnp.ones(3)}, hparams, episode, jax.random.key(0))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
