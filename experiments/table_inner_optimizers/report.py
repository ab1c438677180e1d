"""What `table_inner_optimizers` writes: result records, its two tables, and the curves of MAML."""

import numpy as np
from rich.console import Console

from experiments.table_inner_optimizers.config import Config, LearnerName
from metaopt.comparison import Comparison, RowResult
from metaopt.files import write_json_lines, write_text
from metaopt.losses import NATS_TO_BITS
from metaopt.optimizers.inner import OptimizerName
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.statistics import Interval, interval
from metaopt.training.runs import Run

UNIT = "bits/byte"
BASELINE = "sgd"
ROWS: dict[str, str] = {
    "sgd": "GD",
    "momentum": "momentum",
    "nesterov": "Nesterov",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "lars": "LARS",
    "lamb": "LAMB",
    "lion": "Lion",
}
COLUMNS: dict[LearnerName, str] = {
    "joint": "joint pretraining",
    "fomaml": "FOMAML",
    "maml": "MAML",
    "meta_sgd": "Meta-SGD",
}
"""As they stand in the tables."""


class Report:
    """Collects the cells of a run and keeps its files up to date after each of them."""

    def __init__(self, run: Run, config: Config, comparison: Comparison, command: str):
        """``command`` makes the tables again."""
        self._run, self._config = run, config
        self._steps = comparison.inner.num_steps
        self._drawn = "maml" if "maml" in config.learners else config.learners[-1]
        self._groups = np.asarray(comparison.test.task)
        self._curves: dict[tuple[str, str], np.ndarray] = {}
        self._records = {"loss": [], "gain": []}
        shared = {
            "preset": config.preset,
            "command": command,
            "seeds": [comparison.config.seed],
            "episodes": len(self._groups),
        }
        self._loss_cell = cell_maker(table=f"inner_optimizers/{config.tasks}", **shared)
        self._gain_cell = cell_maker(table=f"inner_optimizers_against_gd/{config.tasks}", **shared)

    def add(self, optimizer: OptimizerName, learner: LearnerName, result: RowResult) -> None:
        """Adds a trained cell, writes all files anew and prints it."""
        self._curves[optimizer, learner] = result.curves
        rate = float(result.rates[self._steps])
        more = {"inner_learning_rate": rate, "seconds": round(result.seconds, 1)}
        row, column = ROWS[optimizer], self._column(learner)
        losses = result.curves[:, self._steps]
        record = self._loss_cell(row, column, self._interval(losses), UNIT, **more)
        self._records["loss"].append(record)
        baseline = self._curves.get((BASELINE, learner))
        if baseline is not None and optimizer != BASELINE:
            gain = self._interval(baseline[:, self._steps] - losses)
            cell = self._gain_cell(row, column, gain, UNIT, better="higher", **more)
            self._records["gain"].append(cell)
        if learner == self._drawn:
            self._draw()
        self._write(f"{row}, {column}: {tables.cell_text(record)} {UNIT}, rate {rate:.3g}")

    def add_diverged(self, optimizer: OptimizerName, learner: LearnerName, why: str) -> None:
        """Adds a cell whose training diverged: a dash, with the reason in its record."""
        row, column, nothing = ROWS[optimizer], self._column(learner), float("nan")
        missing = Interval(nothing, nothing, len(np.unique(self._groups)))
        self._records["loss"].append(self._loss_cell(row, column, missing, UNIT, diverged=why))
        self._write(f"{row}, {column}: {why}")

    def finish(self) -> None:
        """Writes and prints the tables."""
        found = tables.arrange([*self._records["loss"], *self._records["gain"]])
        directory = self._run.directory
        titles = ("", "What each gains on GD, paired episode by episode:\n\n")
        parts = [title + tables.to_markdown(t) for title, t in zip(titles, found, strict=False)]
        write_text(directory / "table.md", "\n".join(parts))
        write_text(directory / "table.tex", "\n".join(map(tables.to_latex, found)))
        self._run.finish()
        console = Console()
        for table in found:
            console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(f"written to {directory}", markup=False, highlight=False)

    def _column(self, learner: LearnerName) -> str:
        return f"{COLUMNS[learner]}, {self._steps} step{'s' if self._steps > 1 else ''}"

    def _interval(self, nats: np.ndarray) -> Interval:
        with np.errstate(invalid="ignore"):  # a loss that is infinite has no interval
            return interval(nats * NATS_TO_BITS, self._groups)

    def _write(self, line: str) -> None:
        write_json_lines(self._run.results, [*self._records["loss"], *self._records["gain"]])
        Console().print(line, markup=False, highlight=False)

    def _draw(self) -> None:
        """The curves of MAML, or of the last learner where there is no MAML."""
        drawn = {o: c for (o, learner), c in self._curves.items() if learner == self._drawn}
        curves = {ROWS[optimizer]: losses for optimizer, losses in drawn.items()}
        baseline = curves.get(ROWS[BASELINE])
        gains = {} if baseline is None else {n: baseline - c for n, c in curves.items()}
        gains.pop(ROWS[BASELINE], None)
        plots.adaptation_curves(
            self._run.directory / "curves.png",
            {name: self._curve(losses) for name, losses in curves.items()},
            {name: self._curve(gain) for name, gain in gains.items()},
            {},
            baseline=ROWS[BASELINE],
            unit=UNIT,
            trained_steps=self._steps,
        )

    def _curve(self, nats: np.ndarray) -> plots.Curve:
        found = [self._interval(step) for step in nats.T]
        return plots.Curve(np.array([f.mean for f in found]), np.array([f.ci95 for f in found]))
