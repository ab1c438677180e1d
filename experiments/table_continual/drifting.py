"""Streams that drift: how far is a learner from the exact Bayes filter?

Markov languages whose language is drawn anew at random times, of which no learner is told, and
linear regression whose weights drift all the time. The loss of each segment is taken before
anything is learned from it, and compared with that of the filter that knows how the source changes,
on the same data. On languages learners start from a table of bigrams that MAML meta-trained on such
languages, or from a random one; on the linear function from zero.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_continual.config import Config
from experiments.table_continual.text import FINE_TUNING, LEARNERS, Settings, best_of, settings_of
from metaopt import learners, losses, meta_gradients, models
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.statistics import interval
from metaopt.streams import continual
from metaopt.streams.drift import (
    LinearDrift,
    drifting,
    drifting_linear,
    filter_losses,
    kalman_errors,
)
from metaopt.tasks.markov import MarkovConfig, markov
from metaopt.training.types import TrainFn
from metaopt.types import Batch, Hparams, Key, LossFn, Params

TABLE, COLUMN, LOSS = "continual/drifting", "gap to Bayes", "loss"
NAMES = tuple(row.name for row in LEARNERS if row.name != "EWC")
"""Learners of `continual/text` that need not be told when the source changes."""
SLOW_RATES: dict[str, Mapping[str, tuple[float, ...]]] = {
    "fast and slow weights": {"strength": (0.01,), "slow_rate": (0.003, 0.03, 0.3)}
}
"""How fast the slow weights are, where the source changes soon. The fast ones are scored."""
Follow = Callable[[Params, Batch, Hparams], jax.Array]
"""``(start, segments, hparams) -> losses [n]``."""


class Row(NamedTuple):
    """A learner of a stream that drifts.

    Attributes:
      name: Name in the table.
      source: languages or linear.
      learner: Its name in `continual/text`; None learns nothing.
      is_filter: The exact filter.
      random_start: From a random start, where there is another.
    """

    name: str
    source: str
    learner: str | None
    is_filter: bool = False
    random_start: bool = False


def _rows_of(source: str, name: str, filter_name: str) -> list[Row]:
    return [
        Row(f"{name}: {filter_name}", source, None, is_filter=True),
        Row(f"{name}: no learning", source, None),
        *(Row(f"{name}: {learner}", source, learner) for learner in NAMES),
    ]


RANDOM = Row("drift: fine-tuning, random start", "languages", FINE_TUNING, random_start=True)
ROWS = (
    *_rows_of("languages", "drift", "Bayes filter"),
    RANDOM,
    *_rows_of("linear", "linear drift", "Kalman filter"),
)


class Source(NamedTuple):
    """What a stream is learned by.

    Attributes:
      loss_fn: Loss of a batch.
      tuning: Segments of the stream that is tuned on, leaves ``[n, B, ...]``.
      streams: Segments of those that are reported.
      bayes: Losses of the exact filter on them, ``[streams, n]``.
      rates: Least and largest rate.
      grids: Values of other settings by the learner, for those of `continual/text`.
      unit: Unit of the losses.
      start: ``(directory, train_fn) -> parameters`` that learners start from.
      random: Parameters of a random start.
    """

    loss_fn: LossFn
    tuning: Batch
    streams: list[Batch]
    bayes: np.ndarray
    rates: tuple[float, float]
    grids: Mapping[str, Mapping[str, tuple[float, ...]]]
    unit: str
    start: Callable[[Path, TrainFn], Params]
    random: Params


def languages(config: Config) -> Source:
    """Markov languages that change suddenly, read by a table of bigrams."""
    sizes = config.drifting
    drift, half = sizes.drift, sizes.segment // 2
    model = models.bigram(drift.vocab_size)
    loss_fn = losses.next_token(model)
    tokens = [drifting(drift, key).tokens for key in _keys(config)]

    def segments(stream: np.ndarray) -> Batch:
        count = (len(stream) - 1) // (2 * half)
        parts = (x[: 2 * half * count].reshape(count, 2, half) for x in (stream[:-1], stream[1:]))
        return Batch(*map(jnp.asarray, parts))

    def filtered(stream: np.ndarray) -> np.ndarray:
        each = filter_losses(stream, drift)
        return each[: len(each) // (2 * half) * 2 * half].reshape(-1, 2 * half).mean(axis=1)

    @functools.cache
    def start(directory: Path, train_fn: TrainFn) -> Params:
        like = {"vocab_size": drift.vocab_size, "concentration": drift.concentration}
        tasks = markov(MarkovConfig(**like, length=half, num_support=2, num_query=2))
        return fit(
            Problem(tasks, model, loss_fn),
            learners.maml(),
            meta_gradients.reverse,
            inner=InnerLoop(num_steps=2),
            outer=OuterConfig(learning_rate=0.03, warmup_steps=10).ending_at(sizes.meta_steps),
            config=FitConfig(seed=config.seed, num_steps=sizes.meta_steps, tasks_per_step=64),
            directory=directory,
            name="meta-training on languages",
            hparams={"inner_learning_rate": 4.0},
            train_fn=train_fn,
        ).meta_params["params"]

    return Source(
        loss_fn=loss_fn,
        tuning=segments(tokens[0]),
        streams=[segments(x) for x in tokens[1:]],
        bayes=np.stack([filtered(x) for x in tokens[1:]]),
        rates=sizes.rates,
        grids=SLOW_RATES | {"online MAML": {"inner_learning_rate": (0.3, 1.0, 4.0)}},
        unit="nats/token",
        start=start,
        random=model.init(jax.random.key(config.seed)),
    )


def linear(config: Config) -> Source:
    """Linear regression whose weights drift, by a linear model that starts from zero."""
    drift, size = config.drifting.linear, 4  # examples in a step
    model = models.mlp(drift.dim, 1, hidden=())
    found = [drifting_linear(drift, key) for key in _keys(config)]
    zero = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))

    def whole(values: np.ndarray) -> np.ndarray:
        return values[: len(values) // size * size].reshape(-1, size, *values.shape[1:])

    def segments(stream: LinearDrift) -> Batch:
        return Batch(
            jnp.asarray(whole(stream.inputs)), jnp.asarray(whole(stream.targets))[..., None]
        )

    return Source(
        loss_fn=losses.regression(model),
        tuning=segments(found[0]),
        streams=[segments(x) for x in found[1:]],
        bayes=np.stack([whole(kalman_errors(x, drift)).mean(axis=1) for x in found[1:]]),
        rates=config.drifting.linear_rates,
        grids=SLOW_RATES | {"online MAML": {"inner_learning_rate": (0.01, 0.03, 0.1)}},
        unit="squared error",
        start=lambda directory, train_fn: zero,
        random=zero,
    )


SOURCES = {"languages": languages, "linear": linear}


def _keys(config: Config) -> list[Key]:
    """The keys of the stream that is tuned on, and of those that are reported."""
    return [jax.random.key(config.seed + i) for i in range(config.drifting.num_streams + 1)]


def follow_of(source: Source, row: Row, config: Config) -> Follow:
    """What follows a stream, compiled once a row."""
    if row.learner is None:
        one = jax.jit(lambda p, b: jax.lax.map(lambda x: source.loss_fn(p, x), b))
        return lambda start, segments, hparams: one(start, segments)
    example = jax.tree.map(lambda x: x[0], source.tuning)
    count = source.tuning.inputs.shape[0] * source.tuning.inputs.shape[1]
    capacity = max(1, int(config.memory_share * count))
    learner = {x.name: x for x in LEARNERS}[row.learner].make(source.loss_fn, capacity, example)

    @jax.jit
    def follow(start: Params, segments: Batch, hparams: Hparams) -> jax.Array:
        state, key = learner.init(start), jax.random.key(0)
        return continual.follow(learner, state, segments, key, hparams)[1]

    return follow


def add_rows(
    table: harness.TableRun, config: Config, rows: Sequence[Row], train_fn: TrainFn
) -> None:
    """Tunes the rows on one stream, and follows the others."""
    sources = {name: SOURCES[name](config) for name in dict.fromkeys(row.source for row in rows)}
    for row in table.pending(rows):
        source = sources[row.source]

        def add(column: str, values: np.ndarray, row: Row = row, **more: Any) -> None:
            unit = sources[row.source].unit
            more |= {"table": TABLE, "unit": unit, "over": "95 % intervals over streams"}
            table.add(row.name, column, interval(values.mean(axis=1)), **more)

        if row.is_filter:
            add(LOSS, source.bayes, limit=True)
            continue
        start = source.random if row.random_start else source.start(table.directory, train_fn)
        follow, settings = follow_of(source, row, config), {}
        if row.learner is not None:
            settings = tuned(source, row, config, start, follow)
        found = np.stack([_follow(follow, start, x, settings) for x in source.streams])
        add(LOSS, found, settings=settings)
        add(COLUMN, found - source.bayes, settings=settings)


def _follow(follow: Follow, start: Params, segments: Batch, settings: Settings) -> np.ndarray:
    hparams = {name: jnp.float32(value) for name, value in settings.items()}
    return np.asarray(follow(start, segments, hparams), np.float64)


def tuned(source: Source, row: Row, config: Config, start: Params, follow: Follow) -> Settings:
    """The settings with the least loss on the stream that is tuned on."""
    learner = {x.name: x for x in LEARNERS}[row.learner or FINE_TUNING]
    learner = learner._replace(grid=source.grids.get(learner.name, learner.grid))

    def loss(settings: Settings) -> float:
        return float(_follow(follow, start, source.tuning, settings).mean())

    return best_of(settings_of(learner, config, source.rates), loss, row.name)
