"""Streams whose source changes, and the best that can be known of them.

Markov languages: a stream is one long sequence of tokens, whose language changes suddenly,
gradually, or goes back to one that was there before. When, is known for evaluation alone: no
learner is told. And linear regression, whose weights drift all the time.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
from scipy import signal, special

from metaopt.ranges import Checked, Count, Range, Steps
from metaopt.tasks.markov import Concentration, Symbols
from metaopt.types import Key

Drift = Literal["sudden", "gradual", "recurring"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftConfig(Checked):
    """A stream of Markov languages of order 1 with the symmetric prior.

    Attributes:
      kind: sudden: the language is drawn anew; gradual: it goes over into a new one, linearly, from
        one change to the next; recurring: it is one of `num_languages`, at random.
      num_tokens: T.
      hazard: h, chance of a change before each token.
      num_languages: number of languages that recur.
      vocab_size: V.
      concentration: concentration of the Dirichlet prior.
    """

    kind: Drift = "sudden"
    num_tokens: Steps = 20_000
    hazard: Annotated[float, Range(0.0, 0.5)] = 1e-3
    num_languages: Count = 4
    vocab_size: Symbols = 16
    concentration: Concentration = 0.3


class Drifting(NamedTuple):
    """A stream and its labels.

    Attributes:
      tokens: int32 ``[T + 1]``; the first is drawn uniformly.
      changes: whether the language changes before each of the others, bool ``[T]``.
      language: number of the language that each of them is of, or that it is on its way from,
        int32 ``[T]``.
    """

    tokens: np.ndarray
    changes: np.ndarray
    language: np.ndarray


def drifting(config: DriftConfig, key: Key) -> Drifting:
    """Draws a stream.

    Args:
      config: how it drifts.
      key: of all that is drawn.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    total, size = config.num_tokens, config.vocab_size
    changes = rng.random(total) < config.hazard
    visit = np.cumsum(changes)
    if config.kind == "recurring":
        chosen = rng.integers(config.num_languages, size=int(visit[-1]) + 1)
        language = chosen[visit]
    else:
        language = visit
    tables = _draw_languages(rng, int(language.max()) + 2, config)
    part = _part_of_visit(visit) if config.kind == "gradual" else np.zeros(total)
    tokens = np.empty(total + 1, np.int32)
    tokens[0] = rng.integers(size)
    uniform = rng.random(total)
    for t in range(total):
        row = tables[language[t], tokens[t]]
        if part[t]:
            row = (1 - part[t]) * row + part[t] * tables[language[t] + 1, tokens[t]]
        tokens[t + 1] = min(np.searchsorted(np.cumsum(row), uniform[t]), size - 1)
    return Drifting(tokens, changes, language.astype(np.int32))


def _draw_languages(rng: np.random.Generator, number: int, config: DriftConfig) -> np.ndarray:
    """Chances of the next token in each context, float64 ``[number, V, V]``.

    Of normalised gamma variables, in log space as in `metaopt.tasks.markov`.
    """
    a, shape = config.concentration, (number, config.vocab_size, config.vocab_size)
    logs = np.log(rng.gamma(a + 1, size=shape)) + np.log1p(-rng.random(shape)) / a
    return special.softmax(logs, axis=-1)


def _part_of_visit(visit: np.ndarray) -> np.ndarray:
    """How much of the time between two changes has passed, from 0 on, ``[T]``."""
    begins = np.searchsorted(visit, visit, side="left")
    ends = np.searchsorted(visit, visit, side="right")
    return (np.arange(len(visit)) - begins) / (ends - begins)


def filter_losses(tokens: np.ndarray, config: DriftConfig) -> np.ndarray:
    """The loss of the exact Bayes filter of sudden drift, token by token.

    Mathematics: with ``w_r`` the weight of the hypothesis that the present language began r tokens
    ago, and ``p_r(x | c) = (n_cx + a) / (n_c + V a)`` from the transitions since then, the next
    token has the probability ``h / V + (1 − h) Σ_r w_r p_r``. Then ``w_0 ∝ h / V`` and
    ``w_{r+1} ∝ (1 − h) w_r p_r``. No learner that sees the same tokens does better on average. It
    takes O(T) for each token.

    Args:
      tokens: integers ``[T + 1]``.
      config: the hazard and the prior that they were drawn by.

    Returns:
      nats, float64 ``[T]``.

    References:
      Adams and MacKay, 2007, "Bayesian Online Changepoint Detection".
    """
    size, total, a = config.vocab_size, len(tokens) - 1, config.concentration
    followed = np.zeros((total, size, size), np.float32)  # of each beginning, the latest last
    weights, losses = np.zeros(total), np.empty(total)
    for t in range(total):
        context, token = tokens[t], tokens[t + 1]
        earlier = followed[:t, context]
        likely = (earlier[:, token] + a) / (earlier.sum(axis=1) + size * a)
        weights[:t] *= (1 - config.hazard) * likely
        weights[t] = (config.hazard if t else 1.0) / size
        chance = weights[: t + 1].sum()
        losses[t] = -np.log(chance)
        weights[: t + 1] /= chance
        followed[: t + 1, context, token] += 1
    return losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDriftConfig(Checked):
    """Linear regression whose weights drift, the teaching case.

    Attributes:
      dim: d.
      num_examples: T.
      noise: σ, standard deviation of the noise of a target.
      memory: ρ, what is left of the weights from one example to the next.
    """

    dim: Count = 8
    num_examples: Steps = 8000
    noise: Annotated[float, Range(1e-3, 1e3)] = 0.3
    memory: Annotated[float, Range(0.0, 1.0)] = 0.999


class LinearDrift(NamedTuple):
    """Examples of a linear function that drifts.

    Attributes:
      inputs: float32 ``[T, d]``.
      targets: float32 ``[T]``.
      weights: the weights of each example, for evaluation alone, float64 ``[T, d]``.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def drifting_linear(config: LinearDriftConfig, key: Key) -> LinearDrift:
    """Draws ``y_t = w_t·x_t + σ ε_t`` with ``w_{t+1} = ρ w_t + √(1 − ρ²) ξ_t``, all else normal."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape, rho = (config.num_examples, config.dim), config.memory
    inputs, moves = rng.standard_normal(shape), rng.standard_normal(shape)
    moves[1:] *= np.sqrt(1 - rho**2)
    weights = np.asarray(signal.lfilter([1.0], [1.0, -rho], moves, axis=0))
    noise = config.noise * rng.standard_normal(config.num_examples)
    targets = np.sum(weights * inputs, axis=1) + noise
    return LinearDrift(inputs.astype(np.float32), targets.astype(np.float32), weights)


def kalman_errors(stream: LinearDrift, config: LinearDriftConfig) -> np.ndarray:
    """The squared error of the exact Bayes filter on each example, before it is learned from.

    Mathematics: with ``w_t`` normal of mean m and covariance P, the error is ``(y − m·x)²``; then
    ``k = P x / (x·P x + σ²)``, ``m ← ρ (m + k (y − m·x))`` and
    ``P ← ρ² (P − k x·P) + (1 − ρ²) I``. No learner has a smaller expected error.

    Args:
      stream: the examples.
      config: what they were drawn by.

    Returns:
      float64 ``[T]``.

    References:
      Kalman, 1960, "A New Approach to Linear Filtering and Prediction Problems".
    """
    mean, covariance = np.zeros(config.dim), np.eye(config.dim)
    rho, errors = config.memory, np.empty(len(stream.targets))
    for t, (x, y) in enumerate(zip(stream.inputs, stream.targets, strict=True)):
        x, y = np.float64(x), float(y)
        error = y - mean @ x
        errors[t] = error**2
        spread = covariance @ x
        gain = spread / (x @ spread + config.noise**2)
        mean = rho * (mean + gain * error)
        covariance = rho**2 * (covariance - np.outer(gain, spread))
        covariance += (1 - rho**2) * np.eye(config.dim)
    return errors
