"""The meta-step in plain JAX: `jax.grad` through an inner loop that is a Python loop."""

from collections.abc import Callable

import jax

from benchmarks.peers import jax_setup
from benchmarks.peers.problems import Candidates, Data, Sizes

PACKAGES = ("jax", "jaxlib", "optax")


def candidates(data: Data, threads: int) -> Candidates:
    """The inner steps unrolled; tasks all at once, or one after the other."""
    return jax_setup.candidates(data, _make_query_loss)


def _make_query_loss(sizes: Sizes, loss: Callable) -> jax_setup.QueryLoss:
    rate = sizes.inner_learning_rate

    def query_loss(params, episode):
        support_inputs, support_targets, query_inputs, query_targets = episode
        for _ in range(sizes.num_inner_steps):
            grads = jax.grad(loss)(params, support_inputs, support_targets)
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return loss(params, query_inputs, query_targets)

    return query_loss
