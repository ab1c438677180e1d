"""Sinusoid regression, the first test of MAML and of Meta-SGD.

References:
  Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
  Networks", 2017, section 5.1.
  Li, Zhou, Chen and Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
  2017, section 4.1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metaopt.ranges import Checked, Count, check_value
from metaopt.tasks.fresh import fresh_tasks
from metaopt.types import Array, Batch, Episode, Key, TaskFamily

INPUTS = (-5.0, 5.0)
"""The interval that inputs are drawn from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidConfig(Checked):
    """Sizes of an episode, and which of the two papers' tasks.

    Without ``vary_frequency`` the tasks are those of Finn et al., and with it those of
    Li et al. Raises UserError on sizes below 1.
    """

    num_support: Count = 5
    num_query: Count = 10
    vary_frequency: bool = False


def sinusoid(config: SinusoidConfig) -> TaskFamily:
    """Tasks ``y = A sin(x - phase)``, or ``y = A sin(frequency x + phase)``.

    The amplitude A is uniform in [0.1, 5], the phase in [0, π], x in [-5, 5], and the
    frequency in [0.8, 1.2]. There is no noise. The sign of the phase follows each
    source: the released code of Finn et al., the text of Li et al.

    Inputs and targets are float32 ``[T, S, 1]``.
    """
    return fresh_tasks("sinusoid", functools.partial(_draw_examples, config), config.num_support)


def evaluation_episodes(
    config: SinusoidConfig, key: Key, *, num_curves: int, supports_per_curve: int
) -> Episode:
    """The evaluation of Li et al.: new curves, each met through several supports.

    The support is drawn as in training. The query is the same for all: ``num_query`` inputs
    spaced evenly from -5 to 5, both ends included. The curves depend on the key alone, so
    episodes of 5, 10 and 20 shots under one key are of the same curves.

    Returns:
      Episodes ``[num_curves * supports_per_curve, ...]``, those of a curve one after the
      other; ``task`` is the index of the curve.

    Raises:
      UserError: a number below 1.
    """
    check_value("num_curves", num_curves, Count)
    check_value("supports_per_curve", supports_per_curve, Count)
    grid = jnp.linspace(*INPUTS, config.num_query)[:, None]

    def of_curve(key: Key) -> tuple[Batch, Batch]:
        curve, inputs_key = _draw_curve(config, key)
        shape = (supports_per_curve, config.num_support, 1)
        inputs = jax.random.uniform(inputs_key, shape, minval=INPUTS[0], maxval=INPUTS[1])
        query = jnp.broadcast_to(grid, (supports_per_curve, *grid.shape))
        return Batch(inputs, curve(inputs)), Batch(query, curve(query))

    support, query = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        jax.jit(jax.vmap(of_curve))(jax.random.split(key, num_curves)),
    )
    task = jnp.repeat(jnp.arange(num_curves, dtype=jnp.int32), supports_per_curve)
    return Episode(support, query, task)


def _draw_examples(config: SinusoidConfig, key: Key) -> Batch:
    curve, inputs_key = _draw_curve(config, key)
    shape = (config.num_support + config.num_query, 1)
    inputs = jax.random.uniform(inputs_key, shape, minval=INPUTS[0], maxval=INPUTS[1])
    return Batch(inputs, curve(inputs))


def _draw_curve(config: SinusoidConfig, key: Key) -> tuple[Callable[[Array], Array], Key]:
    """A curve, and a key for its inputs."""
    amplitude_key, phase_key, frequency_key, inputs_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=math.pi)
    frequency = jax.random.uniform(frequency_key, minval=0.8, maxval=1.2)

    def curve(inputs: Array) -> Array:
        angles = frequency * inputs + phase if config.vary_frequency else inputs - phase
        return amplitude * jnp.sin(angles)

    return curve, inputs_key
