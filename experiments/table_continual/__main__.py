"""The command ``python -m experiments.table_continual``."""

from experiments import harness
from experiments import table_continual as table

if __name__ == "__main__":
    harness.main("table_continual", table.run, table.presets, table.__doc__)
