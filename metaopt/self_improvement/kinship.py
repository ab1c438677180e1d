"""Which past runs are kin to a new one, and what they propose for its start."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metaopt.self_improvement.standing import Curve
from metaopt.training.runs import versions

Task = Mapping[str, Any]
"""Descriptors of a task: sizes and counts as numbers, kinds as strings."""

UNEQUAL = 2.0  # as much as a size that is 7.4 times as large
MISSING = 1.0
LIKE = 0.1
NEAR = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is remembered of a run. All of it must be writable as JSON.

    Attributes:
      name: of the run, such as ``'adapt_languages/cpu-20260102-030405'``.
      task: what it was about, for finding its kin.
      settings: with which a run like it should start; after all that was improved.
      loss: held-out loss at the end; not finite where the run diverged.
      tokens: tokens (or examples) seen.
      seconds: that it took.
      curve: ``(tokens, held-out loss)``; a memory keeps some 200 points of a longer one.
      decisions: what was tried and changed on the way, with the evidence; before that what the
        runs had decided whose search this one went on with.
      seed: of the run.
      when: its end, in ISO 8601.
      versions: of Python, jax, flax, optax and metaopt.
    """

    name: str
    task: Task
    settings: Mapping[str, Any]
    loss: float
    tokens: int
    seconds: float
    curve: Curve = ()
    decisions: Sequence[Mapping[str, Any]] = ()
    seed: int | None = None
    when: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)


class Proposal(NamedTuple):
    """A start for a new run, and where it comes from.

    Attributes:
      settings: those of the past run.
      run: its name.
      distance: from the new task to that run's, see `distance`.
      reason: in words.
      decisions: of that run, where it was of the very task: they hold for the new one too. After
        them those for a choice with which another such run, no shorter, did not get as far.
    """

    settings: dict[str, Any]
    run: str
    distance: float
    reason: str
    decisions: Sequence[Mapping[str, Any]] = ()


def distance(here: Task, there: Task) -> float:
    """How far apart two tasks are: the sum over their descriptors, 0 for the same.

    Positive numbers differ by ``|log(a / b)|``: a model twice as large is 0.69 away. Others
    (zero, negative) differ by ``|a - b| / max(|a|, |b|)``. Anything else is equal or `UNEQUAL`
    apart; a descriptor that only one of them has costs `MISSING`.
    """
    return math.fsum(_gaps(here, there).values())


def choose(records: Sequence[RunRecord], task: Task, within: float = NEAR) -> Proposal | None:
    """The settings of the best of the nearest kin.

    Nearest are the runs that are at most `LIKE` farther away than the nearest of all; best is
    the lowest final loss among them, and of equal ones the quickest. Runs that diverged
    propose nothing.

    Args:
      records: past runs.
      task: of the new run.
      within: no run farther than this is kin.

    Returns:
      `Proposal`, or None where there is no kin.
    """
    kin = [(distance(task, run.task), run) for run in records if math.isfinite(run.loss)]
    kin = [(far, run) for far, run in kin if far <= within]
    if not kin:
        return None
    nearest = min(far for far, _ in kin)
    far, run = min(
        (pair for pair in kin if pair[0] <= nearest + LIKE),
        key=lambda pair: (pair[1].loss, pair[1].seconds),
    )
    decisions = [] if far else list(run.decisions)
    for away, other in kin:
        if away == far == 0 and other.loss > run.loss and other.tokens >= run.tokens:
            decisions += _regretted(other.decisions, run.settings)
    return Proposal(dict(run.settings), run.name, far, _reason(task, far, run), decisions)


def _regretted(decisions: Sequence[Any], better: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices that were accepted, as worse than no change; those in force are not.

    None, where these are no decisions.
    """
    found = []
    try:
        for decision in decisions:
            entries = [
                {**entry, "verdict": "worse", "accepted": False}
                for entry in decision["evidence"]
                if decision["phase"] == 0 and entry["accepted"] and entry["way"] == 0
                if better.get(entry["setting"]) != entry["settings"].get(entry["setting"])
            ]
            if entries:
                found.append({**decision, "verdict": "kept", "changes": {}, "evidence": entries})
    except (TypeError, KeyError, AttributeError):
        return []
    return found


def _reason(task: Task, far: float, run: RunRecord) -> str:
    gaps = _gaps(task, run.task)
    most = sorted((name for name in gaps if gaps[name]), key=lambda name: (-gaps[name], name))
    told = [f"{n} {run.task.get(n, 'unknown')} there, {task.get(n, 'unknown')} here" for n in most]
    differs = "the same task" if not most else f"distance {far:.2f}: {', '.join(told[:3])}"
    reached = f"loss {run.loss:.4g} after {run.tokens:.3g} tokens"
    return f"starts with the settings of {run.name}, which reached {reached} ({differs})"


def _gaps(here: Task, there: Task) -> dict[str, float]:
    return {
        name: _gap(here[name], there[name]) if name in here and name in there else MISSING
        for name in sorted({*here, *there})
    }


def _gap(a: Any, b: Any) -> float:
    if not (_is_number(a) and _is_number(b)):
        return 0.0 if type(a) is type(b) and a == b else UNEQUAL
    if a == b:
        return 0.0
    if a > 0 and b > 0:
        return abs(math.log(a) - math.log(b))
    return abs(a - b) / max(abs(a), abs(b))


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
