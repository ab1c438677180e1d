"""Score a file: the loss of a trained row on all of it, with and without adaptation.

    metaopt score runs/adapt_languages/cpu-TIME --on FILE
    metaopt score RUN --on FILE --adapted adapted.npz
    metaopt score --model PATH --on FILE              # a pretrained model
    metaopt score --model PATH --on FILE --context 768

Text is scored in bits a byte, other tasks in nats a token. The file is cut into segments of the
run's length, and every token but the first is predicted from those before it in its segment.
A pretrained model has segments of --length tokens, with --context tokens read before each. Nothing
is adapted here. A file that was adapted to scores too well: score another one.
"""

import dataclasses
from pathlib import Path

from metaopt.cli.trained import ModelConfig, open_model, open_row, read_tokens
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.pretrained import score
from metaopt.ranges import CountOr0, Length
from metaopt.training.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Score a file.

    Attributes:
      on: File to score.
      adapted: File of adapted parameters, as metaopt adapt saves it.
      length: Tokens of a segment of a pretrained model.
      context: Tokens that it reads before each segment, those at its beginning excepted.
    """

    on: Path
    adapted: Path | None = None
    length: Length = 256
    context: CountOr0 = 0

    def __post_init__(self):
        super().__post_init__()
        if self.context % self.length:
            raise UserError(f"--context {self.context} is no multiple of --length {self.length}")


def run(config: Config) -> None:
    """Prints the score without adaptation and, if there is one, with it.

    Raises:
      UserError: there is no such run or row, a file cannot be used, or the adapted parameters are
        those of another row or run.
    """
    if config.model is not None:
        if config.adapted is not None:
            raise UserError("--adapted is of a run: leave it out with --model")
        model = open_model(config.model, config.adapter)
        tokens = read_tokens(model, config.on)
        log(f"scoring {config.on}")
        with Progress(
            "scoring", total=-(-(len(tokens) - 1) // config.length), first="compiling"
        ) as shown:
            found = score(model, tokens, config.length, config.context, shown.update)
        print(f"{'not adapted' if config.adapter is None else 'adapted'}: {found}")
        return
    found = open_row(config)
    adapted = None if config.adapted is None else found.read(config.adapted)
    tokens = read_tokens(found, config.on)
    log(f"scoring {config.on}")
    print(f"not adapted: {found.score(found.start, tokens)}")
    if adapted is not None:
        print(f"adapted:     {found.score(adapted, tokens)}")
