"""Generate text from a trained row, as it is or adapted.

    metaopt generate runs/adapt_languages/cpu-TIME --prompt TEXT
    metaopt generate RUN --on FILE                  # adapted to a file first
    metaopt generate RUN --adapted adapted.npz --length 500 --temperature 0.5

Without a prompt it continues the end of the file, or a single token if there is none. The text of
Markov languages is letters.
"""

import dataclasses
from pathlib import Path

import numpy as np

from metaopt.cli.trained import RowConfig, log_adapting, open_row, read_tokens, require_tokens
from metaopt.console import log, printable
from metaopt.errors import UserError
from metaopt.loaded import Loaded
from metaopt.ranges import Count, NotNegative, Seed
from metaopt.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RowConfig):
    """Generate text.

    Attributes:
      adapted: File of adapted parameters, as metaopt adapt saves it.
      on: File to adapt to first, all of it, as metaopt adapt does.
      prompt: Text to continue.
      length: Number of tokens to add.
      temperature: Temperature of the draws; 0 takes the likeliest token each time.
      seed: Seed of the draws and of the order of the sequences of a file.
    """

    adapted: Path | None = None
    on: Path | None = None
    prompt: str | None = None
    length: Count = 200
    temperature: NotNegative = 0.7
    seed: Seed = 0


def run(config: Config) -> None:
    """Prints the prompt and what follows.

    Raises:
      UserError: there is no such run or row, a file cannot be used, or the prompt is not of the
        vocabulary.
    """
    if config.adapted is not None and config.on is not None:
        raise UserError("--adapted is adapted already: give it or --on, not both")
    found = open_row(config)
    try:
        prompt = found.tokens(config.prompt or "")
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    params = found.start if config.adapted is None else found.read(config.adapted)
    if config.on is not None:
        tokens = read_tokens(found, config.on)
        require_tokens(found, config.on, tokens, found.sequences_a_step)
        params = _adapt(found, tokens, config.seed)
        prompt = prompt if len(prompt) else tokens[-found.config.length :]
    was = "not adapted" if config.adapted is None and config.on is None else "adapted"
    log(f"generating {config.length} tokens, {was}")
    text = found.generate(
        params, prompt, config.length, temperature=config.temperature, seed=config.seed
    )
    print("\n".join(map(printable, text.split("\n"))))


def _adapt(found: Loaded, tokens: np.ndarray, seed: int) -> Params:
    log_adapting(found, found.steps_of(tokens), None, None)
    return found.adapt(tokens, seed=seed)
