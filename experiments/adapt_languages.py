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
from collections.abc import Mapping
from typing import Literal, get_args

import optax

from experiments import command_line
from experiments.adapt_languages_report import Report
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.comparison import Comparison, ComparisonConfig, Problem, Row, select
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, check_split
from metaopt.outer_step import OuterConfig
from metaopt.runs import as_json, open_run
from metaopt.tasks import text
from metaopt.tasks.markov import MarkovConfig, bayes_loss, markov
from metaopt.types import Learner, Model, TaskFamily

INNER_OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "rmsprop": optax.rmsprop,
    "adagrad": functools.partial(optax.adagrad, initial_accumulator_value=1e-4),
}


ModelName = Literal["bigram", "rnn", "gru", "lstm", "transformer"]
CHOSEN_BY = ("preset", "tasks", "model")
"""The flags that the defaults of all others depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Meta-learn a language model and adapt it to languages that it has never seen.

    Attributes:
      preset: smoke (seconds), cpu or gpu; the defaults of all the rest follow it.
      tasks: markov, text (with --folder), stdlib or tfds:NAME.
      folder: of text, one file a domain.
      model: bigram, rnn, gru, lstm or transformer.
      width: of the recurrent and transformer models.
      num_layers: of the recurrent and transformer models.
      num_heads: of the transformer.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, tokens in a sequence.
      vocab_size: of the Markov languages.
      order: of the Markov languages.
      concentration: of the Dirichlet prior of the Markov languages.
      num_valid_domains: of text, held out for choosing rates and checkpoints.
      num_test_domains: of text, held out for the table.
      split_seed: decides which domains are held out.
      inner_optimizer: what steps in the inner loop.
      rows: names of the rows to run; all if none.
      inner: the inner loop.
      outer: the outer optimiser.
      comparison: how long, on how much, judged on what.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    tasks: str = "markov"
    folder: str | None = None
    model: ModelName = "bigram"
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_support: int = 4
    num_query: int = 8
    length: int = 32
    vocab_size: int = 16
    order: int = 1
    concentration: float = 0.3
    num_valid_domains: int = 8
    num_test_domains: int = 10
    split_seed: int = 0
    inner_optimizer: Literal["sgd", "momentum", "adam", "rmsprop", "adagrad"] = "sgd"
    rows: tuple[str, ...] = ()
    inner: InnerLoop = dataclasses.field(default_factory=InnerLoop)
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    comparison: ComparisonConfig = dataclasses.field(default_factory=ComparisonConfig)
    root: str = "runs"
    run_dir: str | None = None


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


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``, ``--tasks`` and ``--model``."""
    name, tasks = flags.get("preset", "cpu"), flags.get("tasks", "markov")
    if name not in ("smoke", "cpu", "gpu"):
        raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
    base = MARKOV if tasks == "markov" else TEXT
    model = flags.get("model", "bigram" if tasks == "markov" else "transformer")
    if model not in get_args(ModelName):
        raise UserError(f"unknown model {model!r}: choose one of {', '.join(get_args(ModelName))}")
    if model != "bigram" and tasks == "markov":  # rates of tables of logits suit no network
        base = dataclasses.replace(
            base,
            outer=TEXT.outer,
            comparison=dataclasses.replace(
                base.comparison,
                tasks_per_step=16,
                pretrain_steps=500,
                inner_rates=(0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0),
            ),
        )
    base = dataclasses.replace(base, preset=name, tasks=tasks, model=model)  # type: ignore[arg-type]
    return {"smoke": _smoke, "cpu": lambda config: config, "gpu": _gpu}[name](base)


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
    sizes = {"width": 512, "num_layers": 6, "num_heads": 8, "length": 256}
    if config.tasks == "markov":
        sizes = {}
    return dataclasses.replace(config, comparison=comparison, **sizes)


def make_family(config: Config) -> tuple[TaskFamily, int]:
    """The task family and its vocabulary."""
    episode = {name: getattr(config, name) for name in ("num_support", "num_query", "length")}
    if config.folder is not None and config.tasks != "text":
        raise UserError(f"--folder is for --tasks text, not {config.tasks}: leave one of them out")
    if config.tasks == "markov":
        return markov(markov_config(config)), config.vocab_size
    if config.tasks == "text" and config.folder is None:
        raise UserError("--tasks text needs --folder, with one file a domain")
    if config.tasks not in ("text", "stdlib") and not config.tasks.startswith("tfds:"):
        raise UserError(f"unknown tasks {config.tasks!r}: markov, text, stdlib or tfds:NAME")
    source = config.folder if config.tasks == "text" else config.tasks
    family = text.text(
        text.TextConfig(
            source=str(source),
            num_valid_domains=config.num_valid_domains,
            num_test_domains=config.num_test_domains,
            split_seed=config.split_seed,
            **episode,
        )
    )
    return family, text.VOCAB_SIZE


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
    if config.inner.batching == "split":
        check_split(config.num_support, config.inner.num_steps)
    family, vocab_size = make_family(config)
    model = make_model(config, vocab_size)
    tokens = (config.num_support + config.num_query) * config.length
    problem = Problem(family, model, losses.next_token(model), tokens)
    rows = make_rows(config, model)
    comparison = Comparison(problem, config.inner, config.outer, config.comparison)
    place = open_run(
        config.root, "adapt_languages", config.preset, as_saved(config), run_dir=config.run_dir
    )
    command = command_line.command("adapt_languages", config, preset, CHOSEN_BY)
    report = Report(place, comparison, tasks=config.tasks, preset=config.preset, command=command)
    if config.tasks == "markov":
        report.add_limits(functools.partial(bayes_loss, markov_config(config)))
    start = comparison.pretrain(place.directory)
    for row in rows:
        report.add(comparison.run(row, start, place.directory))
    report.finish()


def as_saved(config: Config) -> dict:
    """What decides the results: all but where the run is written."""
    return {k: v for k, v in as_json(config).items() if k not in ("root", "run_dir")}


if __name__ == "__main__":
    command_line.main("adapt_languages", run, Config, preset, CHOSEN_BY, __doc__ or "")
