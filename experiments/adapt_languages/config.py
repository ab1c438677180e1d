"""The config of the table and its presets."""

import dataclasses
from typing import Annotated

import numpy as np

from experiments import harness
from metaopt.comparison import ComparisonConfig
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.languages import (
    BASELINE,
    USUAL,
    LanguageConfig,
    is_cipher,
    is_markov,
    is_text,
    make_codec,
)
from metaopt.losses import NATS_TO_BITS
from metaopt.models import AdapterConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Seed, Several, Steps
from metaopt.tasks.tokenizers import bytes_of
from metaopt.types import Episode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig, harness.TrainedConfig):
    """Meta-learn a language model and adapt it to languages that it has never seen.

    Attributes:
      seeds: Seeds that every row is trained with, once each, and cells are means over them; if
        none, ``comparison.seed`` alone.
      outer: The outer optimiser.
      comparison: Length of the training, sizes, and what it is judged on.
      plain_steps: Steps of training on the plain text of ciphers of the model that they are
        compared with.
      then_transformer: After the table, unless its rows were chosen, joint pretraining and MAML of
        a transformer on symmetric Markov languages, as a run of its own.
    """

    seeds: Annotated[tuple[Seed, ...], Several(0, different=True)] = ()
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    comparison: ComparisonConfig = dataclasses.field(default_factory=ComparisonConfig)
    plain_steps: Steps = 3000
    then_transformer: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_folds and (self.seeds or self.tokenizer.startswith("bpe:")):
            raise UserError(
                "num_folds takes one seed, and bytes or a tokenizer from a file: one that is "
                "trained would have seen what other folds hold out"
            )
        if self.num_folds == 1 or (self.num_folds and not is_text(self.tasks)):
            raise UserError("num_folds is for tasks of text, and two at least")


MARKOV = Config(
    rows=(
        "random init",
        BASELINE,
        "MAML",
        "per-layer-per-step",
        "Meta-SGD",
        "Meta-SGD on Adagrad",
    ),
    outer=OuterConfig(learning_rate=0.03, rates_learning_rate=0.03, warmup_steps=10),
    comparison=ComparisonConfig(
        tasks_per_step=64,
        meta_steps=1000,
        eval_every=100,
        inner_rates=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
        valid_episodes=512,
        test_episodes=2000,
        checkpoint_every=500,
    ),
)
MARKOV_NETWORK = Config(
    rows=(BASELINE, "MAML"),
    width=32,
    num_layers=1,
    inner=InnerLoop(unroll=False),
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
PRETRAINED = Config(
    rows=(USUAL, BASELINE, "FOMAML", "MAML", "per-layer-per-step"),
    adapter=AdapterConfig(blocks=6),
    num_support=8,
    num_query=2,
    length=128,
    inner_optimizer="adam",
    inner=InnerLoop(num_steps=4, batching="split", query_loss="mean", unroll=False),
    outer=OuterConfig(learning_rate=1e-3, rates_learning_rate=0.03, warmup_steps=10),
    comparison=ComparisonConfig(
        tasks_per_step=2,
        tasks_at_a_time=1,
        meta_steps=60,
        max_inner_steps=5,
        inner_rates=(3e-4, 1e-3, 3e-3),
        checkpoint_every=20,
        valid_episodes=8,
        test_episodes=20,
    ),
)
CIPHERS = Config(
    rows=(BASELINE, "MAML", "Meta-SGD"),
    num_support=15,
    num_query=8,
    length=68,
    num_valid_domains=3,
    num_test_domains=6,
    inner=InnerLoop(batching="split"),
    outer=OuterConfig(learning_rate=3e-3, rates_learning_rate=0.03, warmup_steps=20),
    comparison=ComparisonConfig(
        tasks_per_step=8,
        tasks_at_a_time=1,
        meta_steps=3000,
        max_inner_steps=5,
        inner_rates=(0.03, 0.1, 0.3, 1.0),
        eval_every=250,
        checkpoint_every=250,
        valid_episodes=64,
        test_episodes=256,
    ),
)


def presets(preset: str = "cpu", tasks: str = "markov", model: str | None = None) -> Config:
    """The defaults for ``--preset``, ``--tasks`` and ``--model``."""
    model = model or ("bigram" if is_markov(tasks) else "transformer")
    if is_markov(tasks):
        base = MARKOV if model == "bigram" else MARKOV_NETWORK
    elif model == "pretrained":
        base = PRETRAINED
    else:
        base = CIPHERS if is_cipher(tasks) else TEXT
    then = (tasks, model) == ("markov", "bigram")
    base = dataclasses.replace(
        base,
        preset=preset,  # type: ignore[arg-type]
        tasks=tasks,
        model=model,
        then_transformer=then,
    )
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
        plain_steps=4,
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
    if is_markov(config.tasks) or config.model == "pretrained":
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


def unit_of(config: Config) -> str:
    """The unit of the numbers of a run."""
    if is_text(config.tasks):
        return "bits/byte"
    return "nats/symbol" if is_cipher(config.tasks) else "nats/token"


def scales(config: Config, episodes: Episode) -> np.ndarray:
    """What nats a token of each episode's query are multiplied by for the unit, ``[E]``.

    Text is measured in bits a byte: by the bytes that the tokens of an episode stand for.
    """
    if not is_text(config.tasks):
        return np.ones(len(episodes.task))
    targets = np.asarray(episodes.query.targets)
    num_bytes = bytes_of(make_codec(config))[targets].sum(axis=(1, 2))
    return NATS_TO_BITS * targets[0].size / num_bytes
