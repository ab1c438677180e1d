"""Meta-learn a language model and adapt it to languages that it has never seen.

Finn et al., 2017 (MAML, FOMAML); Nichol et al., 2018 (Reptile); Raghu et al., 2020
(ANIL); Antoniou et al., 2019 (rates per layer and step); Li et al., 2017 (Meta-SGD);
on next-token prediction. `--tasks markov` draws random Markov languages, for which the
best possible learner is known exactly; `text`, `stdlib` and `tfds:NAME` are domains of
bytes, of which some are held out.

    python -m experiments.adapt_languages                     # Markov, a few minutes
    python -m experiments.adapt_languages --tasks stdlib      # Python's own sources
    python -m experiments.adapt_languages --tasks text --folder FOLDER
"""

import dataclasses
import functools
from collections.abc import Sequence

from experiments.adapt_languages.config import CHOSEN_BY, Config, preset
from experiments.adapt_languages.report import Report
from metaopt import losses, parallel
from metaopt.cli import command_line
from metaopt.comparison import Comparison, Problem, Row, check_settings
from metaopt.diagnostics import feasible
from metaopt.languages import make_family, make_model, make_rows, markov_config
from metaopt.self_improvement.drop_in import trainer
from metaopt.tasks.markov import bayes_loss
from metaopt.training.runs import open_run
from metaopt.types import Model


def check(config: Config, rows: Sequence[Row], model: Model) -> None:
    """Raises UserError where what the config asks for cannot be computed."""
    check_settings(config.inner, config.comparison)
    if config.tasks == "markov":
        feasible.check_languages(markov_config(config), config.comparison.most_episodes)
    feasible.check(
        [(row.learner, row.estimator, config.inner) for row in rows],
        model.init,
        losses.next_token(model),
        feasible.tokens(config.num_support, config.length),
        feasible.tokens(config.num_query, config.length),
        config.comparison.most_episodes,
    )


def run(config: Config) -> None:
    """Trains and evaluates the rows, and writes table, figure and samples."""
    parallel.set_up_backend()
    model = make_model(config)
    rows = make_rows(config, model)
    check(config, rows, model)
    family = make_family(config)
    problem = Problem(family, model, losses.next_token(model))
    seeds = config.seeds or (config.comparison.seed,)
    comparisons = {
        seed: Comparison(
            problem,
            config.inner,
            config.outer,
            dataclasses.replace(config.comparison, seed=seed),
            trainer(config.improve),
        )
        for seed in seeds
    }
    place = open_run(
        config.root,
        "adapt_languages",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    command = command_line.command("adapt_languages", config, preset, CHOSEN_BY)
    report = Report(
        place,
        comparisons[seeds[0]],
        tasks=config.tasks,
        preset=config.preset,
        command=command,
        seeds=seeds,
        reads_prefix=config.model != "bigram",
    )
    if config.tasks == "markov":
        report.add_limits(functools.partial(bayes_loss, markov_config(config)))
    directories = {seed: place.directory for seed in seeds}
    if len(seeds) > 1:
        directories = {seed: place.directory / f"seed-{seed}" for seed in seeds}
        for directory in directories.values():
            directory.mkdir(exist_ok=True)
    starts = {seed: comparisons[seed].pretrain(directories[seed]) for seed in seeds}
    for row in rows:
        report.add([comparisons[s].run(row, starts[s], directories[s]) for s in seeds])
    report.finish()
