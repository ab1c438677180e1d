"""The smallest task family: Bayesian linear regression, with its exact solution."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from metaopt.ranges import Checked, Count, Range, Width
from metaopt.tasks.fresh import fresh_tasks
from metaopt.types import Array, Batch, Episode, Key, TaskFamily


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(Checked):
    """Sizes of an episode, and the standard deviation of the noise on the targets.

    Raises UserError on sizes below 1 and on negative noise.
    """

    dim: Width = 4
    num_support: Count = 8
    num_query: Count = 8
    noise: Annotated[float, Range(0, 1e6)] = 0.1


def linear(config: LinearConfig) -> TaskFamily:
    """Tasks ``y = w·x + noise``, with ``w`` and ``x`` standard normal.

    Inputs are float32 ``[T, S, D]`` and targets float32 ``[T, S, 1]``.
    """
    return fresh_tasks("linear", functools.partial(_draw_examples, config), config.num_support)


def bayes_loss(config: LinearConfig, episode: Episode) -> Array:
    """Mean squared error on the query of the Bayes-optimal predictor, ``[T]``.

    No learner does better on average. Its expectation given the support's inputs X
    is ``σ² (1 + tr (XᵀX + σ²I)⁻¹)``.
    """

    def loss(support: Batch, query: Batch) -> Array:
        errors = query.inputs @ posterior_mean(config, support) - query.targets
        return jnp.mean(errors**2)

    return jax.vmap(loss)(episode.support, episode.query)


def posterior_mean(config: LinearConfig, support: Batch) -> Array:
    """Mean of ``w`` given one task's support: the ridge solution, ``[D, 1]``.

    It is ``(XᵀX + σ²I)⁻¹ Xᵀy``, found as the least-squares solution of
    ``[X; σI] w = [y; 0]``: without noise that is the shortest ``w`` that fits.
    """
    prior = config.noise * jnp.eye(config.dim)
    inputs = jnp.concatenate([support.inputs, prior])
    targets = jnp.concatenate([support.targets, jnp.zeros((config.dim, 1))])
    return jnp.linalg.lstsq(inputs, targets)[0]


def _draw_examples(config: LinearConfig, key: Key) -> Batch:
    weights_key, inputs_key, noise_key = jax.random.split(key, 3)
    num_examples = config.num_support + config.num_query
    weights = jax.random.normal(weights_key, (config.dim, 1))
    inputs = jax.random.normal(inputs_key, (num_examples, config.dim))
    noise = config.noise * jax.random.normal(noise_key, (num_examples, 1))
    return Batch(inputs, inputs @ weights + noise)
