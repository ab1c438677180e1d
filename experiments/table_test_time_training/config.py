"""The config of the tables of test-time training, and its presets."""

import dataclasses
from typing import Annotated, Literal

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
PARTS = ("switching", "recall", "memory", "code", "books", "scale", "pretrained")
INNER = InnerLoop(batching="split", unroll=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads(Checked):
    """How the model of a source reads, and how long it is trained for that.

    Attributes:
      window: W, tokens in reach of each layer.
      chunk: B, tokens that are predicted, and then learned from.
      num_chunks: N, chunks of a document that is trained on, an even number.
      full_window: Window of the row of full attention, up to the length of a training document.
      rates: Rates of gradient descent that are tried.
      fast: Which weights learn while reading, of the rows of test-time training.
      test_tokens: Tokens of a document that is reported, from its begin.
      valid_tokens: Tokens of a document that rates are chosen on.
      meta_steps: Steps of meta-training to the second order; the other rows take as many as the
        same number of operations pays for.
      outer: Outer optimizer of all but pretraining.
      tasks_per_step: Documents in a step of training.
      tasks_at_a_time: Of them computed together on a device; 0 for all, by vmap.
    """

    window: Length = 128
    chunk: Length = 64
    num_chunks: Count = 16
    full_window: Length = 1024
    rates: Rates = (0.05, 0.1, 0.2, 0.4, 0.8)
    fast: AdapterConfig = dataclasses.field(default_factory=lambda: AdapterConfig(kind="mlps"))
    test_tokens: Steps = 65_536
    valid_tokens: Steps = 16_384
    meta_steps: Steps = 150
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=1e-3, warmup_steps=20)
    )
    tasks_per_step: Count = 8
    tasks_at_a_time: CountOr0 = 0

    def __post_init__(self):
        super().__post_init__()
        if self.num_chunks % 2:
            raise UserError(f"num_chunks {self.num_chunks} must be even")
        for name in ("window", "full_window"):
            if getattr(self, name) % self.chunk:
                raise UserError(
                    f"{name} {getattr(self, name)} is no multiple of chunk {self.chunk}"
                )
        if not self.window <= self.full_window <= self.num_chunks * self.chunk:
            raise UserError(
                f"full_window {self.full_window} must be from window {self.window} on and up to "
                f"the {self.num_chunks * self.chunk} tokens of a training document"
            )
        for name in ("test_tokens", "valid_tokens"):
            if getattr(self, name) % self.window:
                raise UserError(f"{name} {getattr(self, name)} is no multiple of the window")
        if self.valid_tokens > self.test_tokens:
            raise UserError(f"valid_tokens {self.valid_tokens} are more than test_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Reads):
    """The same of a model that is trained from nothing, with its shape.

    Attributes:
      width: D of the model.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      compute_dtype: Dtype of the layers of the model.
      pretrain_steps: Steps of next-token prediction that all rows start from.
      pretrain: Outer optimizer of next-token prediction.
    """

    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 4
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    pretrain_steps: Steps = 2000
    pretrain: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=4e-3, warmup_steps=50)
    )

    def transformer(self, vocab_size: int, window: int) -> TransformerConfig:
        """The model with a window."""
        return TransformerConfig(
            vocab_size=vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            window=window,
            compute_dtype=self.compute_dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Reads):
    """A model that was trained elsewhere, of which an adapter learns.

    Attributes:
      model: Folder of Hugging Face or GGUF file; without it the table of it is left out.
      folder: Folder of text, a document a file; the books, or Python's library, if not given.
      train_bytes: Bytes of a document that is trained on, from its begin.
    """

    model: str | None = None
    folder: str | None = None
    train_bytes: Steps = 200_000
    window: Length = 256
    chunk: Length = 256
    num_chunks: Count = 8
    full_window: Length = 2048
    rates: Rates = (0.03, 0.1, 0.3, 1.0, 3.0)
    fast: AdapterConfig = dataclasses.field(default_factory=lambda: AdapterConfig(blocks=6))
    test_tokens: Steps = 4096
    valid_tokens: Steps = 2048
    meta_steps: Steps = 30
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=1e-3, warmup_steps=3)
    )
    tasks_per_step: Count = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Sizes):
    """The same, for languages of few symbols."""

    width: Width = 32
    num_heads: Heads = 2
    window: Length = 16
    chunk: Length = 16
    num_chunks: Count = 64
    full_window: Length = 1024
    fast: AdapterConfig = dataclasses.field(default_factory=lambda: AdapterConfig(kind="all"))
    test_tokens: Steps = 8192
    valid_tokens: Steps = 8192
    pretrain_steps: Steps = 500
    meta_steps: Steps = 300
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(learning_rate=2e-3, warmup_steps=20)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switching(Small):
    """Markov languages that switch without notice, and what reads them.

    Attributes:
      vocab_size: Symbols of a language.
      hazard: Chance of another language before each symbol.
      concentration: Concentration of the prior of its rows.
    """

    vocab_size: Annotated[int, Range(2, 256)] = 16
    hazard: Annotated[float, Range(0.0, 0.5)] = 1e-3
    concentration: Annotated[float, Range(0.01, 100.0)] = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Small):
    """Keys whose values are to be recalled, and what reads them.

    A document is pairs of a key and a value. Which value a key has is drawn for each document, and
    the keys come in any order. What was read once could be known for ever. Values alone are scored.

    Attributes:
      num_keys: Number of keys.
      num_values: Number of values.
    """

    num_keys: Annotated[int, Range(2, 128)] = 128
    num_values: Annotated[int, Range(2, 128)] = 8
    test_tokens: Steps = 2048
    valid_tokens: Steps = 2048

    def __post_init__(self):
        super().__post_init__()
        if self.chunk % 2:
            raise UserError(f"recall.chunk {self.chunk} must be even: it is read in pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Models that learn from what they read, with and without meta-learning for it.

    Attributes:
      books: Folder of books, one a file; without it the table of books is left out.
      parts: What is read, in this order: switching, recall, code (Python's own library) and books;
        scale, three rows of books, or of code without them, at other widths; pretrained, if its
        model is given; and memory, which reads nothing.
      sizes: The model of books and code.
      switching: The Markov languages, and their model.
      recall: The keys and values, and their model.
      widths: Widths of the scale, beside that of ``sizes``.
      updates: Numbers of updates that memory is compiled for, with ``sizes``.
      num_test: Documents that are reported.
      num_valid: Documents that rates are chosen on.
      pretrained: The model that was trained elsewhere.
      inner: How a document is computed.
      rms_rates: Rates of the RMS rule that are tried, of books.
      decays: Decays to the start that are tried with each rate. Rates of training are not tuned.
      seed: Seed of the split, the initialisation and the training documents.
    """

    books: str | None = None
    parts: Annotated[tuple[str, ...], Several(different=True)] = PARTS
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    switching: Switching = dataclasses.field(default_factory=Switching)
    recall: Recall = dataclasses.field(default_factory=Recall)
    widths: Annotated[tuple[Width, ...], Several(different=True)] = (32, 128)
    updates: Annotated[tuple[Count, ...], Several(different=True)] = (4, 32)
    num_test: Count = 8
    num_valid: Count = 2
    pretrained: Trained = dataclasses.field(default_factory=Trained)
    inner: InnerLoop = dataclasses.field(default_factory=lambda: INNER)
    rms_rates: Rates = (0.0003, 0.0006, 0.0012, 0.0025, 0.005)
    decays: Annotated[tuple[Share, ...], Several()] = (0.0, 0.003, 0.01, 0.03)
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise UserError(f"unknown part {unknown[0]!r}: choose among {', '.join(PARTS)}")
        if len(self.sizes.rates) != len(self.rms_rates):
            raise UserError("sizes.rates and rms_rates must be as many: all rows are tuned alike")
        if self.sizes.width in self.widths:
            raise UserError(f"width {self.sizes.width} is that of sizes: leave it out of widths")
        for width in self.widths:
            sizes = dataclasses.replace(self.sizes, width=width)
            sizes.transformer(256, sizes.window)  # raises where heads do not divide it
        if odd := [number for number in self.updates if number % 2]:
            raise UserError(f"updates {odd[0]} must be even")


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        short = {"width": 8, "num_layers": 1, "num_heads": 2, "num_chunks": 4}
        short |= {"pretrain_steps": 4, "meta_steps": 2, "tasks_per_step": 4, "rates": (0.1,)}
        small = {"window": 8, "chunk": 4, "full_window": 16}
        small |= {"test_tokens": 128, "valid_tokens": 128}
        return dataclasses.replace(
            config,
            sizes=dataclasses.replace(
                config.sizes,
                **short,
                window=16,
                chunk=8,
                full_window=32,
                test_tokens=512,
                valid_tokens=128,
            ),
            switching=dataclasses.replace(config.switching, **short, **small, vocab_size=4),
            recall=dataclasses.replace(config.recall, **short, **small, num_keys=4, num_values=2),
            pretrained=dataclasses.replace(
                config.pretrained,
                **{"window": 8, "chunk": 8, "num_chunks": 4, "full_window": 16, "meta_steps": 2},
                **{"test_tokens": 32, "valid_tokens": 16, "train_bytes": 2000},
                **{"tasks_per_step": 4, "fast": AdapterConfig(rank=2), "rates": (0.1,)},
            ),
            **{"widths": (4,), "updates": (2, 4), "num_test": 2, "num_valid": 1},
            **{"rms_rates": (0.001,), "decays": (0.0, 0.01)},
        )
    if preset == "gpu":
        return dataclasses.replace(
            config,
            sizes=dataclasses.replace(
                config.sizes,
                **{"width": 768, "num_layers": 16, "num_heads": 12, "window": 2048, "chunk": 1024},
                **{"num_chunks": 32, "full_window": 32_768, "pretrain_steps": 20_000},
                **{"meta_steps": 2000, "valid_tokens": 65_536, "test_tokens": 262_144},
                **{"compute_dtype": "bfloat16", "tasks_at_a_time": 1},
                fast=AdapterConfig(kind="second_mlp", blocks=3, rank=1536),
                pretrain=OuterConfig(learning_rate=6e-4, warmup_steps=500),
                outer=OuterConfig(learning_rate=2e-4, warmup_steps=100),
            ),
            widths=(192, 384),
            inner=dataclasses.replace(INNER, kept_states=6),
        )
    return config
