"""The command ``python -m experiments.table_dynamic_evaluation``."""

from experiments import harness
from experiments import table_dynamic_evaluation as table

if __name__ == "__main__":
    harness.main("table_dynamic_evaluation", table.run, table.presets, table.__doc__)
