"""What `table_bayes_gap` writes: result records, the two tables, and the figure."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from metaopt.comparison import Comparison, Row, RowResult
from metaopt.files import Line, read_json_lines, write_json_lines, write_text
from metaopt.reporting import plots, tables
from metaopt.reporting.results import RecordCell, cell_maker
from metaopt.statistics import interval
from metaopt.tasks.markov import MarkovConfig, bayes_loss
from metaopt.training.runs import Run

UNIT = "nats/token"
TABLES = {"bayes_gap": False, "bayes_gap_prefix": True}
"""By the name of the table: whether the earlier tokens of the query are evidence too."""
LINE_STYLES = {"n-gram table": "-", "bigram table": ":", "GRU": "--", "transformer": "-."}
READ_THE_QUERY = ("GRU", "transformer")
"""Models that see the query so far, and so are judged by the limit that does."""


def table_of(model: str) -> str:
    """The table that a model's rows are in: that of the limit which reads what the model reads."""
    return "bayes_gap_prefix" if model in READ_THE_QUERY else "bayes_gap"


class Study(NamedTuple):
    """The learners of one model on one setting.

    Attributes:
      setting: its name, a column of the tables.
      model: its name, part of the names of rows.
      languages: of the setting.
      comparison: trains and evaluates the learners.
      rows: the learners.
    """

    setting: str
    model: str
    languages: MarkovConfig
    comparison: Comparison
    rows: list[Row]


class Limit(NamedTuple):
    """An exact limit of a study, in nats a token.

    Attributes:
      table: that the gaps to it are in.
      test: float64 ``[E]``, on each test episode.
      valid: its mean on the validation episodes.
      cell: makes records of the table.
    """

    table: str
    test: np.ndarray
    valid: float
    cell: RecordCell


class Report:
    """Collects the cells of a run and keeps the results up to date after each row of a study."""

    def __init__(self, run: Run, preset: str, command: str):
        """``preset`` made the tables and ``command`` makes them again."""
        self._run, self._preset, self._command = run, preset, command
        self._gaps: list[dict[str, Any]] = []
        self._references: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def begin(self, study: Study, directory: Path) -> None:
        """What is added from now on is of this study; ``directory`` has its metrics."""
        self._study, self._directory = study, directory
        self._groups = np.asarray(study.comparison.test.task)
        self._limit = self._exact_limit(table_of(study.model))
        key = self._limit.table, study.setting
        self._references.setdefault(key, self._scale(self._limit))

    def add(self, result: RowResult) -> None:
        """Adds the gap of a trained row, and writes the results anew."""
        found = self._gap_record(result, self._limit)
        self._gaps.append(found)
        write_json_lines(self._run.results, self._records())
        Console().print(
            f"{self._study.setting}, {found['row']}: gap {tables.cell_text(found)} {UNIT} "
            f"({result.seconds:.0f} s)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def finish(self) -> None:
        """Writes the figure, and writes and prints the tables."""
        arranged = tables.arrange(self._records())
        directory = self._run.directory
        draw(directory / "curves.png", self._gaps)
        markdown = [f"### {table.name}\n\n{tables.to_markdown(table)}" for table in arranged]
        write_text(directory / "table.md", "\n".join(markdown))
        latex = [f"% {table.name}\n{tables.to_latex(table)}" for table in arranged]
        write_text(directory / "table.tex", "\n".join(latex))
        self._run.finish()
        console = Console()
        for table in arranged:
            console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(f"written to {directory}", markup=False, highlight=False)

    def _exact_limit(self, table: str) -> Limit:
        languages, comparison = self._study.languages, self._study.comparison
        test, valid = (
            np.asarray(bayes_loss(languages, episodes, use_prefix=TABLES[table]), np.float64)
            for episodes in (comparison.test, comparison.valid)
        )
        cell = cell_maker(
            table=table,
            preset=self._preset,
            command=self._command,
            seeds=[comparison.config.seed],
            episodes=len(test),
        )
        return Limit(table, test, float(valid.mean()), cell)

    def _gap_record(self, result: RowResult, limit: Limit) -> dict[str, Any]:
        """Paired: a learner's loss minus the limit's on the same episode."""
        num_steps = self._study.comparison.inner.num_steps
        gaps = result.curves - limit.test[:, None]
        return limit.cell(
            f"{result.row.name}, {self._study.model}",
            self._study.setting,
            interval(gaps[:, num_steps], self._groups),
            UNIT,
            learner=result.row.name,
            model=self._study.model,
            num_inner_steps=num_steps,
            inner_learning_rate=float(result.rates[num_steps]),
            gap_by_inner_steps=finite_list(gaps.mean(axis=0)),
            gap_by_meta_steps={
                str(line["step"]): line["valid_loss"] - limit.valid
                for line in read_json_lines(self._directory / "metrics.jsonl", Line)
                if line["name"] == result.row.name and line.get("valid_loss") is not None
            },
            seconds=round(result.seconds, 1),
        )

    def _scale(self, limit: Limit) -> list[dict[str, Any]]:
        """What gives a column its scale: the gap of knowing nothing, and the limit's own loss."""
        uniform = math.log(self._study.languages.vocab_size) - limit.test
        rows = {"gap of the uniform prediction": uniform, "loss of the limit itself": limit.test}
        return [
            limit.cell(name, self._study.setting, interval(losses, self._groups), UNIT, limit=True)
            for name, losses in rows.items()
        ]

    def _records(self) -> list[dict[str, Any]]:
        """The gaps, and after all of them what gives them their scale."""
        return [*self._gaps, *(cell for cells in self._references.values() for cell in cells)]


def finite_list(values: np.ndarray) -> list[float | None]:
    """As JSON takes it: None for what is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def draw(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Gaps against inner steps, meta-steps and settings, each to its model's own limit.

    The first two are of the setting that came first. Axes are logarithmic above 0.001
    and linear below it.

    Args:
      path: of the PNG file.
      records: of gaps, from `Report`.
    """
    settings = list(dict.fromkeys(record["column"] for record in records))
    learners = list(dict.fromkeys(record["learner"] for record in records))
    figure = plots.new_figure(17.0, 4.8)
    by_inner, by_meta, by_setting = figure.subplots(1, 3)
    for row, of_row in _by_row(records).items():
        line = functools.partial(_line, of_row[0], learners)
        line(by_setting, [settings.index(r["column"]) for r in of_row], _values(of_row), label=row)
        for record in (r for r in of_row if r["column"] == settings[0]):
            gaps = record["gap_by_inner_steps"]
            line(by_inner, list(range(len(gaps))), gaps)
            line(by_meta, [*map(int, record["gap_by_meta_steps"])], _meta_values(record))
    by_inner.axvline(records[0]["num_inner_steps"], color="grey", linewidth=0.8, alpha=0.6)
    by_inner.set(xlabel="inner steps", ylabel=f"gap, {UNIT}", title=f"Test: {settings[0]}")
    by_meta.set(xlabel="meta-steps", title=f"Validation: {settings[0]}")
    by_setting.set(title="Test: all settings")
    stacked = [setting.replace(", ", "\n") for setting in settings]
    by_setting.set_xticks(range(len(settings)), stacked, fontsize=6)
    for axes in (by_inner, by_meta, by_setting):
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    plots.save(figure, path)


def _by_row(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    return rows


def _values(records: Sequence[dict[str, Any]]) -> list[float | None]:
    return [record["value"] for record in records]


def _meta_values(record: dict[str, Any]) -> list[float | None]:
    return list(record["gap_by_meta_steps"].values())


def _line(record, learners, axes, x: Sequence[int], y: Sequence[float | None], label=None) -> None:
    """One line of a row: its colour and marker say the learner, its dashes the model."""
    number = learners.index(record["learner"])
    axes.plot(
        x,
        np.array(y, np.float64),  # None becomes NaN, which is not drawn
        label=label,
        color=f"C{number}",
        marker=plots.MARKERS[number],
        markersize=4,
        linestyle=LINE_STYLES[record["model"]],
    )
