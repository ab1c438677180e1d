"""The command ``python -m experiments.table_self_improvement``."""

import experiments.table_self_improvement as table
from experiments.table_self_improvement.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main(
        "table_self_improvement", table.run, Config, preset, CHOSEN_BY, table.__doc__ or ""
    )
