"""Domains that come and come back: who learns the new without losing the old?

After each visit the model is judged on text of all domains that it never trains on. `average` is
the loss at the end; `forgetting` how far that is above the least that it was on each domain; `new`
the loss right after a domain's first visit; `forward transfer` how much lower than at the start it
is just before that.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_continual.config import Config
from metaopt import learners, losses, meta_gradients, models
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.losses import NATS_TO_BITS
from metaopt.optimizers.outer import OuterConfig
from metaopt.reporting import plots
from metaopt.statistics import Interval, interval
from metaopt.streams import continual
from metaopt.streams.continual import StreamLearner
from metaopt.streams.data import episodes
from metaopt.tasks.sources.text import Domain
from metaopt.tasks.text import next_tokens
from metaopt.training.progress import Progress
from metaopt.training.types import TrainFn
from metaopt.types import Batch, LossFn, Model, Params, TaskFamily

TABLE, FINE_TUNING = "continual/text", "fine-tuning"
Settings = dict[str, float]


class Row(NamedTuple):
    """A learner of the table.

    Attributes:
      name: Name in the table.
      make: ``(loss, capacity, example batch) -> learner``.
      grid: Values that are tried of its settings beside the rate; four rates then go with them.
    """

    name: str
    make: Callable[[LossFn, int, Batch], StreamLearner]
    grid: Mapping[str, tuple[float, ...]] = {}


ROWS = (
    Row(FINE_TUNING, lambda loss, size, batch: continual.fine_tuning(loss)),
    Row(
        "L2 to the start",
        lambda loss, size, batch: continual.towards_start(loss),
        {"strength": (1e-3, 1e-2, 1e-1)},
    ),
    Row(
        "EWC",
        lambda loss, size, batch: continual.elastic(loss),
        {"strength": (1e2, 1e3, 1e4)},
    ),
    Row(
        "fast and slow weights",
        lambda loss, size, batch: continual.fast_and_slow(loss),
        {"strength": (0.01,), "slow_rate": (0.003, 0.01, 0.03)},
    ),
    Row("replay", continual.replay),
    Row("online MAML", continual.online_maml, {"inner_learning_rate": (0.003, 0.01, 0.03)}),
    Row(
        "replay, average judged",
        lambda loss, size, batch: continual.averaged(continual.replay(loss, size, batch)),
        {"slow_rate": (0.003, 0.01, 0.03)},
    ),
)
LEARNERS = (
    *ROWS,
    Row(
        "rate learned online", lambda loss, size, batch: continual.rate_learned_online(loss, batch)
    ),
)
"""Those of small streams, where a rate is learned online too: each of its steps goes through two
others, and differentiates them."""


def settings_of(row: Row, config: Config, range_of_rates: tuple[float, float]) -> list[Settings]:
    """The settings that are tried of a row: as many for each."""
    number = len(list(itertools.product(*row.grid.values())))
    rates = np.geomspace(*range_of_rates, max(1, config.num_rates // number)).tolist()
    return [
        dict(zip(("learning_rate", *row.grid), values, strict=True))
        for values in itertools.product(rates, *row.grid.values())
    ]


class Stream(NamedTuple):
    """Domains to learn one after another.

    Attributes:
      names: Their names.
      visits: Sequences ``[D, visits, n, L + 1]``, each of which is seen once.
      test: Sequences to be judged on ``[D, m, L + 1]``.
    """

    names: tuple[str, ...]
    visits: np.ndarray
    test: np.ndarray


def sequences_needed(config: Config) -> int:
    """The sequences that a domain of a stream must have."""
    return config.visits * config.sequences + config.test_sequences


def split(domains: Sequence[Domain], config: Config) -> tuple[list[Domain], ...]:
    """The domains of the stream, of the stream that is tuned on, and those to pretrain on.

    Raises:
      UserError: there are too few domains that are long enough.
    """
    needed = sequences_needed(config) * (config.length + 1)
    order = np.random.default_rng(config.seed).permutation(len(domains)).tolist()
    chosen = [domains[i] for i in order]
    long = [domain for domain in chosen if domain.size >= needed]
    number = config.num_domains
    if len(long) < 2 * number or len(chosen) < 2 * number + 1:
        raise UserError(
            f"{len(long)} of {len(chosen)} domains have {needed:,} bytes, and two streams of "
            f"{number} and one to pretrain on are needed: lower num_domains or sequences"
        )
    streams = long[:number], long[number : 2 * number]
    return (*streams, [x for x in chosen if x not in streams[0] and x not in streams[1]])


def make_stream(domains: Sequence[Domain], config: Config) -> Stream:
    """The sequences of domains: the first of each to learn from, its last to be judged on."""
    width, number = config.length + 1, config.visits * config.sequences
    tokens = [domain.read(0, number * width).astype(np.int32) for domain in domains]
    size = config.test_sequences * width
    test = [domain.read(domain.size - size, size).astype(np.int32) for domain in domains]
    return Stream(
        tuple(domain.name for domain in domains),
        np.stack(tokens).reshape(len(domains), config.visits, config.sequences, width),
        np.stack(test).reshape(len(domains), config.test_sequences, width),
    )


def next_token(sequences: np.ndarray) -> Batch:
    """Inputs and targets of sequences ``[..., L + 1]``, on the device."""
    return jax.tree.map(jnp.asarray, next_tokens(sequences))


def make_model(config: Config) -> Model:
    """The transformer of bytes that text is read by."""
    sizes = {name: getattr(config, name) for name in ("width", "num_layers", "num_heads")}
    return models.transformer(models.TransformerConfig(vocab_size=256, **sizes))


def best_of(tried: Sequence[Settings], loss: Callable[[Settings], float], name: str) -> Settings:
    """The settings with the least loss; one that is not finite is the worst."""
    found = []
    with Progress(f"tuning {name}", total=len(tried), first="compiling") as progress:
        for i, settings in enumerate(tried):
            one = loss(settings)
            found.append(one if np.isfinite(one) else np.inf)
            progress.update(i + 1, best=min(found))
    return tried[int(np.argmin(found))]


class Study:
    """What the rows share: the model, its loss, the start, and both streams."""

    def __init__(self, config: Config, domains: Sequence[Domain]):
        self.config = config
        reported, tuned, self._others = split(domains, config)
        self.stream, self.tuning = (make_stream(x, config) for x in (reported, tuned))
        self.model = make_model(config)
        self.loss_fn = losses.next_token(self.model)
        half = feasible.tokens(config.batch // 2, config.length)
        trained = [(learners.maml(), meta_gradients.joint, InnerLoop())]
        feasible.check(trained, self.model.init, self.loss_fn, half, half, config.num_domains)
        self.start: Params = {}

        @jax.jit
        def judge(params: Params, test: Batch) -> jax.Array:
            return jax.lax.map(lambda batch: self.loss_fn(params, batch), test)

        self._judge = judge
        self._learners: dict[str, tuple[StreamLearner, Callable]] = {}

    def pretrain(self, directory: Path, train_fn: TrainFn) -> None:
        """Finds the start of all rows, on the domains of neither stream; once."""
        if self.start:
            return
        config, width = self.config, self.config.length + 1
        groups = {}
        for domain in self._others:
            count = domain.size // width
            tokens = domain.read(0, count * width).astype(np.int32)
            groups[domain.name] = tokens.reshape(count, width)
        half = config.batch // 2
        tasks = episodes({n: x for n, x in groups.items() if len(x) >= 2 * half}, None, half, half)
        found = fit(
            Problem(TaskFamily("other domains", tasks, tasks, tasks), self.model, self.loss_fn),
            learners.maml(),
            meta_gradients.joint,
            outer=OuterConfig(learning_rate=3e-3, warmup_steps=50).ending_at(config.pretrain_steps),
            config=FitConfig(
                seed=config.seed,
                num_steps=config.pretrain_steps,
                tasks_per_step=4,
                tasks_at_a_time=1,
                log_every=max(1, config.pretrain_steps // 20),
                checkpoint_every=config.pretrain_steps,
            ),
            directory=directory,
            name="pretraining",
            train_fn=train_fn,
        )
        self.start = found.meta_params["params"]

    def learner(self, row: Row) -> tuple[StreamLearner, Callable]:
        """The learner of a row, and what follows a stream with it, compiled once."""
        if row.name not in self._learners:
            example = next_token(self.stream.visits[0, 0, : self.config.batch])
            found = row.make(self.loss_fn, self.config.capacity, example)
            self._learners[row.name] = found, jax.jit(functools.partial(continual.follow, found))
        return self._learners[row.name]

    def losses(self, row: Row, settings: Settings, stream: Stream, order: int) -> np.ndarray:
        """The loss on each domain before the stream and after each visit, bits ``[T + 1, D]``."""
        config, (learner, follow) = self.config, self.learner(row)
        test = next_token(stream.test)
        hparams = {name: jnp.float32(value) for name, value in settings.items()}
        state = learner.init(self.start)
        found = [self._judge(learner.start(state), test)]
        for i, (domain, visit) in enumerate(visits_of(config, order)):
            batches = next_token(stream.visits[domain, visit])
            cut = jax.tree.map(lambda x: x.reshape(-1, config.batch, config.length), batches)
            key = jax.random.fold_in(jax.random.key(order), i)
            state, _ = follow(state, cut, key, hparams)
            state = learner.domain_ends(state, jax.tree.map(lambda x: x[-64:], batches))
            found.append(self._judge(learner.start(state), test))
        return NATS_TO_BITS * np.asarray(jnp.stack(found), np.float64)

    def tuned(self, row: Row) -> Settings:
        """The settings with the least loss at the end of the stream that is tuned on."""

        def loss(settings: Settings) -> float:
            return float(self.losses(row, settings, self.tuning, order=10**6)[-1].mean())

        return best_of(settings_of(row, self.config, self.config.rates), loss, row.name)


def visits_of(config: Config, order: int) -> list[tuple[int, int]]:
    """``(domain, visit)`` one after another: all domains in one random order, then in another."""
    rng = np.random.default_rng(order)
    rounds = [rng.permutation(config.num_domains).tolist() for _ in range(config.visits)]
    return [(domain, visit) for visit, domains in enumerate(rounds) for domain in domains]


def measures(losses_TxD: np.ndarray, order: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The columns of the table for each domain ``[D]``, of losses before and after the visits."""
    first = {domain: i for i, (domain, visit) in reversed(list(enumerate(order))) if visit == 0}
    domains = range(losses_TxD.shape[1])
    return {
        "average": losses_TxD[-1],
        "forgetting": losses_TxD[-1] - losses_TxD.min(axis=0),
        "new": np.array([losses_TxD[first[d] + 1, d] for d in domains]),
        "forward transfer": np.array([losses_TxD[0, d] - losses_TxD[first[d], d] for d in domains]),
    }


def add_rows(table: harness.TableRun, study: Study, rows: Sequence[Row], train_fn: TrainFn) -> None:
    """Tunes and follows the rows, and draws the loss along the stream."""
    config = study.config
    log(f"the stream: {', '.join(study.stream.names)}; {config.capacity} sequences of memory")
    over = "95 % intervals over domains, means over orders"
    for row in table.pending(rows):
        study.pretrain(table.directory, train_fn)
        settings = study.tuned(row)
        log(f"{row.name}: {settings}")
        orders = config.orders
        found = [study.losses(row, settings, study.stream, order) for order in orders]
        visits = [visits_of(config, order) for order in orders]
        each = [measures(x, order) for x, order in zip(found, visits, strict=True)]
        for column in each[0]:
            values = np.mean([x[column] for x in each], axis=0)
            more = {"settings": settings, "over": over, "seeds": list(orders)}
            if column == "forward transfer":
                more["better"] = "higher"
            table.add(row.name, column, interval(values), **more)
        table.keep(row.name, losses=np.stack(found))
    draw(table, rows)


def draw(table: harness.TableRun, rows: Sequence[Row]) -> None:
    """Draws the mean loss on all domains along the stream."""
    points = {}
    for row in rows:
        mean = table.kept(row.name)["losses"].mean(axis=(0, 2))
        points[row.name] = np.stack([np.arange(len(mean)), mean], axis=1)
    plots.trajectories(
        table.directory / "curves.png",
        points,
        x_label="visits",
        y_label="bits a byte, all domains",
        title="A stream of domains",
    )


def notes(table: harness.TableRun, config: Config) -> list[str]:
    """Forgetting and the loss on new domains beside those of fine-tuning, paired over domains."""
    names = [row.name for row in ROWS if table.has(row.name)]
    found = {name: table.kept(name)["losses"] for name in names}
    if FINE_TUNING not in found:
        return []

    def mean(name: str, column: str) -> np.ndarray:
        pairs = zip(found[name], config.orders, strict=True)
        return np.mean(
            [measures(x, visits_of(config, order))[column] for x, order in pairs], axis=0
        )

    lines = []
    for name in found:
        if name == FINE_TUNING:
            continue
        share = 100 * mean(name, "forgetting").mean() / mean(FINE_TUNING, "forgetting").mean()
        new: Interval = interval(mean(name, "new") - mean(FINE_TUNING, "new"))
        lines.append(
            f"{name}: forgets {share:.0f} % of what fine-tuning forgets; on new domains "
            f"{new.mean:+.3f} ± {new.ci95:.3f} bits/byte beside it"
        )
    return lines
