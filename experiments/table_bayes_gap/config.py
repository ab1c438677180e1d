"""The config of `table_bayes_gap` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, get_args

from metaopt.comparison import ComparisonConfig
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Checked, Count, Heads, Layers, Length, Several, Width
from metaopt.tasks.markov import Concentration, Order, Symbols

CHOSEN_BY = ("preset",)
"""The flags that the defaults of all others depend on."""

ModelName = Literal["n-gram table", "bigram table", "GRU", "transformer"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)


class Setting(NamedTuple):
    """Markov languages and how much of one is seen.

    Attributes:
      order: m.
      symbols: V.
      concentration: of the Dirichlet prior.
      sequences: S, of the support.
    """

    order: int
    symbols: int
    concentration: float
    sequences: int

    def name(self, length: int) -> str:
        """As it stands in the table: ``order 1, 16 symbols, 0.3, 4x32``."""
        return (
            f"order {self.order}, {self.symbols} symbols, {self.concentration:g}, "
            f"{self.sequences}x{length}"
        )


BASE = Setting(1, 16, 0.3, 4)
SETTINGS = (
    BASE,
    Setting(1, 4, 0.3, 4),
    Setting(2, 4, 0.3, 4),
    Setting(3, 4, 0.3, 4),
    Setting(1, 32, 0.3, 4),
    Setting(1, 16, 0.1, 4),
    Setting(1, 16, 1.0, 4),
    Setting(1, 16, 0.3, 1),
    Setting(1, 16, 0.3, 16),
)
"""The base first, then its factors varied one at a time; orders with 4 symbols."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """How the learners of one kind of model are trained, and where.

    Attributes:
      settings: order, symbols, concentration and support sequences of each.
      learners: names of those to run; all if none.
      outer: the outer optimiser.
      comparison: how long, on how much, judged on what.
    """

    settings: Annotated[
        tuple[tuple[Order, Symbols, Concentration, Count], ...], Several(0, different=True)
    ]
    learners: tuple[str, ...] = ()
    outer: OuterConfig
    comparison: ComparisonConfig


TABLES = Training(
    settings=SETTINGS,
    learners=("random init", "FOMAML", "MAML", "Meta-SGD", "Meta-SGD on Adagrad"),
    outer=OuterConfig(learning_rate=0.01, rates_learning_rate=0.05, warmup_steps=10),
    comparison=ComparisonConfig(
        tasks_per_step=32,
        meta_steps=300,
        inner_rates=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
        eval_every=50,
        checkpoint_every=150,
        valid_episodes=1000,  # as many as of the test: one shape to compile
        test_episodes=1000,
    ),
)
NETWORKS = Training(
    settings=(BASE, Setting(2, 4, 0.3, 4)),
    learners=("joint pretraining", "MAML"),
    outer=OuterConfig(learning_rate=3e-3, rates_learning_rate=0.03, warmup_steps=20),
    comparison=ComparisonConfig(
        tasks_per_step=16,
        meta_steps=300,
        inner_rates=(0.03, 0.1, 0.3, 1.0, 3.0),
        eval_every=50,
        checkpoint_every=150,
        valid_episodes=128,
        test_episodes=600,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """The distance of learners to the exact Bayes limits on Markov languages.

    The bigram table stands for what cannot represent the language: it runs with
    one learner, and where it differs from the n-gram table, at orders above 1.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      models: those to run.
      tables: training of the tables of logits.
      networks: training of GRU and transformer.
      length: L, tokens in a sequence.
      num_query: Q, sequences to be judged on.
      width: of the networks.
      num_layers: of the networks.
      num_heads: of the transformer.
      inner: the inner loop.
      improve: train under the closed loop, which changes rates where that helps.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    models: Annotated[tuple[ModelName, ...], Several(different=True)] = MODELS
    tables: Training = TABLES
    networks: Training = NETWORKS
    length: Length = 32
    num_query: Count = 8
    width: Width = 32
    num_layers: Layers = 1
    num_heads: Heads = 2
    inner: InnerLoop = dataclasses.field(default_factory=lambda: InnerLoop(unroll=False))
    improve: bool = False
    root: str = "runs"
    run_dir: str | None = None


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name = flags.get("preset", "cpu")
    presets = {"smoke": _smoke, "cpu": lambda config: config, "gpu": _gpu}
    if name not in presets:
        raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
    return dataclasses.replace(presets[name](Config()), preset=name)  # type: ignore[arg-type]


def _smoke(config: Config) -> Config:
    small = Setting(1, 4, 0.3, 2)
    sizes = {
        "tasks_per_step": 4,
        "meta_steps": 4,
        "eval_every": 2,
        "valid_episodes": 8,
        "test_episodes": 16,
    }
    return dataclasses.replace(
        config,
        models=("n-gram table", "bigram table", "transformer"),
        tables=_with(
            config.tables, (small, Setting(2, 3, 0.3, 2)), ("MAML", "Meta-SGD on Adagrad"), **sizes
        ),
        networks=_with(config.networks, (small,), ("MAML",), **sizes),
        length=8,
        num_query=2,
        width=8,
        inner=InnerLoop(num_steps=2, unroll=False),
    )


def _gpu(config: Config) -> Config:
    """Every learner on every setting, larger alphabets at high orders among them."""
    settings = (
        *SETTINGS,
        *(Setting(order, 8, 0.3, 4) for order in (1, 2, 3)),
        *(Setting(order, 4, 0.3, 16) for order in (1, 2, 3)),
        Setting(1, 64, 0.3, 4),
        Setting(2, 16, 0.3, 16),
    )
    sizes = {"tasks_per_step": 64, "eval_every": 500, "checkpoint_every": 500}
    sizes |= {"valid_episodes": 512, "test_episodes": 2000}
    return dataclasses.replace(
        config,
        tables=_with(config.tables, settings, (), meta_steps=5_000, **sizes),
        networks=_with(config.networks, settings, (), meta_steps=20_000, **sizes),
        width=128,
        num_layers=2,
        num_heads=4,
    )


def _with(
    training: Training, settings: tuple[Setting, ...], learners: tuple[str, ...], **sizes: int
) -> Training:
    comparison = dataclasses.replace(training.comparison, **sizes)
    return dataclasses.replace(
        training, settings=settings, learners=learners, comparison=comparison
    )
