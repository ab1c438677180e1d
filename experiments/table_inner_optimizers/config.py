"""The config of `table_inner_optimizers` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from metaopt.comparison import ComparisonConfig
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.inner import OptimizerName
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Checked, Count, Heads, Layers, Length, Seed, Several, Width

CHOSEN_BY = ("preset",)
"""The flags that the defaults of all others depend on."""

LearnerName = Literal["joint", "fomaml", "maml", "meta_sgd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Inner optimisers beside one another, for several learners.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      tasks: stdlib (the source of Python's library), text (with --folder) or tfds:NAME.
      folder: of text, one file a domain.
      optimizers: the rows; the others are compared with sgd, where it is among them.
      learners: the columns.
      width: of the transformer.
      num_layers: of the transformer.
      num_heads: of the transformer.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, bytes in a sequence.
      num_valid_domains: held out for choosing rates.
      num_test_domains: held out for the table.
      split_seed: decides which domains are held out.
      inner: the inner loop; the table is the loss after its number of steps.
      outer: the outer optimiser, of the joint pretraining too.
      comparison: how long, on how much, judged on what.
      improve: train under the closed loop, which changes rates where that helps.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    tasks: str = "stdlib"
    folder: str | None = None
    optimizers: Annotated[tuple[OptimizerName, ...], Several(different=True)] = (
        "sgd",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam",
        "lars",
        "lion",
    )
    learners: Annotated[tuple[LearnerName, ...], Several(different=True)] = (
        "joint",
        "fomaml",
        "maml",
        "meta_sgd",
    )
    width: Width = 32
    num_layers: Layers = 2
    num_heads: Heads = 2
    num_support: Count = 4
    num_query: Count = 4
    length: Length = 64
    num_valid_domains: Count = 8
    num_test_domains: Count = 10
    split_seed: Seed = 0
    inner: InnerLoop = dataclasses.field(
        # A scan: of so many programs, compiling them takes longer than what unrolling saves.
        default_factory=lambda: InnerLoop(query_loss="mean", unroll=False)
    )
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(
            learning_rate=2e-3, rates_learning_rate=0.03, warmup_steps=20
        )
    )
    comparison: ComparisonConfig = dataclasses.field(
        default_factory=lambda: ComparisonConfig(
            tasks_per_step=4,
            tasks_at_a_time=1,
            pretrain_steps=2000,
            meta_steps=150,
            inner_rates=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
            checkpoint_every=500,
            valid_episodes=40,
            test_episodes=600,
        )
    )
    improve: bool = False
    root: str = "runs"
    run_dir: str | None = None


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name, config = flags.get("preset", "cpu"), Config()
    if name == "cpu":
        return config
    if name == "smoke":
        return _smoke(config)
    if name == "gpu":
        return _gpu(config)
    raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")


def _smoke(config: Config) -> Config:
    return dataclasses.replace(
        config,
        preset="smoke",
        optimizers=("sgd", "lars"),
        learners=("joint", "maml"),
        width=8,
        num_layers=1,
        length=16,
        num_valid_domains=2,
        num_test_domains=3,
        comparison=dataclasses.replace(
            config.comparison,
            pretrain_steps=4,
            meta_steps=4,
            inner_rates=(0.01, 0.1),
            valid_episodes=4,
            test_episodes=12,
        ),
    )


def _gpu(config: Config) -> Config:
    """A larger model, ten times as many meta-steps, and meta-batches of 32 tasks."""
    return dataclasses.replace(
        config,
        preset="gpu",
        optimizers=(*config.optimizers, "lamb"),
        width=512,
        num_layers=6,
        num_heads=8,
        num_support=8,
        num_query=8,
        length=256,
        inner=dataclasses.replace(config.inner, remat=True),
        comparison=dataclasses.replace(
            config.comparison,
            tasks_per_step=32,
            tasks_at_a_time=4,
            pretrain_steps=20_000,
            meta_steps=1500,
            valid_episodes=80,
        ),
    )
