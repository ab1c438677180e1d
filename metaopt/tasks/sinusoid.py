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

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.tasks.fresh import fresh_tasks
from metaopt.types import Batch, Key, TaskFamily


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinusoidConfig:
    """Sizes of an episode, and which of the two papers' tasks.

    Without ``vary_frequency`` the tasks are those of Finn et al., and with it those of
    Li et al. Raises UserError on sizes below 1.
    """

    num_support: int = 5
    num_query: int = 10
    vary_frequency: bool = False

    def __post_init__(self):
        for field in ("num_support", "num_query"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, not {getattr(self, field)}")


def sinusoid(config: SinusoidConfig) -> TaskFamily:
    """Tasks ``y = A sin(x - phase)``, or ``y = A sin(frequency x + phase)``.

    The amplitude A is uniform in [0.1, 5], the phase in [0, π], x in [-5, 5], and the
    frequency in [0.8, 1.2]. There is no noise. The sign of the phase follows each
    source: the released code of Finn et al., the text of Li et al.

    Inputs and targets are float32 ``[T, S, 1]``.
    """
    return fresh_tasks("sinusoid", functools.partial(_draw_examples, config), config.num_support)


def _draw_examples(config: SinusoidConfig, key: Key) -> Batch:
    amplitude_key, phase_key, frequency_key, inputs_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=math.pi)
    frequency = jax.random.uniform(frequency_key, minval=0.8, maxval=1.2)
    num_examples = config.num_support + config.num_query
    inputs = jax.random.uniform(inputs_key, (num_examples, 1), minval=-5.0, maxval=5.0)
    angles = frequency * inputs + phase if config.vary_frequency else inputs - phase
    return Batch(inputs, amplitude * jnp.sin(angles))
