import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import parallel
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import joint, reverse
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.workload import scalars_read
from metaopt.types import Batch, Episode

OUTER = {"clip_norm", "outer_learning_rate", "weight_decay"}
BATCH = Batch(np.ones((2, 2, 4, 3), np.float32), np.ones((2, 2, 4), np.float32))  # type: ignore[arg-type]
EPISODES = Episode(BATCH, BATCH, np.zeros((2, 2), np.int32))  # type: ignore[arg-type]


def loss_fn(params, batch):
    return jnp.mean((batch.inputs @ params["head"] - batch.targets) ** 2)


def start(**scalars):
    hparams = OuterConfig().hparams() | {"inner_learning_rate": jnp.float32(0.1)} | scalars
    outer = outer_optimizer(OuterConfig())
    return init_state(jax.random.key(0), {"head": jnp.zeros(3)}, maml(), outer, hparams)


def on_metrics_alone(step):
    """What a metric reads decides nothing."""

    def shown(state, episodes):
        after, metrics = step(state, episodes)
        return after, metrics | {"shown": metrics["loss"] * state.hparams["own"]}

    return shown


def by_what_it_becomes(step):
    """A scalar that only changes another one, which is read in the next step."""

    def schedule(state, episodes):
        after, metrics = step(state, episodes)
        h = after.hparams
        rate = h["outer_learning_rate"] * h["own"]
        return after._replace(hparams={**h, "outer_learning_rate": rate}), metrics

    return schedule


def several(step):
    """In one call, as of small models."""

    def call(state, episodes):
        state, metrics = jax.lax.scan(lambda s, _: step(s, episodes), state, length=3)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    return jax.jit(call)


INNER = functools.partial(reverse, maml(), loss_fn)


@pytest.mark.parametrize(
    ("estimate", "around", "read"),
    [
        (joint(maml(), loss_fn), None, OUTER),
        (INNER(InnerLoop(num_steps=1)), None, OUTER | {"inner_learning_rate"}),
        (joint(maml(), loss_fn), on_metrics_alone, OUTER),
        (joint(maml(), loss_fn), by_what_it_becomes, OUTER | {"own"}),
        (INNER(InnerLoop(num_steps=1)), several, OUTER | {"inner_learning_rate"}),
        (
            INNER(InnerLoop(num_steps=2, query_loss="annealed")),
            lambda step: jax.jit(step),
            OUTER | {"inner_learning_rate", "query_annealing"},
        ),
    ],
)
def test_a_scalar_is_read_where_the_next_parameters_depend_on_it(estimate, around, read):
    step = make_meta_step(
        estimate, outer_optimizer(OuterConfig()), axis_name=None if around else parallel.AXIS
    )
    episodes = jax.tree.map(lambda x: x[0], EPISODES) if around else EPISODES
    step = around(step) if around else parallel.parallel_step(step, parallel.default_devices(2))
    state = start(own=jnp.float32(2.0), query_annealing=jnp.float32(0.5))
    assert scalars_read(step, state, episodes) == read
    assert optax.tree_utils.tree_sum(state.meta_params) == 0  # it was not run
