"""Runs that start badly, under the closed loop: do they end where well-tuned ones end?

A language model whose learning rate is 30 times too small or too large, with absurd weight
decay, with a sixteenth of the batch, or with all of these at once; MAML with both rates wrong;
MNIST by SGD; a step computed in the worst way; a second run that remembers the first; faults that
are put in, each of which rings an alarm that has a response; and a text whose domains have unequal
parts of the data. Each is compared with a run tuned by Optuna (TPE, 32 whole runs) and with the
untreated one. A second table spends as much in other ways: search, population-based training
(Jaderberg et al., 2017), hypergradients (Baydin et al., 2018; Sharifnassab et al., 2024),
Schedule-Free AdamW (Defazio et al., 2024).

About half an hour on two cores. Seconds are without compiling. A run under the loop goes through as
many tokens as the tuned one; its trials come on top, and are in its time.

    python -m experiments.table_self_improvement --folder FOLDER --mnist.path FILE
    python -m experiments.table_self_improvement --preset smoke
"""

from pathlib import Path

from experiments import harness
from experiments.table_self_improvement.config import Config, presets
from experiments.table_self_improvement.domains import SHARES_ROWS
from experiments.table_self_improvement.report import BASELINES, SHARES, TABLE, add_cells, draw
from experiments.table_self_improvement.rows import baselines, make_rows
from experiments.table_self_improvement.study import Study
from experiments.table_self_improvement.workloads import Text, mnist, transformer
from metaopt import losses
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError

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
    lm, markov, faults = config.lm, config.markov, config.faults
    model = transformer(lm)
    batch, nothing = feasible.tokens(1, lm.length), feasible.tokens(0, 1)
    text, domains = Text(config.folder, max(lm.length, faults.length), config.seed), config.domains
    most = max(*lm.batches, lm.num_held_out, lm.num_test, faults.batch_size, faults.stalled_batch)
    most = max(most, len(text.domains) * max(domains.num_held_out, domains.num_test))
    feasible.check([], model.init, losses.next_token(model), batch, nothing, most)
    episodes = max(markov.num_held_out, markov.num_test, markov.tasks_per_step)
    for name, needed, there in (
        ("lm.batches", max(lm.batches), lm.num_examples),
        ("lm.batches", max(lm.batches), domains.num_examples),
        ("markov.tasks_per_step", markov.tasks_per_step, markov.num_examples),
        ("mnist.batch_size", config.mnist.batch_size, config.mnist.num_train),
    ):
        if needed > there:
            raise UserError(f"{name} {needed} is more than the examples of a run, {there}")
    languages = (feasible.tokens(n, 32) for n in (4, 8))
    size = feasible.num_bytes(episodes, *languages)
    feasible.check_bytes(size, f"to hold {episodes:,} episodes", "lower their number")
    if config.mnist.path is not None:
        mnist(config, "fixed")
    return set(config.rows or rows)


def run(config: Config) -> None:
    """Runs the rows that are not there yet, and writes tables and figures."""
    harness.begin()
    names = check(config)
    table = harness.TableRun(
        "table_self_improvement", config, presets, table=TABLE, unit="", seeds=[config.seed]
    )
    study = Study(config, table.directory / "trainings")
    rows = {name: row for name, row in make_rows(study).items() if name in names}
    if "mnist" in rows and config.mnist.path is None:
        log("no --mnist.path: the row mnist is left out")
        del rows["mnist"]
    for name in table.pending(rows, str):
        add_cells(table, name, rows[name](), SHARES if name in SHARES_ROWS else TABLE)
    others = baselines(study) if BASELINE_ROW in names else {}
    for name in table.pending(others, str):
        add_cells(table, name, [others[name]()], BASELINES)
    draw(table, config)
    table.finish()
