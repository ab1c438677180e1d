"""All benchmarks side by side: what is the same in every run, and what is measured.

    python -m benchmarks                            # the sizes of the tables
    python -m benchmarks --only deterministic       # bytes, operations, compilations
    python -m benchmarks --preset smoke             # tiny sizes, to see that all works

The problems are those of `experiments.table_peers` and the forms at one size of
`experiments.table_meta_gradients`. Nothing is written.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers import ours
from benchmarks.peers.problems import REFERENCE, SMOKE, Peer
from benchmarks.peers.worker import import_peer
from experiments import harness, table_meta_gradients, table_peers
from experiments.table_meta_gradients import forms
from metaopt import measure, parallel
from metaopt.cli import command_line
from metaopt.cli.huge_pages import restart_with_huge_pages
from metaopt.console import log
from metaopt.ranges import Checked

MIB, MEGA = 2**20, 1e6
WIDTH = 140
"""Number of characters in a line where there is no terminal."""
COMPILED = "/jax/core/compile/backend_compile_duration"
Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """All benchmarks side by side: what is the same in every run, and what is measured.

    Attributes:
      preset: Sizes of the problems: smoke (tiny) or cpu.
      only: Figures to print: deterministic (bytes, operations, compilations), noisy (times), or
        all.
    """

    preset: Literal["smoke", "cpu"] = "cpu"
    only: Literal["deterministic", "noisy", "all"] = "all"


def run(config: Config) -> None:
    """Prints the tables, each as soon as its figures are there."""
    harness.begin()
    peers = table_peers.presets(config.preset)
    for peer in filter(table_peers.missing, peers.peers):
        log(f"{peer} is left out: {table_peers.missing(peer)} is not installed")
    installed = tuple(peer for peer in peers.peers if not table_peers.missing(peer))
    threads = min(peers.threads, len(parallel.default_devices()))
    peers = dataclasses.replace(peers, peers=installed, threads=threads)
    gradients = table_meta_gradients.presets(config.preset)
    if config.only != "noisy":
        columns = "temporary MiB", "matmul MFLOP", "elementwise MFLOP"
        rows = programs_of_forms(gradients)
        show("Meta-gradients: deterministic", ("size", "form", *columns), rows)
        columns = "problem", "library", "form", *columns, "compilations", "later"
        show("A step beside JAX peers: deterministic", columns, programs_of_peers(peers))
    if config.only != "deterministic":
        columns = "size", "form", "ms", "time / naive", "of the matmul peak"
        show("Meta-gradients: noisy", columns, times_of_forms(gradients))
        columns = "ms in turns", "ms alone", "s cold start", "time / ours"
        columns = "problem", "library", "form", *columns
        show("A step beside peers: noisy", columns, times_of_peers(peers))


def show(title: str, columns: Sequence[str], rows: Iterator[Row]) -> None:
    """Prints a table, with a log line for every row that is there."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        log(", ".join(row[:3]))
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def programs_of_forms(config: table_meta_gradients.Config) -> Iterator[Row]:
    """Bytes and operations of every form of the meta-gradient, at the size at which it is timed."""
    size = config.time_size

    def temp(form: forms.Form) -> int:
        compiled = measure.compile_for(forms.estimate(form, size), *forms.shapes(size))
        return measure.compiled_memory(compiled).temp

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(forms.FORMS, pool.map(temp, forms.FORMS.values()), strict=True)
        for name, count in found:
            yield str(size), name, *figures(count, table_meta_gradients.operations(name, size))


def programs_of_peers(config: table_peers.Config) -> Iterator[Row]:
    """The same of a step of ours in every form and of the JAX peers in the first, and compilations.

    All devices compute the operations, each has the bytes.
    """
    libraries = [table_peers.OURS, *(peer for peer in table_peers.JAX if peer in config.peers)]
    for problem in config.problems:
        data = ours.make_data((SMOKE if config.preset == "smoke" else REFERENCE)[problem])
        for library in libraries:
            candidates = import_peer(library).candidates(data, config.threads)
            for form in list(candidates)[: None if library == table_peers.OURS else 1]:
                row = problem, table_peers.COLUMNS[library], form
                yield *row, *figures_of_peer(candidates[form]())


def figures_of_peer(peer: Peer) -> Row:
    """Bytes and operations of a step, compilations in the first call and in two more."""
    assert peer.program is not None
    function, args = peer.program
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    compilations = count_compilations(peer.first), count_compilations(peer.step, peer.step)
    temp = measure.compiled_memory(measure.compile_for(function, *shapes)).temp
    counted = measure.count_flops(function, *shapes)
    a_step = measure.Flops(*(count // peer.steps_per_call for count in counted))
    return *figures(temp, a_step), *map(str, compilations)


def figures(temp: int, counted: measure.Flops) -> Row:
    """The texts of bytes and operations."""
    counts = (f"{count / MEGA:.3f}" for count in (counted.matmul, counted.elementwise))
    return f"{temp / MIB:.3f}", *counts


def count_compilations(*calls: Callable[[], Any]) -> int:
    """The number of programs that are compiled, or taken from the cache, in some calls."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        names.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for call in calls:
            call()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return names.count(COMPILED)


def times_of_forms(config: table_meta_gradients.Config) -> Iterator[Row]:
    """Times of every form of the meta-gradient in turns, and the share of the peak they reach."""
    size, peak = config.time_size, measure.matmul_peak(dtype=config.time_size.compute_dtype)
    timings = table_meta_gradients.time_forms(config, size, list(forms.FORMS))
    naive = timings[table_meta_gradients.NAIVE].samples
    for name, timing in timings.items():
        rate = table_meta_gradients.operations(name, size).matmul / timing.median
        ratio = np.median(np.divide(timing.samples, naive))
        yield str(size), name, f"{1e3 * timing.median:.3f}", f"{ratio:.3f}", f"{rate / peak:.3f}"


def times_of_peers(config: table_peers.Config) -> Iterator[Row]:
    """Times of every library on the problems, and how many times ours its step takes."""
    for problem in config.problems:
        measured, failures = table_peers.measure(config, problem)
        for peer, found in measured.items():
            times = (f"{1e3 * np.median(seconds):.3f}" for seconds in (found.turns, found.alone))
            ratio = np.median(table_peers.ratio(measured, [peer]))
            cold = f"{found.cold_start:.1f}"
            name = table_peers.COLUMNS[peer]
            yield problem, name, found.form, *times, cold, f"{ratio:.3f}"
        for peer, reason in failures.items():
            yield problem, table_peers.COLUMNS[peer], reason, *["-"] * 4


def main(args: Sequence[str]) -> None:
    """Runs a command line."""
    with command_line.one_line_exits(args):
        run(command_line.parse(Config, args, "python -m benchmarks", __doc__))


if __name__ == "__main__":
    restart_with_huge_pages()
    main(sys.argv[1:])
