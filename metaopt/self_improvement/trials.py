"""Propose, try, score, accept or roll back: one interface for every change of a setting.

A proposer looks at the settings and at what was decided before, and names changes. They are
tried side by side: from the same snapshot, on the same stretch of data, and judged on the same
held-out examples, beside a trial that changes nothing. Of those that are better beyond noise
the one that improves most in a second is accepted; where several settings were better, they are
tried together as well. The next race starts from the same snapshot, with the settings found by
then, so its trial without a change is the winner of the last: all of a search is decided on one
`Ground`. At its end the training goes on from where the last winner came to; the other trials
are lost work, which has a budget. What refines has longer trials: the shorter they are, the
larger the rates that they prefer at the start of a run.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.self_improvement.assess import as_record
from metaopt.self_improvement.attempts import Change, Trial, is_bad, try_change
from metaopt.self_improvement.budget import TrialConfig
from metaopt.self_improvement.judging import Race
from metaopt.self_improvement.workload import (
    LeftOut,
    Scale,
    Setting,
    Settings,
    Snapshot,
    Workload,
    changed,
    copied,
)

__all__ = [
    "Change",
    "Decision",
    "Ground",
    "Proposer",
    "decide",
    "lowered",
    "stand",
]


LOWERED = 0.25
"""The factor on rates under which all trials diverge."""


class Decision(NamedTuple):
    """What was decided, and on which evidence.

    Attributes:
      step: of the state, when it was taken.
      examples: gone through by then.
      phase: of the search; every phase starts it anew.
      verdict: ``accepted``, ``kept`` (nothing was better) or ``rolled back`` (an alarm).
      changes: the settings that changed, ``{name: [from, to]}``.
      reason: in words, with the rule and the threshold that decided.
      evidence: one entry a change that was tried: its settings, the difference to changing
        nothing with its 95 % interval, the verdict, and whether it was accepted.
      trial_examples: spent on what is not gone on with, if this decision is the last of its
        search, and on evaluations (`Workload.evaluation_examples`).
      seconds: that it took.
      left_out: a stretch of the data that is not trained on from now on, ``(first, end)``.
      size: examples of each of its trials, those to anneal aside.
      gained: how far the run comes by going on from the winner, in examples.
    """

    step: int
    examples: int
    phase: int
    verdict: Literal["accepted", "kept", "rolled back"]
    changes: dict[str, list[Setting]]
    reason: str
    evidence: list[dict[str, Any]]
    trial_examples: int
    seconds: float
    left_out: tuple[int, int] | None = None
    size: int = 0
    gained: int = 0

    def as_json(self) -> dict[str, Any]:
        """A line of ``decisions.jsonl``."""
        return as_record(self)


Proposer = Callable[[Snapshot, Sequence[Decision], int], list[Change]]
"""``(snapshot, decisions so far, phase) -> changes to try side by side``; none to end the phase."""


class Ground(NamedTuple):
    """What all races of a search start from, and how far its last winner came.

    Attributes:
      snapshot: where all trials start, with the settings that were found up to now.
      before: float64 ``[E]``, the held-out losses there.
      winner: the trial of these very settings; None where there was none yet.
      size: the examples of that trial, those to anneal aside.
    """

    snapshot: Snapshot
    before: np.ndarray
    winner: Trial | None = None
    size: int = 0

    @property
    def reached(self) -> Snapshot:
        """Where to go on from when nothing more is tried."""
        return self.snapshot if self.winner is None else self.winner.after


def stand(workload: Workload, snapshot: Snapshot) -> Ground:
    """The ground of a search that begins here.

    Raises:
      FloatingPointError: the held-out loss is not finite.
    """
    before = np.asarray(workload.evaluate(snapshot.state), np.float64)
    if not np.isfinite(before).all():
        raise FloatingPointError("the held-out loss is not finite")
    return Ground(snapshot, before)


def decide(
    workload: Workload,
    ground: Ground,
    changes: Sequence[Change],
    config: TrialConfig,
    phase: int = 0,
    *,
    size: int = 0,
    last: Decision | None = None,
    skip: LeftOut = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> tuple[Ground, Decision]:
    """Tries the changes beside no change, and takes the best that is better.

    Where all of them diverge it goes nowhere: a batch that gives no number from the start
    is to be left out, or else the rates are lowered.

    Args:
      workload: the training.
      ground: where it stands; its arrays stay as they are.
      changes: one or more.
      config: how they are tried.
      phase: of the search, for the record.
      size: examples of a trial, at least those of the race before; of the config if not given.
      last: the decision before, in this search.
      skip: as for `workload.steps`.
      check: called at every step of a trial; what it raises ends the attempt.

    Returns:
      The ground with what was found, and the decision.
    """
    began = time.perf_counter()
    snapshot = ground.snapshot
    size = max(size or config.size(workload, snapshot.settings), ground.size)

    def tried(change: Change | None, start: Snapshot = snapshot) -> Trial:
        left, anneal = snapshot.examples + size - start.examples, round(config.anneal * size)
        return try_change(workload, start, change, left, anneal, skip=skip, check=check)

    unchanged = _unchanged(ground, size, tried)
    race = Race(ground.before, unchanged, config.margin)
    for change in sorted(changes, key=lambda change: change.score == "loss"):
        if not race.is_needless(change):
            race.enter(_or_refused(tried, change, unchanged))
    if together := race.together():
        race.enter(_or_refused(tried, together, unchanged))
    end = _end(workload, ground._replace(winner=unchanged, size=size), race)
    # A run that was stopped after the last race tries its winner once more, at no account.
    gained, held = end.ground.reached.examples - snapshot.examples, last.gained if last else 0
    again = 0 if last is not None and last.size == size else unchanged.examples - held
    # At the ground, of the trial without a change, and of all that could be run.
    evaluations = (last is None) + (again > 0) + race.evaluated
    return end.ground, Decision(
        step=int(snapshot.state.step),
        examples=snapshot.examples,
        phase=phase,
        verdict=end.verdict,
        changes=differences(snapshot.settings, end.ground.snapshot.settings),
        reason=end.reason,
        evidence=race.evidence(),
        trial_examples=race.spent
        + again
        - gained
        + held
        + math.ceil(evaluations * workload.evaluation_examples),
        seconds=time.perf_counter() - began,
        left_out=end.left_out,
        size=size,
        gained=gained,
    )


def _unchanged(ground: Ground, size: int, tried: Callable[..., Trial]) -> Trial:
    """The trial without a change: the last winner, or that one gone on with, where there is one."""
    winner = ground.winner
    if winner is None:
        return tried(None)
    if ground.size == size:
        return winner
    longer, before = tried(None, winner.after), winner.after.examples - ground.snapshot.examples
    return longer._replace(
        examples=longer.examples + before,
        seconds=longer.seconds + winner.seconds * before / winner.examples,
    )


def _or_refused(try_it: Callable[[Change], Trial], change: Change, unchanged: Trial) -> Trial:
    """The trial; where the change cannot be run (nor, say, has room in memory), why."""
    try:
        return try_it(change)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).partition("\n")[0]
        nothing = np.full_like(unchanged.losses, math.inf)
        return Trial(change, unchanged.after, nothing, 0.0, 0, None, reason)


class _End(NamedTuple):
    """How a decision ends: where the search stands then, the verdict and why."""

    ground: Ground
    verdict: Literal["accepted", "kept", "rolled back"]
    reason: str
    left_out: tuple[int, int] | None = None


def _end(workload: Workload, ground: Ground, race: Race) -> _End:
    """What a race comes to; ``ground`` has its trial without a change."""
    snapshot, unchanged = ground.snapshot, race.unchanged
    if race.best is not None and race.best.change is not None:
        change = race.best.change
        found = changed(workload, snapshot, change.settings)
        winner = race.best._replace(change=None)
        reason = race.why()
        return _End(ground._replace(snapshot=found, winner=winner), "accepted", reason)
    if np.isfinite(unchanged.losses).all():
        return _End(ground, "kept", race.why())
    again, broken = Ground(copied(snapshot), ground.before), unchanged.broken
    if broken is not None and is_bad(workload, snapshot, broken):
        reason = f"examples {broken[0]} to {broken[1] - 1} give no number and are left out"
        return _End(again, "rolled back", reason, broken)
    slower = again._replace(snapshot=lowered(workload, again.snapshot))
    reason = f"all trials diverged: no loss is finite; the rates become {LOWERED:g} of theirs"
    return _End(slower, "rolled back", reason)


def lowered(workload: Workload, snapshot: Snapshot, factor: float = LOWERED) -> Snapshot:
    """The snapshot with smaller scheduled rates, within their bounds."""
    rates = {}
    for name in workload.scheduled:
        axis = workload.space.get(name)
        if isinstance(axis, Scale):
            rates[name] = axis.scaled(float(snapshot.settings[name]), factor)
    return changed(workload, snapshot, rates)


def differences(old: Settings, new: Settings) -> dict[str, list[Setting]]:
    """What changed, ``{name: [from, to]}``."""
    return {name: [old[name], new[name]] for name in new if old.get(name) != new[name]}
