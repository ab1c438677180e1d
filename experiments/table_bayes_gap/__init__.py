"""The distance to the Bayes-optimal learner on Markov languages whose prior is known.

A language of order m is a table of Dirichlet draws, so the loss of the best possible
learner is exact: its posterior predictive, from the support alone or from the support and
the query so far. A gap is the query loss of a learner after K inner steps minus the limit that
reads what its model reads, paired episode by episode, in nats a token: tables of m-grams are in
`bayes_gap`, against the support alone; networks, which read the query so far too, are in
`bayes_gap_prefix`, against support and prefix. Settings vary one factor of a base at a time:
order, alphabet, Dirichlet concentration, support. The learner that counts is the limit itself,
at a gap of 0.

Learners: Finn et al., 2017 (MAML, FOMAML); Li et al., 2017 (Meta-SGD, here with rates for
each step); Antoniou et al., 2019 (rates per layer and step). Rates that are not learned
are tuned on validation languages, for every number of steps apart. Models: the table of
all m-grams, which holds the true language; the bigram table, which above order 1 cannot,
so that its gap is mostly what it fails to represent; a GRU and a transformer.

    python -m experiments.table_bayes_gap                     # under 15 minutes on two cores
    python -m experiments.table_bayes_gap --preset smoke      # tiny, to see that all works
    python -m experiments.table_bayes_gap --models "n-gram table"

Expect on the base, 16 symbols at order 1: 0.028 from gradient descent at the best rate,
however its start is learned, and below 0.004 from rates learned on top of Adagrad, whose
steps shrink with what was seen of a symbol, as a posterior does. On order 2 with 4 symbols:
0.027 (MAML), 0.010 (Meta-SGD), 0.006 (on Adagrad). The transformer, trained for so short a time,
is 0.048 from its limit on the base, by MAML, and 0.47 by joint pretraining. `curves.png` shows
the gap of the base against inner steps and, on validation languages, against meta-steps, and of
all settings. A dash was not run.
"""

import functools

from experiments.table_bayes_gap.config import (
    CHOSEN_BY,
    Config,
    ModelName,
    Setting,
    Training,
    preset,
)
from experiments.table_bayes_gap.report import Report, Study
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.cli import command_line
from metaopt.comparison import Comparison, Problem, Row, select
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.self_improvement.drop_in import trainer
from metaopt.tasks.markov import MarkovConfig, markov
from metaopt.training.runs import open_run, slug
from metaopt.types import Model

TABLE_MODELS = ("n-gram table", "bigram table")
make_family = functools.cache(markov)  # models that share a setting share its compiled sampler


def make_model(config: Config, name: ModelName, setting: Setting) -> Model:
    """A model for the languages of a setting."""
    if name in TABLE_MODELS:
        return models.ngram(setting.symbols, setting.order if name == "n-gram table" else 1)
    if name == "GRU":
        return models.recurrent(setting.symbols, config.width, "gru", config.num_layers)
    return models.transformer(
        models.TransformerConfig(
            vocab_size=setting.symbols,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )
    )


def make_rows(config: Config, name: ModelName) -> list[Row]:
    """The learners of a model that the config asks for."""
    steps, adagrad = config.inner.num_steps, INNER_OPTIMIZERS["adagrad"]
    maml, reverse = learners.maml(), meta_gradients.reverse
    on_adagrad = learners.meta_sgd(adagrad, num_steps=steps)
    best = Row("Meta-SGD on Adagrad", on_adagrad, reverse, adagrad)
    if name == "bigram table":
        return [best]
    rows = [
        Row("random init", maml, None),
        Row("joint pretraining", maml, meta_gradients.joint),
        Row("FOMAML", maml, meta_gradients.first_order),
        Row("MAML", maml, reverse),
        Row("per-layer-per-step", learners.per_layer_per_step(num_steps=steps), reverse),
        Row("Meta-SGD", learners.meta_sgd(num_steps=steps), reverse),
        best,
    ]
    return select(rows, training_of(config, name).learners)


def make_problem(config: Config, name: ModelName, setting: Setting) -> tuple[MarkovConfig, Problem]:
    """A model on the languages of a setting; what is wrong with either is found here."""
    languages = MarkovConfig(
        order=setting.order,
        vocab_size=setting.symbols,
        concentration=setting.concentration,
        num_support=setting.sequences,
        num_query=config.num_query,
        length=config.length,
    )
    model = make_model(config, name, setting)
    rows, episodes = make_rows(config, name), training_of(config, name).comparison.most_episodes
    feasible.check_languages(languages, episodes)
    feasible.check(
        [(row.learner, row.estimator, config.inner) for row in rows],
        model.init,
        losses.next_token(model),
        feasible.tokens(setting.sequences, config.length),
        feasible.tokens(config.num_query, config.length),
        episodes,
    )
    return languages, Problem(make_family(languages), model, losses.next_token(model))


def make_studies(config: Config) -> list[Study]:
    """Every model on each of its settings, in the order of the table.

    Raises:
      UserError: there are none.
    """
    chosen: list[tuple[ModelName, Setting]] = [
        (name, Setting(*setting))
        for name in config.models
        for setting in training_of(config, name).settings
        if name != "bigram table" or setting[0] > 1
    ]
    if not chosen:
        raise UserError(
            f"there is nothing to run for {', '.join(config.models)}: give settings, and the "
            "bigram table one of an order above 1"
        )
    # All of this before the first comparison: that compiles, and what is wrong is said first.
    rows = {name: make_rows(config, name) for name in config.models}
    problems = [make_problem(config, name, setting) for name, setting in chosen]
    return [
        Study(
            setting.name(config.length),
            name,
            languages,
            _compare(config, name, problem),
            rows[name],
        )
        for (name, setting), (languages, problem) in zip(chosen, problems, strict=True)
    ]


def training_of(config: Config, name: ModelName) -> Training:
    """How and where a model is trained."""
    return config.tables if name in TABLE_MODELS else config.networks


def _compare(config: Config, name: ModelName, problem: Problem) -> Comparison:
    training = training_of(config, name)
    return Comparison(
        problem, config.inner, training.outer, training.comparison, trainer(config.improve)
    )


def run(config: Config) -> None:
    """Trains and evaluates the learners of every model on every setting; writes the tables."""
    parallel.set_up_backend()
    studies = make_studies(config)
    place = open_run(
        config.root,
        "table_bayes_gap",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    command = command_line.command("table_bayes_gap", config, preset, CHOSEN_BY)
    report = Report(place, config.preset, command)
    for study in studies:
        directory = place.directory / slug(f"{study.model} {study.setting}")
        directory.mkdir(exist_ok=True)
        report.begin(study, directory)
        start = study.comparison.pretrain(directory)
        for row in study.rows:
            report.add(study.comparison.run(row, start, directory))
    report.finish()
