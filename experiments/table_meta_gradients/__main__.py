"""The command ``python -m experiments.table_meta_gradients``."""

import experiments.table_meta_gradients as table
from experiments.table_meta_gradients import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main(
        "table_meta_gradients", table.run, Config, preset, CHOSEN_BY, table.__doc__ or ""
    )
