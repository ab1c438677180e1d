"""What decides the life of a model: its data, its size, and how each generation trains."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig
from metaopt.models import AdapterConfig
from metaopt.npz import LARGEST
from metaopt.optimizers.inner import OptimizerName
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
    StepsOr0,
    Width,
    shared_fields,
)
from metaopt.streams.data import SEQUENCES, DataConfig, passages_needed
from metaopt.streams.duplicates import NUM_HASHES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolveConfig(Checked):
    """A model that lives with the text of a folder.

    Attributes:
      folder: Folder of text, one file a domain; Python's own library if not given.
      waves: Waves in which what is there at first arrives, each a generation; 0 for 5 of Python's
        library, and for 1 of a folder.
      num_held_out: Domains that are never trained on, at most a quarter of those there at first.
      kin: File of domains that are held out together, a group on a line.
      split_seed: Seed of the choice of held-out domains and of the waves.
      model: Pretrained model, a folder of Hugging Face or a GGUF file, of which a part evolves; a
        transformer from nothing if not given.
      adapter: What of the pretrained model evolves.
      width: Width of the transformer.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      compute_dtype: Dtype of its activations, and of what is frozen of a pretrained model.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, tokens in a sequence.
      inner_optimizer: Optimiser of the inner loop.
      inner: The inner loop.
      inner_rate: Inner learning rate that meta-learning trains with.
      inner_rates: Inner learning rates of which one is chosen for each generation.
      steps: Steps of next-token prediction in a generation.
      meta_steps: Steps of MAML after them.
      tasks_per_step: Tasks of a step, of each kind.
      num_devices: Number of devices; 0 for all.
      tasks_at_a_time: Tasks computed together on one device; 0 all, 1 one by one.
      outer: Optimiser of next-token prediction; its rate warms up and falls in each generation.
      meta_rate: Outer learning rate of MAML.
      new_share: Share of the tasks of a generation that are of its new domains.
      most_forgetting: Part by which the loss on old domains may rise in a generation that is kept.
      episodes: Episodes of each domain that it is judged on.
      data: What is kept of the data.
      seed: Seed of the initialisation and of all that is drawn.
    """

    folder: tyro.conf.Positional[str | None] = None
    waves: CountOr0 = 0
    num_held_out: Count = 8
    kin: str | None = None
    split_seed: Seed = 0
    model: Path | None = None
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 2
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    num_support: Count = 8
    num_query: Count = 8
    length: Length = 64
    inner_optimizer: OptimizerName = "sgd"
    inner: InnerLoop = dataclasses.field(default_factory=lambda: InnerLoop(query_loss="mean"))
    inner_rate: Rate = 0.02
    inner_rates: Annotated[tuple[Rate, ...], Several()] = (0.01, 0.02, 0.04)
    steps: Steps = 1800
    meta_steps: StepsOr0 = 60
    tasks_per_step: Count = 4
    num_devices: CountOr0 = 0
    tasks_at_a_time: CountOr0 = 1
    outer: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(
            learning_rate=2e-3, warmup_steps=100, final_fraction=0.05
        )
    )
    meta_rate: Rate = 5e-4
    new_share: Share = 0.3
    most_forgetting: Annotated[float, Range(0, 1)] = 0.02
    episodes: Count = 8
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if self.data.capacity < self.passages_needed:
            raise UserError(
                f"data.capacity {self.data.capacity} holds no episode of {self.num_sequences} "
                f"sequences: give {self.passages_needed} passages of {SEQUENCES} at least"
            )

        bytes_of_all = 4 * (SEQUENCES * (self.length + 1) + NUM_HASHES) * self.data.capacity
        if bytes_of_all > LARGEST // 2:  # those that are judged on come on top
            raise UserError(
                f"data.capacity {self.data.capacity} of passages of {SEQUENCES} sequences takes "
                f"{bytes_of_all / 2**20:,.0f} MiB, more than {LARGEST // 2**21} MiB: lower it"
            )

    @property
    def num_sequences(self) -> int:
        """S + Q, the sequences of an episode."""
        return self.num_support + self.num_query

    @property
    def passages_needed(self) -> int:
        """The passages of an episode."""
        return passages_needed(self.num_sequences)

    @property
    def sequences_needed(self) -> int:
        """Sequences in whole passages, for an episode to choose a rate on and one to judge on."""
        return 2 * SEQUENCES * self.passages_needed

    @property
    def num_waves(self) -> int:
        """The number of waves."""
        return self.waves or (5 if self.folder is None else 1)

    @property
    def languages(self) -> LanguageConfig:
        """The tasks and the model, as `metaopt.load` makes them again."""
        source = "stdlib" if self.folder is None else "text"
        fields = shared_fields(LanguageConfig, self) | {"rows": ("MAML",), "tasks": source}
        path = None if self.model is None else str(self.model)
        name = "transformer" if path is None else "pretrained"
        return LanguageConfig(**fields | {"model": name, "pretrained": path})
