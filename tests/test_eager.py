"""Functions called outside jit: compiled once for equal functions, again for others."""

import collections
import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt import eager, losses, meta_gradients, models
from metaopt.eager import compile_once
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.learners import maml
from metaopt.types import Batch

X = jnp.arange(3.0)


class Counter:
    """Counts traces where no closure reaches: through the class, a library's by its module."""

    traces = 0


library = sys.modules["metaopt.counter"] = types.ModuleType("metaopt.counter")
library.__file__ = dataclasses.__file__
Counter.__module__ = "metaopt.counter"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(eager, "_compiled", collections.OrderedDict())


@pytest.fixture
def traces():
    Counter.traces = 0
    return lambda: Counter.traces


def traced(x):
    Counter.traces += 1
    return x


def scaled(scale):
    return lambda x: traced(x) * scale


def nested(scale):
    inner = functools.partial(lambda s, x: s * x, scale)
    return lambda x: inner(traced(x))


@dataclasses.dataclass
class Mutable:
    scale: float

    def __call__(self, x):
        return traced(x) * self.scale


class Plain:
    def __init__(self, scale):
        self.parts = [scale, {"deep": (scale,)}]

    def method(self, x):
        return traced(x) * self.parts[1]["deep"][0]


SCALE = 2.0


def reads_a_global(x):
    return traced(x) * SCALE


def jitted(scale):
    return jax.jit(lambda x: traced(x) * scale)


def with_rule(scale):
    @jax.custom_jvp
    def function(x):
        return traced(x) * scale

    function.defjvp(lambda x, t: (x[0] * scale, t[0] * scale))
    return function


MAKERS = {
    "closure": scaled,
    "partial": nested,
    "default": lambda scale: lambda x, scale=scale: traced(x) * scale,
    "dataclass": Mutable,
    "method": lambda scale: Plain(scale).method,
    "jit": jitted,
    "custom_jvp": with_rule,
    "array": lambda scale: scaled(jnp.full(3, scale)),
    "numpy": lambda scale: scaled(np.broadcast_to(np.float32(scale), 3)),  # read-only
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_functions_are_traced_once_and_others_again(name, traces):
    make = MAKERS[name]
    for scale, expected in [(2.0, 1), (2.0, 1), (3.0, 2), (2.0, 2), (3.0, 2)]:
        np.testing.assert_array_equal(compile_once(make(scale))(X), scale * X)
        assert traces() == expected


def test_what_changes_under_a_function_is_seen(monkeypatch, traces):
    mutable, plain, array = Mutable(2.0), Plain(2.0), np.full(3, 2.0)
    of_array = scaled(array)
    for function in (mutable, plain.method, of_array, reads_a_global):
        np.testing.assert_array_equal(compile_once(function)(X), 2 * X)
    mutable.scale = 3.0
    plain.parts[1]["deep"] = (3.0,)
    array[:] = 3.0
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    for function in (mutable, plain.method, of_array, reads_a_global):
        np.testing.assert_array_equal(compile_once(function)(X), 3 * X)


def test_what_modules_hold_that_import_each_other_is_seen(monkeypatch):
    first, second = types.ModuleType("first"), types.ModuleType("second")
    first.second, second.first, second.SCALE = second, first, 2.0
    monkeypatch.setitem(globals(), "first", first)
    function = eval("lambda x: x * first.second.SCALE", globals())
    np.testing.assert_array_equal(compile_once(function)(X), 2 * X)
    second.SCALE = 3.0
    np.testing.assert_array_equal(compile_once(function)(X), 3 * X)


def test_an_object_that_cannot_be_looked_into_is_asked_each_time():
    class Hidden:
        __slots__ = ("scale",)

        def __call__(self, x):
            return x * self.scale

    hidden = Hidden()
    for scale in (2.0, 3.0):
        hidden.scale = scale
        np.testing.assert_array_equal(compile_once(hidden)(X), scale * X)


@pytest.mark.parametrize("kind", [dict, list, int])
def test_attributes_of_a_number_or_container_of_a_users_class_are_seen(kind):
    holder = type("Holder", (kind,), {})()
    holder.scale = 2.0
    function = compile_once(lambda x: x * holder.scale)
    np.testing.assert_array_equal(function(X), 2 * X)
    holder.scale = 3.0
    np.testing.assert_array_equal(function(X), 3 * X)


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(eager, "MOST_KEPT", 3)
    for scale in range(5):
        compile_once(scaled(float(scale)))(X)
    assert len(eager._compiled) == 3


def test_another_shape_is_traced_from_the_function_of_the_call():
    first = Mutable(2.0)
    compile_once(first)(X)
    first.scale = 3.0
    np.testing.assert_array_equal(compile_once(Mutable(2.0))(X[:2]), 2 * X[:2])


def test_adapt_is_traced_once_for_equal_calls(traces):
    model = models.ngram(vocab_size=4, order=1)
    tokens = jnp.array([[0, 1, 2, 3]])
    params = model.init(jax.random.key(0))

    def call(rate):
        loss = losses.next_token(model)
        counted = lambda params, batch: traced(loss(params, batch))  # noqa: E731
        support = Batch(tokens, tokens)
        return adapt(counted, optax.adam(rate), params, support, InnerLoop(unroll=False)).params

    first = call(0.1)
    after_one = traces()
    jax.tree.map(np.testing.assert_array_equal, call(0.1), first)
    assert traces() == after_one
    call(0.2)
    assert traces() == 2 * after_one


@pytest.mark.parametrize(
    "estimator",
    [
        meta_gradients.reverse,
        meta_gradients.mixed_mode,
        meta_gradients.first_order,
        meta_gradients.reptile,
        meta_gradients.joint,
        meta_gradients.truncated,
        meta_gradients.implicit,
        functools.partial(meta_gradients.evolution, num_pairs=1),
    ],
)
def test_an_estimator_is_traced_once_for_equal_calls(estimator, traces):
    def call(rate):
        loss = lambda params, batch: traced(quadratic.loss(params, batch))  # noqa: E731
        estimate = estimator(maml(), loss, InnerLoop(num_steps=2, unroll=False))
        hparams = {"inner_learning_rate": rate}
        meta_params = {"params": quadratic.PARAMS}
        return estimate(meta_params, hparams, quadratic.episode(), jax.random.key(0))

    call(0.1)
    after_one = traces()
    call(0.1)
    call(0.2)  # an argument
    assert traces() == after_one > 0
