"""Score a file: the loss of a trained row on all of it, with and without adaptation.

    metaopt score runs/adapt_languages/cpu-TIME --on FILE
    metaopt score RUN --on FILE --adapted adapted.npz

Text is scored in bits a byte, other tasks in nats a token. The file is cut into segments of the
run's length, and every token but the first is predicted from those before it in its segment.
Nothing is adapted here. A file that was adapted to scores too well: score another one.
"""

import dataclasses
from pathlib import Path

from metaopt.cli.trained import RowConfig, open_row, read_tokens
from metaopt.console import log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RowConfig):
    """Score a file.

    Attributes:
      on: File to score.
      adapted: File of adapted parameters, as metaopt adapt saves it.
    """

    on: Path
    adapted: Path | None = None


def run(config: Config) -> None:
    """Prints the score without adaptation and, if there is one, with it.

    Raises:
      UserError: there is no such run or row, a file cannot be used, or the adapted parameters are
        those of another row or run.
    """
    found = open_row(config)
    adapted = None if config.adapted is None else found.read(config.adapted)
    tokens = read_tokens(found, config.on)
    log(f"scoring {config.on}")
    print(f"not adapted: {found.score(found.start, tokens)}")
    if adapted is not None:
        print(f"adapted:     {found.score(adapted, tokens)}")
