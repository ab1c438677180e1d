"""The command ``python -m experiments.table_omniglot``."""

import experiments.table_omniglot as table
from experiments.table_omniglot.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main("table_omniglot", table.run, Config, preset, CHOSEN_BY, table.__doc__)
