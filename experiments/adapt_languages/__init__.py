"""Meta-learn a language model and adapt it to languages that it has never seen.

Finn et al., 2017 (MAML, FOMAML); Nichol et al., 2018 (Reptile); Raghu et al., 2020
(ANIL); Antoniou et al., 2019 (rates per layer and step); Li et al., 2017 (Meta-SGD);
on next-token prediction. `--tasks markov` draws random Markov languages that have something
in common, `markov-symmetric` such as have nothing in common but the size of their
probabilities; for both the best possible learner is known exactly. `text`, `stdlib` and
`tfds:NAME` are domains of bytes, of which some are held out. `--model pretrained` adapts part of a
language model that was trained elsewhere. Tasks, model, inner optimiser and rows of your own are
given as `module:function`, see `metaopt.languages.LanguageConfig`.

Without flags there are two tables: a table of bigrams on `markov`, and a transformer, joint
pretraining beside MAML, on `markov-symmetric`.

    python -m experiments.adapt_languages                     # both, in under five minutes
    python -m experiments.adapt_languages --tasks stdlib      # Python's own sources
    python -m experiments.adapt_languages --tasks text --folder FOLDER
    python -m experiments.adapt_languages --tasks text --folder FOLDER --model pretrained
    python -m experiments.adapt_languages --rows MAML my_module:my_row
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import harness
from experiments.adapt_languages import references
from experiments.adapt_languages.config import Config, presets, scales, unit_of
from experiments.adapt_languages.samples import samples
from metaopt import losses
from metaopt.comparison import Comparison, Row, RowResult
from metaopt.console import log, printable
from metaopt.files import read_text, write_text
from metaopt.fit import Problem
from metaopt.languages import (
    BASELINE,
    EQUAL_OPERATIONS,
    USUAL,
    check,
    digest,
    is_cipher,
    is_markov,
    is_pretrained,
    is_text,
    make_family,
    make_model,
    make_rows,
    text_config,
)
from metaopt.load import TOKENIZER
from metaopt.reporting import plots
from metaopt.statistics import Interval, interval
from metaopt.tasks.text import definition, find, kin_of, short_summary, summary
from metaopt.training.types import TrainFn

DIFFERENCES = (1, 2, 5)
"""Numbers of inner steps that have a column of gains on the baseline."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What the losses of a run are measured by.

    Attributes:
      table: Table of the run.
      config: Config of the run.
      comparison: What the rows share, of the first seed or fold.
      folds: The same of each fold, whose test episodes are pooled; none for one split.
    """

    table: harness.TableRun
    config: Config
    comparison: Comparison
    folds: tuple[Comparison, ...] = ()

    @functools.cached_property
    def tasks(self) -> np.ndarray:
        """The task of each test episode, or its group of kin, int ``[E]``."""
        config = self.config
        if not (self.folds or (is_text(config.tasks) and config.kin)):
            return np.asarray(self.comparison.test.task)
        splits = find(text_config(config)).splits.values()
        names = sorted(domain.name for split in splits for domain in split)
        kin = dict(zip(names, kin_of(names, text_config(config)), strict=True))
        return np.asarray([kin[domain] for domain in self.domains.tolist()])

    @functools.cached_property
    def num_tasks(self) -> int:
        """The number of tasks, of which kin are several."""
        tested = self.folds or (self.comparison,)
        return sum(len(np.unique(comparison.test.task)) for comparison in tested)

    @functools.cached_property
    def references(self) -> dict[str, np.ndarray]:
        """The losses of what is no learner by name, nats ``[E, 2]``: without support and with it.

        They are computed once in a run, and then read from its directory.
        """
        table = self.table
        found = references.make_references(self.config, self.comparison, table.directory)
        return {
            name: table.remember(name, lambda make=make: {"nats": make()})["nats"]
            for name, make in found
        }

    @property
    def limit(self) -> str:
        """The Bayes limit that reads what the model reads."""
        is_table = self.config.model == "bigram"
        return references.SUPPORT_LIMIT if is_table else references.PREFIX_LIMIT

    @property
    def baseline(self) -> str:
        """The row that the others are compared with."""
        if is_pretrained(self.config):
            return USUAL
        return EQUAL_OPERATIONS if EQUAL_OPERATIONS in self.config.rows else BASELINE

    @property
    def columns(self) -> dict[int, str]:
        """The columns of losses, by the number of inner steps."""
        return harness.step_columns(self.config.comparison.max_inner_steps)

    @functools.cached_property
    def domains(self) -> np.ndarray:
        """The name of the domain of each test episode, ``[E]``."""
        tested = self.folds or (self.comparison,)
        return np.concatenate(
            [
                np.asarray(each.problem.family.test.task_names)[np.asarray(each.test.task)]
                for each in tested
            ]
        )

    @functools.cached_property
    def scales(self) -> np.ndarray:
        """What the nats a token of each test episode are multiplied by for the unit, ``[E]``."""
        tested = self.folds or (self.comparison,)
        return np.concatenate([scales(self.config, comparison.test) for comparison in tested])

    def interval(self, nats: np.ndarray) -> Interval:
        """The mean of ``nats [E]`` in the unit of the table, with its interval over tasks.

        Mean and interval are over groups of kin, if there are any; ``n`` counts the tasks.
        """
        return interval(nats * self.scales, self.tasks)._replace(n=self.num_tasks)

    def curve(self, nats: np.ndarray) -> plots.Curve:
        """The means of ``nats [E, steps + 1]``, likewise."""
        return harness.curve(nats * self.scales[:, None], self.tasks)


def table_name(config: Config) -> str:
    """The name of the table in the records."""
    return "pretrained/adaptation" if is_pretrained(config) else f"adapt_languages/{config.tasks}"


def add_row(study: Study, name: str, results: Sequence[RowResult]) -> None:
    """Adds the cells of a trained row: its losses after 0, 1, 2 ... steps.

    They are means over seeds, or those of all folds together.

    The baseline must be added before the others, which are compared with it.
    """
    table, curves = study.table, [result.curves for result in results]
    nats_ExK = np.concatenate(curves) if study.folds else np.mean(curves, axis=0)
    table.keep(name, nats=nats_ExK)
    for step, column in study.columns.items():
        rates = [float(result.rates[step]) for result in results]
        rate = rates[0] if len(rates) == 1 else rates
        table.add(name, column, study.interval(nats_ExK[:, step]), inner_learning_rate=rate)
    _add_gains(study, name, nats_ExK)
    _add_distance(study, name, nats_ExK[:, study.config.inner.num_steps])
    if is_text(study.config.tasks):
        _add_domains(study, name, nats_ExK[:, study.config.inner.num_steps])


def add_references(study: Study) -> None:
    """Adds the rows of the references, which are the same after any number of steps."""
    for name, nats_Ex2 in study.references.items():
        steps = range(1 + study.config.comparison.max_inner_steps)
        nats_ExK = nats_Ex2[:, [min(step, 1) for step in steps]]
        for step, column in study.columns.items():
            study.table.add(name, column, study.interval(nats_ExK[:, step]), limit=True)
        _add_gains(study, name, nats_ExK, limit=True)
        if is_cipher(study.config.tasks):
            _add_distance(study, name, nats_Ex2[:, 1], limit=True)


def _add_gains(study: Study, name: str, nats_ExK: np.ndarray, **fields: Any) -> None:
    """The baseline's losses minus the row's, episode by episode: positive is better."""
    if name == study.baseline or not study.table.has(study.baseline):
        return
    baseline = study.table.kept(study.baseline)["nats"]
    for step, column in study.columns.items():
        if step in DIFFERENCES:
            found = study.interval(baseline[:, step] - nats_ExK[:, step])
            study.table.add(name, f"Δ {column}", found, better="higher", **fields)


def _add_distance(study: Study, name: str, nats_E: np.ndarray, **fields: Any) -> None:
    """How far the losses after the trained number of steps are from what is possible."""
    if is_markov(study.config.tasks):
        gap = study.interval(nats_E - study.references[study.limit][:, 1])
        study.table.add(name, "gap to Bayes", gap, limit_of=study.limit, **fields)
    if is_cipher(study.config.tasks):
        share = interval(references.cracked(nats_E, study.references), study.tasks)
        study.table.add(name, "cracked", share, unit="%", better="higher", **fields)


def _add_domains(study: Study, name: str, nats_E: np.ndarray) -> None:
    """Each domain after the trained number of steps: the baseline's loss, and gains on it."""
    values = nats_E * study.scales
    if name != study.baseline:
        if not study.table.has(study.baseline):
            return
        steps = study.config.inner.num_steps
        values = study.table.kept(study.baseline)["nats"][:, steps] * study.scales - values
    column = name if name == study.baseline else f"gain of {name}"
    for domain in sorted(set(study.domains)):
        of_domain = values[study.domains == domain]
        study.table.add(
            domain,
            column,
            interval(of_domain),
            table=f"{table_name(study.config)}/domains",
            over="95 % intervals over the episodes of a domain",
            better="lower" if name == study.baseline else "higher",
        )


def draw(study: Study, names: Sequence[str]) -> None:
    """Losses against inner steps of the rows that are finished, and what they come to."""
    kept = {name: study.table.kept(name)["nats"] for name in names if study.table.has(name)}
    tasks, path = study.config.tasks, study.table.directory / "curves.png"
    if is_markov(tasks):
        _draw_gaps(study, kept, path)
    elif is_cipher(tasks):
        _draw_cracked(study, kept, path)
    else:
        baseline = kept.get(study.baseline, np.nan)
        gains = {name: baseline - nats for name, nats in kept.items() if name != study.baseline}
        plots.adaptation_curves(
            path,
            {name: study.curve(nats) for name, nats in kept.items()},
            {name: study.curve(x) for name, x in gains.items() if study.baseline in kept},
            {},
            title="Held-out domains" if is_text(tasks) else "Held-out languages",
            baseline=study.baseline,
            unit=unit_of(study.config),
            trained_steps=study.config.inner.num_steps,
        )


def _draw_gaps(study: Study, kept: Mapping[str, np.ndarray], path: Path) -> None:
    """How far rows are from the best possible learner, on logarithmic axes."""
    limit, num_steps = study.references[study.limit][:, 1:], study.config.inner.num_steps
    gaps = {name: nats - limit for name, nats in kept.items()}
    unit, model = unit_of(study.config), printable(study.config.model)
    model = "table of bigrams" if model == "bigram" else model
    plots.adaptation_summary(
        path,
        {name: study.curve(x) for name, x in gaps.items()},
        {name: study.interval(x[:, num_steps])[:2] for name, x in gaps.items()},
        title=f"Adapting a {model} to languages never seen",
        y_label=f"loss above the best possible, {unit}",
        score_title=f"After {num_steps} steps (left is better)",
        score_label=f"loss above the best possible, {unit}",
        trained_steps=num_steps,
        scale="log",
    )


def _draw_cracked(study: Study, kept: Mapping[str, np.ndarray], path: Path) -> None:
    """Losses against inner steps, and how much of a cipher each row and each reference cracks."""
    num_steps, known = study.config.inner.num_steps, study.references
    losses = {name: nats[:, num_steps] for name, nats in kept.items()}
    losses |= {name: nats[:, 1] for name, nats in known.items()}
    shares = {name: references.cracked(nats, known) for name, nats in losses.items()}
    plots.adaptation_summary(
        path,
        {name: study.curve(nats) for name, nats in kept.items()},
        {name: interval(share, study.tasks)[:2] for name, share in shares.items()},
        title="Messages under keys never seen",
        y_label=f"loss on the rest of the message, {unit_of(study.config)}",
        score_title=f"Cracked after {num_steps} steps (right is better)",
        score_label="% of the way to the plain text",
        trained_steps=num_steps,
        limits={name: study.interval(known[name][:, 1]).mean for name in references.ENDS},
    )


def parts(config: Config) -> list[Config]:
    """The runs of a config: its own, and that of a transformer if it is asked for.

    A run of chosen rows is of these alone.
    """
    if not config.then_transformer or config.rows != presets(config.preset).rows:
        return [config]
    other = presets(config.preset, "markov-symmetric", "transformer")
    here = None if config.run_dir is None else f"{config.run_dir}/transformer"
    comparison = dataclasses.replace(
        other.comparison, seed=config.comparison.seed, num_devices=config.comparison.num_devices
    )
    shared = {name: getattr(config, name) for name in ("root", "improve", "memory", "seeds")}
    return [config, dataclasses.replace(other, run_dir=here, comparison=comparison, **shared)]


def run(config: Config) -> None:
    """Trains and evaluates the rows of each part, and writes table, figure and samples."""
    train_fn = harness.begin(config)
    runs = [prepare(part, train_fn) for part in parts(config)]
    for one in runs:
        one()


def prepare(config: Config, train_fn: TrainFn) -> Callable[[], None]:
    """Checks a config, and gives what runs it.

    Raises:
      UserError: something of the config cannot be run.
    """
    model = make_model(config)
    rows = make_rows(config, model)
    check(config, config.comparison, rows, model)
    if is_text(config.tasks):
        log(f"reading the text of {config.folder or config.tasks}")
        for fold in range(config.num_folds or 1):
            for line in short_summary(text_config(config, fold)):
                log(f"fold {fold}, {line}" if config.num_folds else line)

    def comparison(fold: int, seed: int) -> Comparison:
        problem = Problem(make_family(config, fold), model, losses.next_token(model))
        settings = dataclasses.replace(config.comparison, seed=seed)
        return Comparison(problem, config.inner, config.outer, settings, train_fn)

    first = config.comparison.seed
    if config.num_folds:
        comparisons = {f"fold-{i}": comparison(i, first) for i in range(config.num_folds)}
    else:
        comparisons = {f"seed-{seed}": comparison(0, seed) for seed in config.seeds or (first,)}
    return functools.partial(_run, config, rows, comparisons)


def _run(config: Config, rows: Sequence[Row], comparisons: Mapping[str, Comparison]) -> None:
    first, names = next(iter(comparisons.values())), [row.name for row in rows]
    table = harness.TableRun(
        "adapt_languages",
        config,
        presets,
        table=table_name(config),
        unit=unit_of(config),
        rows=names,
        seeds=tuple({each.config.seed: None for each in comparisons.values()}),
        episodes=config.comparison.test_episodes,
        data=digest(config),
    )
    if is_text(config.tasks):
        _keep_data(config, table.directory)
    study = Study(table, config, first, tuple(comparisons.values()) if config.num_folds else ())
    train = harness.compare(comparisons, table.directory)
    for row in table.pending(sorted(rows, key=lambda row: row.name != study.baseline)):
        results = train(row)
        add_row(study, row.name, results)
        draw(study, names)
        if row.name == names[-1]:
            write_text(table.directory / "samples.md", samples(config, first, results[0]))
    add_references(study)
    Console().print(read_text(table.directory / "samples.md"), markup=False, highlight=False)
    table.finish()


def _keep_data(config: Config, directory: Path) -> None:
    """What the data are, and the tokenizer with which the run is loaded anywhere."""
    folds = [summary(text_config(config, fold)) for fold in range(config.num_folds or 1)]
    write_text(directory / "data.md", "\n".join(line for fold in folds for line in [*fold, ""]))
    if config.tokenizer != "bytes":
        write_text(directory / TOKENIZER, definition(text_config(config)))
