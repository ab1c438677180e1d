"""Meta-learn a language model and adapt it to languages that it has never seen.

Finn et al., 2017 (MAML, FOMAML); Nichol et al., 2018 (Reptile); Raghu et al., 2020
(ANIL); Antoniou et al., 2019 (rates per layer and step); Li et al., 2017 (Meta-SGD);
on next-token prediction. `--tasks markov` draws random Markov languages, for which the
best possible learner is known exactly; `text`, `stdlib` and `tfds:NAME` are domains of
bytes, of which some are held out. Tasks, model, inner optimiser and rows of your own are
given as `module:function`, see `metaopt.languages.LanguageConfig`.

    python -m experiments.adapt_languages                     # Markov, a few minutes
    python -m experiments.adapt_languages --tasks stdlib      # Python's own sources
    python -m experiments.adapt_languages --tasks text --folder FOLDER
    python -m experiments.adapt_languages --rows MAML my_module:my_row
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import harness
from metaopt import losses
from metaopt.comparison import Comparison, ComparisonConfig, RowResult
from metaopt.console import log, printable
from metaopt.files import read_text, write_text
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.languages import (
    LanguageConfig,
    check,
    digest,
    is_text,
    make_codec,
    make_family,
    make_model,
    make_rows,
    markov_config,
)
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Seed, Several
from metaopt.reporting import plots
from metaopt.sequence import decoding
from metaopt.statistics import Interval, interval
from metaopt.tasks.markov import bayes_loss
from metaopt.types import Array, Episode

DIFFERENCES = (1, 2, 5)
"""Numbers of inner steps that have a column of gains on the baseline."""
BASELINE = "joint pretraining"
SUPPORT_LIMIT, PREFIX_LIMIT = "Bayes: support", "Bayes: support + prefix"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig, harness.TrainedConfig):
    """Meta-learn a language model and adapt it to languages that it has never seen.

    Attributes:
      seeds: Seeds that every row is trained with, once each, and cells are means over them; if
        none, ``comparison.seed`` alone.
      outer: The outer optimiser.
      comparison: Length of the training, sizes, and what it is judged on.
    """

    seeds: Annotated[tuple[Seed, ...], Several(0, different=True)] = ()
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    comparison: ComparisonConfig = dataclasses.field(default_factory=ComparisonConfig)


MARKOV = Config(
    outer=OuterConfig(learning_rate=0.01, rates_learning_rate=0.05, warmup_steps=10),
    comparison=ComparisonConfig(
        tasks_per_step=64,
        meta_steps=500,
        inner_rates=(0.25, 0.5, 0.7, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0),
        valid_episodes=512,
        test_episodes=2000,
        checkpoint_every=250,
    ),
)
TEXT = Config(
    num_support=8,
    num_query=8,
    length=64,
    inner=InnerLoop(query_loss="mean"),
    outer=OuterConfig(learning_rate=1e-3, rates_learning_rate=0.03, warmup_steps=20),
    comparison=ComparisonConfig(
        tasks_per_step=4,
        tasks_at_a_time=1,
        pretrain_steps=3000,
        meta_steps=500,
        inner_rates=(0.005, 0.01, 0.015, 0.02, 0.03, 0.05),
        eval_every=125,
        checkpoint_every=125,
        valid_episodes=48,
        test_episodes=120,
    ),
)


def presets(preset: str = "cpu", tasks: str = "markov", model: str | None = None) -> Config:
    """The defaults for ``--preset``, ``--tasks`` and ``--model``."""
    model = model or ("bigram" if tasks == "markov" else "transformer")
    base = MARKOV if tasks == "markov" else TEXT
    if model != "bigram" and tasks == "markov":  # rates of tables of logits suit no network
        comparison = dataclasses.replace(
            base.comparison,
            tasks_per_step=16,
            pretrain_steps=500,
            inner_rates=(0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0),
        )
        base = dataclasses.replace(base, outer=TEXT.outer, comparison=comparison)
    base = dataclasses.replace(base, preset=preset, tasks=tasks, model=model)  # type: ignore[arg-type]
    return {"smoke": _smoke, "cpu": lambda config: config, "gpu": _gpu}[preset](base)


def _smoke(config: Config) -> Config:
    comparison = dataclasses.replace(
        config.comparison,
        tasks_per_step=4,
        pretrain_steps=min(2, config.comparison.pretrain_steps),
        meta_steps=4,
        inner_rates=config.comparison.inner_rates[::3],
        eval_every=0,
        valid_episodes=8,
        test_episodes=16,
    )
    return dataclasses.replace(
        config,
        width=8,
        num_layers=1,
        length=16,
        num_valid_domains=2,
        num_test_domains=3,
        comparison=comparison,
    )


def _gpu(config: Config) -> Config:
    comparison = dataclasses.replace(
        config.comparison,
        tasks_per_step=64,
        tasks_at_a_time=0,
        pretrain_steps=10 * config.comparison.pretrain_steps,
        meta_steps=10 * config.comparison.meta_steps,
    )
    if config.tasks == "markov":
        return dataclasses.replace(config, comparison=comparison, compute_dtype="bfloat16")
    return dataclasses.replace(
        config,
        width=512,
        num_layers=6,
        num_heads=8,
        length=256,
        compute_dtype="bfloat16",
        # A step that is recomputed, of a few tasks at a time: all at once would not fit.
        inner=dataclasses.replace(config.inner, remat=True),
        comparison=dataclasses.replace(comparison, tasks_per_step=32, tasks_at_a_time=4),
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """What the losses of a run are measured by.

    Attributes:
      table: Table of the run.
      config: Config of the run.
      draw_test: Draws the test episodes, which nothing needs before a row is trained.
    """

    table: harness.TableRun
    config: Config
    draw_test: Callable[[], Episode]

    @functools.cached_property
    def tasks(self) -> np.ndarray:
        """The task of each test episode, int ``[E]``."""
        return np.asarray(self.draw_test().task)

    @functools.cached_property
    def limits(self) -> Mapping[str, np.ndarray]:
        """The exact Bayes limits by name, nats ``[E, 2]``: without the support and with it."""
        return bayes_limits(self.config, self.draw_test())

    @property
    def columns(self) -> dict[int, str]:
        """The columns of losses, by the number of inner steps."""
        return harness.step_columns(self.config.comparison.max_inner_steps)

    @property
    def scale(self) -> float:
        """What nats a token are multiplied by: text is measured in bits a byte."""
        return losses.NATS_TO_BITS if is_text(self.config.tasks) else 1.0

    def interval(self, nats: np.ndarray) -> Interval:
        """The mean of ``nats [E]`` in the unit of the table, with its interval over tasks."""
        return interval(nats * self.scale, self.tasks)

    def curve(self, nats: np.ndarray) -> plots.Curve:
        """The means of ``nats [E, steps + 1]``, likewise."""
        return harness.curve(nats * self.scale, self.tasks)


def unit_of(config: Config) -> str:
    """The unit of the numbers of a run."""
    return "bits/byte" if is_text(config.tasks) else "nats/token"


def bayes_limits(config: Config, test: Episode) -> dict[str, np.ndarray]:
    """The losses of the best possible learners, nats ``[E, 2]``: without the support and with it.

    One predicts each token from the support alone, the other from the query so far too.
    """
    if config.tasks != "markov":
        return {}
    languages = markov_config(config)

    def losses_Ex2(use_prefix: bool) -> np.ndarray:
        columns = [
            bayes_loss(languages, test, use_support=use_support, use_prefix=use_prefix)
            for use_support in (False, True)
        ]
        return np.stack(columns, axis=1).astype(np.float64)

    return {SUPPORT_LIMIT: losses_Ex2(False), PREFIX_LIMIT: losses_Ex2(True)}


def add_row(study: Study, name: str, results: Sequence[RowResult]) -> None:
    """Adds the cells of a trained row: the mean over seeds of its losses after 0, 1, 2 ... steps.

    The baseline must be added before the others, which are compared with it.
    """
    table, config = study.table, study.config
    nats_ExK = np.mean([result.curves for result in results], axis=0)
    table.keep(name, nats=nats_ExK)
    for step, column in study.columns.items():
        rates = [float(result.rates[step]) for result in results]
        rate = rates[0] if len(rates) == 1 else rates
        table.add(name, column, study.interval(nats_ExK[:, step]), inner_learning_rate=rate)
    _add_gains(study, name, nats_ExK)
    if study.limits:
        limit = SUPPORT_LIMIT if config.model == "bigram" else PREFIX_LIMIT  # what the model reads
        gap = study.interval(nats_ExK[:, config.inner.num_steps] - study.limits[limit][:, 1])
        table.add(name, "gap to Bayes", gap, limit_of=limit)


def add_limits(study: Study) -> None:
    """Adds the rows of the exact limits, which are the same after any number of steps."""
    for name, nats_Ex2 in study.limits.items():
        steps = range(1 + study.config.comparison.max_inner_steps)
        nats_ExK = nats_Ex2[:, [min(step, 1) for step in steps]]
        study.table.add_steps(name, nats_ExK * study.scale, study.tasks, limit=True)
        _add_gains(study, name, nats_ExK, limit=True)


def _add_gains(study: Study, name: str, nats_ExK: np.ndarray, **fields: Any) -> None:
    """The baseline's losses minus the row's, episode by episode: positive is better."""
    if name == BASELINE or not study.table.has(BASELINE):
        return
    baseline = study.table.kept(BASELINE)["nats"]
    for step, column in study.columns.items():
        if step in DIFFERENCES:
            found = study.interval(baseline[:, step] - nats_ExK[:, step])
            study.table.add(name, f"Δ {column}", found, better="higher", **fields)


def draw(study: Study, names: Sequence[str]) -> None:
    """Losses against inner steps of the rows that are finished, and their gains."""
    kept = {name: study.table.kept(name)["nats"] for name in names if study.table.has(name)}
    baseline = kept.get(BASELINE)
    others = {} if baseline is None else {n: baseline - x for n, x in kept.items() if n != BASELINE}
    plots.adaptation_curves(
        study.table.directory / "curves.png",
        {name: study.curve(nats) for name, nats in kept.items()},
        {name: study.curve(gains) for name, gains in others.items()},
        {name: study.interval(nats[:, 1]).mean for name, nats in study.limits.items()},
        title="Held-out domains" if is_text(study.config.tasks) else "Held-out languages",
        baseline=BASELINE,
        unit=unit_of(study.config),
        trained_steps=study.config.inner.num_steps,
    )


def samples(study: Study, comparison: Comparison, result: RowResult) -> str:
    """Text of a row's model for the first test episode, before and after adaptation."""
    episode: Episode = jax.tree.map(lambda x: jnp.asarray(x[0]), comparison.test)
    learner, problem = result.row.learner, comparison.problem
    start = learner.start(result.meta_params)
    optimizer = learner.inner_opt(result.meta_params, result.hparams)
    adapted = adapt(problem.loss_fn, optimizer, start, episode.support, comparison.inner).params
    prompt = episode.query.inputs[0]
    names = problem.family.test.task_names
    language = names[int(episode.task)] if names else "a new language"
    lines = [
        f"Text of {printable(result.row.name)} for {printable(language)}, a held-out language.",
        "",
        *_block(study.config, "Support (first sequence)", episode.support.inputs[0]),
        *_block(study.config, "Prompt", prompt),
    ]
    after = f"After {comparison.inner.num_steps} steps of"
    for title, params in (("Before", start), (after, adapted)):
        loss = float(problem.loss_fn(params, episode.query)) * study.scale
        key, length = jax.random.key(0), 2 * len(prompt)
        tokens = decoding.generate(problem.model, params, prompt, length, key, 0.7)
        heading = f"{title} adaptation, {loss:.3f} {unit_of(study.config)}"
        lines += _block(study.config, heading, tokens[len(prompt) :])
    return "\n".join(lines)


def _block(config: Config, title: str, tokens: Array) -> Iterator[str]:
    shown = make_codec(config).show(tokens)
    yield from (f"{title}:", "", *(f"    {printable(x)}" for x in shown.splitlines()), "")


def run(config: Config) -> None:
    """Trains and evaluates the rows, and writes table, figure and samples."""
    train_fn = harness.begin(improve=config.improve)
    model = make_model(config)
    rows = make_rows(config, model)
    check(config, config.comparison, rows, model)
    if is_text(config.tasks):
        log(f"reading the text of {config.folder or config.tasks}")
    problem = Problem(make_family(config), model, losses.next_token(model))
    seeds = config.seeds or (config.comparison.seed,)
    comparisons = {}
    for seed in seeds:
        settings = dataclasses.replace(config.comparison, seed=seed)
        comparisons[seed] = Comparison(problem, config.inner, config.outer, settings, train_fn)
    first, names = comparisons[seeds[0]], [row.name for row in rows]
    table = harness.TableRun(
        "adapt_languages",
        config,
        presets,
        table=f"adapt_languages/{config.tasks}",
        unit=unit_of(config),
        rows=names,
        seeds=seeds,
        episodes=config.comparison.test_episodes,
        data=digest(config),
    )
    study = Study(table, config, lambda: first.test)
    train = harness.compare(comparisons, table.directory)
    for row in table.pending(sorted(rows, key=lambda row: row.name != BASELINE)):
        results = train(row)
        add_row(study, row.name, results)
        draw(study, names)
        if row.name == names[-1]:
            write_text(table.directory / "samples.md", samples(study, first, results[0]))
    add_limits(study)
    Console().print(read_text(table.directory / "samples.md"), markup=False, highlight=False)
    table.finish()


if __name__ == "__main__":
    harness.main("adapt_languages", run, presets, __doc__)
