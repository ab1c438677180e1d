"""Read a file with a pretrained model that adapts on the way, and say what that gains.

    metaopt read --model PATH --on FILE
    metaopt read --model PATH --on FILE --kind all --learning-rate 1e-4
    metaopt read --model PATH --on FILE --context 768 --save adapter.npz

The file is cut into segments. Each is scored first and stepped on afterwards, so every token is
predicted by a model that has not seen it; beside that the score of the model as it is, on the same
segments with the same context. What has adapted can be saved alone, and laid over the model by
metaopt score and generate.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from metaopt.cli.adapt import check_new
from metaopt.cli.trained import open_model, read_tokens
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.pretrained import Pretrained, ReadingConfig, read_along, save_adapter
from metaopt.pretrained.reading import Read, gain, score_of
from metaopt.ranges import Checked
from metaopt.training.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Read a file and adapt.

    Attributes:
      model: A folder of Hugging Face or a GGUF file.
      on: File to read.
      reading: What adapts, and how.
      general: Text like that of the model's training, which the optimizer rms takes its scale from.
      save: New file for what has adapted; it is not kept if not given.
    """

    model: Path
    on: Path
    reading: tyro.conf.OmitArgPrefixes[ReadingConfig] = dataclasses.field(
        default_factory=ReadingConfig
    )
    general: Path | None = None
    save: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.reading.optimizer == "rms") != (self.general is not None):
            raise UserError("--general FILE is for --optimizer rms, which takes its scale from it")


def run(config: Config) -> None:
    """Reads, prints both scores and the gain, and saves.

    Raises:
      UserError: model or file cannot be used, or ``save`` is there already.
    """
    if config.save is not None:
        check_new(config.save)
    found = open_model(config.model)
    tokens = read_tokens(found, config.on)
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
