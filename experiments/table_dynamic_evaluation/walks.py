"""Walks along the streams of `table_dynamic_evaluation`, and the tuning of their update rules."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.table_dynamic_evaluation.config import Config
from experiments.table_dynamic_evaluation.data import Text, statistics_segments
from metaopt import parallel
from metaopt.console import log
from metaopt.evaluate import rates_beyond
from metaopt.streams.dynamic_evaluation import (
    cut_segments,
    mean_squared_gradients,
    rms_with_prior,
    segment_loss,
    sgd_with_prior,
    walk,
)
from metaopt.types import Batch, Model, Params

MOST_RATES = 12


class RuleHparams(NamedTuple):
    """Learning rate and decay of an update rule."""

    rate: float
    decay: float


class Tuned(NamedTuple):
    """The best hyperparameters for each stream, and their nats a byte ``[streams]``."""

    hparams: list[RuleHparams]
    losses: np.ndarray


STATIC = RuleHparams(0.0, 0.0)
"""Under it no rule takes a step."""


class Walks:
    """Walks of one model along the streams, by either rule."""

    def __init__(self, config: Config, text: Text, model: Model):
        """Compiles nothing yet."""
        self._config, self._text = config, text
        self._loss_fn = segment_loss(model)
        self._walks = {"SGD": self._make_walks(_sgd), "RMS": self._make_walks(self._rms)}
        self._statistics = jax.jit(
            lambda params, segments: mean_squared_gradients(self._loss_fn, params, segments)
        )

    def tune(self, rule: str, params: Params, length: int, decays: Sequence[float]) -> Tuned:
        """The best hyperparameters of a rule on the tuning part of each stream."""
        segments, squares = self._segments("valid", length), self._mean_squares(params, length)
        rates = {"SGD": self._config.sgd_rates, "RMS": self._config.rms_rates}[rule]

        def scores(tried):
            every = jax.tree.map(lambda x: np.repeat(x, len(tried), axis=0), segments)
            hparams = list(tried) * len(segments.targets)
            found = self._walks[rule](params, squares, every, hparams)
            return found.mean(axis=1).reshape(-1, len(tried))

        return tune(scores, rates, decays)

    def test(
        self, rule: str, params: Params, length: int, hparams: Sequence[RuleHparams]
    ) -> np.ndarray:
        """Nats a byte of each segment of the test parts, ``[streams, N]``."""
        segments, squares = self._segments("test", length), self._mean_squares(params, length)
        return self._walks[rule](params, squares, segments, hparams)

    def _segments(self, part: str, length: int) -> Batch:
        """Segments of a part of every stream, ``[streams, N, ...]``; whole blocks of the test."""
        parts = [getattr(stream, part) for stream in self._text.streams]
        cut = [cut_segments(part, length, self._config.context) for part in parts]
        count = len(cut[0].targets)
        if part == "test":
            count -= count % self._config.block
        return jax.tree.map(lambda *leaves: np.stack([leaf[:count] for leaf in leaves]), *cut)

    def _mean_squares(self, params: Params, length: int) -> Params:
        segments = statistics_segments(self._config, self._text.train, length)
        return self._statistics(params, segments)

    def _rms(self, params: Params, squares: Params, hparams) -> optax.GradientTransformation:
        rate, decay = hparams
        return rms_with_prior(params, rate, decay, squares, self._config.epsilon)

    def _make_walks(
        self, rule: Callable[[Params, Params, Any], optax.GradientTransformation]
    ) -> Callable[[Params, Params, Batch, Sequence[RuleHparams]], np.ndarray]:
        """``(params, mean squares, segments [W, N, ...], hparams [W]) -> nats a byte [W, N]``."""
        devices = parallel.default_devices()

        def on_device(shared, walks):
            params, squares = shared
            segments, hparams = jax.tree.map(lambda x: x[0], walks)
            return walk(self._loss_fn, rule(params, squares, hparams), params, segments).losses[
                None
            ]

        mapped = parallel.parallel_map(on_device, devices, most=1)

        def walks(params, squares, segments, hparams):
            tasks = segments, np.array(hparams, np.float32)
            return mapped((params, squares), tasks).astype(np.float64)

        return walks


def _sgd(params: Params, squares: Params, hparams) -> optax.GradientTransformation:
    del squares
    rate, decay = hparams
    return sgd_with_prior(params, rate, decay)


def tune(
    scores: Callable[[list[RuleHparams]], np.ndarray],
    rates: Sequence[float],
    decays: Sequence[float],
) -> Tuned:
    """The best of all rates with all decays, for each stream.

    If the best rate of a stream is an outermost of several, further ones are tried beyond it in
    the same ratio, up to `MOST_RATES`.

    Args:
      scores: Hyperparameters to losses ``[streams, hparams]``; NaN and inf are never best.
      rates: Learning rates, above 0.
      decays: Decays from 0 to 1.
    """
    tried, losses, more = [], [], sorted(rates)
    while more:
        added = list(itertools.starmap(RuleHparams, itertools.product(more, decays)))
        losses.append(np.nan_to_num(scores(added), nan=np.inf))
        tried += added
        every = np.concatenate(losses, axis=1)
        best = [tried[i] for i in every.argmin(axis=1)]
        known = sorted({hparams.rate for hparams in tried})
        more = rates_beyond(known, {hparams.rate for hparams in best}, MOST_RATES)
    return Tuned(best, every.min(axis=1))


def choose_length(lengths: Sequence[int], tune: Callable[[int], Tuned]) -> tuple[int, float]:
    """The segment length that plain SGD scores best with, and its rate, the mean over streams.

    Args:
      lengths: Segment lengths to choose from.
      tune: A length to the rate of plain SGD for each stream and its score.
    """
    found = {}
    for length in lengths:
        tuned = tune(length)
        rate = float(np.exp(np.mean(np.log([hparams.rate for hparams in tuned.hparams]))))
        found[length] = (tuned.losses.mean(), rate)
        log(f"segments of {length}: {tuned.losses.mean():.4f} nats a byte by SGD at {rate:.3g}")
    length = min(found, key=lambda length: found[length][0])
    return length, found[length][1]
