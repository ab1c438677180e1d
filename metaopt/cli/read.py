"""Read a file with a model that adapts on the way, and say what that gains.

    metaopt read FILE                                        # by SmolLM2, see metaopt model smollm2
    metaopt read FILE --model PATH --kind all --learning-rate 1e-4
    metaopt read FILE --model PATH --context 768 --save adapter.npz
    metaopt read FILE --run RUN --learning-rate 1e-2         # by a transformer trained here
    metaopt read FILE --surprise 10

The file is cut into segments. Each is scored first and stepped on afterwards, so every token is
predicted by a model that has not seen it; beside that the score of the model as it is, on the same
segments with the same context. What has adapted can be saved alone, and laid over the model by
metaopt score and generate. With --surprise N the file is read once, whole, with the context carried
on, and the N lines that surprised the model most are printed: errors in a log, for example.
"""

import dataclasses
from pathlib import Path
from typing import Literal, cast

import numpy as np
import tyro

from metaopt.cli.adapt import check_new
from metaopt.cli.trained import RowConfig, open_model, open_row, read_tokens
from metaopt.console import log, printable
from metaopt.errors import UserError
from metaopt.files import local_path
from metaopt.languages import transformer_config
from metaopt.losses import NATS_TO_BITS
from metaopt.pretrained import Pretrained, ReadingConfig, read_along, save_adapter
from metaopt.pretrained.packages import fetched
from metaopt.pretrained.reading import Read, gain, score_of
from metaopt.ranges import Checked, Count, Seed
from metaopt.streams.reader import Reader, ReaderConfig
from metaopt.streams.surprise import surprising_lines
from metaopt.tasks.sources.text import data_directory
from metaopt.tasks.tokenizers import bytes_of
from metaopt.training.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Read a file and adapt.

    Attributes:
      file: File to read.
      model: Pretrained model, a folder of Hugging Face or a GGUF file; SmolLM2 if neither it nor a
        run is given.
      run: Directory of a finished run of adapt_languages, or of a life of metaopt evolve, whose
        model is a transformer.
      row: Name of a row of the run; the best after the trained number of steps if not given.
      run_seed: Seed that the row was trained with, if the run has several; the first if not given.
      reading: What adapts, and how.
      general: Text like that of the model's training, which the optimizer rms takes its scale from.
      save: New file for what has adapted; it is not kept if not given.
      surprise: Number of lines to print, those that surprised the model most.
    """

    file: tyro.conf.Positional[Path]
    model: Path | None = None
    run: Path | None = None
    row: str | None = None
    run_seed: Seed | None = None
    reading: tyro.conf.OmitArgPrefixes[ReadingConfig] = dataclasses.field(
        default_factory=ReadingConfig
    )
    general: Path | None = None
    save: Path | None = None
    surprise: Count | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.model is not None and self.run is not None:
            raise UserError("give --model PATH or --run RUN, and not both")
        if self.run is None and (self.row, self.run_seed) != (None, None):
            raise UserError("--row and --run-seed are of a run: give --run RUN too")
        if self.run is not None and self.save is not None:
            raise UserError("--save keeps what is laid over a pretrained model: give --model PATH")
        if self.surprise is not None and (self.save, self.reading.context) != (None, 0):
            raise UserError("--surprise carries what was read on: leave out --context and --save")
        if self.surprise is not None and self.reading.optimizer == "rms":
            raise UserError("--surprise steps by adam, sgd or not at all: give another --optimizer")
        if (self.reading.optimizer == "rms") != (self.general is not None):
            raise UserError("--general FILE is for --optimizer rms, which takes its scale from it")


def run(config: Config) -> None:
    """Reads, prints both scores and the gain, and saves.

    Raises:
      UserError: model or file cannot be used, or ``save`` is there already.
    """
    if config.save is not None:
        check_new(config.save)
    if not local_path(config.file).is_file():
        raise UserError(f"there is no file {config.file}")
    found = _open(config)
    tokens = read_tokens(found, config.file)
    if config.surprise is not None:
        _surprise(found, config, tokens)
        return
    still = _read(found, tokens, dataclasses.replace(config.reading, optimizer="none"), "as it is")
    print(f"as it is:  {score_of(still.segments)}")
    general = None if config.general is None else read_tokens(found, config.general)
    read = _read(found, tokens, config.reading, "adapting", general)
    print(f"adapting:  {score_of(read.segments)}")
    print(f"gain:      {gain(still.segments, read.segments)}")
    if config.save is None:
        log("not saved: give --save PATH to keep what has adapted")
    else:
        save_adapter(config.save, found, config.reading.adapter, read.fast)
        log(f"saved as {config.save}")


def _open(config: Config) -> Pretrained:
    """What reads."""
    if config.run is None:
        return open_model(config.model or fetched("smollm2", data_directory(None)))
    row = open_row(RowConfig(run=config.run, row=config.row, run_seed=config.run_seed))
    shape = transformer_config(row.config)
    if shape is None:
        raise UserError(
            f"{config.run}: its model is {row.config.model}, and a reader is a transformer that "
            "was trained here, or a pretrained one by --model PATH"
        )
    if config.reading.length != row.config.length:
        log(f"note: it was trained on sequences of {row.config.length}, see --length")
    return Pretrained(shape, row.model, row.start, row.codec, "")


def _surprise(found: Pretrained, config: Config, tokens: np.ndarray) -> None:
    """Reads on and learns, and prints the lines that surprised the model most."""
    how, token_bytes = config.reading, bytes_of(found.codec)[tokens]
    read_bytes = np.cumsum(token_bytes) - token_bytes[:1]  # the first token is not predicted
    fields = {name: getattr(how, name) for name in ("adapter", "learning_rate", "decay", "seed")}
    optimizer = cast(Literal["adam", "sgd", "none"], how.optimizer)
    chosen = ReaderConfig(**fields, optimizer=optimizer, chunk=how.length)
    reader = Reader(found.config, found.params, chosen)
    state, log_probs, nats = reader.start(), [], 0.0
    with Progress("reading", total=len(tokens), first="compiling") as shown:
        for begin in range(0, len(tokens), how.length):
            state, found_here = reader.read(state, tokens[begin : begin + how.length])
            log_probs.append(found_here)
            nats -= float(np.nansum(found_here, dtype=np.float64))
            read = min(len(tokens), begin + how.length)
            bits = nats * NATS_TO_BITS / max(1, read_bytes[read - 1])
            shown.update(read, **{"bits/byte": bits})
    data = found.codec.decode(tokens)
    lines = surprising_lines(data, token_bytes, np.concatenate(log_probs), config.surprise or 0)
    for line in lines:
        text = printable(line.text.decode(errors="replace"))[:200]
        print(f"line {line.number}: {line.excess:.0f} bits more than others of its length: {text}")


def _read(
    found: Pretrained,
    tokens: np.ndarray,
    how: ReadingConfig,
    name: str,
    general: np.ndarray | None = None,
) -> Read:
    total = max(0, len(tokens) - 1 - how.context) // how.length
    with Progress(f"reading, {name}", total=total, first="compiling") as shown:
        return read_along(found, tokens, how, shown.update, general)
