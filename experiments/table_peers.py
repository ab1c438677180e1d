"""The time of one MAML meta-step (Finn et al., 2017), ours beside that of PyTorch libraries.

Every library computes the same function from the same parameters and episodes: its
first meta-loss and gradient norm are held against ours, and one that differs is an error.
Each runs in a process of its own, on the same cores, in the fastest of its forms, and
they step in turn, one at a time, so that all see the same machine.

    pip install -e '.[peers]'
    python -m experiments.table_peers                   # under ten minutes on two cores
    python -m experiments.table_peers --preset smoke    # tiny sizes, to see that all works
"""

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from benchmarks.peers import ours, report
from benchmarks.peers.host import Worker, WorkerFailed, check_agreement, take_turns
from benchmarks.peers.problems import REFERENCE, SMOKE, Name, save
from metaopt import parallel
from metaopt.cli import command_line
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import write_json_lines
from metaopt.ranges import Checked, Count, Range, Seed, Several
from metaopt.reporting import tables
from metaopt.reporting.results import RecordCell, cell_maker
from metaopt.training.runs import open_run

PeerName = Literal["torch_func", "torchopt", "higher", "torch_compile"]
NEEDED = {"torch_func": "torch", "torch_compile": "torch"}
CHOSEN_BY = ("preset",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """The time of one MAML meta-step, ours beside that of PyTorch libraries.

    Attributes:
      preset: smoke (tiny sizes) or reference; the defaults of all the rest follow it.
      problems: rows of the table.
      peers: libraries beside ours; torch_compile is torch.func compiled, which takes
        minutes before its first step.
      threads: cores that each library may use.
      rounds: turns of each library.
      turn_seconds: a turn is so long, and one step at least.
      ready_seconds: a library that takes longer to warm up gets no number.
      seed: of parameters and episodes.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "reference"] = "reference"
    problems: Annotated[tuple[Name, ...], Several(different=True)] = (
        "sinusoid",
        "lm",
        "omniglot",
    )
    peers: tuple[PeerName, ...] = ("torch_func", "torchopt", "higher")
    threads: Annotated[int, Range(1, 4096)] = 2
    rounds: Count = 9
    turn_seconds: Annotated[float, Range(0, 1e5)] = 0.3
    ready_seconds: Annotated[float, Range(0.1, 1e5)] = 600.0
    seed: Seed = 0
    root: str = "runs"
    run_dir: str | None = None


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset``."""
    name = flags.get("preset", "reference")
    if name == "smoke":
        return Config(preset="smoke", rounds=1, turn_seconds=0.0)
    if name != "reference":
        raise UserError(f"unknown preset {name!r}: choose smoke or reference")
    return Config()


def check(config: Config) -> None:
    """Raises UserError where a library is missing, or there are fewer cores."""
    if config.threads > (cores := os.cpu_count() or 1):
        raise UserError(f"threads is {config.threads}, and this machine has {cores} cores")
    for peer in config.peers:
        package = NEEDED.get(peer, peer)
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{peer} needs {package}, which is not installed: pip install -e '.[peers]', "
                "or choose others with --peers"
            )


def measure(config: Config, problem: Name, cell: RecordCell) -> list[dict[str, Any]]:
    """The records of one problem.

    Raises:
      UserError: our own step fails, or a peer computes another function.
    """
    sizes = (SMOKE if config.preset == "smoke" else REFERENCE)[problem]
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as data, contextlib.ExitStack() as stack:
        save(Path(data) / problem, ours.make_data(sizes, config.seed))
        workers: dict[str, Worker] = {}
        for peer in ("ours", *config.peers):
            try:
                worker = Worker(peer, problem, Path(data), config.threads, config.ready_seconds)
            except WorkerFailed as reason:
                if peer == "ours":
                    raise UserError(f"our own step failed on {problem}: {reason}") from None
                failures[peer] = str(reason)
                log(f"{problem}: {peer} has no number: {reason}")
                continue
            workers[peer] = stack.enter_context(worker)
            log(f"{problem}: {peer} is ready ({worker.report['form']})")
        reports = {peer: worker.report for peer, worker in workers.items()}
        check_agreement(problem, reports)
        times = take_turns(workers, config.rounds, config.turn_seconds)
    return report.records(cell, problem, times, reports, failures, config.threads)


def run(config: Config) -> None:
    """Measures the problems that an unfinished run lacks, and writes the table."""
    check(config)
    parallel.set_up_backend()
    place = open_run(
        config.root,
        "table_peers",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    cell = cell_maker(
        table="peers",
        preset=config.preset,
        command=command_line.command("table_peers", config, preset, CHOSEN_BY),
        seeds=[config.seed],
        episodes=0,
    )
    records = tables.read_records(place.results)
    for problem in config.problems:
        if problem not in {record["row"] for record in records}:
            records += measure(config, problem, cell)
            write_json_lines(place.results, records)
    (table,) = tables.arrange(records)
    tables.write(place.directory, [table])
    place.finish()
    console = Console()
    console.print(*tables.to_rich(table, console.width), sep="\n")
    console.print(f"written to {place.directory}", markup=False, highlight=False)


if __name__ == "__main__":
    command_line.main("table_peers", run, Config, preset, CHOSEN_BY, __doc__ or "")
