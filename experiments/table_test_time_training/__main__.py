"""The command ``python -m experiments.table_test_time_training``."""

from experiments import harness
from experiments import table_test_time_training as table

if __name__ == "__main__":
    harness.main("table_test_time_training", table.run, table.presets, table.__doc__)
