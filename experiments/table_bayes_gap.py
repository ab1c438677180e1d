"""The distance to the Bayes-optimal learner on Markov languages whose prior is known.

A language of order m is a table of Dirichlet draws, so the loss of the best possible
learner is exact: its posterior predictive, from the support alone or from the support and
the query so far. A gap is the query loss of a learner after K inner steps minus the limit that
reads what its model reads, paired episode by episode, in nats a token. Tables of m-grams are in
`bayes_gap`, against the support alone. Networks, which read the query so far too, are in
`bayes_gap_prefix`, against support and prefix. The settings vary one factor of a base at a time:
order, alphabet, Dirichlet concentration, support. The learner that counts is the limit itself,
at a gap of 0.

Learners: Finn et al., 2017 (MAML, FOMAML); Li et al., 2017 (Meta-SGD, here with rates for
each step); Antoniou et al., 2019 (rates per layer and step). Rates that are not learned
are tuned on validation languages, separately for every number of steps. Models: the table of
all m-grams, which holds the true language; the bigram table, which above order 1 cannot,
so that its gap is mostly what it fails to represent; a GRU and a transformer.

    python -m experiments.table_bayes_gap                     # under 15 minutes on two cores
    python -m experiments.table_bayes_gap --preset smoke      # tiny: a minute or two
    python -m experiments.table_bayes_gap --models "n-gram table"

Expect on the base, 16 symbols at order 1: 0.028 from gradient descent at the best rate,
however its start is learned, and below 0.004 from rates learned on top of Adagrad, whose
steps shrink with the counts of a symbol, as a posterior does. On order 2 with 4 symbols:
0.027 (MAML), 0.010 (Meta-SGD), 0.006 (on Adagrad). The transformer, trained for a short time,
is 0.048 from its limit on the base by MAML, and 0.47 by joint pretraining. `curves.png` shows
the gap of the base against inner steps and, on validation languages, against meta-steps, and
the gaps of all settings. A dash was not run.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import harness
from metaopt import languages, losses, models
from metaopt.comparison import Comparison, ComparisonConfig, Row, RowResult
from metaopt.errors import UserError
from metaopt.files import Line, read_json_lines
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Checked, Count, Heads, Layers, Length, Several, Width
from metaopt.reporting import plots
from metaopt.reporting.tables import Record
from metaopt.statistics import interval
from metaopt.tasks.markov import Concentration, MarkovConfig, Order, Symbols, bayes_loss, markov
from metaopt.training.runs import slug
from metaopt.training.types import TrainFn
from metaopt.types import Episode

UNIT = "nats/token"
ModelName = Literal["n-gram table", "bigram table", "GRU", "transformer"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
NETWORKS = ("GRU", "transformer")
"""Models that read the query so far, and so are judged by the limit that does."""
MODEL_STYLES = {
    "n-gram table": {"linestyle": "-", "fillstyle": "full"},
    "bigram table": {"linestyle": ":", "fillstyle": "none"},
    "GRU": {"linestyle": "--", "fillstyle": "left"},
    "transformer": {"linestyle": "-.", "fillstyle": "bottom"},
}

Factors = tuple[Order, Symbols, Concentration, Count]
"""Order m, symbols V, concentration of the Dirichlet prior, sequences S of the support."""
BASE: Factors = (1, 16, 0.3, 4)
SETTINGS: tuple[Factors, ...] = (
    BASE,
    (1, 4, 0.3, 4),
    (2, 4, 0.3, 4),
    (3, 4, 0.3, 4),
    (1, 32, 0.3, 4),
    (1, 16, 0.1, 4),
    (1, 16, 1.0, 4),
    (1, 16, 0.3, 1),
    (1, 16, 0.3, 16),
)
"""The base first, then its factors varied one at a time; orders with 4 symbols."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(Checked):
    """Training of the learners of one kind of model.

    Attributes:
      settings: Order, symbols, concentration and support sequences of each setting.
      learners: Names of the learners to run; `LEARNERS` if none.
      outer: Outer optimiser.
      comparison: Length of training, its sizes and the evaluation.
    """

    settings: Annotated[tuple[Factors, ...], Several(0, different=True)]
    learners: tuple[str, ...] = ()
    outer: OuterConfig
    comparison: ComparisonConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.ImprovedConfig):
    """The distance of learners to the exact Bayes limits on Markov languages.

    The bigram table is the example of a model that cannot represent the language: it runs with
    one learner, and only at orders above 1, where it differs from the n-gram table.

    Attributes:
      models: Models to run.
      tables: Training of the tables of logits.
      networks: Training of GRU and transformer.
      length: L, tokens in a sequence.
      num_query: Q, query sequences, on which the loss is measured.
      width: Width of the networks.
      num_layers: Number of layers of the networks.
      num_heads: Number of heads of the transformer.
      inner: Inner loop.
    """

    models: Annotated[tuple[ModelName, ...], Several(different=True)] = MODELS
    tables: GroupConfig = GroupConfig(
        settings=SETTINGS,
        learners=("random init", "FOMAML", "MAML", "Meta-SGD", "Meta-SGD on Adagrad"),
        outer=OuterConfig(learning_rate=0.01, rates_learning_rate=0.05, warmup_steps=10),
        comparison=ComparisonConfig(
            tasks_per_step=32,
            meta_steps=300,
            inner_rates=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
            eval_every=50,
            checkpoint_every=150,
            valid_episodes=1000,  # as many as for the test: one shape to compile
            test_episodes=1000,
        ),
    )
    networks: GroupConfig = GroupConfig(
        settings=(BASE, (2, 4, 0.3, 4)),
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
    length: Length = 32
    num_query: Count = 8
    width: Width = 32
    num_layers: Layers = 1
    num_heads: Heads = 2
    inner: InnerLoop = dataclasses.field(default_factory=lambda: InnerLoop(unroll=False))

    def group(self, model: str) -> GroupConfig:
        """The training of the learners of a model."""
        return self.networks if model in NETWORKS else self.tables


def presets(preset: Literal["smoke", "cpu", "gpu"] = "cpu") -> Config:
    """The defaults; gpu has every learner on every setting, and larger alphabets at high orders."""
    config = Config(preset=preset)
    if preset == "smoke":
        small: Factors = (1, 4, 0.3, 2)
        sizes: dict[str, Any] = {"tasks_per_step": 4, "meta_steps": 4, "eval_every": 2}
        sizes |= {"valid_episodes": 8, "test_episodes": 16}
        trained = ("MAML", "Meta-SGD on Adagrad")
        config = dataclasses.replace(
            config,
            models=("n-gram table", "bigram table", "transformer"),
            tables=_resized(config.tables, (small, (2, 3, 0.3, 2)), trained, sizes),
            networks=_resized(config.networks, (small,), ("MAML",), sizes),
            length=8,
            num_query=2,
            width=8,
            inner=InnerLoop(num_steps=2, unroll=False),
        )
    elif preset == "gpu":
        larger: list[Factors] = [(order, 8, 0.3, 4) for order in (1, 2, 3)]
        larger += [(order, 4, 0.3, 16) for order in (1, 2, 3)]
        settings = (*SETTINGS, *larger, (1, 64, 0.3, 4), (2, 16, 0.3, 16))
        sizes = {"tasks_per_step": 64, "eval_every": 500, "checkpoint_every": 500}
        sizes |= {"valid_episodes": 512, "test_episodes": 2000}
        config = dataclasses.replace(
            config,
            tables=_resized(config.tables, settings, (), sizes | {"meta_steps": 5_000}),
            networks=_resized(config.networks, settings, (), sizes | {"meta_steps": 20_000}),
            width=128,
            num_layers=2,
            num_heads=4,
        )
    return config


def _resized(
    group: GroupConfig,
    settings: tuple[Factors, ...],
    names: tuple[str, ...],
    sizes: dict[str, Any],
) -> GroupConfig:
    comparison = dataclasses.replace(group.comparison, **sizes)
    return dataclasses.replace(group, settings=settings, learners=names, comparison=comparison)


LEARNERS = (
    "random init",
    "joint pretraining",
    "FOMAML",
    "MAML",
    "per-layer-per-step",
    "Meta-SGD",
    "Meta-SGD on Adagrad",
)
"""The learners of a model if none are named: without Reptile and ANIL."""

make_family = functools.cache(markov)  # models of one setting share its compiled sampler


@dataclasses.dataclass(frozen=True)
class Study:
    """The learners of one model on the languages of one setting.

    Attributes:
      model: Name of the model.
      languages: Languages of the setting.
      comparison: What trains and evaluates the learners.
      rows: Learners.
    """

    model: str
    languages: MarkovConfig
    comparison: Comparison
    rows: list[Row]

    @property
    def column(self) -> str:
        """Name of the setting in the tables: ``order 1, 16 symbols, 0.3, 4x32``."""
        of = self.languages
        support = f"{of.num_support}x{of.length}"
        return f"order {of.order}, {of.vocab_size} symbols, {of.concentration:g}, {support}"

    def row_name(self, row: Row) -> str:
        """Name of a learner in the tables: ``MAML, GRU``."""
        return f"{row.name}, {self.model}"

    @property
    def shared(self) -> dict[str, Any]:
        """Fields that all records of the study share."""
        table = "bayes_gap_prefix" if self.model in NETWORKS else "bayes_gap"
        config = self.comparison.config
        return {"table": table, "episodes": config.test_episodes, "seeds": [config.seed]}

    @functools.cached_property
    def test_limit(self) -> np.ndarray:
        """Exact limit on each test episode, float64 ``[E]``, in nats a token."""
        return self._limit(self.comparison.test)

    @functools.cached_property
    def valid_limit(self) -> float:
        """Mean of the exact limit over the validation episodes, in nats a token."""
        return float(self._limit(self.comparison.valid).mean())

    def _limit(self, episodes: Episode) -> np.ndarray:
        prefix = self.model in NETWORKS
        return np.asarray(bayes_loss(self.languages, episodes, use_prefix=prefix), np.float64)


def make_studies(config: Config, train_fn: TrainFn) -> list[Study]:
    """Every model on each of its settings, in the order of the table.

    Raises:
      UserError: there are none, or one of them cannot be computed.
    """
    chosen = [
        (name, factors)
        for name in config.models
        for factors in config.group(name).settings
        if name != "bigram table" or factors[0] > 1
    ]
    if not chosen:
        raise UserError(
            f"there is nothing to run for {', '.join(config.models)}: give settings, and the "
            "bigram table one of an order above 1"
        )
    return [make_study(config, name, factors, train_fn) for name, factors in chosen]


def make_study(config: Config, name: str, factors: Factors, train_fn: TrainFn) -> Study:
    """One model on one setting.

    Raises:
      UserError: the setting cannot be computed, or there is no learner of a name.
    """
    group = config.group(name)
    order, vocab_size, concentration, num_support = factors
    language = languages.LanguageConfig(
        tasks="markov-symmetric",
        model=name.lower() if name in NETWORKS else "bigram",
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_support=num_support,
        num_query=config.num_query,
        length=config.length,
        vocab_size=vocab_size,
        order=order,
        concentration=concentration,
        inner=config.inner,
        rows=("Meta-SGD on Adagrad",) if name == "bigram table" else group.learners or LEARNERS,
    )
    is_ngram = name == "n-gram table"
    model = models.ngram(vocab_size, order) if is_ngram else languages.make_model(language)
    rows = languages.make_rows(language, model)
    languages.check(language, group.comparison, rows, model)
    markov_config = languages.markov_config(language)
    problem = Problem(make_family(markov_config), model, losses.next_token(model))
    comparison = Comparison(problem, config.inner, group.outer, group.comparison, train_fn)
    return Study(name, markov_config, comparison, rows)


def run(config: Config) -> None:
    """Trains and evaluates the learners of every model on every setting; writes the tables."""
    studies = make_studies(config, harness.begin(config))
    table = harness.TableRun(
        "table_bayes_gap",
        config,
        presets,
        table="bayes_gap",
        unit=UNIT,
        rows=dict.fromkeys(study.row_name(row) for study in studies for row in study.rows),
    )
    for study in studies:
        add_study(table, study)
    figure = draw([record for record in table.records if not record.get("limit")])
    plots.save(figure, table.directory / "curves.png")
    table.finish()


def add_study(table: harness.TableRun, study: Study) -> None:
    """Trains the learners of a study and adds their gaps, and what gives these a scale."""
    directory = table.directory / slug(f"{study.model} {study.column}")
    results = harness.compare({study.model: study.comparison}, directory)
    for row in table.pending(study.rows, study.row_name, lambda row: study.column):
        (result,) = results(row)
        add_gap(table, study, result, directory)
        add_scale(table, study)


def add_gap(table: harness.TableRun, study: Study, result: RowResult, directory: Path) -> None:
    """Adds the loss of a learner minus that of the limit on the same episodes.

    Args:
      table: Run of the table.
      study: Study of the learner.
      result: Losses of the trained learner.
      directory: Directory of the study, with its metrics.
    """
    num_steps = study.comparison.inner.num_steps
    gaps = result.curves - study.test_limit[:, None]
    table.add(
        study.row_name(result.row),
        study.column,
        interval(gaps[:, num_steps], np.asarray(study.comparison.test.task)),
        **study.shared,
        learner=result.row.name,
        model=study.model,
        num_inner_steps=num_steps,
        inner_learning_rate=float(result.rates[num_steps]),
        gap_by_inner_steps=[float(x) if np.isfinite(x) else None for x in gaps.mean(axis=0)],
        gap_by_meta_steps={
            str(line["step"]): line["valid_loss"] - study.valid_limit
            for line in read_json_lines(directory / "metrics.jsonl", Line)
            if line["name"] == result.row.name and line.get("valid_loss") is not None
        },
    )


def add_scale(table: harness.TableRun, study: Study) -> None:
    """Adds the gap of the uniform prediction to a column, and the loss of the limit itself."""
    scale = {
        "gap of the uniform prediction": math.log(study.languages.vocab_size) - study.test_limit,
        "loss of the limit itself": study.test_limit,
    }
    for name, values in scale.items():
        found = interval(values, np.asarray(study.comparison.test.task))
        table.add(name, study.column, found, limit=True, **study.shared)


def draw(records: Sequence[Record]) -> Figure:
    """Gaps against inner steps, meta-steps and settings, each to the limit of its model.

    The first two are of the setting that came first. A colour and a marker are a learner; a line
    style and a filling are a model. Gaps are logarithmic above 0.001 and linear below it.

    Args:
      records: Records of gaps, see `add_gap`.
    """
    rows, settings, learners = (
        list(dict.fromkeys(record[key] for record in records))
        for key in ("row", "column", "learner")
    )
    figure = plots.new_figure(17.0, 6.5)
    by_inner, by_meta, by_setting = figure.subplots(1, 3)
    for set_scale in (by_inner.set_yscale, by_meta.set_yscale, by_setting.set_xscale):
        set_scale("symlog", linthresh=1e-3)
    styles, of_learner = {}, plots.styles(learners)
    for record in records:
        row = rows.index(record["row"])
        style = of_learner[record["learner"]] | {"markersize": 4}
        styles[record["row"]] = style = style | MODEL_STYLES[record["model"]]
        place = settings.index(record["column"]) + 0.8 * ((row + 0.5) / len(rows) - 0.5)
        by_setting.plot([record["value"]], [place], **style | {"linestyle": "none"})
        if record["column"] == settings[0]:
            by_inner.plot(record["gap_by_inner_steps"], **style)
            by_step = record["gap_by_meta_steps"]
            by_meta.plot([int(step) for step in by_step], [*by_step.values()], **style)
    num_steps = records[0]["num_inner_steps"]
    by_inner.axvline(num_steps, color="grey", linewidth=0.8, alpha=0.6)
    gap = f"loss above the best possible, {UNIT}"
    by_inner.set(
        xlabel="inner steps", ylabel=f"{gap} (lower is better)", title=f"Test: {settings[0]}"
    )
    by_meta.set(xlabel="meta-steps", title=f"Validation: {settings[0]}")
    by_setting.set(xlabel=gap, title=f"Test: all settings, {num_steps} inner steps")
    by_setting.set(ylim=(len(settings) - 0.5, -0.5))
    by_setting.set_yticks(range(len(settings)), settings, fontsize=8)
    for i in range(0, len(settings), 2):
        by_setting.axhspan(i - 0.5, i + 0.5, color="grey", alpha=0.1, linewidth=0)
    for axes, lines in ((by_inner, "both"), (by_meta, "both"), (by_setting, "x")):
        axes.grid(alpha=0.25, axis=lines)
    handles = [Line2D([], [], label=row, **style) for row, style in styles.items()]
    where = {"loc": "outside right center", "handlelength": 4}
    figure.legend(handles=handles, fontsize=8, frameon=False, **where)
    return figure


if __name__ == "__main__":
    harness.main("table_bayes_gap", run, presets, __doc__)
