"""Tasks drawn in groups: the same tasks, by one program for every number above a group."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.tasks.fresh import AT_A_TIME, fresh_tasks
from metaopt.types import Batch


def draw_examples(key):
    inputs = jax.random.normal(key, (5, 2))
    return Batch(inputs, inputs.sum(1))


def test_a_task_is_that_of_its_key_however_many_are_drawn(compilations):
    family, key = fresh_tasks("toy", draw_examples, num_support=3), jax.random.key(0)
    numbers = (AT_A_TIME, 2 * AT_A_TIME + 1, 5 * AT_A_TIME)
    for number in numbers:
        drawn = family.test.sample(key, number)
        keys = jax.random.split(jax.random.fold_in(key, 2), number)
        inputs, targets = jax.vmap(draw_examples)(keys)
        np.testing.assert_array_equal(drawn.support.inputs, inputs[:, :3])
        np.testing.assert_array_equal(drawn.query.targets, targets[:, 3:])
        np.testing.assert_array_equal(drawn.task, jnp.arange(number))
    assert compilations("draw") == 1
    traced = jax.jit(lambda key: family.test.sample(key, numbers[-1]))(key)  # as in a step
    jax.tree.map(np.testing.assert_array_equal, traced, drawn)
