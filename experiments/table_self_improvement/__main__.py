"""The command ``python -m experiments.table_self_improvement``."""

from experiments import harness
from experiments import table_self_improvement as table

if __name__ == "__main__":
    harness.main("table_self_improvement", table.run, table.presets, table.__doc__)
