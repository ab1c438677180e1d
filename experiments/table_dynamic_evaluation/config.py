"""The config of `table_dynamic_evaluation` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models import TransformerConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    Heads,
    Layers,
    Length,
    Positive,
    Range,
    Rate,
    Seed,
    Several,
    Share,
    Steps,
    Width,
)

CHOSEN_BY = ("preset",)
PRETRAIN = OuterConfig(learning_rate=4e-3, warmup_steps=50)
INNER = InnerLoop(num_steps=8, batching="split")
OUTER = OuterConfig(learning_rate=1e-3, warmup_steps=20)
Rates = Annotated[tuple[Rate, ...], Several()]
Bytes = Annotated[int, Range(1, 2**30)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Dynamic evaluation of a byte model, with and without a meta-learned initialisation.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      train: folders of training text, one file a domain; the standard library of Python,
        but for the streams, if none.
      exclude: names of files in them that are left out, as they overlap with the streams.
      streams: what is walked along: a file, whose beginning is for tuning and whose end is the
        test, or a folder with valid.txt and test.txt. Two packages of the standard library
        if none and no training text is given either.
      width: of the transformer.
      num_layers: of the transformer.
      num_heads: of the transformer.
      context: C, bytes that are read before each segment.
      segment_lengths: L, bytes that are scored and then stepped on; of several the one with
        which plain SGD scores best on the tuning parts is taken for all rows.
      inner: the walk of the meta-training; its num_steps, 2 or more, is the number of segments
        in a stretch of training text.
      tasks_per_step: stretches in a step of any training.
      tasks_at_a_time: on one device; 0 all by vmap, 1 one by one in a scan.
      pretrain_steps: of plain training, before the two initialisations part.
      meta_steps: of either after that.
      pretrain: the outer optimiser of the first part.
      outer: the outer optimiser of the second.
      statistics_segments: of training text, for the mean squared gradients.
      sgd_rates: tried on the tuning parts; where an outermost is best, more beyond it.
      rms_rates: likewise, for the RMS rule.
      decays: towards the initialisation, tried with every rate.
      epsilon: of the RMS rule, as a share of the mean root of the mean squares.
      valid_bytes: of each stream, for tuning.
      test_bytes: of each stream, to report; the last are left out where they fill no block.
      block: consecutive segments of one block; intervals are over blocks.
      seed: of the initialisation and of the training text.
      eval_seed: of the training text for the mean squared gradients.
      improve: train under the closed loop, which changes rates where that helps.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    train: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ("tiny_shakespeare.txt", "shakespeare_xml.txt", "wiki_qa_en.txt")
    streams: tuple[str, ...] = ()
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 4
    context: Annotated[int, Range(0, 2**20)] = 64
    segment_lengths: Annotated[tuple[Length, ...], Several(different=True)] = (32, 64)
    inner: InnerLoop = INNER
    tasks_per_step: Count = 8
    tasks_at_a_time: CountOr0 = 1
    pretrain_steps: Steps = 3500
    meta_steps: Steps = 400
    pretrain: OuterConfig = PRETRAIN
    outer: OuterConfig = OUTER
    statistics_segments: Count = 512
    sgd_rates: Rates = (0.02, 0.04, 0.08)
    rms_rates: Rates = (0.0005, 0.001, 0.002)
    decays: Annotated[tuple[Share, ...], Several()] = (0.0, 0.001, 0.004)
    epsilon: Positive = 0.1
    valid_bytes: Bytes = 16_384
    test_bytes: Bytes = 131_072
    block: Count = 64
    seed: Seed = 0
    eval_seed: Seed = 1234
    improve: bool = False
    root: str = "runs"
    run_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.inner.num_steps < 2:
            raise UserError("inner.num_steps is 1; a walk adapts from 2 segments on")
        if self.inner.query_loss != "last":
            raise UserError(
                "a walk has no query: leave inner.query_loss at 'last', not "
                f"{self.inner.query_loss!r}"
            )
        for name, segments in (("valid_bytes", 1), ("test_bytes", self.block)):
            needed = self.window + (segments - 1) * max(self.segment_lengths) + 1
            if getattr(self, name) < needed:
                raise UserError(
                    f"{name} is {getattr(self, name)}, which holds no block of segments: "
                    f"give {needed} or more, or lower block, context or segment_lengths"
                )
        if self.train and not self.streams:
            raise UserError("--train needs --streams: which text should be walked along?")

    @property
    def window(self) -> int:
        """Bytes that the model reads at once."""
        return self.context + max(self.segment_lengths)

    def transformer(self) -> TransformerConfig:
        """The model over bytes."""
        return TransformerConfig(
            vocab_size=256,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name = flags.get("preset", "cpu")
    if name == "cpu":
        return Config()
    if name == "smoke":
        return Config(
            preset="smoke",
            width=8,
            num_layers=1,
            num_heads=2,
            context=8,
            segment_lengths=(16,),
            inner=dataclasses.replace(INNER, num_steps=2),
            tasks_per_step=2,
            pretrain_steps=4,
            meta_steps=2,
            statistics_segments=8,
            sgd_rates=(0.1,),
            rms_rates=(0.01,),
            decays=(0.0, 0.01),
            valid_bytes=1024,
            test_bytes=4096,
            block=16,
        )
    if name == "gpu":
        return Config(
            preset="gpu",
            width=512,
            num_layers=6,
            num_heads=8,
            context=256,
            segment_lengths=(64, 128),
            inner=dataclasses.replace(INNER, num_steps=16, unroll=False),
            tasks_per_step=32,
            tasks_at_a_time=8,
            pretrain_steps=30_000,
            meta_steps=3_000,
            pretrain=OuterConfig(learning_rate=1e-3, warmup_steps=500),
            outer=OuterConfig(learning_rate=3e-4, warmup_steps=100),
            valid_bytes=200_000,
            test_bytes=500_000,
        )
    raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
