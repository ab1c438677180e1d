"""What the commands that use a model share: a run and its row, or a pretrained model; texts."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro

from metaopt import parallel
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import local_path, one_line
from metaopt.load import load
from metaopt.loaded import Loaded
from metaopt.pretrained import Pretrained, lay_over, open_pretrained
from metaopt.ranges import Checked, Seed
from metaopt.tasks.sources.text import array_domain
from metaopt.tasks.sources.text_checks import check_readable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig(Checked):
    """A trained row.

    Attributes:
      run: Directory of a finished run of adapt_languages, or of a life of metaopt evolve.
      row: Name of the row; the best trained one after the trained number of steps if not given.
      run_seed: Seed that the row was trained with, if the run has several; the first if not given.
    """

    run: tyro.conf.Positional[Path]
    row: str | None = None
    run_seed: Seed | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(RowConfig):
    """A trained row, or a pretrained model.

    Attributes:
      run: Directory of a finished run of adapt_languages or of a life; none with a pretrained
        model.
      model: Pretrained model in place of a run: a folder of Hugging Face or a GGUF file.
      adapter: File that metaopt read saved, to lay over the pretrained model.
    """

    run: tyro.conf.Positional[Path | None] = None  # type: ignore[assignment]
    model: Path | None = None
    adapter: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.run is None) == (self.model is None):
            raise UserError("give the directory of a run, or --model PATH of a pretrained one")
        if self.model is not None and (self.row is not None or self.run_seed is not None):
            raise UserError("--row and --run-seed are of a run: leave them out with --model")
        if self.adapter is not None and self.model is None:
            raise UserError("--adapter is laid over a pretrained model: give --model PATH too")


def open_model(path: Path, adapter: Path | None = None) -> Pretrained:
    """A pretrained model, with what has adapted laid over it.

    Raises:
      UserError: see `metaopt.pretrained.open_pretrained` and `metaopt.pretrained.lay_over`.
    """
    parallel.set_up_backend()
    log(f"loading {path}")
    found = open_pretrained(path)
    if adapter is not None:
        log(f"laying {adapter} over it")
        found = lay_over(adapter, found)
    number = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    log(f"{number:,} parameters, {found.codec.vocab_size:,} tokens")
    return found


def open_row(config: RowConfig) -> Loaded:
    """The row, and a line that says which it is.

    Raises:
      UserError: see `metaopt.load`.
    """
    parallel.set_up_backend()
    log(f"loading {config.run}")
    found = load(config.run, config.row, config.run_seed)
    chosen = "" if config.row else ", the best after the trained number of steps"
    log(f"row {found.row!r} of seed {found.seed}{chosen}")
    return found


def read_tokens(found: Loaded | Pretrained, file: Path) -> np.ndarray:
    """The tokens of a file, int32 ``[n]``.

    Raises:
      UserError: it cannot be read, is empty or packed, or not of the vocabulary.
    """
    path = local_path(file)
    with one_line(path, "read"):
        data = path.read_bytes()
    if not data:
        raise UserError(f"{path} is empty: give a file of text")
    if found.codec.is_text:
        note = check_readable([array_domain(str(path), np.frombuffer(data, np.uint8))])
        if note is not None:
            log(f"note: {note}")
    try:
        return found.codec.encode(data) if isinstance(found, Pretrained) else found.tokens(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def require_tokens(found: Loaded, file: Path, tokens: np.ndarray, sequences: int) -> None:
    """Checks that a file has this number of sequences.

    Raises:
      UserError: it has fewer, with the length that it needs.
    """
    needed = sequences * (found.config.length + 1)
    if len(tokens) < needed:
        unit = "bytes" if found.codec.is_text and found.codec.vocab_size == 256 else "tokens"
        raise UserError(
            f"{file} has {len(tokens)} {unit} and needs {needed}, {sequences} sequences of "
            f"{found.config.length + 1}: give a longer file"
        )


def log_adapting(found: Loaded, steps: int, sequences: int | None, rate: float | None) -> None:
    """Says how a file is adapted to."""
    size = found.sequences_a_step if sequences is None else sequences
    rate = float(found.hparams["inner_learning_rate"]) if rate is None else rate
    log(f"adapting: {steps} steps of {size} sequences of {found.config.length} at rate {rate:g}")
