"""The command ``python -m experiments.table_bayes_gap``."""

import experiments.table_bayes_gap as table
from experiments.table_bayes_gap.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main("table_bayes_gap", table.run, Config, preset, CHOSEN_BY, table.__doc__)
