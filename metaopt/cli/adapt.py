"""Adapt a trained row to a file, and say what that gains on the end of the file.

    metaopt adapt runs/adapt_languages/cpu-TIME --on FILE
    metaopt adapt RUN --on FILE --row MAML --save adapted.npz
    metaopt adapt --model PATH --on FILE --kind blocks --blocks 6 --rate 1e-4

The file is cut into sequences of the run's length. The last tenth of them, and at least as many
as the run's query, is held out: the loss on it is given before and after. The others are adapted
to with the row's inner optimiser and rate: each step takes as many sequences as a step of training,
in a random order. A short file takes the number of steps of training, a longer one is read once.

Of a pretrained model the part adapts that the flags of the adapter say, by Adam, a sequence a step.
It is saved alone, and laid over the model again by metaopt score and generate with --adapter.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from metaopt.cli.trained import (
    ModelConfig,
    log_adapting,
    open_model,
    open_row,
    read_tokens,
    require_tokens,
)
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import check_directory, local_path
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig
from metaopt.learners import maml
from metaopt.loaded import Loaded
from metaopt.losses import next_token
from metaopt.models import AdapterConfig, adapting
from metaopt.pretrained import Pretrained, save_adapter
from metaopt.ranges import Count, InnerSteps, Length, Rate, Seed
from metaopt.training.progress import Progress

RATE = 1e-3
"""Inner rate of a pretrained model, if no other is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Adapt a trained row, or a pretrained model, to a file.

    Attributes:
      on: File to adapt to.
      part: What of a pretrained model adapts.
      length: Tokens of a sequence of a pretrained model.
      steps: Number of inner steps; those that read the file once, and at least those of training,
        if not given.
      sequences: Number of sequences in a step; as in training if not given.
      rate: Inner learning rate; the one that the run's results name if not given, and 1e-3 of a
        pretrained model.
      seed: Seed of the order of the sequences.
      save: New file for the adapted parameters; they are not kept if not given.
    """

    on: Path
    part: tyro.conf.OmitArgPrefixes[AdapterConfig] = dataclasses.field(
        default_factory=AdapterConfig
    )
    length: Length = 256
    steps: InnerSteps | None = None
    sequences: Count | None = None
    rate: Rate | None = None
    seed: Seed = 0
    save: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.adapter is not None:
            raise UserError("adapting starts from the model as it is: leave --adapter out")


def run(config: Config) -> None:
    """Adapts, prints the losses before and after, and saves.

    Raises:
      UserError: there is no such run or row, the file cannot be used, or ``save`` is there already.
    """
    if config.save is not None:
        check_new(config.save)
    pretrained = None if config.model is None else open_model(config.model, config.adapter)
    found = open_row(config) if pretrained is None else _as_row(config, pretrained)
    tokens = read_tokens(found, config.on)
    size = found.sequences_a_step if config.sequences is None else config.sequences
    require_tokens(found, config.on, tokens, size + found.config.num_query)
    support, held_out = cut(found, tokens, size)
    steps = config.steps or found.steps_of(support, config.sequences)
    log_adapting(found, steps, config.sequences, config.rate)
    with Progress("adapting", total=steps, first="compiling") as shown:
        adapted = found.adapt(
            support,
            num_steps=steps,
            sequences=config.sequences,
            learning_rate=config.rate,
            seed=config.seed,
            update=shown.update,
        )
    log("scoring the end of the file, which was not adapted to")
    before, after = found.score(found.start, held_out), found.score(adapted, held_out)
    print(f"{'before:':<18}{before}")
    print(f"{f'after {steps} steps:':<18}{after}")
    if after.mean > before.mean:
        log("note: adapting made it worse: try a lower --rate, or fewer --steps")
    if config.save is None:
        log("not saved: give --save PATH to keep what was adapted")
        return
    if pretrained is None:
        found.save(adapted, config.save)
    else:
        save_adapter(config.save, pretrained, config.part, adapted)
    log(f"saved as {config.save}")


def _as_row(config: Config, found: Pretrained) -> Loaded:
    """A part of a pretrained model, as a row that starts from what it is.

    Raises:
      UserError: the model has no such part.
    """
    model = adapting(found.config, config.part, found.params)
    learner, inner = maml(optax.adam), InnerLoop(num_steps=1)
    return Loaded(
        row=str(config.model),
        seed=config.seed,
        model=model,
        loss_fn=next_token(model),
        learner=learner,
        inner=inner,
        meta_params=learner.init(model.init(jax.random.key(config.seed))),
        hparams={"inner_learning_rate": jnp.float32(RATE)},
        config=LanguageConfig(num_support=1, num_query=1, length=config.length, inner=inner),
        codec=found.codec,
        pretrained=found.config,
    )


def cut(found: Loaded, tokens: np.ndarray, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a file to adapt to, and those held out, the last ones.

    Args:
      found: the row.
      tokens: tokens of the file, ``[n]``.
      sequences: number of sequences in a step, for which room is left.
    """
    width, query = found.config.length + 1, found.config.num_query
    count = len(tokens) // width
    held_out = min(max(query, count // 10), count - sequences)
    end = (count - held_out) * width
    return tokens[:end], tokens[end:]


def check_new(path: Path) -> None:
    """Raises UserError unless a file can be written there that is not there yet."""
    path = local_path(path)
    if path.exists():
        raise UserError(f"--save {path} is there already: give another name, or move it away")
    check_directory(path.parent)
    if not path.parent.is_dir():
        raise UserError(f"--save {path}: there is no folder {path.parent}; make it first")
