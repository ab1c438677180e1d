"""The command ``python -m experiments.adapt_languages``."""

from experiments import adapt_languages as table
from experiments import harness

if __name__ == "__main__":
    harness.main("adapt_languages", table.run, table.presets, table.__doc__)
