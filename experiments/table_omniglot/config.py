"""The config of `table_omniglot` and its presets."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from metaopt.errors import UserError
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    ImageSize,
    InnerSteps,
    Range,
    Rate,
    Seed,
    Seeds,
    Several,
    Steps,
    Width,
)

CHOSEN_BY = ("preset",)
"""The flags that the defaults of all others depend on."""
SettingName = Literal["5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"]


class Setting(NamedTuple):
    """A column of the table: characters to tell apart, and drawings of each to learn from."""

    ways: int
    shots: int

    @property
    def column(self) -> str:
        """As it stands in the table."""
        return f"{self.ways}-way {self.shots}-shot"


def parse_setting(name: SettingName) -> Setting:
    """``'5-way-1-shot'`` as a `Setting`."""
    ways, _, shots, _ = name.split("-")
    return Setting(int(ways), int(shots))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reptile(Checked):
    """How the row Reptile is trained and tested; by default for a few thousand meta-steps.

    Attributes:
      adam: inner steps by Adam without momentum, as published, or by gradient descent.
      inner_rate: of either, for Adam about 0.001; of 20 ways half of it.
      num_steps: inner steps of training, each on drawings of its own; of 20 ways twice as many.
      drawings: of a character in an episode of training.
      tasks_per_step: the meta-batch.
      tested: inner steps of the test.
    """

    adam: bool = False
    inner_rate: Rate = 0.3
    num_steps: InnerSteps = 5
    drawings: Annotated[int, Range(2, 10**6)] = 10
    tasks_per_step: Count = 10
    tested: InnerSteps = 5

    def __post_init__(self):
        super().__post_init__()
        if 5 * self.drawings % self.num_steps:
            raise UserError(
                f"reptile: 5 ways of {self.drawings} drawings cannot be cut into {self.num_steps} "
                "batches of equal size; change drawings or num_steps"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Few-shot classification of Omniglot's characters: MAML, its relatives and MAML++.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      source: tfds:omniglot, or a folder of npz files.
      image_size: height and width, in pixels.
      num_train_characters: characters for training.
      num_valid_characters: characters that are kept for validation, and not used; the rest is
        for the test.
      settings: columns of the table.
      rows: names of the rows to run; the seven main ones if none.
      seeds: every row is trained once with each; cells are means over them.
      filters: of every layer.
      meta_steps: of each training.
      outer: the outer optimiser, of all rows but Reptile.
      cosine: whether its rate falls to zero over the training in all rows; MAML++ and its part
        of that name have a cosine in any case.
      query_shots: query drawings of a character in training; 0 for as many as shots, which is what
        Finn et al. do and what the test does.
      tasks_per_step: the meta-batch; 0 for that of Finn et al., 32 tasks of 5 ways and 16 of 20.
      plus_plus_tasks: the meta-batch of MAML++ and its parts.
      reptile: how Reptile is trained and tested.
      implicit_tasks: that of iMAML.
      implicit_steps: inner steps of iMAML.
      unroll: inner steps laid out one after the other, quicker to run and slower to compile.
      tasks_at_a_time: on one device; 0 all by vmap, 1 one by one in a scan.
      num_devices: 0 for all.
      max_inner_steps: the figure goes on to so many inner steps.
      test_episodes: of each setting.
      eval_seed: of the test.
      checkpoint_every: meta-steps between checkpoints.
      improve: train under the closed loop, which changes rates where that helps.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    source: str = "tfds:omniglot"
    image_size: ImageSize = 28
    num_train_characters: Count = 1100
    num_valid_characters: Count = 100
    settings: Annotated[tuple[SettingName, ...], Several(different=True)] = ("5-way-1-shot",)
    rows: tuple[str, ...] = ()
    seeds: Seeds = (0,)
    filters: Width = 32
    meta_steps: Steps = 2500
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(
            learning_rate=5e-3, rates_learning_rate=1e-2, clip_norm=10.0, warmup_steps=50
        )
    )
    cosine: bool = True
    query_shots: CountOr0 = 3
    tasks_per_step: CountOr0 = 0
    plus_plus_tasks: Count = 16
    reptile: Reptile = dataclasses.field(default_factory=Reptile)
    implicit_tasks: Count = 8
    implicit_steps: InnerSteps = 8
    unroll: bool = True
    tasks_at_a_time: CountOr0 = 1
    num_devices: CountOr0 = 0
    max_inner_steps: Annotated[int, Range(5, 10**5)] = 10  # rows are judged after up to 5
    test_episodes: Count = 1000
    eval_seed: Seed = 1234
    checkpoint_every: Steps = 500
    improve: bool = False
    root: str = "runs"
    run_dir: str | None = None


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name = flags.get("preset", "cpu")
    if name == "cpu":
        return Config()
    if name == "gpu":
        return Config(
            preset="gpu",
            settings=("5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"),
            filters=64,
            meta_steps=60_000,
            outer=OuterConfig(learning_rate=1e-3, rates_learning_rate=1e-3, clip_norm=math.inf),
            cosine=False,
            query_shots=0,
            plus_plus_tasks=8,
            reptile=Reptile(adam=True, inner_rate=1e-3, tasks_per_step=5, tested=50),
            implicit_tasks=16,
            implicit_steps=16,
            tasks_at_a_time=0,
            checkpoint_every=5000,
        )
    if name == "smoke":
        return Config(
            preset="smoke",
            rows=("MAML", "MAML++"),
            filters=4,
            meta_steps=6,
            tasks_per_step=4,
            plus_plus_tasks=4,
            reptile=Reptile(tasks_per_step=4),
            implicit_tasks=4,
            implicit_steps=2,
            unroll=False,
            test_episodes=16,
        )
    raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
