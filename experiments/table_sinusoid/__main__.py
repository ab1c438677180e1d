"""The command ``python -m experiments.table_sinusoid``."""

import experiments.table_sinusoid as table
from experiments.table_sinusoid.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main("table_sinusoid", table.run, Config, preset, CHOSEN_BY, table.__doc__)
