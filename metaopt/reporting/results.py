"""Result records: one JSON object a table cell, with all that is needed to make it again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from metaopt.statistics import Interval
from metaopt.training.runs import device_name, git_commit, versions

RecordCell = Callable[..., dict[str, Any]]


def cell_maker(
    *, table: str, preset: str, command: str, seeds: Sequence[int], episodes: int
) -> RecordCell:
    """``(row, column, interval, unit, **more) -> record``, with what a run's cells share.

    Args:
      table: name of the table.
      preset: which made the numbers.
      command: that makes them again.
      seeds: of the run.
      episodes: test episodes behind every cell.

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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
