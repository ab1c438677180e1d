"""The config of `table_self_improvement` and its presets."""

import dataclasses
from typing import Annotated

from experiments import harness
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

PartOfRun = Annotated[float, Range(1e-6, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel(Checked):
    """A byte transformer, trained plainly on sequences of all domains of a text.

    Attributes:
      width: Width of the model.
      num_layers: Number of layers of the model.
      num_heads: Number of heads of the model.
      length: Bytes in a sequence.
      num_examples: Sequences in a run.
      batches: Batch sizes that tuning chooses from.
      optimizers: Optimisers that the runs with a memory choose from; all begin with Adam.
      num_held_out: Sequences that changes are judged by, as many again for tuning.
      num_test: Sequences that are reported on.
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
      num_examples: Tasks in a run.
      tasks_per_step: Tasks of a meta-step.
      num_inner_steps: K, the number of inner steps.
      num_held_out: Tasks that changes are judged by.
      num_test: Tasks that are reported on.
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
      path: npz file with x_train, y_train, x_test and y_test; without it the row is a dash.
      filters: Channels of each layer.
      batch_size: Images of a step.
      num_epochs: Epochs of a run.
      num_train: Images that are trained on; the last 1000 of the training set are held out.
      num_seeds: Seeds of the row; each has its own tuned run.
      start_rate: Rate that the row starts from.
      rates: Rates tried with a fixed rate and with a cosine.
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
class Faults(Checked):
    """Runs of a bigram table of bytes that something makes slow, wait, too large or stall.

    Attributes:
      length: Bytes in a sequence of a step whose time is worth an alarm.
      batch_size: Sequences of such a step.
      num_steps: Steps of a run of these; a quarter of them come before the fault.
      stalled_batch: Sequences of a step of the run that stalls.
      stalled_steps: Steps of that run.
    """

    length: Length = 256
    batch_size: Count = 256
    num_steps: Steps = 200
    stalled_batch: Count = 32
    stalled_steps: Steps = 1500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains(Checked):
    """The language model on domains with unequal parts of the data.

    Attributes:
      num_examples: Sequences in a run.
      num_held_out: Sequences of each domain that changes are judged by.
      num_test: Sequences of each domain that are reported on.
    """

    num_examples: Steps = 24_000
    num_held_out: Count = 16
    num_test: Count = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.RunConfig):
    """Runs with bad starts under the closed loop, against tuned and untreated ones.

    Attributes:
      rows: Names of the rows to run; all if none.
      folder: Folder of text, one file a domain; Python's own sources without it.
      num_trials: Number of trials of Optuna, for the run that others are compared with.
      seed: Seed of everything.
      lm: The language model.
      markov: The meta-learning problem.
      mnist: The image classifier.
      faults: Disturbed runs.
      domains: Domains with unequal parts.
      loop: The closed loop.
      second_runs: Lengths of a run that remembers a first one, as shares of its length. The
        first of them that reaches its loss is reported.
      population: Members of the baseline.
      resources_seconds: Budget of the search through execution options of a step.
      resources_rounds: Timed calls with each of them, for the best.
    """

    rows: tuple[str, ...] = ()
    folder: str | None = None
    num_trials: Count = 32
    seed: Seed = 0
    lm: LanguageModel = dataclasses.field(default_factory=LanguageModel)
    markov: Markov = dataclasses.field(default_factory=Markov)
    mnist: Mnist = dataclasses.field(default_factory=Mnist)
    faults: Faults = dataclasses.field(default_factory=Faults)
    domains: Domains = dataclasses.field(default_factory=Domains)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    second_runs: Annotated[tuple[PartOfRun, ...], Several()] = (0.6, 0.7, 0.8, 0.9, 1.0)
    population: Count = 4
    resources_seconds: Seconds = 120.0
    resources_rounds: Count = 24

    def __post_init__(self):
        super().__post_init__()
        if "adam" not in self.lm.optimizers:
            raise UserError(f"lm.optimizers {self.lm.optimizers} must have adam among them")


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    if preset == "gpu":
        return Config(
            preset="gpu",
            lm=LanguageModel(
                width=512, num_layers=6, num_heads=8, length=256, num_examples=1_000_000
            ),
            markov=Markov(num_examples=320_000, tasks_per_step=64),
            mnist=Mnist(filters=64, num_epochs=10, num_train=55_000),
            domains=Domains(num_examples=1_000_000),
        )
    if preset == "smoke":
        return Config(
            preset="smoke",
            num_trials=2,
            lm=LanguageModel(
                width=8, num_layers=1, length=8, num_examples=640, batches=(16,), num_test=64
            ),
            markov=Markov(num_examples=64, tasks_per_step=8, num_held_out=16, num_test=32),
            mnist=Mnist(filters=2, num_epochs=1, num_train=640, num_seeds=1, rates=(0.1,)),
            faults=Faults(length=8, batch_size=8, num_steps=16, stalled_batch=8, stalled_steps=16),
            domains=Domains(num_examples=640, num_held_out=2, num_test=2),
            loop=LoopConfig(phases=(0.0,), shares=(0.3,), assess_every=0.5),
            second_runs=(0.7, 1.0),
            population=2,
            resources_seconds=10.0,
            resources_rounds=1,
        )
    return Config()
