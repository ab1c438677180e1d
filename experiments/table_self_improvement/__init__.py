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
from pathlib import Path

from experiments.table_self_improvement.config import CHOSEN_BY, Config, preset
from experiments.table_self_improvement.report import BASELINES, Report
from experiments.table_self_improvement.rows import baselines, make_rows
from experiments.table_self_improvement.study import Study
from experiments.table_self_improvement.workloads import Text, mnist, transformer
from metaopt import losses, parallel
from metaopt.cli import command_line
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.training.runs import open_run

BASELINE_ROW = "baselines"


def check(config: Config) -> set[str]:
    """The rows to run.

    Raises:
      UserError: there is none of a name, its data are missing or wrong, or what the config asks
        for exceeds the memory of the device.
    """
    rows = [*make_rows(Study(config, Path())), BASELINE_ROW]
    if unknown := set(config.rows) - set(rows):
        raise UserError(f"no row {sorted(unknown)[0]!r}; there are {', '.join(rows)}")
    lm, markov = config.lm, config.markov
    model = transformer(lm)
    batch, nothing = feasible.tokens(1, lm.length), feasible.tokens(0, 1)
    most = max(*lm.batches, lm.num_held_out, lm.num_test)
    feasible.check([], model.init, losses.next_token(model), batch, nothing, most)
    episodes = max(markov.num_held_out, markov.num_test, markov.tasks_per_step)
    for name, needed, there in (
        ("lm.batches", max(lm.batches), lm.num_examples),
        ("markov.tasks_per_step", markov.tasks_per_step, markov.num_examples),
        ("mnist.batch_size", config.mnist.batch_size, config.mnist.num_train),
    ):
        if needed > there:
            raise UserError(f"{name} {needed} is more than the examples of a run, {there}")
    languages = (feasible.tokens(n, 32) for n in (4, 8))
    size = feasible.num_bytes(episodes, *languages)
    feasible.check_bytes(size, f"to hold {episodes:,} episodes", "lower their number")
    Text(config.folder, lm.length, config.seed)
    if config.mnist.path is not None:
        mnist(config, "fixed")
    return set(config.rows or rows)


def run(config: Config) -> None:
    """Runs the rows that are not there yet, and writes tables and figure."""
    parallel.set_up_backend()
    names = check(config)
    place = open_run(
        config.root,
        "table_self_improvement",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    study = Study(config, place.directory / "trainings")
    rows = make_rows(study)
    command = command_line.command("table_self_improvement", config, preset, CHOSEN_BY)
    report = Report(place, config, command)
    for name, cells in rows.items():
        if name == "mnist" and config.mnist.path is None:
            log("no --mnist.path: the row mnist is left out")
        elif name in names and not report.has(name):
            began = time.monotonic()
            found = list(cells())
            report.add(name, found, time.monotonic() - began)
    if BASELINE_ROW in names:
        for name, cell in baselines(study).items():
            if not report.has(name):
                began = time.monotonic()
                report.add(name, [cell()], time.monotonic() - began, BASELINES)
    report.finish()
