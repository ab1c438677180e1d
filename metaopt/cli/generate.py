"""Generate text from a trained row, as it is or adapted.

    metaopt generate runs/adapt_languages/cpu-TIME --prompt TEXT
    metaopt generate RUN --on FILE                  # adapted to a file first
    metaopt generate RUN --adapted adapted.npz --length 500 --temperature 0.5
    metaopt generate --model PATH --prompt TEXT     # a pretrained model, as it draws

Without a prompt it continues the end of the file, or a single token if there is none. The text of
Markov languages is letters.
"""

import codecs
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from metaopt.cli.trained import (
    ModelConfig,
    log_adapting,
    open_model,
    open_row,
    read_tokens,
    require_tokens,
)
from metaopt.console import log, printable
from metaopt.errors import UserError
from metaopt.loaded import Loaded
from metaopt.pretrained import Pretrained
from metaopt.ranges import Count, NotNegative, Seed
from metaopt.sequence.decoding import stream
from metaopt.training.progress import Progress
from metaopt.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
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
    if config.model is not None and (config.adapted or config.on):
        raise UserError("--adapted and --on are of a run: leave them out with --model")
    if config.model is not None:
        _stream(config, open_model(config.model, config.adapter))
        return
    found = open_row(config)
    prompt = _prompt(found.tokens, config)
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
    steps = found.steps_of(tokens)
    log_adapting(found, steps, None, None)
    with Progress("adapting", total=steps, first="compiling") as shown:
        return found.adapt(tokens, seed=seed, update=shown.update)


def _prompt(encode: Callable[[bytes], np.ndarray], config: Config) -> np.ndarray:
    try:
        return encode((config.prompt or "").encode("utf-8", "surrogateescape"))
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None


def _stream(config: Config, found: Pretrained) -> None:
    """Prints the text of a pretrained model while it is drawn, and how fast that was."""
    prompt = _prompt(found.codec.encode, config)
    prompt = prompt if len(prompt) else found.codec.encode(found.codec.opening)
    was = "not adapted" if config.adapter is None else "adapted"
    log(f"generating {config.length} tokens, {was}")
    key = jax.random.key(config.seed)
    drawn = stream(found.config, found.params, prompt, config.length, key, config.temperature)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    _show(text.decode(found.codec.decode(prompt)))
    began = None
    for token in drawn:
        began = began or time.monotonic()  # when all is compiled and the prompt read
        _show(text.decode(found.codec.decode([token])))
    print(printable(text.decode(b"", final=True)))
    if began is not None and config.length > 1:
        log(f"{(config.length - 1) / (time.monotonic() - began):.1f} tokens/s")


def _show(text: str) -> None:
    """A part of a text, with line breaks as such, and without one at its end."""
    for part in re.split("(\n)", text):
        print(part if part == "\n" else printable(part), end="", flush=True)
