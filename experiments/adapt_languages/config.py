"""The config of `adapt_languages` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from metaopt.comparison import ComparisonConfig
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Seed, Several

CHOSEN_BY = ("preset", "tasks", "model")
"""The flags that the defaults of all others depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig):
    """Meta-learn a language model and adapt it to languages that it has never seen.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      seeds: Seeds that every row is trained with, once each, and cells are means over them; if
        none, ``comparison.seed`` alone.
      outer: The outer optimiser.
      comparison: Length of the training, sizes, and what it is judged on.
      improve: Train under the closed loop, which changes rates where that helps.
      root: Directory where runs are written.
      run_dir: Directory of this run instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    seeds: Annotated[tuple[Seed, ...], Several(0, different=True)] = ()
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    comparison: ComparisonConfig = dataclasses.field(default_factory=ComparisonConfig)
    improve: bool = False
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
