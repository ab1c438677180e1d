"""What every table shares: presets, command line, run directory, resume, records and files.

A table is a config with presets, a list of rows and a function from a row to numbers;
`experiments.table_linear` is the example to read. The rest is here:

    def run(config: Config) -> None:
        train_fn = harness.begin(config)
        rows = harness.select(make_rows(config), config.rows)
        table = harness.TableRun("table_linear", config, presets, table="linear", unit="nats")
        for row in table.pending(rows):  # those that an earlier run of this config has not finished
            losses = ...                 # the numbers of the row
            table.add(row.name, "5 steps", interval(losses, tasks))
        table.finish()

    if __name__ == "__main__":
        harness.main("table_linear", run, presets, __doc__)
"""

import argparse
import dataclasses
import functools
import inspect
import io
import itertools
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import jax
import numpy as np
from rich.console import Console

from metaopt import parallel
from metaopt.cli import command_line
from metaopt.cli.command_line import BARE
from metaopt.comparison import (
    Comparison,
    ComparisonConfig,
    Row,
    RowResult,
    check_settings,
    select,
)
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.files import check_directory, write_bytes, write_json_lines, write_text
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.npz import read_npz
from metaopt.ranges import Checked
from metaopt.reporting import plots, tables
from metaopt.reporting.page import PAGE, page
from metaopt.reporting.results import Published, cell_maker, step_column
from metaopt.self_improvement.improving import IMPROVING, SEARCHED, Searched, improving_train
from metaopt.self_improvement.memory import Memory
from metaopt.statistics import Interval, interval
from metaopt.training.loop import train
from metaopt.training.runs import as_json, open_run, slug
from metaopt.training.types import TrainFn
from metaopt.types import Params

__all__ = [
    "RunConfig",
    "TableRun",
    "TrainedConfig",
    "as_saved",
    "begin",
    "check_rows",
    "command",
    "compare",
    "curve",
    "main",
    "parse",
    "select",
    "step_column",
    "step_columns",
]

STEPS = (0, 1, 2, 5, 10)
"""Numbers of inner steps that have a column in the tables of adaptation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """What the config of every table has.

    Attributes:
      preset: Size of the run: smoke (tiny: a minute or two), cpu or gpu. The defaults of the other
        flags follow it.
      root: Directory of all runs.
      run_dir: Directory of this run instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    root: str = "runs"
    run_dir: str | None = None


Improve = Literal["off", "on", "report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprovedConfig(RunConfig):
    """What the config of a table has that trains.

    Attributes:
      improve: Train under the closed loop, which changes rates if that helps; --improve alone is
        on. With report it says what it would change, and why, and changes nothing.
      memory: File of the memory of past runs, for the closed loop; the file or the URL in
        $METAOPT_MEMORY if not given.
    """

    improve: Improve = "off"
    memory: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.memory is not None and "://" in self.memory:
            raise UserError(
                "--memory takes a file: flags are written down, and the URL of a database may "
                "hold a password; give it in $METAOPT_MEMORY"
            )
        if self.memory is not None and self.improve == "off":
            raise UserError("--memory is of the closed loop: give --improve too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedConfig(ImprovedConfig):
    """What the config of a table has whose rows are trained.

    Attributes:
      rows: Names of the rows to run; all if none.
    """

    rows: tuple[str, ...] = ()


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
Presets = Callable[..., AnyConfig]
"""Keyword arguments, all with defaults and named like fields of the config, to a config.

``presets(preset="cpu", protocol="li")`` is the default of every other flag of
``--preset cpu --protocol li``: the names of its arguments are the flags that choose.
"""


Item = TypeVar("Item")


def main(
    module: str,
    run: Callable[[AnyConfig], Any],
    presets: Presets[AnyConfig],
    description: str | None,
    args: Sequence[str] | None = None,
) -> None:
    """Reads a config from the command line, starting from its presets, and runs it.

    Exits as `command_line.one_line_exits` says. The directory of the run is checked first.

    Args:
      module: Name below ``experiments``.
      run: The table.
      presets: Defaults by the flags that choose them.
      description: Text of ``--help``.
      args: Command line; that of the process by default.
    """
    args = sys.argv[1:] if args is None else list(args)
    with command_line.one_line_exits(args, resumes=True):
        config = parse(module, presets, description, args)
        check_directory(config.root if config.run_dir is None else config.run_dir)
        run(config)


def _spelled_out(args: Sequence[str]) -> list[str]:
    """The arguments, with a value for a flag that may stand alone."""
    found = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        found.append(arg)
        if arg == BARE and following not in get_args(Improve):
            found.append("on")
    return found


def parse(
    module: str, presets: Presets[AnyConfig], description: str | None, args: Sequence[str]
) -> AnyConfig:
    """The config of a command line.

    The flags that choose the defaults of the others are read first, by argparse, and their config
    is tyro's default, so that ``--help`` shows it. tyro's own form of presets
    (`tyro.extras.overridable_config_cli`) is a subcommand: it takes one choice, not two, and the
    recorded ``--preset smoke --protocol finn`` would no longer run.

    Raises:
      UserError: a flag is unknown, or its value is not one of its type.
    """
    args = _spelled_out(args)
    choosing = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in inspect.signature(presets).parameters:
        choosing.add_argument(f"--{name}", nargs="?")
    flags = {k: v for k, v in vars(choosing.parse_known_args(args)[0]).items() if v is not None}
    usual = presets()
    hints = get_type_hints(type(usual))
    for name, value in flags.items():
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            *others, last = map(str, get_args(hints[name]))
            raise UserError(f"unknown {name} {value!r}: choose {', '.join(others)} or {last}")
    program = f"python -m experiments.{module}"
    return command_line.parse(type(usual), args, program, description, presets(**flags))


def command(module: str, config: AnyConfig, presets: Presets[AnyConfig]) -> str:
    """The shortest command that gives this config: only what differs from the defaults."""
    chosen, default = {}, presets()
    for name in inspect.signature(presets).parameters:  # each may change the default of the next
        if getattr(config, name) != getattr(default, name):
            chosen[name] = getattr(config, name)
            default = presets(**chosen)
    flags = [f"--{name} {command_line.as_argument(value)}" for name, value in chosen.items()]
    changed = command_line.changed_flags(config, default)
    return " ".join([f"python -m experiments.{module}", *flags, *changed])


def as_saved(config: RunConfig) -> dict[str, Any]:
    """What decides the results: all but where the run and the memory of past runs are."""
    return {k: v for k, v in as_json(config).items() if k not in ("root", "run_dir", "memory")}


def begin(config: RunConfig | None = None, searched: Searched = SEARCHED) -> TrainFn:
    """Sets up the devices, and gives what trains rows: `train`, or the closed loop if it asks so.

    Args:
      config: of the table.
      searched: what the closed loop may change.

    Raises:
      UserError: the memory of the closed loop cannot be used.
    """
    parallel.set_up_backend()
    log("preparing: data, models and their sizes")
    if not isinstance(config, ImprovedConfig) or config.improve == "off":
        return train
    where = config.memory or os.environ.get("METAOPT_MEMORY")
    loop = dataclasses.replace(IMPROVING, report_only=config.improve == "report")
    memory = Memory(where) if where else None
    return functools.partial(improving_train, searched=searched, loop=loop, memory=memory)


def check_rows(
    rows: Sequence[Row], problem: Problem, inner: InnerLoop, config: ComparisonConfig
) -> None:
    """Checks rows of a `Comparison` from shapes, before anything is compiled.

    For tasks whose sampler can be traced; others call `feasible.check` with their shapes.

    Raises:
      UserError: what is asked for cannot be computed, or exceeds the memory of the device.
    """
    check_settings(inner, config)
    batches = jax.eval_shape(lambda: problem.family.train.sample(jax.random.key(0), 1))[:2]
    support, query = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    trained = [(row.learner, row.estimator, inner) for row in rows]
    most = config.most_episodes
    feasible.check(trained, problem.model.init, problem.loss_fn, support, query, most)


class Cell(NamedTuple):
    """The place of a number."""

    table: str
    row: str
    column: str


class TableRun:
    """A run of a table, or of several: its directory, its records and its files.

    `pending` gives the rows that are not finished; `add` gives them their cells. A row is written
    when the next one is asked for, and a run of the same config that was stopped resumes after the
    last row that it wrote.

    Attributes:
      directory: Directory of the run, where everything is written.
    """

    def __init__(
        self,
        module: str,
        config: AnyConfig,
        presets: Presets[AnyConfig],
        *,
        table: str,
        unit: str,
        rows: Iterable[str] = (),
        seeds: Sequence[int] = (),
        episodes: int = 0,
        data: str | None = None,
        run_dir: Path | str | None = None,
    ):
        """Opens the run: a new one, or the newest unfinished one of this config and these data.

        Args:
          module: Name below ``experiments``.
          config: Config of the run.
          presets: See `main`.
          table: Name of the table in the records, unless a cell says another.
          unit: Unit of its numbers, unless a cell says another.
          rows: Names of rows in the order of the table; others follow in the order they are added.
          seeds: Seeds behind every cell.
          episodes: Test episodes behind every cell.
          data: Digest of data that the config does not determine, such as files. Data that changed
            make another run, as another config does.
          run_dir: Directory of the run, if the config gives none and it is not to be a new one.

        Raises:
          UserError: the directory cannot be used, see `open_run`.
        """
        saved = as_saved(config) | ({"data": data} if data is not None else {})
        run_dir = config.run_dir or run_dir
        self._run = open_run(config.root, module, config.preset, saved, run_dir=run_dir)
        self.directory = self._run.directory
        found = tables.read_records(self._run.results)
        self._cells = {Cell(r["table"], r["row"], r["column"]): r for r in found}
        self._order = {name: i for i, name in enumerate(rows)}
        self._unit = unit
        self._make = cell_maker(
            table=table,
            preset=config.preset,
            command=command(module, config, presets),
            seeds=seeds,
            episodes=episodes,
        )

    @property
    def records(self) -> list[tables.Record]:
        """All cells, those from before a resume too, in the order of the rows."""
        last = len(self._order)
        return sorted(self._cells.values(), key=lambda r: self._order.get(r["row"], last))

    def pending(
        self,
        items: Iterable[Item],
        row: Callable[[Item], str] = operator.attrgetter("name"),
        column: Callable[[Item], str | None] = lambda item: None,
        table: str | None = None,
    ) -> Iterator[Item]:
        """The items whose cells are not in the results yet, one after the other.

        What was added for an item is written, with the seconds that it took, when the next one
        is asked for; if the body of the loop raises, the item is not finished.

        Args:
          items: Rows, or what single cells are made of.
          row: Name of an item's row; its attribute ``name`` by default.
          column: Column of an item, if it is a single cell and not a whole row.
          table: Table that the rows are of, if others have rows of these names too.
        """
        for item in items:
            name = row(item)
            if self.has(name, column(item), table):
                log(f"{name}: taken from {self._run.results}")
                continue
            before, began = dict(self._cells), time.monotonic()
            yield item
            seconds = time.monotonic() - began
            new = [r for cell, r in self._cells.items() if before.get(cell) is not r]
            for record in new:
                record.setdefault("seconds", round(seconds, 1))
            write_json_lines(self._run.results, self.records)
            shown = [f"{r['column']} {tables.cell_text(r)}" for r in new if r["row"] == name]
            log(f"{name}: {', '.join(shown)} ({seconds:.0f} s)")

    def has(self, row: str, column: str | None = None, table: str | None = None) -> bool:
        """Whether a row, or its cell in a column, is in the results, of any table or of one."""
        return any(
            cell.row == row and column in (None, cell.column) and table in (None, cell.table)
            for cell in self._cells
        )

    def add(
        self,
        row: str,
        column: str,
        found: Interval,
        *,
        table: str | None = None,
        unit: str | None = None,
        published: Published | None = None,
        **fields: Any,
    ) -> None:
        """Adds a cell, in place of the one that was there.

        Args:
          row: Name of its row.
          column: Name of its column.
          found: The number; NaN is shown as a dash.
          table: Its table, if it is not that of the run.
          unit: Its unit, if it is not that of the run.
          published: Number of a paper, shown beside it.
          **fields: More fields of the record, such as ``better="higher"`` or ``limit=True``; see
            `metaopt.reporting.tables.RecordFields`.
        """
        if published:
            fields |= published.fields()
        if table is not None:
            fields["table"] = table
        record = self._make(row, column, found, unit or self._unit, **fields)
        self._cells[Cell(record["table"], row, column)] = record

    def add_steps(self, row: str, values: np.ndarray, tasks: np.ndarray, **fields: Any) -> None:
        """Adds cells of a row after the numbers of inner steps that have a column.

        Args:
          row: Name of the row.
          values: Numbers ``[E, steps + 1]``.
          tasks: Task of each episode ``[E]``, over which the intervals are.
          **fields: See `add`.
        """
        for step, column in step_columns(values.shape[1] - 1).items():
            self.add(row, column, interval(values[:, step], tasks), **fields)

    def discard(self, row: str) -> None:
        """Takes a row out, such as one that further data have made old."""
        self._cells = {cell: r for cell, r in self._cells.items() if cell.row != row}

    def keep(self, row: str, **arrays: np.ndarray) -> None:
        """Saves arrays of a row that other rows, figures or a resumed run need."""
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        self._kept(row).parent.mkdir(exist_ok=True)
        write_bytes(self._kept(row), packed.getvalue())

    def kept(self, row: str) -> dict[str, np.ndarray]:
        """The arrays that `keep` saved of a row, in this run or before it was resumed.

        Raises:
          UserError: the file is missing or damaged.
        """
        return read_npz(self._kept(row))

    def remember(
        self, row: str, make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The arrays of a row that `keep` saved, or else those that ``make`` gives, saved."""
        if not self._kept(row).exists():
            self.keep(row, **make())
        return self.kept(row)

    def _kept(self, row: str) -> Path:
        return self.directory / "rows" / f"{slug(row)}.npz"

    def close(self) -> None:
        """Lets other processes open the run, which the same command resumes."""
        self._run.close()

    def finish(self, notes: Sequence[str] = (), titles: Mapping[str, str] | None = None) -> None:
        """Writes and prints the tables, and marks the run as finished.

        Args:
          notes: Lines below the tables.
          titles: Headings by the name of a table; its name by default, if there are several.
        """
        arranged = tables.arrange(self.records)
        write_json_lines(self._run.results, self.records)
        tables.write(self.directory, arranged, notes, titles)
        self._run.finish()
        write_text(self.directory / PAGE, page(self.directory))
        console = Console()
        for table in arranged:
            console.print(*tables.to_rich(table, console.width), sep="\n")
        for line in (*notes, f"written to {self.directory}"):
            console.print(line, markup=False, highlight=False)


def step_columns(longest: int) -> dict[int, str]:
    """The columns of `STEPS` up to the longest evaluation, by the number of inner steps."""
    return {step: step_column(step) for step in STEPS if step <= longest}


def curve(values: np.ndarray, groups: np.ndarray) -> plots.Curve:
    """The mean of ``values [E, steps + 1]`` over tasks, with its interval, for a figure."""
    found = [interval(of_step, groups) for of_step in values.T]
    return plots.Curve(np.array([f.mean for f in found]), np.array([f.ci95 for f in found]))


def compare(
    comparisons: Mapping[str, Comparison], directory: Path
) -> Callable[[Row], list[RowResult]]:
    """``row -> its results``, one of each comparison, such as of several seeds.

    What rows start from is pretrained, once a comparison, when the first of them is trained.

    Args:
      comparisons: By name, alike in all but the seed or the tasks.
      directory: Directory of the run; several comparisons have a folder of their name each in it.
    """

    @functools.cache
    def start(name: str) -> tuple[Params, Path]:
        place = directory if len(comparisons) == 1 else directory / name
        place.mkdir(exist_ok=True)
        return comparisons[name].pretrain(place), place

    def results(row: Row) -> list[RowResult]:
        found = []
        for name, comparison in comparisons.items():
            if len(comparisons) > 1:
                log(f"{row.name}: {name}")
            found.append(comparison.run(row, *start(name)))
        return found

    return results
