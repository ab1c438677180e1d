"""Adapt a trained row to a file, and say what that gains on the end of the file.

    metaopt adapt runs/adapt_languages/cpu-TIME --on FILE
    metaopt adapt RUN --on FILE --row MAML --save adapted.npz

The file is cut into sequences of the run's length. The last tenth of them, and at least as many
as the run's query, is held out: the loss on it is given before and after. The others are adapted
to with the row's inner optimiser and rate: each step takes as many sequences as a step of training,
in a random order. A short file takes the number of steps of training, a longer one is read once.
"""

import dataclasses
from pathlib import Path

import numpy as np

from metaopt.cli.trained import RowConfig, log_adapting, open_row, read_tokens, require_tokens
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import check_directory, local_path
from metaopt.loaded import Loaded
from metaopt.ranges import Count, InnerSteps, Rate, Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RowConfig):
    """Adapt a trained row to a file.

    Attributes:
      on: File to adapt to.
      steps: Number of inner steps; those that read the file once, and at least those of training,
        if not given.
      sequences: Number of sequences in a step; as in training if not given.
      rate: Inner learning rate; the one that the run's results name if not given.
      seed: Seed of the order of the sequences.
      save: New file for the adapted parameters; they are not kept if not given.
    """

    on: Path
    steps: InnerSteps | None = None
    sequences: Count | None = None
    rate: Rate | None = None
    seed: Seed = 0
    save: Path | None = None


def run(config: Config) -> None:
    """Adapts, prints the losses before and after, and saves.

    Raises:
      UserError: there is no such run or row, the file cannot be used, or ``save`` is there already.
    """
    if config.save is not None:
        check_new(config.save)
    found = open_row(config)
    tokens = read_tokens(found, config.on)
    size = found.sequences_a_step if config.sequences is None else config.sequences
    require_tokens(found, config.on, tokens, size + found.config.num_query)
    support, held_out = cut(found, tokens, size)
    steps = config.steps or found.steps_of(support, config.sequences)
    log_adapting(found, steps, config.sequences, config.rate)
    adapted = found.adapt(
        support,
        num_steps=steps,
        sequences=config.sequences,
        learning_rate=config.rate,
        seed=config.seed,
    )
    log("scoring the end of the file, which was not adapted to")
    before, after = found.score(found.start, held_out), found.score(adapted, held_out)
    print(f"{'before:':<18}{before}")
    print(f"{f'after {steps} steps:':<18}{after}")
    if after.mean > before.mean:
        log("note: adapting made it worse: try a lower --rate, or fewer --steps")
    if config.save is None:
        log("not saved: give --save PATH to keep what was adapted")
    else:
        found.save(adapted, config.save)
        log(f"saved as {config.save}")


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
