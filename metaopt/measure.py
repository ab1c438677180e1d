"""Measuring: operations counted on the program, bytes as planned by the compiler, seconds.

Operations and bytes are the same in every run; seconds are not, so that what is to
be compared is timed in turns.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from metaopt.errors import UserError
from metaopt.ranges import Count, check_value

REDUCTIONS = {"argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
MOVES = {
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice"),
    *("dynamic_update_slice", "gather", "iota", "optimization_barrier", "pad", "reduce_precision"),
    *("reshape", "rev", "scatter", "select_n", "slice", "sort", "split", "squeeze", "stack"),
    *("stop_gradient", "tile", "top_k", "transpose", "unstack", "empty", "bitcast_convert_type"),
    *("rng_uniform", "rng_bit_generator", "device_put", "dce_sink", "name", "sharding_constraint"),
}
UNKNOWN = {
    *("approx_top_k", "cholesky", "cholesky_update", "custom_linear_solve", "eig", "eigh", "fft"),
    *("ffi_call", "geqp3", "geqrf", "hessenberg", "householder_product", "io_callback", "lu"),
    *("ormqr", "pallas_call", "pmap", "pure_callback", "qr", "ragged_dot_general", "schur"),
    *("svd", "symmetric_product", "triangular_solve", "tridiagonal"),
    *("tridiagonal_solve", "xla_pmap"),
    *("attend", "attend_dot", "attend_backward", "attend_backward_dot"),  # of fused attention
}


class Flops(NamedTuple):
    """Floating-point operations.

    Attributes:
      matmul: of matrix products and convolutions, a multiplication and an addition each.
      elementwise: all others: elementwise functions, reductions and scattered sums.
    """

    matmul: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.matmul + self.elementwise


class Memory(NamedTuple):
    """Bytes of a compiled function: working memory, arguments and results."""

    temp: int
    arguments: int
    outputs: int


class Timing(NamedTuple):
    """Seconds a call: median and quartiles over all rounds, and each round's ``samples``."""

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]


def count_flops(function: Callable, *args: Any) -> Flops:
    """Counts the floating-point operations of ``function(*args)`` without running it.

    A matrix product ``[m, k] @ [k, n]`` is ``2 m n k``, an elementwise function 1 an
    element that it returns, whatever the function, a reduction 1 an element that it takes.
    Comparisons, selections, integers and moves of data are free. A scan is its body times
    its length, a map over devices its body times their number, a branch the dearest one. What
    `jax.checkpoint` recomputes is counted as often as it is computed; what no result depends
    on is not counted. Common subexpressions, which XLA merges later, are. A convolution is
    counted with the zeros of its padding and dilation.

    Args:
      function: of arrays; for a derivative, give the derivative (``jax.grad(f)``).
      args: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
      `Flops` of one call.

    Raises:
      UserError: a while loop, whose trip count is not known before it is run (a
        `jax.lax.fori_loop` with constant bounds is known), or an operation whose cost is
        not known here, such as a factorisation or a callback.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(jaxpr)


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations of a program, those of the programs within it too."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in core.jaxprs_in_params(equation.params):
            yield from equations(nested)


def _of_jaxpr(jaxpr: core.Jaxpr) -> Flops:
    counts = [_of_equation(equation) for equation in jaxpr.eqns]
    return Flops(sum(c.matmul for c in counts), sum(c.elementwise for c in counts))


def _of_equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "while":
        raise UserError(
            "the operations of a while loop cannot be counted, since its trip count is not "
            "known before it is run: use jax.lax.scan, or a fori_loop with constant bounds"
        )
    if name in UNKNOWN:
        raise _not_known(name)
    if name in MOVES:
        return Flops()
    own = _of_primitive(equation)
    if own is not None:
        return own
    nested = [_of_jaxpr(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(nested, key=lambda flops: flops.total)
    if nested:  # a scan is computed several times, and so is a map over devices
        times = params["length"] if name == "scan" else 1
        times = params["mesh"].size if name == "shard_map" else times
        return Flops(
            times * sum(n.matmul for n in nested), times * sum(n.elementwise for n in nested)
        )
    return Flops(elementwise=_elementwise(equation))


def _of_primitive(equation: core.JaxprEqn) -> Flops | None:
    """The count of an operation with a formula of its own; None for all others."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(_shape(equation.invars[0])[axis] for axis in contracted)
        return Flops(matmul=2 * terms * _float_size(equation.outvars[0]))
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        terms = math.prod(kernel) // out_features
        return Flops(matmul=2 * terms * _float_size(equation.outvars[0]))
    if name.startswith("reduce_window") or name.startswith("select_and_"):
        window = math.prod(params["window_dimensions"])
        taken = equation.invars[0] if name.startswith("select_and_scatter") else None
        return Flops(elementwise=window * _float_size(taken or equation.outvars[0]))
    if name.startswith("reduce") or name in REDUCTIONS:
        return Flops(elementwise=_float_size(equation.invars[0]))
    if name.startswith("scatter-"):
        return Flops(elementwise=_float_size(equation.invars[2]))
    return None


def _elementwise(equation: core.JaxprEqn) -> int:
    """Elements of the results, once it is sure that this is an elementwise operation."""
    operands = [_shape(variable) for variable in equation.invars if _float_size(variable)]
    for variable in filter(_float_size, equation.outvars):
        if not all(_fits(shape, _shape(variable)) for shape in operands):
            raise _not_known(equation.primitive.name)
    return sum(map(_float_size, equation.outvars))


def _fits(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether an operand of this shape is broadcast to the result."""
    return not shape or (
        len(shape) == len(result)
        and all(n in (1, size) for n, size in zip(shape, result, strict=True))
    )


def _float_size(variable: Any) -> int:
    """Elements of a floating-point variable; 0 for one of another type."""
    dtype = getattr(variable.aval, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return math.prod(_shape(variable)) if is_float else 0


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _not_known(operation: str) -> UserError:
    return UserError(
        f"how much {operation!r} computes is not known here: count a function without it"
    )


def compile_for(function: Callable, *args: Any) -> jax.stages.Compiled:
    """Compiles a function for arguments of these shapes; it is called with such arguments.

    One that is under `jax.jit` or `jax.pmap` already is compiled as it is.
    """
    return lower_for(function, *args).compile()


def lower_for(function: Callable, *args: Any) -> jax.stages.Lowered:
    """The program that `compile_for` compiles."""
    traced = function if hasattr(function, "lower") else jax.jit(function)
    return traced.lower(*args)


def compiled_memory(compiled: jax.stages.Compiled) -> Memory:
    """The bytes that the compiler has planned; the same for every run.

    Raises:
      UserError: the device's compiler does not tell.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise UserError("this device's compiler does not tell how much memory a function takes")
    return Memory(
        found.temp_size_in_bytes, found.argument_size_in_bytes, found.output_size_in_bytes
    )


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Times functions in turns, A B C A B C ..., so that a busy moment falls on all of them.

    Args:
      functions: of no arguments; their results are waited for (`jax.block_until_ready`).
      rounds: timed calls of each.
      warmup: calls of each before that, which compile, and are not timed.

    Raises:
      UserError: there is no round to time.
    """
    check_value("rounds", rounds, Count)
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            samples[name].append(time.perf_counter() - started)
    return {name: timing_of(found) for name, found in samples.items()}


def timing_of(samples: Sequence[float]) -> Timing:
    """The median and the quartiles of seconds a call."""
    lower, median, upper = (float(x) for x in np.quantile(samples, (0.25, 0.5, 0.75)))
    return Timing(median, lower, upper, tuple(samples))


_COMPILING = dict.fromkeys(
    (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    ),
    0.0,
)


def _note_compiling(event: str, duration_secs: float, **_) -> None:
    if event in _COMPILING:
        _COMPILING[event] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


def compile_seconds() -> float:
    """Seconds that this process has spent so far on tracing and compiling.

    The difference of two readings, taken from what a piece of work took, leaves what
    it would take with every program at hand.
    """
    return sum(_COMPILING.values())


def matmul_peak(size: int = 2048, dtype: Any = jnp.float32, rounds: int = 5) -> float:
    """Operations a second of a square matrix product, the best of several rounds.

    What a program reaches of it is its utilisation.
    """
    a = jnp.ones((size, size), dtype)
    product = compile_for(jnp.matmul, a, a)
    timing = interleaved({"product": lambda: product(a, a)}, rounds)["product"]
    return 2 * size**3 / min(timing.samples)


def device_bytes() -> int:
    """Memory of the device that computes, in bytes; of the machine, for a CPU."""
    (device,) = jax.device_put(0.0).devices()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Working memory, arguments and results together, in bytes a device.

    Memory that results share with donated arguments counts twice: rather too much.
    """
    return sum(compiled_memory(compiled))


def human_bytes(count: float) -> str:
    """Bytes for people: ``'61.3 MiB'``, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
