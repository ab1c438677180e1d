"""The command ``python -m experiments.table_inner_optimizers``."""

import experiments.table_inner_optimizers as table
from experiments.table_inner_optimizers.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main(
        "table_inner_optimizers", table.run, Config, preset, CHOSEN_BY, table.__doc__ or ""
    )
