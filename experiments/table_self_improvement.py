"""Runs that start badly, under the closed loop: do they end where well-tuned ones end?

A language model whose learning rate is 30 times too small or too large, with absurd weight
decay, with a sixteenth of the batch, or with all of these at once; MAML with both rates wrong;
MNIST by SGD; a step computed in the worst way; a second run that remembers the first; and
faults that are put in.
Each is compared with a run tuned by Optuna (TPE, 32 whole runs) and with the untreated one. A
second table spends as much in other ways: search, population-based training (Jaderberg et
al., 2017), hypergradients (Baydin et al., 2018; Sharifnassab et al., 2024).

Some 20 minutes on two cores. Seconds are without compiling. A run under the loop goes through as
many tokens as the tuned one; its trials come on top, and are in its time.

    python -m experiments.table_self_improvement --folder FOLDER --mnist.path FILE
    python -m experiments.table_self_improvement --preset smoke
"""

import time

from experiments import command_line
from experiments.table_self_improvement_config import CHOSEN_BY, Config, preset
from experiments.table_self_improvement_report import BASELINES, Report
from experiments.table_self_improvement_rows import baselines, make_rows
from experiments.table_self_improvement_study import Study
from experiments.table_self_improvement_workloads import read_mnist
from metaopt import parallel
from metaopt.errors import UserError
from metaopt.progress import say
from metaopt.runs import open_run


def run(config: Config) -> None:
    """Runs the rows that are not there yet, and writes tables and figure."""
    parallel.set_up_backend()
    if config.mnist.path is not None and (not config.rows or "mnist" in config.rows):
        read_mnist(config)  # now, and not after the other rows, is the time to refuse it
    place = open_run(
        config.root,
        "table_self_improvement",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    study = Study(config, place.directory / "trainings")
    rows = make_rows(study)
    unknown = set(config.rows) - {*rows, "baselines"}
    if unknown:
        raise UserError(f"no row {sorted(unknown)[0]!r}; there are {', '.join(rows)}, baselines")
    command = command_line.command("table_self_improvement", config, preset, CHOSEN_BY)
    report = Report(place, config, command)
    for name, cells in rows.items():
        wanted = not config.rows or name in config.rows
        if name == "mnist" and config.mnist.path is None:
            say("no --mnist.path: the row mnist is left out")
        elif wanted and not report.has(name):
            began = time.monotonic()
            found = list(cells())
            report.add(name, found, time.monotonic() - began)
    if not config.rows or "baselines" in config.rows:
        for name, cell in baselines(study).items():
            if not report.has(name):
                began = time.monotonic()
                report.add(name, [cell()], time.monotonic() - began, BASELINES)
    report.finish()


if __name__ == "__main__":
    command_line.main("table_self_improvement", run, Config, preset, CHOSEN_BY, __doc__ or "")
