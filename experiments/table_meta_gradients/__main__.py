"""The command ``python -m experiments.table_meta_gradients``."""

from experiments import harness, table_meta_gradients

if __name__ == "__main__":
    harness.main(
        "table_meta_gradients",
        table_meta_gradients.run,
        table_meta_gradients.presets,
        table_meta_gradients.__doc__,
    )
