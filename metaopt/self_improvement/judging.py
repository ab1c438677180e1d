"""Judges trials: which of them did better than changing nothing, and which is the best."""

import math
from typing import Any

import numpy as np

from metaopt.self_improvement.assess import Verdict, compare
from metaopt.self_improvement.attempts import Change, Trial
from metaopt.self_improvement.workload import Setting

QUICKER = 1.1
"""A change by which examples go so many times as quickly is better where the improvement a
second is about the same: a run has a given number of examples."""
MUCH_QUICKER = 1.25
"""A change by which examples go so many times as quickly is tried and taken before all others."""
WORTH_ADDING = 0.25
"""Of the best difference: a smaller one is not tried together with it."""
EFFICIENCY_MARGIN = 0.1
"""A smaller difference in the improvement a second, as a fraction of it, is none."""
THROUGHPUT_MARGIN = 0.05
"""Examples must take less time by more than this fraction of it ..."""
THROUGHPUT_LOSS_MARGIN = 0.01
"""... and the loss may not be higher by more than this fraction of it."""


def judge(before: np.ndarray, unchanged: Trial, trial: Trial, margin: float = 0.0) -> Verdict:
    """Whether a trial did better than the one that changed nothing, by the change's score.

    Args:
      before: float64 ``[E]``, the held-out losses where both started.
      unchanged: the trial to compare with.
      trial: the one to judge.
      margin: the relevant size of a difference of losses, as a fraction of the loss.

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
        found = compare(
            rates[0], rates[1], margin=EFFICIENCY_MARGIN * abs(float(np.mean(rates[0])))
        )
        no_worse = found.outcome == "noise" and _speed(unchanged, trial) > QUICKER
        return found._replace(outcome="better") if no_worse else found
    smallest = THROUGHPUT_LOSS_MARGIN * abs(float(np.mean(unchanged.losses)))
    loss = compare(unchanged.losses, trial.losses, margin=smallest)
    if loss.outcome == "worse":
        return loss
    costs = [t.seconds / t.examples for t in (unchanged, trial)]
    outcome = "better" if costs[1] < (1 - THROUGHPUT_MARGIN) * costs[0] else "noise"
    return Verdict(outcome, costs[1] - costs[0], math.nan, 1)


def improvement_rates(before: np.ndarray, trial: Trial) -> np.ndarray:
    """By how much each held-out loss fell in a second, ``[E]``."""
    return (before - trial.losses) / max(trial.seconds, 1e-9)


def _speed(unchanged: Trial, trial: Trial) -> float:
    """How many times as quickly examples go."""
    return unchanged.seconds / unchanged.examples / (trial.seconds / trial.examples)


class Race:
    """Trials that are judged one by one; but for the best, what they came to is let go of."""

    def __init__(self, before: np.ndarray, unchanged: Trial, margin: float):
        """Nothing was tried yet.

        Args:
          before: float64 ``[E]``, the held-out losses where all trials start.
          unchanged: the trial to compare with.
          margin: as for `judge`.
        """
        self.before, self.unchanged, self.margin = before, unchanged, margin
        self.best: Trial | None = None
        self._verdict: Verdict | None = None  # on the best
        self.spent = self.evaluated = 0
        self._alone: dict[str, tuple[float, Change]] = {}
        self._entries: list[tuple[Change, dict[str, Any]]] = []

    def enter(self, trial: Trial) -> None:
        """Judges one more; the smaller wins a tie where it refines, as trials prefer the larger."""
        change = trial.change
        assert change is not None
        verdict = judge(self.before, self.unchanged, trial, self.margin)
        self._entries.append((change, _evidence(trial, verdict)))
        self.spent += trial.examples
        self.evaluated += not trial.error
        tie = verdict.outcome == "noise" and change.level > 0 and change.way < 0
        if verdict.outcome != "better" and not tie:
            return
        if self.best is None or self._gain(trial) > self._gain(self.best):
            self.best, self._verdict = trial, verdict
        if change.score == "loss":
            alone = self._alone.get(change.setting, (math.inf, change))
            self._alone[change.setting] = min(
                alone, (verdict.difference, change), key=lambda x: x[0]
            )

    def is_needless(self, change: Change) -> bool:
        """Whether the best so far makes all after it much quicker, or the other way was taken."""
        if self.best is not None and self._gain(self.best)[0] == 2:
            return True  # all that is left can be tried at less cost
        _, better = self._alone.get(change.setting, (0.0, None))
        return better is not None and change.way * better.way < 0

    def together(self) -> Change | None:
        """The best changes of several settings as one, where several were better by the loss."""
        most = min((difference for difference, _ in self._alone.values()), default=0.0)
        changes = [change for x, change in self._alone.values() if x <= WORTH_ADDING * most]
        if len(changes) < 2:
            return None
        merged: dict[str, Setting] = {}
        for change in changes:
            merged |= change.settings
        names = " and ".join(change.setting for change in changes)
        reasons = "; ".join(change.reason for change in changes)
        return Change(merged, names, "loss", reasons, parts=tuple(changes))

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
            rank, timed = 2 * (_speed(self.unchanged, trial) > MUCH_QUICKER), trial
        rates = improvement_rates(self.before, trial._replace(seconds=timed.seconds))
        return rank, float(rates.mean())

    def why(self) -> str:
        """The rule by which the best is taken, or none is, with what it compared."""
        least = self.margin * abs(float(np.mean(self.unchanged.losses)))
        if self.best is None or self._verdict is None:
            loss = float(np.mean(self.unchanged.losses))
            return (
                f"nothing was better beyond noise than no change, of loss {loss:.4g}: by its 95 % "
                f"interval and a margin of {least:.2g}"
            )
        assert self.best.change is not None
        change, (outcome, difference, half, _) = self.best.change, self._verdict
        measured = f"{difference:.3g} ± {half:.2g}"
        if change.score == "throughput":
            rule = (
                f"examples go {_speed(self.unchanged, self.best):.3g} times as quickly, more than "
                f"{1 / (1 - THROUGHPUT_MARGIN):.3g}, and the loss is no worse"
            )
        elif change.score == "efficiency":
            rates = improvement_rates(self.before, self.unchanged)
            least = EFFICIENCY_MARGIN * abs(float(np.mean(rates)))
            rule = f"improvement a second {-difference:+.3g} ± {half:.2g} beyond {least:.2g}"
            if -difference - half <= least:
                rule = (
                    f"improvement a second within noise, {-difference:+.3g} ± {half:.2g}, and "
                    f"examples go {_speed(self.unchanged, self.best):.3g} times as quickly, more "
                    f"than {QUICKER}"
                )
        elif outcome == "better":
            rule = f"loss {measured} beyond the margin of {least:.2g}"
        else:
            rule = f"loss {measured}, noise or within the margin of {least:.2g}: the smaller wins"
        return f"{change.reason}: {rule}"

    def evidence(self) -> list[dict[str, Any]]:
        """One entry a trial."""
        chosen = self.best.change if self.best else None
        accepted = [] if chosen is None else [chosen, *chosen.parts]
        return [
            entry | {"accepted": any(change is each for each in accepted)}
            for change, entry in self._entries
        ]


def _evidence(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    assert trial.change is not None
    return {
        "setting": trial.change.setting,
        "way": trial.change.way,
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
