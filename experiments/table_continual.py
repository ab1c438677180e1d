"""A stream of domains that come and come back: who learns the new without losing the old?

A small transformer, pretrained on other domains, reads 12 domains of text one after another, each
twice, every sequence once. After each visit it is judged on text of all of them that it never
trains on. Beside plain fine-tuning: a penalty on the distance to the start, elastic weight
consolidation (Kirkpatrick et al., 2017), fast and slow weights, replay of a sample of at most 5 %
of the stream (Chaudhry et al., 2019) and online meta-learning with the same memory (Finn et al.,
2019; Gupta et al., 2020). Each is tuned by 12 settings on a stream of other domains.

    python -m experiments.table_continual                     # Python's own library
    python -m experiments.table_continual --folder FOLDER     # under an hour on two cores
    python -m experiments.table_continual --preset smoke

`average` is the loss on all domains at the end; `forgetting` how far it is above the least that it
was on each; `new` the loss on each domain right after its first visit; `forward transfer` how much
better than at the start it is on a domain just before its first visit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from metaopt import learners, losses, meta_gradients, models
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.losses import NATS_TO_BITS
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Count,
    Heads,
    Layers,
    Length,
    Range,
    Seed,
    Seeds,
    Several,
    Steps,
    Width,
)
from metaopt.reporting import plots
from metaopt.self_improvement.improving import RATES_ALONE
from metaopt.statistics import Interval, interval
from metaopt.streams import continual
from metaopt.streams.continual import StreamLearner
from metaopt.streams.data import episodes
from metaopt.tasks.sources.text import Domain, fingerprint, folder_domains, stdlib_domains
from metaopt.tasks.sources.text_checks import check_text
from metaopt.training.progress import Progress
from metaopt.types import Batch, LossFn, Model, Params, TaskFamily

FINE_TUNING = "fine-tuning"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Learners of a stream of domains.

    Attributes:
      folder: Folder of text, one file a domain; Python's own library if not given.
      num_domains: Domains of the stream, and of the stream that is tuned on.
      visits: Number of times that each domain comes.
      sequences: Sequences of a visit.
      test_sequences: Sequences of each domain that it is judged on.
      batch: Sequences in a step, an even number.
      length: L, bytes in a sequence.
      width: Width of the transformer.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      pretrain_steps: Steps of pretraining on the other domains.
      memory_share: Size of a replay memory as a share of the stream.
      rates: Least and largest rate of the learners.
      num_rates: Rates that are tried of a learner that has no other setting.
      orders: Seeds of the orders in which the domains come.
      seed: Seed of the split of the domains and of the initialisation.
    """

    folder: str | None = None
    num_domains: Count = 12
    visits: Count = 2
    sequences: Count = 600
    test_sequences: Count = 64
    batch: Count = 8
    length: Length = 64
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 2
    pretrain_steps: Steps = 1500
    memory_share: Annotated[float, Range(0.001, 1.0)] = 0.05
    rates: tuple[Annotated[float, Range(1e-12, 1e4)], Annotated[float, Range(1e-12, 1e4)]] = (
        1e-4,
        1e-2,
    )
    num_rates: Count = 12
    orders: Annotated[Seeds, Several()] = (0, 1, 2)
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if self.batch % 2 or self.sequences % self.batch:
            raise UserError(
                f"batch {self.batch} must be even, and sequences {self.sequences} a multiple of it"
            )
        if self.rates[0] >= self.rates[1]:
            raise UserError(f"rates {self.rates} must be the least and the largest, in this order")

    @property
    def capacity(self) -> int:
        """The sequences of a replay memory."""
        whole = self.num_domains * self.visits * self.sequences
        return max(1, int(self.memory_share * whole))


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        small = {"num_domains": 3, "sequences": 8, "test_sequences": 4, "batch": 4, "length": 16}
        tiny = {"width": 8, "num_layers": 1, "pretrain_steps": 3, "num_rates": 2, "orders": (0,)}
        return dataclasses.replace(config, **small, **tiny)
    if preset == "gpu":
        large = {"width": 512, "num_layers": 6, "num_heads": 8, "length": 256, "batch": 32}
        return dataclasses.replace(config, **large, sequences=640, pretrain_steps=20_000)
    return config


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
        {"strength": (1.0, 10.0, 100.0)},
    ),
    Row(
        "fast and slow weights",
        lambda loss, size, batch: continual.fast_and_slow(loss),
        {"strength": (0.01,), "slow_rate": (0.003, 0.01, 0.03)},
    ),
    Row("replay", continual.replay),
    Row("online MAML", continual.online_maml, {"inner_learning_rate": (0.003, 0.01, 0.03)}),
)


def settings_of(row: Row, config: Config) -> list[Settings]:
    """The settings that are tried of a row: as many for each."""
    number = len(list(itertools.product(*row.grid.values())))
    rates = np.geomspace(*config.rates, max(1, config.num_rates // number)).tolist()
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
    """Inputs and targets of sequences ``[..., L + 1]``."""
    return Batch(jnp.asarray(sequences[..., :-1]), jnp.asarray(sequences[..., 1:]))


class Study:
    """What the rows share: the model, its loss, the start, and both streams."""

    def __init__(self, config: Config, domains: Sequence[Domain]):
        self.config = config
        reported, tuned, self._others = split(domains, config)
        self.stream, self.tuning = (make_stream(x, config) for x in (reported, tuned))
        self.model: Model = models.transformer(
            models.TransformerConfig(
                vocab_size=256,
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
            )
        )
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

    def pretrain(self, directory: Path, train_fn) -> None:
        """Finds the start of all rows, on the domains of neither stream."""
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
        tried = settings_of(row, self.config)
        found = []
        with Progress(f"tuning {row.name}", total=len(tried), first="compiling") as progress:
            for i, settings in enumerate(tried):
                loss = float(self.losses(row, settings, self.tuning, order=10**6)[-1].mean())
                found.append(loss if np.isfinite(loss) else np.inf)
                progress.update(i + 1, best=min(found))
        return tried[int(np.argmin(found))]


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


def run(config: Config) -> None:
    """Tunes and follows the rows, and writes the table and the figure."""
    train_fn = harness.begin(config, RATES_ALONE)
    rows = harness.select(list(ROWS), config.rows)
    domains = stdlib_domains() if config.folder is None else folder_domains(Path(config.folder))
    study = Study(config, domains)
    check_text(domains)
    table = harness.TableRun(
        "table_continual",
        config,
        presets,
        table="continual/text",
        unit="bits/byte",
        rows=[row.name for row in rows],
        seeds=list(config.orders),
        data=fingerprint(domains),
    )
    log(f"the stream: {', '.join(study.stream.names)}; {config.capacity} sequences of memory")
    study.pretrain(table.directory, train_fn)
    over = "95 % intervals over domains, means over orders"
    for row in table.pending(rows):
        settings = study.tuned(row)
        log(f"{row.name}: {settings}")
        found = [study.losses(row, settings, study.stream, order) for order in config.orders]
        each = [
            measures(x, visits_of(config, order))
            for x, order in zip(found, config.orders, strict=True)
        ]
        for column in each[0]:
            values = np.mean([x[column] for x in each], axis=0)
            more = {"settings": settings, "over": over}
            if column == "forward transfer":
                more["better"] = "higher"
            table.add(row.name, column, interval(values), **more)
        table.keep(row.name, losses=np.stack(found))
    draw(table, rows)
    table.finish(notes({row.name: table.kept(row.name)["losses"] for row in rows}, config))


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


def notes(found: Mapping[str, np.ndarray], config: Config) -> list[str]:
    """Forgetting and the loss on new domains beside those of fine-tuning, paired over domains."""
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


if __name__ == "__main__":
    harness.main("table_continual", run, presets, __doc__)
