"""What the JAX peers share: one jitted meta-step over all tasks, with Adam of optax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.jax_models import make_loss
from benchmarks.peers.problems import Candidates, Data, Peer, Sizes, unflatten

QueryLoss = Callable[..., jax.Array]
"""``(params, (support x, y, query x, y)) -> scalar`` of one task, after the inner steps."""


def candidates(data: Data, make_query_loss: Callable[[Sizes, Callable], QueryLoss]) -> Candidates:
    """All tasks at once by `jax.vmap`, or one after the other by `jax.lax.map`."""
    query_loss = make_query_loss(data.sizes, make_loss(data.sizes))
    forms = {"vmap": _vmapped, "lax.map": _mapped}
    return {name: functools.partial(_build, data, form(query_loss)) for name, form in forms.items()}


def _vmapped(query_loss: QueryLoss) -> Callable:
    def mean_loss(params, episodes):
        return jnp.mean(jax.vmap(query_loss, in_axes=(None, 0))(params, episodes))

    return jax.value_and_grad(mean_loss)


def _mapped(query_loss: QueryLoss) -> Callable:
    def meta_gradient(params, episodes):
        of_task = functools.partial(jax.value_and_grad(query_loss), params)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(of_task, episodes))

    return meta_gradient


def _build(data: Data, meta_gradient: Callable) -> Peer:
    optimizer = optax.adam(data.sizes.outer_learning_rate)

    @functools.partial(jax.jit, donate_argnums=0)
    def meta_step(state, episodes):
        params, opt_state = state
        loss, grads = meta_gradient(params, episodes)
        updates, opt_state = optimizer.update(grads, opt_state)
        state = optax.apply_updates(params, updates), opt_state
        return state, loss, optax.global_norm(grads)

    params = jax.tree.map(jnp.asarray, unflatten(data.params))
    episodes = tuple(map(jnp.asarray, (*data.support, *data.query)))
    place: list[Any] = [(params, optimizer.init(params))]
    program = meta_step, (place[0], episodes)

    def step() -> tuple[jax.Array, jax.Array]:
        place[0], loss, grad_norm = jax.block_until_ready(meta_step(place[0], episodes))
        return loss, grad_norm

    def first() -> tuple[float, float]:
        loss, grad_norm = step()
        return float(loss), float(grad_norm)

    return Peer(first, step, program=program)
