"""The command ``python -m experiments.table_omniglot``."""

from experiments import harness
from experiments import table_omniglot as table

if __name__ == "__main__":
    harness.main("table_omniglot", table.run, table.presets, table.__doc__)
