"""What `table_sinusoid` writes: result records, the table, and the curves of `--protocol finn`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from experiments.table_sinusoid.config import Config
from metaopt.files import write_json_lines, write_text
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.statistics import Interval, interval
from metaopt.training.runs import Run

UNIT = "mean squared error"
SOURCE = "Li et al., 2017, arXiv:1707.09835, table 1 (5-shot meta-training)"
PUBLISHED = {
    "MAML": {5: (1.13, 0.18), 10: (0.85, 0.14), 20: (0.71, 0.12)},
    "Meta-SGD": {5: (0.90, 0.16), 10: (0.63, 0.12), 20: (0.50, 0.10)},
}
"""Mean and half of the 95 % interval, by the shots of the test."""
STEPS = (0, 1, 2, 5, 10)
"""The columns of finn."""


class Report:
    """Collects the rows of a run and keeps its files up to date after each of them."""

    def __init__(self, run: Run, config: Config, command: str):
        """``command`` makes the table again."""
        self._run, self._config = run, config
        self._curves_of_test = np.repeat(np.arange(config.test_curves), config.supports_per_curve)
        self._records: list[dict[str, Any]] = []
        self._lines: dict[str, plots.Curve] = {}
        self._medians: dict[str, np.ndarray] = {}
        self._cell = cell_maker(
            table="sinusoid" if config.protocol == "li" else "sinusoid/finn",
            preset=config.preset,
            command=command,
            seeds=config.seeds,
            episodes=len(self._curves_of_test),
        )

    def add(
        self,
        name: str,
        num_steps: int,
        found: Sequence[dict[int, np.ndarray]],
        seconds: float,
    ) -> None:
        """Adds a row, writes all files anew and prints where it ends.

        Args:
          name: of the row.
          num_steps: of the inner loop that it was trained with.
          found: for each seed, losses ``[E, steps + 1]`` by the number of shots.
          seconds: that it took.
        """
        more = {"num_inner_steps": num_steps, "seconds": round(seconds, 1)}
        for shots in self._config.test_shots:
            losses = np.stack([of_seed[shots] for of_seed in found])
            losses = np.where(np.isnan(losses), np.inf, losses)  # diverged, for the medians
            if self._config.protocol == "li":
                column = f"{shots}-shot"
                self._add_cell(name, column, losses[:, :, num_steps], _published(name, shots), more)
            else:
                self._add_curve(name, losses, more)
        write_json_lines(self._run.results, self._records)
        shown = [f"{r['column']} {tables.cell_text(r)}" for r in self._records if r["row"] == name]
        line = f"{name}: {', '.join(shown)} ({seconds:.0f} s)"
        Console().print(line, markup=False, highlight=False)

    def finish(self) -> None:
        """Writes and prints the table, and how it compares with what is published."""
        (table,) = tables.arrange(self._records)
        directory = self._run.directory
        beside = "".join(f"- {line}\n" for line in compared(self._records))
        text = tables.to_markdown(table)
        write_text(directory / "table.md", f"{text}\n{beside}" if beside else text)
        write_text(directory / "table.tex", tables.to_latex(table))
        self._run.finish()
        console = Console()
        console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(beside, f"written to {directory}", markup=False, highlight=False)

    def _interval(self, losses: np.ndarray) -> Interval:
        """Over curves, of the mean over seeds; ``losses [seeds, E]``."""
        with np.errstate(invalid="ignore"):  # a loss that is infinite has no interval
            return interval(losses.mean(axis=0), self._curves_of_test)

    def _add_cell(
        self,
        row: str,
        column: str,
        losses: np.ndarray,
        of_cell: dict[str, Any],
        more: dict[str, Any],
    ) -> None:
        per_seed = [float(value) for value in losses.mean(axis=1)]
        if not np.isfinite(per_seed).all():  # JSON has no such numbers
            per_seed = None
        self._records.append(
            self._cell(
                row, column, self._interval(losses), UNIT, per_seed=per_seed, **of_cell, **more
            )
        )

    def _add_curve(self, name: str, losses: np.ndarray, more: dict[str, Any]) -> None:
        for step in (step for step in STEPS if step <= self._config.max_inner_steps):
            column = f"{step} step" if step == 1 else f"{step} steps"
            median = float(np.median(losses[:, :, step]))  # means are of those that diverge
            finite = {"median": median if np.isfinite(median) else None}
            self._add_cell(name, column, losses[:, :, step], finite, more)
        points = [self._interval(losses[:, :, step]) for step in range(losses.shape[2])]
        self._lines[name] = plots.Curve(
            np.array([p.mean for p in points]), np.array([p.ci95 for p in points])
        )
        self._medians[name] = np.median(losses, axis=(0, 1))
        self._draw()

    def _draw(self) -> None:
        """Means with their intervals, and dotted the medians.

        The axis ends above the worst start: what diverges leaves the picture.
        """
        figure = plots.new_figure()
        axes = figure.subplots()
        for i, (name, (mean, half)) in enumerate(self._lines.items()):
            steps, color = np.arange(len(mean)), f"C{i}"
            mean = np.where(np.isfinite(mean), mean, np.nan)
            marker = plots.MARKERS[i % len(plots.MARKERS)]
            axes.plot(steps, mean, label=name, color=color, marker=marker, markersize=4)
            axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12, lw=0)
            axes.plot(steps, self._medians[name], color=color, linestyle=":", linewidth=1)
        shots = self._config.test_shots[0]
        title = f"New sinusoids, {shots} shots (dotted: median)"
        axes.set(xlabel="inner steps", ylabel=UNIT, title=title)
        axes.set_yscale("log")
        lowest = min(medians.min() for medians in self._medians.values())
        worst_start = max(curve.mean[0] for curve in self._lines.values())
        axes.set_ylim(lowest / 2, 2 * worst_start)
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=8, frameon=False)
        plots.save(figure, self._run.directory / "curves.png")


def _published(row: str, shots: int) -> dict[str, Any]:
    """The fields of a record that hold the published number; none where there is none."""
    if shots not in PUBLISHED.get(row, {}):
        return {}
    value, half = PUBLISHED[row][shots]
    return {"paper": value, "paper_ci95": half, "source": SOURCE}


def compared(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each record with a published number: below, within or above its interval."""
    lines = []
    for record in records:
        if record["paper"] is None or record["value"] is None:
            continue
        value, paper, half = record["value"], record["paper"], record["paper_ci95"]
        where = "within" if abs(value - paper) <= half else "below" if value < paper else "above"
        lines.append(
            f"{record['row']}, {record['column']}: {tables.cell_text(record)}, {where} the "
            f"published {paper:.2f} ± {half:.2f}; {record['source']}"
        )
    return lines
