"""Propose, try, score, accept or roll back: one interface for every change of a setting.

A proposer looks at the settings and at what was decided before, and names changes. They are
tried side by side: from the same snapshot, on the same stretch of data, and judged on the same
held-out examples, beside a trial that changes nothing. Of those that are better beyond noise
the one that improves most in a second is accepted, and its trial was progress; otherwise the
trial that changed nothing was. Where several settings were better, they are tried together as
well. The others are lost work, which has a budget.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.self_improvement.assess import Verdict, as_record, compare
from metaopt.self_improvement.attempts import Change, Trial, is_bad, try_change
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
    "Proposer",
    "Trial",
    "TrialConfig",
    "decide",
    "judge",
    "lowered",
    "try_change",
]


class Decision(NamedTuple):
    """What was decided, and on which evidence.

    Attributes:
      step: of the state, when it was taken.
      examples: gone through by then.
      phase: of the search; every phase starts it anew.
      verdict: ``accepted``, ``kept`` (nothing was better) or ``rolled back`` (an alarm).
      changes: the settings that changed, ``{name: [from, to]}``.
      reason: in words.
      evidence: one entry a change that was tried: its settings, the difference to changing
        nothing with its 95 % interval, the verdict, and whether it was accepted.
      trial_examples: spent on what was not gone on with.
      seconds: that it took.
      left_out: a stretch of the data that is not trained on from now on, ``(first, end)``.
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
    left_out: Sequence[int] | None = None

    def as_json(self) -> dict[str, Any]:
        """A line of ``decisions.jsonl``."""
        return as_record(self)


MUCH_QUICKER = 1.25
"""A change by which examples go so many times as quickly is tried and taken before all others."""

Proposer = Callable[[Snapshot, Sequence[Decision], int], list[Change]]
"""``(snapshot, decisions so far, phase) -> changes to try side by side``; none to end the phase."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """How changes are tried.

    Attributes:
      examples: a trial's, as a fraction of the run.
      anneal: after those, so many more, as a fraction of them, with rates that go to zero:
        a trial is judged by what the run would be if it ended there, since without that
        short trials prefer small rates (Wu et al., 2018, the short-horizon bias).
      margin: a difference in the score smaller than this fraction of it is none.
      least_steps: a trial has at least so many steps of the batch that the run has, and a batch
        of which it would have fewer is not tried.
    """

    examples: float = 0.01
    anneal: float = 0.33
    margin: float = 0.002
    least_steps: int = 4

    def __post_init__(self):
        if not 0 < self.examples < 1 or not 0 <= self.anneal <= 1 or not 0 <= self.margin < 1:
            raise UserError(
                f"a trial's examples={self.examples} must be a fraction of the run, anneal="
                f"{self.anneal} one of the trial, and margin={self.margin} one of the score"
            )
        if self.least_steps < 1:
            raise UserError(f"least_steps is {self.least_steps}; it must be at least 1")

    def size(self, workload: Workload, settings: Settings) -> int:
        """Examples of a trial, without those to anneal."""
        least = self.least_steps * workload.examples_per_step(settings)
        return max(least, round(self.examples * workload.num_examples))

    def cost(self, workload: Workload, settings: Settings) -> float:
        """Examples of a trial in all."""
        return (1 + self.anneal) * self.size(workload, settings)

    def possible(self, workload: Workload, settings: Settings, change: Change) -> bool:
        """Whether a trial is long enough to judge the change by."""
        batch = workload.examples_per_step({**settings, **change.settings})
        return self.size(workload, settings) >= self.least_steps * batch


def decide(
    workload: Workload,
    snapshot: Snapshot,
    changes: Sequence[Change],
    config: TrialConfig,
    phase: int = 0,
    *,
    skip: LeftOut = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> tuple[Snapshot, Decision]:
    """Tries the changes beside no change, and goes on with the best that is better.

    Where all of them diverge it goes nowhere: a batch that gives no number from the start
    is to be left out, or else the rates are lowered.

    Args:
      workload: the training.
      snapshot: where it stands; its arrays stay as they are.
      changes: one or more.
      config: how they are tried.
      phase: of the search, for the record.
      skip: as for `workload.steps`.
      check: called at every step of a trial; what it raises ends the attempt.

    Returns:
      The snapshot to go on with, and the decision.

    Raises:
      FloatingPointError: the held-out loss of the snapshot itself is not finite.
    """
    began = time.perf_counter()
    before = np.asarray(workload.evaluate(snapshot.state), np.float64)
    if not np.isfinite(before).all():
        raise FloatingPointError("the held-out loss is not finite")

    def tried(change: Change | None) -> Trial:
        size = config.size(workload, snapshot.settings)
        return try_change(workload, snapshot, change, size, config.anneal, skip=skip, check=check)

    unchanged = tried(None)
    race = _Race(before, unchanged, config.margin)
    for change in sorted(changes, key=lambda change: change.score == "loss"):
        race.enter(_or_refused(tried, change, unchanged))
        if race.is_much_quicker():
            break  # all that is left can be tried at less cost
    if together := race.together():
        race.enter(_or_refused(tried, together, unchanged))
    end = race.outcome(workload, snapshot)
    return end.after, Decision(
        step=int(snapshot.state.step),
        examples=snapshot.examples,
        phase=phase,
        verdict=end.verdict,
        changes=differences(snapshot.settings, end.after.settings),
        reason=end.reason,
        evidence=race.evidence(),
        trial_examples=race.spent - (end.after.examples - snapshot.examples),
        seconds=time.perf_counter() - began,
        left_out=end.left_out,
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
    """How a decision ends: where to go on from, the verdict and why."""

    after: Snapshot
    verdict: Literal["accepted", "kept", "rolled back"]
    reason: str
    left_out: tuple[int, int] | None = None


class _Race:
    """Trials that are judged one by one; but for the best, what they came to is let go of."""

    def __init__(self, before: np.ndarray, unchanged: Trial, margin: float):
        self.before, self.unchanged, self.margin = before, unchanged, margin
        self.best: Trial | None = None
        self.spent = unchanged.examples
        self._alone: dict[str, tuple[tuple[int, float], Change]] = {}
        self._entries: list[tuple[Change, dict[str, Any]]] = []

    def enter(self, trial: Trial) -> None:
        """Judges one more."""
        assert trial.change is not None
        verdict = judge(self.before, self.unchanged, trial, self.margin)
        self._entries.append((trial.change, _evidence(trial, verdict)))
        self.spent += trial.examples
        if verdict.outcome != "better":
            return
        gain = self._gain(trial)
        if self.best is None or gain > self._gain(self.best):
            self.best = trial
        if trial.change.score == "loss":
            best = self._alone.get(trial.change.setting, (gain, trial.change))
            self._alone[trial.change.setting] = max(best, (gain, trial.change), key=lambda x: x[0])

    def is_much_quicker(self) -> bool:
        """Whether the best so far makes everything after it much quicker."""
        return self.best is not None and self._gain(self.best)[0] == 2

    def together(self) -> Change | None:
        """The best changes of several settings as one, where several were better by the loss."""
        if len(self._alone) < 2:
            return None
        changes = [change for _, change in self._alone.values()]
        merged: dict[str, Setting] = {}
        for change in changes:
            merged |= change.settings
        names = " and ".join(change.setting for change in changes)
        reasons = "; ".join(change.reason for change in changes)
        return Change(merged, names, "loss", reasons, tuple(changes))

    def _gain(self, trial: Trial) -> tuple[int, float]:
        """What the best is chosen by: its rank, and by how much it improves in a second.

        What is judged by the loss comes before the ways to get there, whose worth can only be
        told once the loss goes down as it should; unless one of them makes everything after it
        much quicker. It is given the time of no change, so that what wins does not hang on the
        noise of clocks.
        """
        assert trial.change is not None
        if trial.change.score == "loss":
            rank, timed = 1, self.unchanged
        else:
            rank, timed = 2 * _much_quicker(self.unchanged, trial), trial
        rates = improvement_rates(self.before, trial._replace(seconds=timed.seconds))
        return rank, float(rates.mean())

    def outcome(self, workload: Workload, snapshot: Snapshot) -> _End:
        """Where to go on from."""
        if self.best is not None and self.best.change is not None:
            return _End(self.best.after, "accepted", self.best.change.reason)
        if np.isfinite(self.unchanged.losses).all():
            return _End(self.unchanged.after, "kept", "nothing was better beyond noise")
        again, broken = copied(snapshot), self.unchanged.broken
        if broken is not None and is_bad(workload, snapshot, broken):
            reason = f"examples {broken[0]} to {broken[1] - 1} give no number and are left out"
            return _End(again, "rolled back", reason, broken)
        reason = "all trials diverged; the rates are lowered"
        return _End(lowered(workload, again), "rolled back", reason)

    def evidence(self) -> list[dict[str, Any]]:
        """One entry a trial."""
        chosen = self.best.change if self.best else None
        accepted = [] if chosen is None else [chosen, *chosen.parts]
        return [
            entry | {"accepted": any(change is each for each in accepted)}
            for change, entry in self._entries
        ]


def _much_quicker(unchanged: Trial, trial: Trial) -> bool:
    return MUCH_QUICKER * trial.seconds / trial.examples < unchanged.seconds / unchanged.examples


def improvement_rates(before: np.ndarray, trial: Trial) -> np.ndarray:
    """By how much each held-out loss fell in a second, ``[E]``."""
    return (before - trial.losses) / max(trial.seconds, 1e-9)


def lowered(workload: Workload, snapshot: Snapshot, factor: float = 0.25) -> Snapshot:
    """The snapshot with smaller scheduled rates, within their bounds."""
    rates = {}
    for name in workload.scheduled:
        axis = workload.space.get(name)
        if isinstance(axis, Scale):
            rates[name] = axis.scaled(float(snapshot.settings[name]), factor)
    return changed(workload, snapshot, rates)


def judge(before: np.ndarray, unchanged: Trial, trial: Trial, margin: float = 0.0) -> Verdict:
    """Whether a trial did better than the one that changed nothing, by the change's score.

    Args:
      before: float64 ``[E]``, the held-out losses where both started.
      unchanged: the trial to compare with.
      trial: the one to judge.
      margin: the relevant size of a difference, as a fraction of the score.

    Returns:
      The verdict on the held-out loss, on its negative improvement a second for
      ``efficiency``, or for ``throughput`` on the seconds an example, where the loss is no worse.
    """
    assert trial.change is not None
    score = trial.change.score
    if trial.error or not np.isfinite(trial.losses).all():
        return Verdict("worse", math.inf, math.nan, trial.losses.size)
    if score == "loss":
        smallest = margin * abs(float(np.mean(unchanged.losses)))
        return compare(unchanged.losses, trial.losses, margin=smallest)
    if score == "efficiency":
        rates = [-improvement_rates(before, t) for t in (unchanged, trial)]
        found = compare(rates[0], rates[1], margin=0.1 * abs(float(np.mean(rates[0]))))
        no_worse = found.outcome == "noise" and _much_quicker(unchanged, trial)
        return found._replace(outcome="better") if no_worse else found
    loss = compare(
        unchanged.losses, trial.losses, margin=0.01 * abs(float(np.mean(unchanged.losses)))
    )
    if loss.outcome == "worse":
        return loss
    costs = [t.seconds / t.examples for t in (unchanged, trial)]
    outcome = "better" if costs[1] < 0.95 * costs[0] else "noise"
    return Verdict(outcome, costs[1] - costs[0], math.nan, 1)


def differences(old: Settings, new: Settings) -> dict[str, list[Setting]]:
    """What changed, ``{name: [from, to]}``."""
    return {name: [old[name], new[name]] for name in new if old.get(name) != new[name]}


def _evidence(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    assert trial.change is not None
    return {
        "setting": trial.change.setting,
        "settings": trial.change.settings,
        "score": trial.change.score,
        "loss": float(trial.losses.mean()),
        "difference": verdict.difference,
        "ci95": verdict.ci95,
        "verdict": verdict.outcome,
        "seconds": trial.seconds,
        "examples": trial.examples,
        "error": trial.error,
    }
