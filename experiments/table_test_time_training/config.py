"""The config of the tables of test-time training, and its presets."""

import dataclasses
from typing import Annotated

from experiments import harness
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models import AdapterConfig, TransformerConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    Heads,
    Layers,
    Length,
    Range,
    Rate,
    Seed,
    Several,
    Share,
    Steps,
    Width,
)

Rates = Annotated[tuple[Rate, ...], Several()]
INNER = InnerLoop(batching="split", unroll=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchingConfig(Checked):
    """Markov languages that switch without notice.

    Attributes:
      vocab_size: Symbols of a language.
      hazard: Chance of another language before each symbol.
      concentration: Concentration of the prior of its rows.
      window: Symbols in reach of each layer of the model.
      chunk: Symbols that are predicted, and then learned from.
      test_tokens: Symbols of a stream that is reported.
    """

    vocab_size: Annotated[int, Range(2, 256)] = 16
    hazard: Annotated[float, Range(0.0, 0.5)] = 1e-3
    concentration: Annotated[float, Range(0.01, 100.0)] = 0.3
    window: Length = 16
    chunk: Length = 16
    test_tokens: Steps = 8192

    def __post_init__(self):
        super().__post_init__()
        if self.window % self.chunk or self.test_tokens % self.window:
            raise UserError(
                f"switching: window {self.window} must be a multiple of chunk {self.chunk}, and "
                f"test_tokens {self.test_tokens} one of the window"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Models that learn from what they read, with and without meta-learning for it.

    Attributes:
      books: Folder of books, one a file; without it the table of books is left out.
      parts: Which sources are read: books, code (Python's own library) and switching.
      width: D of the model.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      window: W, bytes in reach of each layer.
      chunk: B, bytes that are predicted, and then learned from.
      num_chunks: N, chunks of a document that is trained on, an even number.
      full_window: Window of the row of full attention, up to the length of a training document.
      fast: Which weights learn while reading, of the rows of test-time training.
      num_test: Documents that are reported.
      num_valid: Documents that rates are chosen on.
      test_bytes: Bytes of a document that is reported, from its begin.
      valid_bytes: Bytes of a document that rates are chosen on.
      tasks_per_step: Documents in a step of training.
      tasks_at_a_time: Of them computed together on a device; 0 for all, by vmap.
      pretrain_steps: Steps of next-token prediction that all rows start from.
      meta_steps: Steps of meta-training to the second order after that; the other rows take as many
        as the same number of operations pays for.
      pretrain: Outer optimizer of next-token prediction.
      outer: Outer optimizer of what comes after it.
      inner: How a document is computed.
      rates: Rates of gradient descent that are tried.
      rms_rates: The same of the RMS rule.
      decays: Decays to the start that are tried with each rate. Rates of training are not tuned.
      switching: The Markov languages.
      seed: Seed of the split, the initialisation and the training documents.
    """

    books: str | None = None
    parts: Annotated[tuple[str, ...], Several(different=True)] = ("books", "code", "switching")
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 4
    window: Length = 128
    chunk: Length = 64
    num_chunks: Count = 16
    full_window: Length = 1024
    fast: AdapterConfig = dataclasses.field(default_factory=lambda: AdapterConfig(kind="mlps"))
    num_test: Count = 8
    num_valid: Count = 2
    test_bytes: Steps = 65_536
    valid_bytes: Steps = 16_384
    tasks_per_step: Count = 8
    tasks_at_a_time: CountOr0 = 0
    pretrain_steps: Steps = 2000
    meta_steps: Steps = 150
    pretrain: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=4e-3, warmup_steps=50)
    )
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=1e-3, warmup_steps=20)
    )
    inner: InnerLoop = dataclasses.field(default_factory=lambda: INNER)
    rates: Rates = (0.02, 0.05, 0.1, 0.2)
    rms_rates: Rates = (0.0005, 0.001, 0.002, 0.004)
    decays: Annotated[tuple[Share, ...], Several()] = (0.0, 0.001, 0.004)
    switching: SwitchingConfig = dataclasses.field(default_factory=SwitchingConfig)
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if self.num_chunks % 2:
            raise UserError(f"num_chunks {self.num_chunks} must be even")
        if unknown := sorted(set(self.parts) - {"books", "code", "switching"}):
            raise UserError(f"unknown part {unknown[0]!r}: choose books, code or switching")
        if len(self.rates) != len(self.rms_rates):
            raise UserError("rates and rms_rates must be as many: all rows are tuned alike")
        for name in ("window", "full_window"):
            if getattr(self, name) % self.chunk:
                raise UserError(
                    f"{name} {getattr(self, name)} is no multiple of chunk {self.chunk}"
                )
        if not self.window <= self.full_window <= self.num_chunks * self.chunk:
            raise UserError(
                f"full_window {self.full_window} must be from window {self.window} on and up to "
                f"the {self.num_chunks * self.chunk} bytes of a training document"
            )
        for name in ("test_bytes", "valid_bytes"):
            if getattr(self, name) % self.window:
                raise UserError(f"{name} {getattr(self, name)} is no multiple of the window")
        if self.valid_bytes > self.test_bytes:
            raise UserError(f"valid_bytes {self.valid_bytes} are more than test_bytes")

    def transformer(self, vocab_size: int, window: int) -> TransformerConfig:
        """The model with a window."""
        return TransformerConfig(
            vocab_size=vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            window=window,
        )


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        return dataclasses.replace(
            config,
            **{"width": 8, "num_layers": 1, "num_heads": 2, "window": 16, "chunk": 8},
            **{"num_chunks": 4, "full_window": 32, "num_test": 2, "num_valid": 1},
            **{"test_bytes": 512, "valid_bytes": 128, "tasks_per_step": 4},
            **{"pretrain_steps": 4, "meta_steps": 2, "rates": (0.1,), "rms_rates": (0.001,)},
            decays=(0.0, 0.01),
            switching=SwitchingConfig(vocab_size=4, window=8, chunk=4, test_tokens=128),
        )
    if preset == "gpu":
        return dataclasses.replace(
            config,
            **{"width": 768, "num_layers": 12, "num_heads": 12, "window": 2048, "chunk": 1024},
            **{"num_chunks": 32, "full_window": 32_768, "tasks_per_step": 8, "tasks_at_a_time": 1},
            **{"pretrain_steps": 20_000, "meta_steps": 2000, "valid_bytes": 65_536},
            **{"test_bytes": 262_144},
            fast=AdapterConfig(kind="second_mlp", blocks=3, rank=1536),
            pretrain=OuterConfig(learning_rate=6e-4, warmup_steps=500),
            outer=OuterConfig(learning_rate=2e-4, warmup_steps=100),
            inner=dataclasses.replace(INNER, kept_states=6),
        )
    return config
