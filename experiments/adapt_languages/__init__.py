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
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.cli import command_line
from metaopt.comparison import Comparison, Problem, Row, check_settings, select
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.self_improvement.drop_in import trainer
from metaopt.tasks import text
from metaopt.tasks.markov import MarkovConfig, bayes_loss, markov
from metaopt.training.runs import open_run
from metaopt.types import Learner, Model, TaskFamily


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


def make_family(config: Config) -> TaskFamily:
    """The task family."""
    episode = {name: getattr(config, name) for name in ("num_support", "num_query", "length")}
    if config.folder is not None and config.tasks != "text":
        raise UserError(f"--folder is for --tasks text, not {config.tasks}: leave one of them out")
    if config.tasks == "markov":
        return markov(markov_config(config))
    if config.tasks == "text" and config.folder is None:
        raise UserError("--tasks text needs --folder, with one file a domain")
    if config.tasks not in ("text", "stdlib") and not config.tasks.startswith("tfds:"):
        raise UserError(f"unknown tasks {config.tasks!r}: markov, text, stdlib or tfds:NAME")
    source = config.folder if config.tasks == "text" else config.tasks
    return text.text(
        text.TextConfig(
            source=str(source),
            num_valid_domains=config.num_valid_domains,
            num_test_domains=config.num_test_domains,
            split_seed=config.split_seed,
            **episode,
        )
    )


def markov_config(config: Config) -> MarkovConfig:
    """The Markov languages of a config."""
    names = [field.name for field in dataclasses.fields(MarkovConfig)]
    return MarkovConfig(**{name: getattr(config, name) for name in names})


def make_model(config: Config, vocab_size: int) -> Model:
    """The model of a config."""
    if config.model == "bigram":
        return models.bigram(vocab_size)
    if config.model == "transformer":
        return models.transformer(
            models.TransformerConfig(
                vocab_size=vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                compute_dtype="bfloat16" if config.preset == "gpu" else "float32",
            )
        )
    return models.recurrent(vocab_size, config.width, config.model, config.num_layers)


def make_rows(config: Config, model: Model) -> list[Row]:
    """All rows of the table, the baseline of the differences second."""
    optimizer, steps = INNER_OPTIMIZERS[config.inner_optimizer], config.inner.num_steps
    maml, reverse = learners.maml(optimizer), meta_gradients.reverse

    def row(name: str, learner: Learner, estimator) -> Row:
        return Row(name, learner, estimator, optimizer)

    rows = [
        row("random init", maml, None),
        row("joint pretraining", maml, meta_gradients.joint),
        row("Reptile", maml, meta_gradients.reptile),
        row("FOMAML", maml, meta_gradients.first_order),
        row("ANIL", learners.anil(model, optimizer), reverse),
        row("MAML", maml, reverse),
        row("per-layer-per-step", learners.per_layer_per_step(optimizer, num_steps=steps), reverse),
        row("Meta-SGD", learners.meta_sgd(optimizer, num_steps=steps), reverse),
    ]
    if config.tasks == "markov" and config.inner_optimizer == "sgd":
        adagrad = INNER_OPTIMIZERS["adagrad"]
        learner = learners.meta_sgd(adagrad, num_steps=steps)
        rows.append(Row("Meta-SGD on Adagrad", learner, reverse, adagrad))
    return select(rows, config.rows)


def run(config: Config) -> None:
    """Trains and evaluates the rows, and writes table, figure and samples."""
    parallel.set_up_backend()
    model = make_model(config, config.vocab_size if config.tasks == "markov" else text.VOCAB_SIZE)
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
