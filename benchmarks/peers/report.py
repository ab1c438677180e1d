"""The records of a comparison with peers: medians over rounds, and the ratio of the fastest."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaopt.reporting.results import RecordCell
from metaopt.statistics import Interval

OURS, RATIO = "ours", "fastest peer / ours"
COLUMNS = {
    "ours": OURS,
    "torch_func": "torch.func",
    "torchopt": "torchopt",
    "higher": "higher",
    "torch_compile": "torch.compile",
}


def records(
    cell: RecordCell,
    problem: str,
    times: Mapping[str, Sequence[float]],
    reports: Mapping[str, dict[str, Any]],
    failures: Mapping[str, str],
    threads: int,
) -> list[dict[str, Any]]:
    """One row: milliseconds of each library, None for one that failed, and the ratio.

    Args:
      cell: from `metaopt.reporting.results.cell_maker`.
      problem: name of the row.
      times: seconds a step in each round, by peer.
      reports: of the workers, by peer.
      failures: the reason, by peer.
      threads: that each worker had.
    """
    versions: dict[str, str] = {}
    for report in reports.values():
        versions |= report["versions"]
    shared = {
        "device": f"{threads} threads of a {os.cpu_count()}-core CPU",
        "limit": True,  # rows are other problems, not contenders
        "over": "medians over rounds in turn",
    }

    def one(column: str, values: Sequence[float], unit: str, **more: Any) -> dict[str, Any]:
        found = Interval(
            float(np.median(values)) if len(values) else math.nan, math.nan, len(values)
        )
        record = cell(problem, column, found, unit, **shared, **more)
        quartiles = np.quantile(values, [0.25, 0.75]).tolist() if len(values) else None
        return record | {"versions": record["versions"] | versions, "quartiles": quartiles}

    rows = []
    for peer, column in COLUMNS.items():
        if peer in times:
            milliseconds = [1e3 * seconds for seconds in times[peer]]
            note = {name: reports[peer][name] for name in ("form", "loss", "grad_norm")}
            rows.append(one(column, milliseconds, "ms", **note))
        elif peer in failures:
            rows.append(one(column, [], "ms", note=failures[peer]))
    rows.append(one(RATIO, *_ratio(times), better="higher"))
    return rows


def _ratio(times: Mapping[str, Sequence[float]]) -> tuple[list[float], str]:
    """How many times our step the step of the fastest peer takes, round by round."""
    medians = {peer: np.median(values) for peer, values in times.items() if peer != "ours"}
    if not medians:
        return [], "times"
    fastest = times[min(medians, key=lambda peer: medians[peer])]
    return [theirs / ours for theirs, ours in zip(fastest, times["ours"], strict=True)], "times"
