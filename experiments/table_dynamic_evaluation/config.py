"""The config of `table_dynamic_evaluation` and its presets."""

import dataclasses
from typing import Annotated

from experiments import harness
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models import TransformerConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
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

PRETRAIN = OuterConfig(learning_rate=4e-3, warmup_steps=50)
INNER = InnerLoop(num_steps=8, batching="split")
OUTER = OuterConfig(learning_rate=1e-3, warmup_steps=20)
RatesTried = Annotated[tuple[Rate, ...], Several()]
Bytes = Annotated[int, Range(1, 2**30)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Dynamic evaluation of a byte model, with and without a meta-learned initialisation.

    Attributes:
      train: Folders of training text, one file a domain; the standard library of Python, but for
        the streams, if none.
      exclude: Names of files in them that are left out, as they overlap with the streams.
      streams: Streams to walk along: a file, whose beginning is for tuning and whose end is the
        test, or a folder with valid.txt and test.txt. Two packages of the standard library if
        none and no training text is given either.
      width: Width of the transformer.
      num_layers: Number of layers of the transformer.
      num_heads: Number of heads of the transformer.
      context: C, bytes that are read before each segment.
      segment_lengths: L, bytes that are scored and then stepped on; of several the one that plain
        SGD scores best with on the tuning parts is used by all rows.
      inner: Walk of the meta-training; its num_steps, 2 or more, is the number of segments in a
        stretch of training text.
      tasks_per_step: Stretches in a step of any training.
      tasks_at_a_time: Stretches computed together on one device; 0 all by vmap, 1 one by one in a
        scan.
      pretrain_steps: Length of the plain training that both initialisations start from.
      meta_steps: Length of the training of either after that.
      pretrain: Outer optimiser of the first part.
      outer: Outer optimiser of the second part.
      statistics_segments: Segments of training text behind the mean squared gradients.
      sgd_rates: Rates tried on the tuning parts; if an outermost is best, more beyond it.
      rms_rates: Likewise, for the RMS rule.
      decays: Decays towards the initialisation, tried with every rate.
      epsilon: Floor of the RMS rule, as a share of the mean root of the mean squares.
      valid_bytes: Bytes of each stream for tuning.
      test_bytes: Bytes of each stream to report; the last that fill no block are left out.
      block: Consecutive segments of one block; intervals are over blocks.
      seed: Seed of the initialisation and of the training text.
      eval_seed: Seed of the training text for the mean squared gradients.
    """

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
    sgd_rates: RatesTried = (0.02, 0.04, 0.08)
    rms_rates: RatesTried = (0.0005, 0.001, 0.002)
    decays: Annotated[tuple[Share, ...], Several()] = (0.0, 0.001, 0.004)
    epsilon: Positive = 0.1
    valid_bytes: Bytes = 16_384
    test_bytes: Bytes = 131_072
    block: Count = 64
    seed: Seed = 0
    eval_seed: Seed = 1234

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


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
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
    ),
    "smoke": Config(
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
    ),
}


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    return PRESETS[preset]
