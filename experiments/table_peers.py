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
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from benchmarks.peers import ours
from benchmarks.peers.host import Worker, WorkerFailed, check_agreement, take_turns
from benchmarks.peers.problems import REFERENCE, SMOKE, Name, save
from experiments import harness
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.ranges import Count, Range, Seed, Several
from metaopt.statistics import Interval
from metaopt.training import runs

PeerName = Literal["torch_func", "torchopt", "higher", "torch_compile"]
NEEDED = {"torch_func": "torch", "torch_compile": "torch"}
OURS, RATIO = "ours", "fastest peer / ours"
COLUMNS = {
    "ours": OURS,
    "torch_func": "torch.func",
    "torchopt": "torchopt",
    "higher": "higher",
    "torch_compile": "torch.compile",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.RunConfig):
    """The time of one MAML meta-step, ours beside that of PyTorch libraries.

    Attributes:
      preset: Size of the run: smoke (tiny sizes) or cpu. The defaults of the other flags follow it.
      problems: Rows of the table.
      peers: Libraries beside ours; torch_compile is torch.func compiled, which takes
        minutes before its first step.
      threads: Number of cores that each library may use.
      rounds: Turns of each library.
      turn_seconds: Length of a turn, which is one step at least.
      ready_seconds: Time after which a library that has not warmed up gets no number.
      seed: Seed of parameters and episodes.
    """

    preset: Literal["smoke", "cpu"] = "cpu"
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


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    if preset == "smoke":
        return Config(preset="smoke", rounds=1, turn_seconds=0.0)
    return Config()


def check(config: Config) -> None:
    """Raises UserError if a library is missing, or there are fewer cores."""
    if config.threads > (cores := os.cpu_count() or 1):
        raise UserError(f"threads is {config.threads}, and this machine has {cores} cores")
    for peer in config.peers:
        package = NEEDED.get(peer, peer)
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{peer} needs {package}, which is not installed: pip install -e '.[peers]', "
                "or choose others with --peers"
            )


def measure(config: Config, problem: Name, table: harness.TableRun) -> None:
    """Measures one problem, and adds its row.

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
    add_row(table, problem, times, reports, failures, config.threads)


def add_row(
    table: harness.TableRun,
    problem: str,
    times: Mapping[str, Sequence[float]],
    reports: Mapping[str, dict[str, Any]],
    failures: Mapping[str, str],
    threads: int,
) -> None:
    """Adds a row: milliseconds of each library, None for one that failed, and the ratio.

    Args:
      table: table of the run.
      problem: name of the row.
      times: seconds of a step in each round, by peer.
      reports: what each worker said when it was ready, by peer.
      failures: reason of each that failed, by peer.
      threads: number of threads of each worker.
    """
    versions = runs.versions()
    for said in reports.values():
        versions |= said["versions"]

    def add(column: str, values: Sequence[float], unit: str, **more: Any) -> None:
        found = Interval(
            float(np.median(values)) if len(values) else math.nan, math.nan, len(values)
        )
        table.add(
            problem,
            column,
            found,
            unit=unit,
            device=f"{threads} threads of a {os.cpu_count()}-core CPU",
            limit=True,  # rows are other problems, not contenders
            over="medians over rounds in turn",
            versions=versions,
            quartiles=np.quantile(values, [0.25, 0.75]).tolist() if len(values) else None,
            **more,
        )

    for peer, column in COLUMNS.items():
        if peer in times:
            milliseconds = [1e3 * seconds for seconds in times[peer]]
            note = {name: reports[peer][name] for name in ("form", "loss", "grad_norm")}
            add(column, milliseconds, "ms", **note)
        elif peer in failures:
            add(column, [], "ms", note=failures[peer])
    add(RATIO, _ratio(times), "times", better="higher")


def _ratio(times: Mapping[str, Sequence[float]]) -> list[float]:
    """How many times our step the step of the fastest peer takes, round by round."""
    medians = {peer: np.median(values) for peer, values in times.items() if peer != "ours"}
    if not medians:
        return []
    fastest = times[min(medians, key=lambda peer: medians[peer])]
    return [theirs / ours for theirs, ours in zip(fastest, times["ours"], strict=True)]


def run(config: Config) -> None:
    """Measures the problems, and writes the table."""
    check(config)
    harness.begin()
    table = harness.TableRun(
        "table_peers", config, presets, table="peers", unit="ms", seeds=[config.seed]
    )
    for problem in table.pending(config.problems, row=str):
        measure(config, problem, table)
    table.finish()


if __name__ == "__main__":
    harness.main("table_peers", run, presets, __doc__)
