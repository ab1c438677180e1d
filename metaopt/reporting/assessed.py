"""What runs under the loop said of themselves, from the lines of their ``metrics.jsonl``, as text.

Imports no JAX. A value that is missing or of the wrong type is a dash, or left out: whoever watches
a run is not stopped by a damaged line.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metaopt.files import matches
from metaopt.reporting import tables

EXTREMES = 5
"""Groups that are shown on either side."""
NAMED = 3
"""Strengths and weaknesses that are named in a line."""
MOST_CHANGES = 4
"""Changed settings of one decision that are named; the shares of domains may be many."""
SCORES = {"precision": "precision", "recall": "recall", "f1": "F1"}

Assessment = Mapping[str, Any]  # a line that `metaopt.self_improvement.records` wrote
Rows = Sequence[Sequence[str]]


def named_changes(changes: Sequence[str]) -> list[str]:
    """The changed settings of one decision that are named, and how many more there are."""
    more = len(changes) - MOST_CHANGES
    return [*changes[:MOST_CHANGES], *([f"and {more} more"] if more > 0 else [])]


def latest(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Assessment]:
    """The last assessment of each training that has one, by its name."""
    return {str(x.get("name", "")): x for x in metrics if matches(x.get("cost"), float)}


def in_words(line: Assessment) -> str:
    """Cost, strengths, weaknesses, accuracy and rank, as far as they are known."""
    said = [f"cost {_number(line['cost'])}"] if matches(line.get("cost"), float) else []
    for side in ("strengths", "weaknesses"):
        if groups := _names(line, side):
            more = f" and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
            said.append(f"{side} {', '.join(groups[:NAMED])}{more}")
    if classes := _part(line, "classes"):
        said.append(f"accuracy {_number(classes.get('accuracy'))}")
        said.append(f"macro F1 {_number(classes.get('f1'))}")
    rank = _part(line, "rank")
    if matches(rank.get("rank"), int) and matches(rank.get("n"), int):
        said.append(f"rank {rank['rank']} of {rank['n'] + 1} runs of similar tasks")
    return "; ".join(said)


def groups(line: Assessment) -> Rows:
    """The losses of groups, best first, below headings; nothing if there are none.

    Of many groups the best and the worst, `EXTREMES` each.
    """
    given = line.get("groups")
    found = [x for x in given if isinstance(x, dict)] if isinstance(given, list) else []
    found = [x for x in found if matches(_part(x, "loss").get("mean"), float)]
    found.sort(key=lambda x: x["loss"]["mean"])
    if len(found) > 2 * EXTREMES:
        found = found[:EXTREMES] + found[-EXTREMES:]
    verdicts = dict.fromkeys(_names(line, "strengths"), "strength")
    verdicts |= dict.fromkeys(_names(line, "weaknesses"), "weakness")
    rows = [
        [
            str(x.get("group")),
            *(_interval(_part(x, part)) for part in ("loss", "improvement", "difference")),
            verdicts.get(str(x.get("group")), ""),
        ]
        for x in found
    ]
    headings = ["", "loss", "fall since the last assessment", "difference to the others", ""]
    return [headings, *rows] if rows else []


def classes(line: Assessment) -> Rows:
    """Precision, recall and F1 of each class, also at its best threshold, below headings.

    The last row is the mean over classes. Nothing if there are no classes.
    """
    found = _part(line, "classes")
    scores = {name: x for name, x in _part(found, "per_class").items() if isinstance(x, dict)}
    rows = [
        [name, *(_number(score.get(key)) for key in (*SCORES, "support"))]
        + [_number(_part(score, "best").get(key)) for key in ("threshold", *SCORES)]
        for name, score in scores.items()
    ]
    if not rows:
        return []
    mean = ["mean", *(_number(found.get(key)) for key in SCORES), *[""] * 5]
    at_best = [f"{name} there" for name in SCORES.values()]
    return [
        ["class", *SCORES.values(), "examples", "best threshold held out", *at_best],
        *rows,
        mean,
    ]


def _names(line: Assessment, side: str) -> list[str]:
    return line[side] if matches(line.get(side), list[str]) else []


def _part(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a record; an empty one if there is none."""
    return found if isinstance(found := record.get(key), dict) else {}


def _interval(found: Mapping[str, Any]) -> str:
    """A mean and half of its interval, where these are known."""
    half = f" ± {_number(found['ci95'])}" if matches(found.get("ci95"), float) else ""
    return f"{_number(found.get('mean'))}{half}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if matches(value, float) else tables.DASH
