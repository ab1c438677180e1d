"""What a line of ``decisions.jsonl`` must hold before anything is decided by it again."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from metaopt.files import what_is_wrong
from metaopt.self_improvement.trials import Decision
from metaopt.self_improvement.workload import Setting

COUNTS = ("step", "examples", "trial_examples", "seconds", "size", "gained")


class Evidence(TypedDict):
    """What a proposer reads of a change that was tried."""

    setting: str
    settings: dict[str, Setting]
    way: int
    verdict: Literal["better", "worse", "noise"]
    accepted: bool


def what_is_damaged(line: Any) -> str | None:
    """What is wrong with a decision from a file or a memory; None where nothing is.

    Its fields are there and finite, counts are not negative, and what was accepted is what was
    tried. The evidence of decisions outside of a search (a phase below 0) is not read.
    """
    if not isinstance(line, Mapping):
        return "it is no decision"
    if problem := what_is_wrong(line, Decision):
        return problem
    for name in COUNTS:
        if line.get(name, 0) < 0:
            return f"{name!r} is {line[name]}, below 0"
    left_out = line.get("left_out")
    if left_out and not 0 <= left_out[0] < left_out[1]:
        return f"'left_out' is {left_out}, no stretch of examples"
    for name, pair in line["changes"].items():
        if len(pair) != 2:
            return f"the change of {name!r} is {pair}, not from one value to another"
    return None if line["phase"] < 0 else _damage_of_evidence(line)


def _damage_of_evidence(line: Mapping[str, Any]) -> str | None:
    accepted: list[dict[str, Setting]] = []
    for entry in line["evidence"]:
        if problem := what_is_wrong(entry, Evidence):
            return f"in its evidence, {problem}"
        tried = entry["setting"].split(" and ")  # of a change of several, all
        if entry["way"] not in (-1, 0, 1) or not set(tried) <= entry["settings"].keys():
            return f"in its evidence, {entry['setting']!r} is no change that was tried"
        accepted += [entry["settings"]] * entry["accepted"]
    if line["verdict"] != "accepted":
        return None
    for name, (_, new) in line["changes"].items():
        if not any(settings.get(name) == new for settings in accepted):
            return f"the change of {name!r} to {new} is none that its evidence accepts"
    return None


def known_decisions(lines: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """The first search of a past run as a proposer reads it; none where any of it is damaged."""
    try:
        first = [line for line in lines if line["phase"] == 0]
        if any(map(what_is_damaged, first)):
            return []
        return [Decision(**line) for line in first]
    except (TypeError, KeyError):  # of another version, or no decisions at all
        return []


def is_search(lines: Sequence[Any]) -> bool:
    """Whether a past run has searched at all, as far as its decisions can be read."""
    return any(isinstance(line, Mapping) and line.get("phase") == 0 for line in lines)
