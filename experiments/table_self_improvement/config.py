"""The config of `table_self_improvement` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from metaopt.errors import UserError
from metaopt.optimizers.outer import Optimizer
from metaopt.ranges import (
    Checked,
    Count,
    Heads,
    InnerSteps,
    Layers,
    Length,
    Range,
    Rate,
    Seconds,
    Seed,
    Several,
    Steps,
    Width,
)
from metaopt.self_improvement.loop import LoopConfig

CHOSEN_BY = ("preset",)
"""The flag that the defaults of all others depend on."""
PartOfRun = Annotated[float, Range(1e-6, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel(Checked):
    """A byte transformer, trained plainly on sequences of all domains of a text.

    Attributes:
      width: of the model.
      num_layers: of the model.
      num_heads: of the model.
      length: bytes in a sequence.
      num_examples: sequences in a run.
      batches: batch sizes that tuning chooses from.
      optimizers: that the runs with a memory choose from, Adam among them, which all begin with.
      num_held_out: sequences that changes are judged by, as many again for tuning.
      num_test: sequences that are reported on.
    """

    width: Width = 32
    num_layers: Layers = 2
    num_heads: Heads = 2
    length: Length = 32
    num_examples: Steps = 24_000
    batches: Annotated[tuple[Count, ...], Several(different=True)] = (16, 32, 64)
    optimizers: tuple[Optimizer, ...] = ("adam", "muon", "lion", "rmsprop")
    num_held_out: Count = 128
    num_test: Count = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Markov(Checked):
    """MAML of a bigram table on random Markov languages.

    Attributes:
      num_examples: tasks in a run.
      tasks_per_step: the meta-batch.
      num_inner_steps: K.
      num_held_out: tasks that changes are judged by.
      num_test: tasks that are reported on.
    """

    num_examples: Steps = 9600
    tasks_per_step: Count = 32
    num_inner_steps: InnerSteps = 5
    num_held_out: Count = 256
    num_test: Count = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mnist(Checked):
    """A convolutional network on MNIST, by stochastic gradient descent.

    Attributes:
      path: a npz file with x_train, y_train, x_test and y_test; without it the row is a dash.
      filters: channels of each layer.
      batch_size: of a step.
      num_epochs: of a run.
      num_train: images that are trained on; the last 1000 of the training set are held out.
      num_seeds: of the row; each has its own tuned run.
      start_rate: where the row starts from.
      rates: tried with a fixed rate and with a cosine.
    """

    path: str | None = None
    filters: Width = 8
    batch_size: Count = 64
    num_epochs: Count = 4
    num_train: Count = 12_000
    num_seeds: Count = 5
    start_rate: Rate = 0.003
    rates: Annotated[tuple[Rate, ...], Several()] = (0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Runs with bad starts under the closed loop, against tuned and untreated ones.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      rows: names of the rows to run; all if none.
      folder: of text, one file a domain; Python's own sources without it.
      num_trials: of Optuna, for what a run is compared with.
      seed: of everything.
      lm: the language model.
      markov: the meta-learning problem.
      mnist: the image classifier.
      loop: the closed loop.
      second_runs: lengths of a run that remembers a first one, as shares of it, of which the
        first that reaches its loss is reported.
      population: members of the baseline.
      resources_seconds: budget of the search through ways to compute a step.
      resources_rounds: timed calls of every way, for the best.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    rows: tuple[str, ...] = ()
    folder: str | None = None
    num_trials: Count = 32
    seed: Seed = 0
    lm: LanguageModel = dataclasses.field(default_factory=LanguageModel)
    markov: Markov = dataclasses.field(default_factory=Markov)
    mnist: Mnist = dataclasses.field(default_factory=Mnist)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    second_runs: Annotated[tuple[PartOfRun, ...], Several()] = (0.6, 0.7, 0.8, 0.9, 1.0)
    population: Count = 4
    resources_seconds: Seconds = 120.0
    resources_rounds: Count = 24
    root: str = "runs"
    run_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if "adam" not in self.lm.optimizers:
            raise UserError(f"lm.optimizers {self.lm.optimizers} must have adam among them")


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name = flags.get("preset", "cpu")
    if name == "cpu":
        return Config()
    if name == "gpu":
        return Config(
            preset="gpu",
            lm=LanguageModel(
                width=512, num_layers=6, num_heads=8, length=256, num_examples=1_000_000
            ),
            markov=Markov(num_examples=320_000, tasks_per_step=64),
            mnist=Mnist(filters=64, num_epochs=10, num_train=55_000),
        )
    if name == "smoke":
        return Config(
            preset="smoke",
            num_trials=2,
            lm=LanguageModel(
                width=8, num_layers=1, length=8, num_examples=640, batches=(16,), num_test=64
            ),
            markov=Markov(num_examples=64, tasks_per_step=8, num_held_out=16, num_test=32),
            mnist=Mnist(filters=2, num_epochs=1, num_train=640, num_seeds=1, rates=(0.1,)),
            loop=LoopConfig(phases=(0.0,), shares=(0.3,), assess_every=0.5),
            second_runs=(0.7, 1.0),
            population=2,
            resources_seconds=10.0,
            resources_rounds=1,
        )
    raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
