"""The time of one MAML meta-step (Finn et al., 2017), ours beside that of its peers.

These are PyTorch libraries, and JAX as a user would write it: an inner loop in plain Python, or
one with `optax.sgd` and `jax.lax.scan`. Every library computes the same function from the same
parameters and episodes in float32: its first meta-loss and gradient norm are held against ours,
and one that differs is an error. Each runs in a process of its own, in the fastest of its forms,
on one core or on all. Three things are timed:

* cold start: from the start of the process to the end of its first call, with imports,
  compilation and an empty compilation cache;
* alone: its next steps, before any other process takes part;
* in turns: one library after the other steps, so that all see the same machine. The first step
  of each turn is not counted.

For small models ours does several meta-steps in one compiled call, which its form says; a step's
time is then the call's divided by their number. A loop of a training may do so in JAX, on episodes
that it has or draws; in eager PyTorch there is no such call, and the JAX peers have one step a
call, as most programs do.

    pip install -e '.[peers]'
    python -m experiments.table_peers                   # half an hour on two cores
    python -m experiments.table_peers --preset smoke    # tiny sizes, to see that all works
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from benchmarks.peers import ours
from benchmarks.peers.host import (
    Form,
    Worker,
    WorkerFailed,
    check_agreement,
    fastest_form,
    take_turns,
)
from benchmarks.peers.problems import REFERENCE, SMOKE, Name, save
from experiments import harness
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.ranges import Count, Range, Seed, Several
from metaopt.statistics import Interval
from metaopt.training import runs

PeerName = Literal["torch_func", "torchopt", "higher", "torch_compile", "jax_plain", "jax_optax"]
NEEDED = {"torch_func": "torch", "torch_compile": "torch", "jax_plain": "jax", "jax_optax": "jax"}
OURS, RATIO, JAX_RATIO = "ours", "fastest peer / ours", "fastest JAX peer / ours"
TORCH = {
    "torch_func": "torch.func",
    "torchopt": "torchopt",
    "higher": "higher",
    "torch_compile": "torch.compile",
}
JAX = {"jax_plain": "JAX, unrolled", "jax_optax": "JAX, optax and scan"}
COLUMNS = {"ours": OURS} | TORCH | JAX


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.RunConfig):
    """The time of one MAML meta-step, ours beside that of PyTorch libraries and of plain JAX.

    Attributes:
      preset: Size of the run: smoke (tiny sizes) or cpu. The defaults of the other flags follow it.
      problems: Rows of the table.
      peers: Libraries beside ours; torch_compile is torch.func compiled, which takes
        minutes before its first step.
      threads: Number of cores that each library may use.
      rounds: Turns of each library.
      turn_seconds: Length of a turn, which is one step at least after the first.
      alone_seconds: Length of the turn that each library takes before the others.
      ready_seconds: Time after which a library that is not ready gets no number.
      seed: Seed of parameters and episodes.
    """

    preset: Literal["smoke", "cpu"] = "cpu"
    problems: Annotated[tuple[Name, ...], Several(different=True)] = (
        "sinusoid",
        "lm",
        "omniglot",
    )
    peers: tuple[PeerName, ...] = ("torch_func", "torchopt", "higher", "jax_plain", "jax_optax")
    threads: Annotated[int, Range(1, 4096)] = 2
    rounds: Count = 9
    turn_seconds: Annotated[float, Range(0, 1e5)] = 0.3
    alone_seconds: Annotated[float, Range(0, 1e5)] = 3.0
    ready_seconds: Annotated[float, Range(0.1, 1e5)] = 600.0
    seed: Seed = 0


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    if preset == "smoke":
        return Config(preset="smoke", rounds=1, turn_seconds=0.0, alone_seconds=0.0)
    return Config()


def check(config: Config) -> None:
    """Raises UserError if a library is missing, or there are fewer cores."""
    if config.threads > (cores := os.cpu_count() or 1):
        raise UserError(f"threads is {config.threads}, and this machine has {cores} cores")
    for peer in config.peers:
        if package := missing(peer):
            raise UserError(
                f"{peer} needs {package}, which is not installed: pip install -e '.[peers]', "
                "or choose others with --peers"
            )


def missing(peer: PeerName) -> str | None:
    """The package that a peer needs, if it is not installed."""
    package = NEEDED.get(peer, peer)
    return package if importlib.util.find_spec(package) is None else None


class Measured(NamedTuple):
    """What was measured of a library on a problem.

    Attributes:
      form: the fastest of its forms, which was measured.
      report: what it said at the end of its first call: loss, grad_norm and versions.
      cold_start: seconds until then.
      alone: seconds of its next steps.
      turns: median seconds of a step in each round in turn with the others.
    """

    form: str
    report: dict[str, Any]
    cold_start: float
    alone: Sequence[float]
    turns: Sequence[float]


def measure(config: Config, problem: Name) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measures one problem.

    Returns:
      What was measured of each library, ours first, and why others have no number.

    Raises:
      UserError: our own step fails, or a peer computes another function.
    """
    sizes = (SMOKE if config.preset == "smoke" else REFERENCE)[problem]
    failures: dict[str, str] = {}
    forms: dict[str, Form] = {}
    workers: dict[str, Worker] = {}
    alone: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as data, contextlib.ExitStack() as stack:
        save(Path(data) / problem, ours.make_data(sizes, config.seed))
        for peer in (OURS, *config.peers):
            args = peer, problem, Path(data)
            try:
                form = fastest_form(*args, config.threads, config.ready_seconds)
                worker = Worker(*args, form.threads, config.ready_seconds, form.name)
            except WorkerFailed as reason:
                if peer == OURS:
                    raise UserError(f"our own step failed on {problem}: {reason}") from None
                failures[peer] = str(reason)
                log(f"{problem}: {peer} has no number: {reason}")
                continue
            forms[peer], workers[peer] = form, stack.enter_context(worker)
            alone[peer] = worker.steps(config.alone_seconds)
            log(f"{problem}: {peer} is ready ({form})")
        check_agreement(problem, {peer: worker.report for peer, worker in workers.items()})
        turns = take_turns(workers, config.rounds, config.turn_seconds)
    measured = {
        peer: Measured(str(forms[peer]), w.report, w.cold_start, alone[peer], turns[peer])
        for peer, w in workers.items()
    }
    return measured, failures


def add_row(
    table: harness.TableRun,
    problem: str,
    measured: Mapping[str, Measured],
    failures: Mapping[str, str],
    threads: int,
) -> None:
    """Adds a row to each of the three tables: None for a library that failed, and the ratios.

    Args:
      table: table of the run.
      problem: name of the row.
      measured: what was measured, by peer.
      failures: reason of each that failed, by peer.
      threads: most threads of a library.
    """
    versions = runs.versions()
    for found in measured.values():
        versions |= found.report["versions"]

    def add(column: str, values: Sequence[float], unit: str, over: str, **more: Any) -> None:
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
            over=over,
            versions=versions,
            quartiles=np.quantile(values, [0.25, 0.75]).tolist() if len(values) else None,
            **more,
        )

    in_turn = "medians over rounds in turn"
    for peer, column in COLUMNS.items():
        if peer in failures:
            add(column, [], "ms", in_turn, note=failures[peer])
        if peer not in measured:
            continue
        found = measured[peer]
        note = {"form": found.form} | {n: found.report[n] for n in ("loss", "grad_norm")}
        add(column, _in_ms(found.turns), "ms", in_turn, **note)
        steps = {"table": "peers/alone", "form": found.form}
        add(column, _in_ms(found.alone), "ms", "median over steps of a process alone", **steps)
        first = {"table": "peers/cold_start", "form": found.form}
        add(column, [found.cold_start], "s", "from the start to the end of the first call", **first)
    for column, peers in ((RATIO, TORCH), (JAX_RATIO, JAX)):
        add(column, ratio(measured, peers), "times", in_turn, better="higher")


def _in_ms(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]


def ratio(measured: Mapping[str, Measured], peers: Iterable[str]) -> list[float]:
    """How many times our step the step of the fastest of some peers takes, round by round."""
    theirs = [measured[peer].turns for peer in peers if peer in measured]
    if not theirs:
        return []
    fastest = min(theirs, key=np.median)
    return [slower / ours for slower, ours in zip(fastest, measured[OURS].turns, strict=True)]


def run(config: Config) -> None:
    """Measures the problems, and writes the table."""
    check(config)
    harness.begin()
    table = harness.TableRun(
        "table_peers", config, presets, table="peers", unit="ms", seeds=[config.seed]
    )
    for problem in table.pending(config.problems, row=str):
        add_row(table, problem, *measure(config, problem), config.threads)
    table.finish()


if __name__ == "__main__":
    harness.main("table_peers", run, presets, __doc__)
