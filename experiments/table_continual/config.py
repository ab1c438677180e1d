"""The config of the tables of streams, and its presets."""

import dataclasses
from typing import Annotated

from experiments import harness
from metaopt.errors import UserError
from metaopt.ranges import (
    Checked,
    Count,
    Heads,
    Layers,
    Length,
    Range,
    Rate,
    Seed,
    Seeds,
    Several,
    Steps,
    Width,
)
from metaopt.streams.data_rater import RaterConfig
from metaopt.streams.drift import DriftConfig, LinearDriftConfig
from metaopt.tasks.series import SeriesConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningConfig(Checked):
    """Data with copies and noise put in.

    Attributes:
      clean: Name of the domain that is clean; the longest if not given.
      wrong: Name of the domain that is noise of another language; the second longest if not given.
      passages: Passages of eight sequences that are trained on, copies and noise among them.
      duplicates: Share of them that are copies of a few others, half of them with a few bytes
        changed.
      noise: Share of them that are noise.
      held_out: Sequences that the rater is judged by, which are known to be clean.
      test_sequences: Sequences that the losses are on.
      steps: Training steps.
      batch: Sequences in a step.
      learning_rate: Rate of AdamW.
      rater: The rater.
      num_seeds: Seeds that each row is run with.
    """

    clean: str | None = None
    wrong: str | None = None
    passages: Count = 1200
    duplicates: Annotated[float, Range(0.0, 0.9)] = 0.5
    noise: Annotated[float, Range(0.0, 0.9)] = 0.3
    held_out: Count = 256
    test_sequences: Count = 512
    steps: Steps = 2000
    batch: Count = 32
    learning_rate: Rate = 2e-3
    rater: RaterConfig = dataclasses.field(default_factory=RaterConfig)
    num_seeds: Count = 2

    def __post_init__(self):
        super().__post_init__()
        if self.duplicates + self.noise > 0.95:
            raise UserError("copies and noise are more than 95 % of the data: lower one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftingConfig(Checked):
    """Markov languages and a linear function that drift.

    Attributes:
      drift: How the language of a stream changes.
      linear: How the weights of a linear function drift.
      num_streams: Streams that are reported; one more is tuned on.
      segment: Tokens of a stream in a step, an even number.
      meta_steps: Steps of MAML that the start is trained with.
      rates: Least and largest rate of the learners of languages.
      linear_rates: The same of the linear function.
    """

    drift: DriftConfig = dataclasses.field(default_factory=DriftConfig)
    linear: LinearDriftConfig = dataclasses.field(default_factory=LinearDriftConfig)
    num_streams: Count = 8
    segment: Annotated[int, Range(4, 10**5)] = 32
    meta_steps: Steps = 500
    rates: tuple[Rate, Rate] = (0.01, 1.0)
    linear_rates: tuple[Rate, Rate] = (0.001, 0.3)

    def __post_init__(self):
        super().__post_init__()
        if self.segment % 2 or self.segment >= self.drift.num_tokens:
            raise UserError(
                f"segment {self.segment} must be even, and less than {self.drift.num_tokens} tokens"
            )
        if self.drift.kind != "sudden":
            raise UserError(f"the exact filter is that of sudden drift, not of {self.drift.kind}")
        for low, high in (self.rates, self.linear_rates):
            if low >= high:
                raise UserError(f"rates {low} and {high} must be the least and the largest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolatilityConfig(Checked):
    """Daily prices.

    Attributes:
      series: Days of an episode, and the part that is trained on.
      width: Width of the network.
      meta_steps: Steps of MAML.
      inner_rate: Inner learning rate.
    """

    series: SeriesConfig = dataclasses.field(default_factory=SeriesConfig)
    width: Width = 16
    meta_steps: Steps = 1500
    inner_rate: Rate = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Learners of a stream of domains, and data that are cleaned.

    Attributes:
      folder: Folder of text, one file a domain; Python's own library if not given.
      series: Folder of daily prices, CSV files with the columns date and value; the table of
        volatility is left out if not given.
      num_domains: Domains of the stream, and of the stream that is tuned on.
      visits: Number of times that each domain comes.
      sequences: Sequences of a visit.
      test_sequences: Sequences of each domain that it is judged on.
      batch: Sequences in a step, an even number.
      length: L, bytes in a sequence.
      width: Width of the transformer.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      pretrain_steps: Steps of pretraining on the other domains.
      memory_share: Size of a replay memory as a share of the stream.
      rates: Least and largest rate of the learners.
      num_rates: Rates that are tried of a learner that has no other setting.
      orders: Seeds of the orders in which the domains come.
      seed: Seed of the split of the domains and of the initialisation.
      cleaning: Data with copies and noise put in.
      drifting: Markov languages that drift.
      volatility: The network that predicts prices.
    """

    folder: str | None = None
    series: str | None = None
    num_domains: Count = 12
    visits: Count = 2
    sequences: Count = 600
    test_sequences: Count = 64
    batch: Count = 8
    length: Length = 64
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 2
    pretrain_steps: Steps = 1500
    memory_share: Annotated[float, Range(0.001, 1.0)] = 0.05
    rates: tuple[Rate, Rate] = (1e-4, 1e-2)
    num_rates: Count = 12
    orders: Annotated[Seeds, Several()] = (0, 1, 2)
    seed: Seed = 0
    cleaning: CleaningConfig = dataclasses.field(default_factory=CleaningConfig)
    drifting: DriftingConfig = dataclasses.field(default_factory=DriftingConfig)
    volatility: VolatilityConfig = dataclasses.field(default_factory=VolatilityConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.batch % 2 or self.sequences % self.batch:
            raise UserError(
                f"batch {self.batch} must be even, and sequences {self.sequences} a multiple of it"
            )
        if self.rates[0] >= self.rates[1]:
            raise UserError(f"rates {self.rates} must be the least and the largest, in this order")

    @property
    def capacity(self) -> int:
        """The sequences of a replay memory."""
        whole = self.num_domains * self.visits * self.sequences
        return max(1, int(self.memory_share * whole))


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        small = {"num_domains": 3, "sequences": 8, "test_sequences": 4, "batch": 4, "length": 16}
        tiny = {"width": 8, "num_layers": 1, "pretrain_steps": 3, "num_rates": 2, "orders": (0,)}
        cleaning = dataclasses.replace(
            config.cleaning,
            **{"passages": 40, "held_out": 8, "test_sequences": 8, "steps": 4, "batch": 4},
            rater=RaterConfig(width=8),
            num_seeds=1,
        )
        drifting = DriftingConfig(
            drift=DriftConfig(num_tokens=200, hazard=0.02),
            linear=LinearDriftConfig(num_examples=200),
            num_streams=2,
            meta_steps=3,
        )
        parts = {"cleaning": cleaning, "drifting": drifting}
        parts["volatility"] = VolatilityConfig(meta_steps=3)
        return dataclasses.replace(config, **small, **tiny, **parts)
    if preset == "gpu":
        large = {"width": 512, "num_layers": 6, "num_heads": 8, "length": 256, "batch": 32}
        cleaning = dataclasses.replace(config.cleaning, steps=20_000, batch=128)
        long = {"sequences": 640, "pretrain_steps": 20_000}
        return dataclasses.replace(config, **large, **long, cleaning=cleaning)
    return config
