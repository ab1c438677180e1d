"""Result records: one JSON object a table cell, with all that is needed to make it again."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from metaopt.reporting import tables
from metaopt.statistics import Interval
from metaopt.training.runs import device_name, git_commit, versions

RecordCell = Callable[..., dict[str, Any]]


class Published(NamedTuple):
    """The number of a paper for a cell.

    Attributes:
      value: Number in the unit of the cell.
      source: Paper and table.
      ci95: Half of its 95 % interval, if there is one.
    """

    value: float
    source: str
    ci95: float | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a record that hold it."""
        interval = {} if self.ci95 is None else {"paper_ci95": self.ci95}
        return {"paper": self.value, "source": self.source} | interval


def beside_published(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each number that has a published one: below it, within its interval, above it.

    What was not run, or diverged, has no line.
    """
    return [
        f"{record['row']}, {record['column']}: {tables.cell_text(record)}, {_side(record)}; "
        f"{record['source']}"
        for record in records
        if record["paper"] is not None and record["value"] is not None
    ]


def _side(record: dict[str, Any]) -> str:
    value, paper, half = record["value"], record["paper"], record.get("paper_ci95")
    side = "within" if abs(value - paper) <= (half or 0) else "below" if value < paper else "above"
    return f"{side} the published {paper:g}" + (f" ± {half:g}" if half else "")


def cell_maker(
    *, table: str, preset: str, command: str, seeds: Sequence[int], episodes: int
) -> RecordCell:
    """``(row, column, interval, unit, **more) -> record``, with what a run's cells share.

    Args:
      table: Name of the table.
      preset: Preset that made the numbers.
      command: Command that makes them again.
      seeds: Seeds of the run.
      episodes: Number of test episodes behind every cell.

    Returns:
      A function to records as `metaopt.reporting.tables` reads them; ``n`` is the number of tasks
      that the interval is over. What is not finite (the loss of a learner that diverged,
      the interval over one task) is None, since JSON has no such numbers.
    """
    shared = {
        "preset": preset,
        "device": device_name(),
        "versions": versions(),
        "commit": git_commit(),
        "command": command,
    }

    def cell(row: str, column: str, found: Interval, unit: str, **more: Any) -> dict[str, Any]:
        return {
            "table": table,
            "row": row,
            "column": column,
            "value": _finite(found.mean),
            "ci95": _finite(found.ci95),
            "unit": unit,
            "n": found.n,
            "episodes": episodes,
            "seeds": list(seeds),
            "paper": None,
            "source": None,
            **shared,
            **more,
        }

    return cell


def step_column(step: int) -> str:
    """The column of a number of inner steps: ``'1 step'``, ``'5 steps'``."""
    return f"{step} step" if step == 1 else f"{step} steps"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
