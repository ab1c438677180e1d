"""What `table_self_improvement` writes: records, tables, and the trajectories as a figure."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from rich.console import Console

from experiments.table_self_improvement.config import Config
from experiments.table_self_improvement.mnist import SHOWN
from experiments.table_self_improvement.rows import BAD_STARTS
from experiments.table_self_improvement.study import Cell
from metaopt.files import append_json_line, read_json_lines, write_json_lines
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.training.runs import Run

TABLE, BASELINES = "self_improvement", "self_improvement_baselines"
UNITS = {
    "ratio to tuned": "ratio of held-out losses",
    "ratio to undisturbed": "ratio of held-out losses",
    "untreated ratio": "ratio of held-out losses",
    "time ratio": "ratio of seconds without compiling",
    "throughput ratio": "ratio of tokens a second",
    "tokens ratio": "ratio of tokens, those of trials among them",
}


class Assessed(TypedDict):
    """What is drawn of a line of ``metrics.jsonl``."""

    tokens: int
    valid_loss: float | None
    scores: NotRequired[dict[str, float | None]]


class Report:
    """Keeps the files of a run up to date after every row; rows that are done stay done."""

    def __init__(self, run: Run, config: Config, command: str):
        """``command`` makes the tables again."""
        self._run, self._config = run, config
        self._path = run.directory / "cells.jsonl"
        self._records = tables.read_records(self._path)
        self._make_cell = cell_maker(
            table=TABLE, preset=config.preset, command=command, seeds=[config.seed], episodes=0
        )

    def has(self, row: str) -> bool:
        """Whether a row is there from before."""
        return any(record["row"] == row for record in self._records)

    def add(self, row: str, cells: Sequence[Cell], seconds: float, table: str = TABLE) -> None:
        """Adds a row, and prints it."""
        for cell in cells:
            more = {"table": table, "unit": UNITS.get(cell.column, ""), "seconds": seconds}
            more |= {"better": "lower", "over": OVER, "episodes": cell.found.n} | cell.more
            more["limit"] = table == TABLE  # its rows are different trainings, and no rivals
            unit = more.pop("unit")
            record = self._make_cell(row, cell.column, cell.found, unit, **more)
            self._records.append(record)
            append_json_line(self._path, record)
            print(f"{row}: {cell.column} {tables.cell_text(record)}", flush=True)
        self._write()

    def finish(self) -> None:
        """Draws the trajectories, prints the tables and marks the run as finished."""
        self._write()
        self._draw()
        console = Console()
        for table in tables.arrange(self._records):
            for part in tables.to_rich(table, console.width):
                console.print(part)
        self._run.finish()

    def _write(self) -> None:
        directory = self._run.directory
        write_json_lines(directory / "results.jsonl", self._records)
        tables.write(directory, tables.arrange(self._records))

    def _draw(self) -> None:
        """The held-out loss by tokens of the language model, the test error by epoch of MNIST."""
        improved = self._trajectories("improved")
        tuned = {"tuned": self._trajectory("tuned")}
        drawn = {name: points for name, points in (tuned | improved).items() if len(points) > 1}
        if drawn:
            plots.trajectories(
                self._run.directory / "curves.png",
                drawn,
                dashed=self._trajectories("untreated"),
                x_label="tokens",
                y_label="held-out loss, nats a token",
                title="Language model: bad starts under the closed loop, and untreated (dashed)",
            )

        epochs = {name: self._trajectory(place, "test_accuracy") for place, name in SHOWN.items()}
        errors = {
            name: points * [1 / self._config.mnist.num_train, -1] + [0, 1]
            for name, points in epochs.items()
            if len(points) > 1
        }
        if errors:
            plots.trajectories(
                self._run.directory / "mnist.png",
                errors,
                x_label="epochs",
                y_label="test error, 1 − accuracy",
                title="MNIST by gradient descent: a bad start under the closed loop",
                y_scale="log",
            )

    def _trajectories(self, kind: str) -> dict[str, np.ndarray]:
        return {name: self._trajectory(f"{kind} {name}") for name in BAD_STARTS}

    def _trajectory(self, name: str, quantity: str = "valid_loss") -> np.ndarray:
        """Of a training, ``[points, 2]``: tokens and a quantity that was assessed."""
        path = self._run.directory / "trainings" / name / "metrics.jsonl"
        lines = [line | line.get("scores", {}) for line in read_json_lines(path, Assessed)]
        known = [(x["tokens"], x[quantity]) for x in lines if x.get(quantity) is not None]
        return np.array(known).reshape(-1, 2)


OVER = "95 % intervals over held-out examples, paired"
