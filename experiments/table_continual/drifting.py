"""Markov languages that drift: how far is a learner from the exact Bayes filter?

A stream of tokens whose language is drawn anew at random times, of which no learner is told. The
loss of each segment is taken before anything is learned from it, and compared with that of the
filter that knows how languages are drawn and how often they change, on the same tokens. Learners
start from a table of bigrams that MAML meta-trained on such languages, or from a random one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_continual.config import Config
from experiments.table_continual.text import FINE_TUNING, Settings, settings_of
from experiments.table_continual.text import ROWS as LEARNERS
from metaopt import learners, losses, meta_gradients, models
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.statistics import interval
from metaopt.streams import continual
from metaopt.streams.drift import drifting, filter_losses
from metaopt.tasks.markov import MarkovConfig, markov
from metaopt.training.progress import Progress
from metaopt.training.types import TrainFn
from metaopt.types import Batch, Hparams, Params

TABLE, COLUMN = "continual/drifting", "gap to Bayes"
RANDOM, FILTER = "drift: fine-tuning, random start", "drift: Bayes filter"
NO_LEARNING = "drift: no learning"


Follow = Callable[[Params, Batch, Hparams], jax.Array]
"""``(start, segments, hparams) -> losses [n]``."""


class Row(NamedTuple):
    """A learner of the stream, by its name in `continual/text`; None learns nothing."""

    name: str
    learner: str | None


ROWS = (
    Row(FILTER, None),
    Row(NO_LEARNING, None),
    Row(RANDOM, FINE_TUNING),
    *(Row(f"drift: {row.name}", row.name) for row in LEARNERS if row.name != "EWC"),
)


class Study:
    """What the rows share: the streams, what the filter loses on them, and the start."""

    def __init__(self, config: Config):
        self.config, drift = config, config.drifting.drift
        self.model = models.bigram(drift.vocab_size)
        self.loss_fn = losses.next_token(self.model)
        seeds = range(config.seed, config.seed + config.drifting.num_streams + 1)
        streams = [drifting(drift, jax.random.key(seed)).tokens for seed in seeds]
        self.tuning, self.streams = streams[0], streams[1:]
        self.starts: dict[bool, Params] = {False: self.model.init(jax.random.key(config.seed))}

    def segments(self, tokens: np.ndarray) -> Batch:
        """A stream in batches of two halves of a segment, int32 ``[n, 2, L]``."""
        length = self.config.drifting.segment // 2
        count = (len(tokens) - 1) // (2 * length)
        inputs, targets = tokens[:-1], tokens[1:]
        shape = (count, 2, length)
        cut = (x[: 2 * length * count].reshape(shape) for x in (inputs, targets))
        return Batch(*(jnp.asarray(x) for x in cut))

    def pretrain(self, directory: Path, train_fn: TrainFn) -> None:
        """Meta-trains the start by MAML on languages like those of the streams; once."""
        if True in self.starts:
            return
        config, drift = self.config.drifting, self.config.drifting.drift
        languages = MarkovConfig(
            vocab_size=drift.vocab_size,
            concentration=drift.concentration,
            length=config.segment // 2,
            num_support=2,
            num_query=2,
        )
        found = fit(
            Problem(markov(languages), self.model, self.loss_fn),
            learners.maml(),
            meta_gradients.reverse,
            inner=InnerLoop(num_steps=2),
            outer=OuterConfig(learning_rate=0.03, warmup_steps=10).ending_at(config.meta_steps),
            config=FitConfig(seed=self.config.seed, num_steps=config.meta_steps, tasks_per_step=64),
            directory=directory,
            name="meta-training on languages",
            hparams={"inner_learning_rate": 4.0},
            train_fn=train_fn,
        )
        self.starts[True] = found.meta_params["params"]

    def losses(
        self, row: Row, settings: Settings, tokens: np.ndarray, follow: Follow
    ) -> np.ndarray:
        """The loss of each segment before it was learned from, nats a token ``[n]``."""
        hparams = {name: jnp.float32(value) for name, value in settings.items()}
        start = self.starts[row.name != RANDOM]
        return np.asarray(follow(start, self.segments(tokens), hparams), np.float64)

    def follow(self, row: Row) -> Follow:
        """What follows a stream, compiled once a row."""
        if row.learner is None:
            one = jax.jit(lambda p, b: jax.lax.map(lambda x: self.loss_fn(p, x), b))
            return lambda start, segments, hparams: one(start, segments)
        learner_row = {x.name: x for x in LEARNERS}[row.learner]
        example = jax.tree.map(lambda x: x[0], self.segments(self.tuning))
        count = 2 * len(self.segments(self.tuning).inputs)
        capacity = max(1, int(self.config.memory_share * count))
        learner = learner_row.make(self.loss_fn, capacity, example)

        @jax.jit
        def run(start: Params, segments: Batch, hparams):
            state = learner.init(start)
            return continual.follow(learner, state, segments, jax.random.key(0), hparams)[1]

        return run

    def filtered(self, tokens: np.ndarray) -> np.ndarray:
        """The loss of the exact filter on each segment ``[n]``."""
        each = filter_losses(tokens, self.config.drifting.drift)
        size = self.config.drifting.segment // 2 * 2
        return each[: len(each) // size * size].reshape(-1, size).mean(axis=1)


def add_rows(table: harness.TableRun, study: Study, rows: Sequence[Row], train_fn: TrainFn) -> None:
    """Tunes the rows on one stream, and follows the others."""

    def add(row: Row, column: str, values: np.ndarray, **more: Any) -> None:
        over = "95 % intervals over streams"
        found = interval(values.mean(axis=1))
        table.add(row.name, column, found, table=TABLE, unit="nats/token", over=over, **more)

    bayes = np.stack([study.filtered(tokens) for tokens in study.streams])
    for row in table.pending(rows):
        if row.name == FILTER:
            add(row, "loss", bayes, limit=True)
            continue
        study.pretrain(table.directory, train_fn)
        follow, settings = study.follow(row), {}
        if row.learner is not None:
            settings = tuned(study, row, follow)
        found = np.stack([study.losses(row, settings, x, follow) for x in study.streams])
        add(row, "loss", found, settings=settings)
        add(row, COLUMN, found - bayes, settings=settings)


def tuned(study: Study, row: Row, follow: Follow) -> Settings:
    """The settings with the least loss on the stream that is tuned on."""
    learner = {x.name: x for x in LEARNERS}[row.learner or FINE_TUNING]
    tried = settings_of(learner, study.config, study.config.drifting.rates)
    found = []
    with Progress(f"tuning {row.name}", total=len(tried), first="compiling") as progress:
        for i, settings in enumerate(tried):
            loss = float(study.losses(row, settings, study.tuning, follow).mean())
            found.append(loss if np.isfinite(loss) else np.inf)
            progress.update(i + 1, best=min(found))
    return tried[int(np.argmin(found))]
