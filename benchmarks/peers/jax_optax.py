"""The meta-step in JAX with optax: `optax.sgd` in a `jax.lax.scan` over inner steps."""

from collections.abc import Callable

import jax
import optax

from benchmarks.peers import jax_setup
from benchmarks.peers.problems import Candidates, Data, Sizes

PACKAGES = ("jax", "jaxlib", "optax")


def candidates(data: Data, threads: int) -> Candidates:
    """The inner steps scanned; tasks all at once, or one after the other."""
    return jax_setup.candidates(data, _make_query_loss)


def _make_query_loss(sizes: Sizes, loss: Callable) -> jax_setup.QueryLoss:
    inner = optax.sgd(sizes.inner_learning_rate)

    def query_loss(params, episode):
        support_inputs, support_targets, query_inputs, query_targets = episode

        def inner_step(carry, _):
            params, opt_state = carry
            grads = jax.grad(loss)(params, support_inputs, support_targets)
            updates, opt_state = inner.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        start = params, inner.init(params)
        (params, _), _ = jax.lax.scan(inner_step, start, length=sizes.num_inner_steps)
        return loss(params, query_inputs, query_targets)

    return query_loss
