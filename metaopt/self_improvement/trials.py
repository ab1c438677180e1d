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

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.measure import compile_seconds
from metaopt.ranges import Checked, Range, Share, Steps
from metaopt.self_improvement.assess import Verdict, compare
from metaopt.self_improvement.records import Decision, differences
from metaopt.self_improvement.workload import (
    LeftOut,
    Scale,
    Score,
    Setting,
    Settings,
    Snapshot,
    Step,
    Workload,
    after_steps,
    changed,
    copied,
    steps,
)


class Change(NamedTuple):
    """What a proposer would do.

    Attributes:
      settings: their new values.
      setting: the one that matters; the others go with it.
      score: what it is judged by.
      reason: in words.
      way: 1 for more of the setting, -1 for less, 0 where there is no such order.
      level: of refinement; 0 while the search is coarse.
      rank: it waits for all of a lower rank that can be tried.
      parts: the changes that it is made of, where it is of several.
    """

    settings: dict[str, Setting]
    setting: str
    score: Score
    reason: str
    way: int = 0
    level: int = 0
    rank: int = 0
    parts: tuple["Change", ...] = ()


class Trial(NamedTuple):
    """A change, tried; ``change`` is None for the trial that changes nothing.

    Attributes:
      change: what was tried.
      after: the snapshot that it came to.
      losses: float64 ``[E]``, held out; not finite where it diverged or could not be run.
      seconds: of its steps, without compiling.
      examples: that it went through, with those to anneal.
      broken: the first stretch of the data that gave no number, ``(first, end)``.
      error: why it could not be run; nothing where it could.
    """

    change: Change | None
    after: Snapshot
    losses: np.ndarray
    seconds: float
    examples: int
    broken: tuple[int, int] | None = None
    error: str = ""


def try_change(
    workload: Workload,
    snapshot: Snapshot,
    change: Change | None,
    size: int,
    anneal: int,
    *,
    skip: LeftOut = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> Trial:
    """Goes on from a copy of the snapshot with the change, and measures where it comes to.

    Args:
      workload: the training.
      snapshot: where to start; its arrays stay as they are.
      change: what to try; None for nothing.
      size: examples to go through.
      anneal: examples after those, over which the rates go to zero.
      skip: as for `workload.steps`.
      check: called at every step; what it raises ends the trial.
    """
    settings = change.settings if change else {}
    started = changed(workload, copied(snapshot), settings)
    end = snapshot.examples + size
    after, seconds, broken = _run(workload, started, end, skip=skip, check=check)
    judged = after
    if anneal:
        end = after.examples + anneal
        judged, more, later = _run(
            workload, copied(after), end, anneal=True, skip=skip, check=check
        )
        seconds, broken = seconds + more, broken or later
    losses = np.asarray(workload.evaluate(judged.state), np.float64)
    return Trial(change, after, losses, seconds, judged.examples - snapshot.examples, broken)


def _run(
    workload: Workload,
    snapshot: Snapshot,
    end: int,
    *,
    anneal: bool = False,
    skip: LeftOut,
    check: Callable[[], None],
) -> tuple[Snapshot, float, tuple[int, int] | None]:
    """The snapshot at ``end``, seconds without compiling, the first stretch without a number."""
    compiled, start, broken = compile_seconds(), snapshot.examples, None
    began, ends, unseen = time.perf_counter(), [], None
    for step in steps(workload, snapshot, end, anneal=anneal, skip=skip):
        check()
        snapshot = step.snapshot
        if unseen:  # as in training: while the device computes this step, look at the one before
            broken = broken or _broken(unseen)
            ends.append(time.perf_counter())
        unseen = step
    if unseen:
        broken = broken or _broken(unseen)
        jax.block_until_ready(snapshot.state.step)
        ends.append(time.perf_counter())
    seconds = _seconds(began, ends, compile_seconds() - compiled)
    examples = after_steps(start, end, workload.examples_per_step(snapshot.settings))
    return snapshot._replace(examples=examples), seconds, broken


def _seconds(began: float, ends: list[float], compiling: float) -> float:
    """What steps took that came to their ends then; the first compiled, and waited for its data.

    It is the median of the others that counts: trials are short, and a machine that did something
    else for once should decide nothing.
    """
    if len(ends) < 2:
        return max(0.0, ends[-1] - began - compiling) if ends else 0.0
    return float(np.median(np.diff(ends)) * len(ends))


def _broken(step: Step) -> tuple[int, int] | None:
    """The stretch of the data of a step of which a scalar is no number."""
    metrics = jax.device_get(step.metrics)
    sound = all(np.isfinite(x) for x in metrics.values() if np.ndim(x) == 0)
    return None if sound else (step.position, step.snapshot.examples)


def is_bad(workload: Workload, snapshot: Snapshot, stretch: tuple[int, int]) -> bool:
    """Whether the batch there gives no number from this sound snapshot either.

    So it is the data that is at fault, and not where the training had come to.
    """
    there = copied(snapshot)._replace(examples=stretch[0])
    return (
        _run(workload, there, stretch[0] + 1, skip=frozenset(), check=lambda: None)[2] is not None
    )


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


Margin = Annotated[float, Range(0, 0.999)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig(Checked):
    """How changes are tried.

    Attributes:
      examples: a trial's, as a fraction of the run.
      longer: a change that refines (`Change.level`) has so many times the examples of one a
        level above it.
      anneal: after those, so many more, as a fraction of them, with rates that go to zero:
        a trial is judged by what the run would be if it ended there, since without that
        short trials prefer small rates (Wu et al., 2018, the short-horizon bias).
      margin: a difference in the held-out loss smaller than this fraction of it is none.
      least_steps: a trial has at least so many steps of the batch that the run has, and a batch
        of which it would have fewer is not tried.
    """

    examples: Annotated[float, Range(1e-9, 0.999)] = 0.01
    longer: Annotated[float, Range(1, 1000)] = 4.0
    anneal: Share = 0.33
    margin: Margin = 0.002
    least_steps: Steps = 4

    def size(self, workload: Workload, settings: Settings, level: int = 0) -> int:
        """Examples of a trial, without those to anneal."""
        least = self.least_steps * workload.examples_per_step(settings)
        return round(self.longer**level * max(least, round(self.examples * workload.num_examples)))

    def possible(self, workload: Workload, settings: Settings, change: Change) -> bool:
        """Whether a trial as long as it should be is enough to judge the change by."""
        size = self.size(workload, settings, change.level)
        return self.judges(workload, settings, change, size)

    def judges(self, workload: Workload, settings: Settings, change: Change, size: int) -> bool:
        """Whether a trial of so many examples is long enough to judge the change by."""
        batch = workload.examples_per_step({**settings, **change.settings})
        return size >= self.least_steps * batch


def affordable(
    workload: Workload,
    snapshot: Snapshot,
    changes: Sequence[Change],
    config: TrialConfig,
    budget: float,
    *,
    size: int = 0,
) -> tuple[list[Change], int]:
    """Of the changes those that can be tried now, and the examples of their trials.

    Nothing of a higher rank is tried while something of a lower one is possible, and nothing is
    refined while something coarse is to be tried. What refines has trials as long as
    it should; the last one that the budget is good for may have half of it. Where there is only
    budget for trials of the size before, they are believed against their bias alone: only what
    makes a setting smaller is tried, for at the start of a run short trials prefer rates that
    are too large.

    Args:
      workload: the training.
      snapshot: where it stands.
      changes: in the order of their worth.
      config: how they are tried.
      budget: in examples that are not gone on with.
      size: of the trials of the race before, in this search; they do not become shorter.
    """
    settings = snapshot.settings
    possible = [c for c in changes if config.possible(workload, settings, c)]
    first = min((change.rank for change in possible), default=0)
    possible = [change for change in possible if change.rank == first]
    level = min((change.level for change in possible), default=0)
    found = [change for change in possible if change.level == level]
    wanted = max(size, config.size(workload, settings, level))
    each, room = 1 + config.anneal, _room(workload, snapshot, possible, config)

    def affords(number: int) -> float:
        """The size of so many trials beside one without a change, the best gone on with."""
        trials = number + 1 + _is_merged(found[:number])
        left = budget - (trials + 1) * workload.evaluation_examples  # one is of where all start
        return min(wanted, room, left / (each * trials - 1))

    if size != wanted:
        for number in range(len(found), 0, -1):
            least = wanted / 2 if level and number == 1 else wanted
            if affords(number) >= max(size + 1, least):
                found, size = found[:number], int(affords(number))
                return [c for c in found if config.judges(workload, settings, c, size)], size
        found = [change for change in possible if change.way < 0] if level else found
    if not 0 < size <= room:
        return [], size
    found = [c for c in found if config.judges(workload, settings, c, size)]
    one = each * size + workload.evaluation_examples
    while found and one * (len(found) + _is_merged(found)) > budget:
        found = found[:-1]
    return found, size


def _room(
    workload: Workload, snapshot: Snapshot, changes: Sequence[Change], config: TrialConfig
) -> float:
    """The size of a trial that ends with the run, whatever batch it is of."""
    batches = [
        workload.examples_per_step({**snapshot.settings, **settings})
        for settings in ({}, *(change.settings for change in changes))
    ]
    left = workload.num_examples - snapshot.examples - 2 * max(batches)
    return left / (1 + config.anneal)


def _is_merged(changes: Sequence[Change]) -> bool:
    """Whether there may be one more trial, of several settings together."""
    return len({change.setting for change in changes if change.score == "loss"}) > 1


LOWERED = 0.25
"""The factor on rates under which all trials diverge."""


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


def races(
    workload: Workload,
    snapshot: Snapshot,
    proposer: Proposer,
    config: TrialConfig,
    share: float,
    phase: int,
    decisions: Sequence[Decision],
    *,
    skip: Callable[[], LeftOut],
    check: Callable[[], None],
) -> Iterator[tuple[Ground, Decision]]:
    """Where a search stands after each of its races, and what was decided.

    Args:
      workload: the training.
      snapshot: where all trials start; its arrays stay as they are.
      proposer: names what to try.
      config: how it is tried.
      share: of the run that trials may cost which are not gone on with.
      phase: of the search.
      decisions: all of the run; each that is given is to be added to them before the next.
      skip: the stretches of the data that are left out by now.
      check: as for `decide`.

    Raises:
      FloatingPointError: the held-out loss of the snapshot is not finite.
    """
    ground: Ground | None = None
    while True:
        now = ground.snapshot if ground else snapshot
        last = _last(decisions, now, phase)
        spent = sum(decision.trial_examples for decision in decisions if decision.phase == phase)
        changes, size = affordable(
            workload,
            now,
            proposer(now, decisions, phase),
            config,
            share * workload.num_examples - spent,
            size=last.size if last else 0,
        )
        if not changes:
            return
        ground = ground or stand(workload, snapshot)
        ground, decision = decide(
            workload, ground, changes, config, phase, size=size, last=last, skip=skip(), check=check
        )
        yield ground, decision


def _last(decisions: Sequence[Decision], now: Snapshot, phase: int) -> Decision | None:
    """The decision before, if it was of the same search."""
    if not decisions or decisions[-1].verdict == "rolled back":
        return None
    same = decisions[-1].phase == phase and decisions[-1].examples == now.examples
    return decisions[-1] if same else None


def is_closed(decisions: Sequence[Decision], now: Snapshot, phase: int) -> bool:
    """Whether the run has gone on from the search of this phase."""
    return any(
        decision.phase == phase
        and decision.verdict != "rolled back"
        and decision.examples < now.examples
        for decision in decisions
    )
