import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import measure
from metaopt.errors import UserError
from metaopt.measure import Flops, compile_for, count_flops, program_bytes


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def kernel_3x3(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]


CASES = {
    "matrix product": (jnp.matmul, [floats(2, 3), floats(3, 5)], Flops(2 * 2 * 3 * 5, 0)),
    "batched": (lambda a, b: a @ b, [floats(7, 2, 3), floats(7, 3, 5)], Flops(7 * 60, 0)),
    "under vmap": (
        jax.vmap(jnp.matmul, in_axes=(0, None)),
        [floats(7, 2, 3), floats(3, 5)],
        Flops(7 * 60, 0),
    ),
    "convolution": (
        kernel_3x3,
        [floats(2, 8, 8, 3), floats(3, 3, 3, 4)],
        Flops(2 * (2 * 8 * 8 * 4) * (3 * 3 * 3), 0),
    ),
    "elementwise": (lambda x: jnp.exp(x) * x + 1, [floats(4, 3)], Flops(0, 3 * 12)),
    "broadcast": (lambda x, y: x * y, [floats(4, 1), floats(4, 3)], Flops(0, 12)),
    "a reduction": (lambda x: x.sum(1).max(), [floats(4, 3)], Flops(0, 12 + 4)),
    "moves": (lambda x: jnp.where(x.T[:, :2] > 0, 1.0, 2.0), [floats(4, 3)], Flops(0, 0)),
    "integers": (lambda i: i * 2 + 1, [jax.ShapeDtypeStruct((9,), jnp.int32)], Flops(0, 0)),
    "scan": (scanned, [floats(2, 3), floats(3, 3)], Flops(5 * 36, 5 * 6)),
    "constant bounds": (
        lambda x: jax.lax.fori_loop(2, 6, lambda i, x: x * 2, x),
        [floats(4, 3)],
        Flops(0, 4 * 12),
    ),
    "the dearest branch": (
        lambda p, x: jax.lax.cond(p, lambda x: x + 1, lambda x: x @ x, x),
        [jax.ShapeDtypeStruct((), jnp.bool), floats(3, 3)],
        Flops(2 * 27, 0),
    ),
    "nested functions": (
        jax.jit(lambda x: jax.checkpoint(jax.nn.relu)(x) + jax.nn.silu(x)),
        [floats(10)],
        Flops(0, 10 + 20 + 10),  # max; logistic and mul; add
    ),
    "no result needs it": (lambda x: (x @ x, x + 1)[1], [floats(3, 3)], Flops(0, 9)),
    "a scattered sum": (
        lambda x, i, u: x.at[i].add(u),
        [floats(50, 3), jax.ShapeDtypeStruct((4,), jnp.int32), floats(4, 3)],
        Flops(0, 4 * 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_counted_exactly(case):
    function, args, expected = CASES[case]
    assert count_flops(function, *args) == expected
    assert count_flops(function, *args).total == sum(expected)


def chain(w, x):
    """Three products and no other operation but the last sum."""
    for _ in range(3):
        x = x @ w
    return x.sum()


def test_a_gradient_is_two_more_products_each_and_a_checkpoint_one():
    product, w, x = 2 * 2 * 4 * 4, floats(4, 4), floats(2, 4)
    assert count_flops(chain, w, x).matmul == 3 * product
    # Not the last product, whose value no gradient needs, nor the gradient of x.
    grad = count_flops(jax.grad(chain), w, x).matmul
    assert grad == (2 + 3 + 2) * product
    both = count_flops(jax.value_and_grad(chain), w, x).matmul
    recomputed = count_flops(jax.value_and_grad(jax.checkpoint(chain)), w, x).matmul
    assert both == (3 + 3 + 2) * product
    assert recomputed == both + 2 * product


def test_the_gradient_of_a_checkpointed_scan_recomputes_its_body():
    def loss(w, x, body=lambda f: f):
        step = body(lambda x, _: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, length=5)[0].sum()

    product, args = 2 * 2 * 3 * 3, (floats(3, 3), floats(2, 3))
    plain = count_flops(jax.grad(loss), *args).matmul
    remat = count_flops(jax.grad(lambda w, x: loss(w, x, jax.checkpoint)), *args).matmul
    assert plain == 5 * 3 * product
    assert remat == 5 * 4 * product


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x), "trip count"),
        (lambda x: jnp.linalg.cholesky(x), "cholesky"),
        (lambda x: jnp.fft.rfft(x), "fft"),
    ],
)
def test_what_cannot_be_counted_is_refused(function, message):
    with pytest.raises(UserError, match=message):
        count_flops(jax.jit(function), floats(3, 3))


def test_memory_is_that_of_the_compiled_function():
    compiled = measure.compile_for(lambda a, b: jnp.tanh(a @ b) @ b, floats(64, 64), floats(64, 64))
    found = measure.compiled_memory(compiled)
    square = 64 * 64 * 4
    assert (found.arguments, found.outputs) == (2 * square, square)
    assert square <= found.temp <= 4 * square


def test_functions_are_timed_in_turns():
    calls = []

    def waits(name, seconds):
        def function():
            calls.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return function

    found = measure.interleaved({"a": waits("a", 0.02), "b": waits("b", 0.001)}, 3, warmup=2)
    assert calls == ["a", "a", "b", "b", *"ababab"]
    assert list(found) == ["a", "b"] and len(found["a"].samples) == 3
    assert 0.02 <= found["a"].lower <= found["a"].median <= found["a"].upper
    assert found["b"].median == np.median(found["b"].samples) >= 0.001
    with pytest.raises(UserError, match="rounds is 0"):
        measure.interleaved({}, 0)


def test_the_peak_of_a_small_product_is_that_of_a_computer():
    assert 1e7 < measure.matmul_peak(128) < 1e16


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (64277709, "61.3 MiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_are_written_for_people(count, text):
    assert measure.human_bytes(count) == text


def test_seconds_of_compiling_grow_where_something_compiles_and_nowhere_else():
    def tangled(x):
        for _ in range(20):
            x = jnp.sin(x) @ x
        return x

    function, x = jax.jit(tangled), jnp.ones((4, 4))
    began, before = time.perf_counter(), measure.compile_seconds()
    function(x).block_until_ready()
    spent, after = time.perf_counter() - began, measure.compile_seconds()
    assert 0.1 * spent < after - before < spent
    function(x).block_until_ready()
    assert measure.compile_seconds() == after


def test_a_map_over_devices_is_counted_on_each_of_them():
    devices = jax.devices()[:2]
    step = jax.pmap(lambda x: jax.lax.psum(x @ x, "i"), axis_name="i", devices=devices)
    found = count_flops(step, jnp.ones((len(devices), 3, 3)))
    assert found.matmul == len(devices) * 2 * 27 and len(devices) == 2


def test_the_bytes_of_a_program_are_known_from_shapes_alone():
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    arguments_and_results = 2 * 8 * 256 * 4
    found = program_bytes(compile_for(lambda x: jnp.tanh(x) + 1, x))
    assert arguments_and_results <= found <= 9 / 8 * arguments_and_results
