"""The command ``python -m experiments.adapt_languages``."""

import experiments.adapt_languages as table
from experiments.adapt_languages.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main("adapt_languages", table.run, Config, preset, CHOSEN_BY, table.__doc__)
