"""Documents as inner loops: the carried context and its meta-gradient, against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import learners, losses
from metaopt.errors import UserError
from metaopt.frozen import FrozenLoss
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.meta_gradients.first_order import stopped_gradients
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.meta_gradients.reverse import reverse
from metaopt.meta_gradients.streaming import streaming
from metaopt.models import TransformerConfig, with_memory, with_window
from metaopt.optimizers.part import on_part
from metaopt.types import Batch, Episode

CONFIG = TransformerConfig(vocab_size=11, width=8, num_heads=2, num_layers=1, window=5)
INNER = InnerLoop(batching="split", unroll=False)
RATE = {"inner_learning_rate": 0.3}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def document(chunks=4, size=4, seed=0):
    """A document that repeats itself, in chunks."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, 11, 9), 4)[: chunks * size + 1].astype(np.int32)
    inputs, targets = (x.reshape(chunks, size) for x in (tokens[:-1], tokens[1:]))
    return Batch(jnp.asarray(inputs), jnp.asarray(targets))


def start(model, scale=1.0):
    params = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: scale * x.astype(jnp.float64), params)


def by_hand(model, params, chunks, rate, stop=lambda x: x):
    """The losses of chunks, each before the step on it."""
    context, found = model.start(1, jnp.float64), []
    for inputs, targets in zip(*chunks, strict=True):

        def loss(params, context, inputs=inputs, targets=targets):
            logits, after = model.read(params, context, inputs[None])
            each = optax.softmax_cross_entropy_with_integer_labels(logits[0], targets)
            return each.mean(), after

        (now, after), grads = jax.value_and_grad(loss, has_aux=True)(params, context)
        found.append(now)
        params = jax.tree.map(lambda p, g: p - rate * stop(g), params, grads)
        context = after
    return jnp.stack(found)


def episode(chunks):
    return Episode(*(jax.tree.map(lambda x, h=h: x[h], chunks) for h in (slice(3), slice(3, None))))


def flat_close(found, wanted, rtol=1e-8):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-10), found, wanted
    )


@pytest.mark.parametrize("model", [with_window(CONFIG), with_memory(11, 6)], ids=["window", "gru"])
def test_a_document_is_read_and_learned_from_as_in_a_plain_loop(model):
    params, chunks = start(model), document()
    config = dataclasses.replace(INNER, num_steps=4)
    found = adapt(losses.ReadingLoss(model), optax.sgd(0.3), params, chunks, config)
    np.testing.assert_allclose(found.losses, by_hand(model, params, chunks, 0.3), rtol=1e-6)
    still = adapt(losses.ReadingLoss(model), optax.sgd(0.0), params, chunks, config)
    np.testing.assert_allclose(
        losses.ReadingLoss(model)(params, chunks), still.losses.mean(), rtol=1e-6
    )
    # Read in two parts: the second resumes from the state after the first.
    first, second = (jax.tree.map(lambda x, h=h: x[h], chunks) for h in (slice(2), slice(2, 4)))
    loss, rule = losses.ReadingLoss(model), optax.sgd(0.3)
    one = adapt(loss, rule, params, first, dataclasses.replace(INNER, num_steps=2))
    more = {"opt_state": one.opt_state, "context": one.context}
    two = adapt(loss, rule, one.params, second, dataclasses.replace(INNER, num_steps=2), **more)
    np.testing.assert_array_equal(np.append(one.losses, two.losses), found.losses)


FORMS = {
    "reverse": (INNER, jax.value_and_grad),
    "unrolled": (dataclasses.replace(INNER, unroll=True), jax.value_and_grad),
    "mixed mode": (INNER, forward_over_reverse),
    "planned": (dataclasses.replace(INNER, kept_states=2), jax.value_and_grad),
    "planned, mixed mode": (dataclasses.replace(INNER, kept_states=2), forward_over_reverse),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_gradient_goes_through_steps_and_context(form):
    inner, grad_fn = FORMS[form]
    model, chunks = with_window(CONFIG), document()
    params = start(model)
    estimate = streaming(learners.maml(), losses.ReadingLoss(model), inner, grad_fn=grad_fn)
    found, metrics = jax.jit(estimate)({"params": params}, RATE, episode(chunks), jax.random.key(0))
    wanted = jax.jit(jax.grad(lambda p: by_hand(model, p, chunks, 0.3).mean()))(params)
    flat_close(found["params"], wanted)
    np.testing.assert_allclose(metrics["inner_losses"], by_hand(model, params, chunks, 0.3))


def test_the_meta_gradient_is_that_of_finite_differences():
    model, chunks = with_window(CONFIG), document()
    params, tangent = start(model), start(model, 0.5)
    estimate = jax.jit(streaming(learners.maml(), losses.ReadingLoss(model), INNER))
    found, _ = estimate({"params": params}, RATE, episode(chunks), jax.random.key(0))
    score = jax.jit(
        lambda e: by_hand(
            model, jax.tree.map(lambda p, t: p + e * t, params, tangent), chunks, 0.3
        ).mean()
    )
    wanted = (score(1e-5) - score(-1e-5)) / 2e-5
    leaves = map(jax.tree.leaves, (found["params"], tangent))
    slope = sum(jnp.vdot(g, t) for g, t in zip(*leaves, strict=True))
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)


def test_first_order_takes_the_inner_gradients_as_constants():
    model, chunks = with_window(CONFIG), document()
    params = start(model)
    estimate = streaming(
        learners.maml(), losses.ReadingLoss(model), INNER, grad_fn=stopped_gradients
    )
    found, _ = jax.jit(estimate)({"params": params}, RATE, episode(chunks), jax.random.key(0))
    stop = jax.lax.stop_gradient
    wanted = jax.grad(lambda p: by_hand(model, p, chunks, 0.3, stop).mean())(params)
    flat_close(found["params"], wanted)
    exact = jax.grad(lambda p: by_hand(model, p, chunks, 0.3).mean())(params)
    assert not np.allclose(
        found["params"]["layer_0"]["qkv"]["kernel"], exact["layer_0"]["qkv"]["kernel"]
    )


def test_a_part_of_a_model_adapts_while_it_reads():
    model, chunks = with_window(CONFIG), document()
    params = start(model)
    fast = {"head": params["head"]}
    frozen = {name: leaf for name, leaf in params.items() if name != "head"}
    loss = FrozenLoss(losses.ReadingLoss(model), frozen)
    config = dataclasses.replace(INNER, num_steps=4)
    found = adapt(loss, optax.sgd(0.3), fast, chunks, config)
    both = adapt(
        losses.ReadingLoss(model),
        on_part(optax.sgd(0.3), lambda path: path[0] == "head"),
        params,
        chunks,
        config,
    )
    np.testing.assert_allclose(found.losses, both.losses)


def test_what_does_not_carry_a_context_is_refused():
    model, chunks = with_window(CONFIG), document()
    loss, params = losses.ReadingLoss(model), start(model)
    with pytest.raises(UserError, match="batching='split'"):
        adapt(loss, optax.sgd(0.1), params, chunks, InnerLoop(num_steps=2))
    with pytest.raises(UserError, match="estimator streaming"):
        reverse(learners.maml(), loss, INNER)
    changed = learners.maml()._replace(inner_loss=lambda m, f: lambda p, b: f(p, b) + 1)
    with pytest.raises(UserError, match="judged by the loss that is stepped on"):
        streaming(changed, loss, INNER)
