"""The command ``python -m experiments.table_dynamic_evaluation``."""

import experiments.table_dynamic_evaluation as table
from experiments.table_dynamic_evaluation.config import CHOSEN_BY, Config, preset
from metaopt.cli import command_line

if __name__ == "__main__":
    command_line.main(
        "table_dynamic_evaluation", table.run, Config, preset, CHOSEN_BY, table.__doc__ or ""
    )
