"""Trials: propose, try, judge, accept or roll back; one way for every change of a setting.

A proposer looks at the settings and at earlier decisions, and names changes. A *trial round*
tries them side by side: from the same snapshot, on the same data, judged on the same held-out
examples, beside a trial without a change. Of those that are better beyond noise the one that
improves most in a second is accepted; if several settings were better, they are tried together
as well. The next round starts from the same snapshot with the settings found so far, so its
trial without a change is the last winner: a search is decided on one `SearchState`. At its end
the training continues from where the last winner ended. The other trials are discarded; a
budget bounds what they may cost.

Short trials are biased. At the start of a run they prefer rates that are too large, the more
the shorter they are: so what refines has longer trials, and the smaller value wins a tie. Late
in a run they prefer rates that are too small, since a lower rate removes noise at once and what
it costs comes after the trial (Wu et al., 2018, the short-horizon bias): so trials end with
rates that go to zero (`TrialConfig.anneal`), and a change in a later phase needs a larger gain.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.measure import compile_seconds
from metaopt.ranges import Checked, Range, Share, Steps
from metaopt.self_improvement.records import Decision, TriedChange, differences
from metaopt.self_improvement.workload import (
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
from metaopt.statistics import Verdict, compare

LOWERED = 0.25
"""Factor on the rates if all trials diverge."""
FASTER = 1.1
"""Factor of speed by which a change is better if the improvement a second is about the same: a
run has a given number of examples."""
MUCH_FASTER = 1.25
"""Factor of speed by which a change is tried and taken before all others."""
WORTH_ADDING = 0.25
"""Fraction of the best difference: a change with a smaller one is not tried together with it."""
EFFICIENCY_MARGIN = 0.1
"""Relative difference in the improvement a second below which it does not count."""
THROUGHPUT_MARGIN = 0.05
"""Relative fall in the seconds an example that a change judged by throughput needs ..."""
THROUGHPUT_LOSS_MARGIN = 0.01
"""... and the relative rise of the loss that it may not exceed."""

Margin = Annotated[float, Range(0, 0.999)]


class Change(NamedTuple):
    """What a proposer would change.

    Attributes:
      settings: New values.
      setting: Name of the setting that matters; the others go with it.
      score: What the change is judged by.
      reason: The change in words.
      direction: 1 for more of the setting, -1 for less, 0 if there is no such order.
      level: Level of refinement; 0 while the search is coarse.
      rank: Order: it waits for all of a lower rank that can be tried.
      parts: Changes that it is made of, if it is several together.
    """

    settings: dict[str, Setting]
    setting: str
    score: Score
    reason: str
    direction: int = 0
    level: int = 0
    rank: int = 0
    parts: tuple["Change", ...] = ()


Proposer = Callable[[Snapshot, Sequence[Decision], int], Sequence[Change]]
"""``(snapshot, decisions, phase) -> changes``: the snapshot that all would start from, and all
decisions of the run so far. No changes end the search of the phase. It keeps no state of its
own, so a resumed run continues with the same change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig(Checked):
    """How changes are tried.

    Attributes:
      examples: Length of a trial, as a fraction of the run.
      longer: Factor on that length for each level of refinement (`Change.level`).
      anneal: Examples after those, as a fraction of them, over which the rates go to zero: a
        trial is judged by what the run would be if it ended there.
      margin: Relative difference in the held-out loss below which it does not count.
      least_steps: Least number of steps of a trial, of the batch that the run has; a batch of
        which it would have fewer is not tried.
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

    def judges(self, workload: Workload, settings: Settings, change: Change, size: int = 0) -> bool:
        """Whether a trial is long enough to judge a change by: of ``size``, or of its own."""
        size = size or self.size(workload, settings, change.level)
        batch = workload.examples_per_step({**settings, **change.settings})
        return size >= self.least_steps * batch


class Trial(NamedTuple):
    """A change that was tried.

    Attributes:
      change: What was tried; None for the trial without a change.
      after: Snapshot at its end, before annealing.
      losses: Held-out losses, float64 ``[E]``; not finite if it diverged or could not be run.
      seconds: Time of its steps, without compiling.
      examples: Examples that it used, those to anneal among them.
      broken: First stretch of the data whose metrics became NaN or inf, ``(first, end)``.
      error: Why it could not be run; empty if it could.
    """

    change: Change | None
    after: Snapshot
    losses: np.ndarray
    seconds: float
    examples: int
    broken: tuple[int, int] | None = None
    error: str = ""


def run_trial(
    workload: Workload,
    snapshot: Snapshot,
    change: Change | None,
    size: int,
    anneal: int,
    check: Callable[[], None] = lambda: None,
) -> Trial:
    """Trains on from a copy of the snapshot with the change, and evaluates the end.

    Args:
      workload: the training.
      snapshot: where to start; its arrays stay as they are.
      change: what to try; None for nothing.
      size: examples to train on.
      anneal: examples after those, over which the rates go to zero.
      check: called at every step; what it raises ends the trial.
    """
    started = changed(workload, copied(snapshot), change.settings if change else {})
    after, seconds, broken = _train(workload, started, snapshot.examples + size, check=check)
    judged = after
    if anneal:
        end = after.examples + anneal
        judged, more, later = _train(workload, copied(after), end, anneal=True, check=check)
        seconds, broken = seconds + more, broken or later
    losses = np.asarray(workload.evaluate(judged.state), np.float64)
    return Trial(change, after, losses, seconds, judged.examples - snapshot.examples, broken)


def _train(
    workload: Workload,
    snapshot: Snapshot,
    end: int,
    *,
    anneal: bool = False,
    check: Callable[[], None] = lambda: None,
) -> tuple[Snapshot, float, tuple[int, int] | None]:
    """The snapshot at ``end``, seconds without compiling, the first stretch with NaN or inf."""
    compiled, start, broken = compile_seconds(), snapshot.examples, None
    began, ends, unseen = time.perf_counter(), [], None
    for step in steps(workload, snapshot, end, anneal=anneal):
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
    """Time of steps with these ends: the first compiled, and waited for its data.

    The median of the others counts: trials are short, and a busy moment of the machine should
    decide nothing.
    """
    if len(ends) < 2:
        return max(0.0, ends[-1] - began - compiling) if ends else 0.0
    return float(np.median(np.diff(ends)) * len(ends))


def _broken(step: Step) -> tuple[int, int] | None:
    """The stretch of the data of a step if one of its scalar metrics is NaN or inf."""
    metrics = jax.device_get(step.metrics)
    finite = all(np.isfinite(x) for x in metrics.values() if np.ndim(x) == 0)
    return None if finite else (step.position, step.snapshot.examples)


def is_bad_batch(workload: Workload, snapshot: Snapshot, stretch: tuple[int, int]) -> bool:
    """Whether the batch there gives NaN or inf from this sound snapshot too.

    The batch itself is bad then, not the state.
    """
    there = copied(snapshot)._replace(examples=stretch[0], left_out=frozenset())
    return _train(workload, there, stretch[0] + 1)[2] is not None


class Judgement(NamedTuple):
    """Verdict on a trial beside the one without a change, and the rule in words."""

    verdict: Verdict
    rule: str = ""


def judge(before: np.ndarray, unchanged: Trial, trial: Trial, margin: float = 0.0) -> Judgement:
    """Whether a trial did better than the one without a change, by the change's score.

    Args:
      before: held-out losses at the common start, float64 ``[E]``.
      unchanged: the trial without a change.
      trial: the one to judge.
      margin: relevant difference of losses, as a fraction of the loss.

    Returns:
      The verdict on the held-out loss; on its negative improvement a second for ``efficiency``;
      for ``throughput`` on the seconds an example, if the loss is no worse.
    """
    assert trial.change is not None
    score, loss = trial.change.score, abs(float(np.mean(unchanged.losses)))
    if trial.error or not np.isfinite(trial.losses).all():
        return Judgement(Verdict("worse", math.inf, math.nan, trial.losses.size))
    if score == "efficiency":
        speed = _speed(unchanged, trial)
        rates = [-improvement_rates(before, each) for each in (unchanged, trial)]
        least = EFFICIENCY_MARGIN * abs(float(np.mean(rates[0])))
        found = compare(rates[0], rates[1], margin=least)
        measured = f"{-found.difference:+.3g} ± {found.ci95:.2g}"
        if found.outcome == "noise" and speed > FASTER:
            rule = (
                f"improvement a second within noise, {measured}, and examples {speed:.3g} times "
                f"as fast, more than {FASTER}"
            )
            return Judgement(found._replace(outcome="better"), rule)
        return Judgement(found, f"improvement a second {measured} beyond {least:.2g}")
    if score == "throughput":
        found = compare(unchanged.losses, trial.losses, margin=THROUGHPUT_LOSS_MARGIN * loss)
        if found.outcome == "worse":
            return Judgement(found)
        speed = _speed(unchanged, trial)
        costs = [each.seconds / each.examples for each in (unchanged, trial)]
        outcome = "better" if costs[1] < (1 - THROUGHPUT_MARGIN) * costs[0] else "noise"
        rule = (
            f"examples {speed:.3g} times as fast, more than {1 / (1 - THROUGHPUT_MARGIN):.3g}, "
            "and the loss no worse"
        )
        return Judgement(Verdict(outcome, costs[1] - costs[0], math.nan, 1), rule)
    found = compare(unchanged.losses, trial.losses, margin=margin * loss)
    measured, limit = f"loss {found.difference:.3g} ± {found.ci95:.2g}", f"{margin * loss:.2g}"
    if found.outcome == "better":
        return Judgement(found, f"{measured} beyond the margin of {limit}")
    return Judgement(found, f"{measured}, noise or within the margin of {limit}: the smaller wins")


def improvement_rates(before: np.ndarray, trial: Trial) -> np.ndarray:
    """Fall of each held-out loss a second, ``[E]``."""
    return (before - trial.losses) / max(trial.seconds, 1e-9)


def _speed(unchanged: Trial, trial: Trial) -> float:
    """Factor by which examples are faster."""
    return unchanged.seconds / unchanged.examples / (trial.seconds / trial.examples)


class TrialRound:
    """Trials that are judged one by one; only the best keeps the snapshot at its end."""

    def __init__(self, before: np.ndarray, unchanged: Trial, margin: float):
        """Nothing was tried yet. Args: as for `judge`."""
        self.before, self.unchanged, self.margin = before, unchanged, margin
        self.best: Trial | None = None
        self._rule, self._best_gain = "", (0, 0.0)
        self._alone: dict[str, tuple[float, Change]] = {}
        self._tried: list[tuple[Change, TriedChange]] = []

    def enter(self, trial: Trial) -> None:
        """Judges one more; if it refines, the smaller value wins a tie (see the module)."""
        change = trial.change
        assert change is not None
        verdict, rule = judge(self.before, self.unchanged, trial, self.margin)
        self._tried.append((change, _record_of(change, trial, verdict)))
        tie = verdict.outcome == "noise" and change.level > 0 and change.direction < 0
        if verdict.outcome != "better" and not tie:
            return
        gain = self._gain(change, trial)
        if self.best is None or gain > self._best_gain:
            self.best, self._rule, self._best_gain = trial, rule, gain
        if change.score == "loss":
            best_alone = self._alone.get(change.setting)
            if best_alone is None or verdict.difference < best_alone[0]:
                self._alone[change.setting] = verdict.difference, change

    def is_needless(self, change: Change) -> bool:
        """Whether all that is left will be much faster, or the other direction was better."""
        if self.best is not None and self._best_gain[0] == 2:
            return True
        _, better = self._alone.get(change.setting, (0.0, None))
        return better is not None and change.direction * better.direction < 0

    def together(self) -> Change | None:
        """The best changes of several settings as one, if several were better by the loss."""
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

    def _gain(self, change: Change, trial: Trial) -> tuple[int, float]:
        """What the best is chosen by: its rank, and its improvement a second.

        What is judged by the loss comes before what is judged by a clock, which can only be told
        once the loss falls as it should, unless that makes everything after it much faster.
        It is given the time of no change, so that the winner does not depend on the noise of
        clocks.
        """
        if change.score == "loss":
            rank, seconds = 1, self.unchanged.seconds
        else:
            rank, seconds = 2 * (_speed(self.unchanged, trial) > MUCH_FASTER), trial.seconds
        rates = improvement_rates(self.before, trial._replace(seconds=seconds))
        return rank, float(rates.mean())

    def reason(self) -> str:
        """The rule by which the best is taken, or none is, with what it compared."""
        if self.best is not None and self.best.change is not None:
            return f"{self.best.change.reason}: {self._rule}"
        loss = float(np.mean(self.unchanged.losses))
        return (
            f"nothing was better beyond noise than no change, of loss {loss:.4g}: by its 95 % "
            f"interval and a margin of {self.margin * abs(loss):.2g}"
        )

    def trials(self) -> tuple[TriedChange, ...]:
        """The record of each trial."""
        chosen = self.best.change if self.best else None
        accepted = [] if chosen is None else [chosen, *chosen.parts]
        return tuple(
            record._replace(accepted=any(change is each for each in accepted))
            for change, record in self._tried
        )


def _record_of(change: Change, trial: Trial, verdict: Verdict) -> TriedChange:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return TriedChange(
        setting=change.setting,
        settings=change.settings,
        direction=change.direction,
        score=change.score,
        loss=finite(float(trial.losses.mean())),
        difference=finite(verdict.difference),
        ci95=finite(verdict.ci95),
        verdict=verdict.outcome,
        accepted=False,
        seconds=trial.seconds,
        examples=trial.examples,
        error=trial.error,
    )


class SearchState(NamedTuple):
    """What all rounds of a search are decided on.

    Attributes:
      snapshot: Common start of all trials, with the settings found so far.
      before: Held-out losses there, float64 ``[E]``.
      winner: Last winner, as the next round's trial without a change; None at first.
      size: Examples of its trials, those to anneal aside.
    """

    snapshot: Snapshot
    before: np.ndarray
    winner: Trial | None = None
    size: int = 0

    @property
    def reached(self) -> Snapshot:
        """Where the training continues if the search ends here."""
        return self.winner.after if self.winner else self.snapshot


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: trial rounds from one snapshot, within a budget.

    Attributes:
      workload: The training.
      config: How changes are tried.
      phase: Number of the search, for the record.
      check: Called at every step of a trial; what it raises ends the round.
    """

    workload: Workload
    config: TrialConfig
    phase: int = 0
    check: Callable[[], None] = lambda: None

    def begin(self, snapshot: Snapshot) -> SearchState:
        """The state before the first round. Raises FloatingPointError if a loss is not finite."""
        before = np.asarray(self.workload.evaluate(snapshot.state), np.float64)
        if not np.isfinite(before).all():
            raise FloatingPointError("the held-out loss is not finite")
        return SearchState(snapshot, before)

    def rounds(
        self, snapshot: Snapshot, proposer: Proposer, share: float, decisions: Sequence[Decision]
    ) -> Iterator[tuple[SearchState, Decision]]:
        """The state after each round, and its decision, while the next one can be afforded.

        Args:
          snapshot: where all trials start; its arrays stay as they are.
          proposer: names what to try.
          share: of the run that discarded trials may cost.
          decisions: all of the run; each that is given is to be added to them before the next.

        Raises:
          FloatingPointError: the held-out loss of the snapshot is not finite.
        """
        state: SearchState | None = None
        while True:
            now = state.snapshot if state else snapshot
            last = decisions[-1] if decisions else None
            if last and (last.verdict == "rolled back" or not self._is_round(last, now)):
                last = None
            spent = sum(d.trial_examples for d in decisions if d.phase == self.phase)
            budget = share * self.workload.num_examples - spent
            proposed = proposer(now, decisions, self.phase)
            changes, size = self.affordable(now, proposed, budget, last.size if last else 0)
            if not changes:
                return
            state = state or self.begin(snapshot)
            state, decision = self.run_round(state, changes, size, last)
            yield state, decision

    def _is_round(self, decision: Decision, now: Snapshot) -> bool:
        return decision.phase == self.phase and decision.examples == now.examples

    def affordable(
        self, snapshot: Snapshot, changes: Sequence[Change], budget: float, size: int = 0
    ) -> tuple[list[Change], int]:
        """The changes that can be tried now, and the examples of their trials.

        Nothing of a higher rank is tried while something of a lower one is possible, and nothing
        is refined while something coarse is left. What refines has trials of its full length; the
        last one that the budget allows may have half of it. If the budget allows only trials of
        the last size, they are believed against their bias alone: only what makes a setting
        smaller is tried.

        Args:
          snapshot: where trials start.
          changes: in the order of their worth.
          budget: examples that discarded trials may cost.
          size: of the trials of the last round; they do not become shorter.
        """
        workload, config, settings = self.workload, self.config, snapshot.settings
        possible = [change for change in changes if config.judges(workload, settings, change)]
        first = min((change.rank for change in possible), default=0)
        possible = [change for change in possible if change.rank == first]
        level = min((change.level for change in possible), default=0)
        found = [change for change in possible if change.level == level]
        wanted = max(size, config.size(workload, settings, level))
        each, room = 1 + config.anneal, self._room(snapshot, possible)

        def affords(number: int) -> float:
            """The size of ``number`` trials beside one without a change, if the best is kept."""
            trials = number + 1 + _is_merged(found[:number])
            left = budget - (trials + 1) * workload.evaluation_examples  # one is of the start
            return min(wanted, room, left / (each * trials - 1))

        if size != wanted:
            for number in range(len(found), 0, -1):
                least = wanted / 2 if level and number == 1 else wanted
                if affords(number) >= max(size + 1, least):
                    found, size = found[:number], int(affords(number))
                    return [c for c in found if config.judges(workload, settings, c, size)], size
            found = [change for change in possible if change.direction < 0] if level else found
        if not 0 < size <= room:
            return [], size
        found = [change for change in found if config.judges(workload, settings, change, size)]
        one = each * size + workload.evaluation_examples
        while found and one * (len(found) + _is_merged(found)) > budget:
            found = found[:-1]
        return found, size

    def _room(self, snapshot: Snapshot, changes: Sequence[Change]) -> float:
        """The size of a trial that ends with the run, whatever its batch."""
        tried = [snapshot.settings | change.settings for change in changes]
        batches = map(self.workload.examples_per_step, [snapshot.settings, *tried])
        left = self.workload.num_examples - snapshot.examples - 2 * max(batches)
        return left / (1 + self.config.anneal)

    def run_round(
        self,
        state: SearchState,
        changes: Sequence[Change],
        size: int = 0,
        last: Decision | None = None,
    ) -> tuple[SearchState, Decision]:
        """Tries the changes beside no change, and takes the best that is better.

        If every trial diverges, nothing is accepted: a batch that gives NaN or inf from the start
        too is left out, or else the rates are lowered.

        Args:
          state: of the search; its arrays stay as they are.
          changes: one or more.
          size: examples of a trial, at least those of the last round; of the config if 0.
          last: the last decision of this search.
        """
        began, start, config = time.perf_counter(), state.snapshot, self.config
        size = max(size or config.size(self.workload, start.settings), state.size)
        unchanged = self._unchanged(state, size)
        trials = TrialRound(state.before, unchanged, config.margin)
        for change in sorted(changes, key=lambda change: change.score == "loss"):
            if not trials.is_needless(change):
                trials.enter(self._tried(state, change, size))
        if together := trials.together():
            trials.enter(self._tried(state, together, size))
        end, verdict, reason = state._replace(winner=unchanged, size=size), "kept", trials.reason()
        if trials.best is not None and trials.best.change is not None:
            found = changed(self.workload, start, trials.best.change.settings)
            winner = trials.best._replace(change=None)
            end, verdict = end._replace(snapshot=found, winner=winner), "accepted"
        elif not np.isfinite(unchanged.losses).all():
            found, reason = self._all_diverged(start, unchanged.broken)
            end, verdict = SearchState(found, state.before), "rolled back"
        records = trials.trials()
        # A run that was stopped after the last round repeats its winner, at no cost.
        gained, held = end.reached.examples - start.examples, last.gained if last else 0
        again = 0 if last is not None and last.size == size else unchanged.examples - held
        # Of the start, of the trial without a change, and of all that could be run.
        evaluations = (last is None) + (again > 0) + sum(not record.error for record in records)
        spent = sum(record.examples for record in records) + again - gained + held
        return end, Decision(
            kind="search",
            step=int(start.state.step),
            examples=start.examples,
            phase=self.phase,
            verdict=verdict,
            changes=differences(start.settings, end.snapshot.settings),
            reason=reason,
            trials=records,
            trial_examples=spent + math.ceil(evaluations * self.workload.evaluation_examples),
            seconds=time.perf_counter() - began,
            left_out=next(iter(end.snapshot.left_out - start.left_out), None),
            size=size,
            gained=gained,
        )

    def _trial(self, change: Change | None, begin: Snapshot, size: int, total: int) -> Trial:
        anneal = round(self.config.anneal * total)
        return run_trial(self.workload, begin, change, size, anneal, self.check)

    def _tried(self, state: SearchState, change: Change, size: int) -> Trial:
        """The trial of a change, or why it could not be run."""
        try:
            return self._trial(change, state.snapshot, size, size)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # such as no room in memory
            nothing, reason = np.full_like(state.before, math.inf), str(error).partition("\n")[0]
            return Trial(change, state.snapshot, nothing, 0.0, 0, None, reason)

    def _unchanged(self, state: SearchState, size: int) -> Trial:
        """The trial without a change: the last winner, continued if trials are longer now."""
        start, winner = state.snapshot, state.winner
        if winner is None:
            return self._trial(None, start, size, size)
        if state.size == size:
            return winner
        before = winner.after.examples - start.examples
        longer = self._trial(None, winner.after, size - before, size)
        return longer._replace(
            examples=longer.examples + before,
            seconds=longer.seconds + winner.seconds * before / winner.examples,
        )

    def _all_diverged(
        self, start: Snapshot, broken: tuple[int, int] | None
    ) -> tuple[Snapshot, str]:
        """The start of a round that diverged, with what is changed about it, and why."""
        again = copied(start)
        if broken is not None and is_bad_batch(self.workload, start, broken):
            reason = f"examples {broken[0]} to {broken[1] - 1} give NaN or inf and are left out"
            return again._replace(left_out=again.left_out | {broken}), reason
        reason = f"all trials diverged: no loss is finite; the rates are multiplied by {LOWERED:g}"
        return lowered(self.workload, again), reason

    def is_over(self, now: Snapshot, decisions: Sequence[Decision]) -> bool:
        """Whether the run has trained on since this search."""
        return any(
            decision.phase == self.phase
            and decision.verdict != "rolled back"
            and decision.examples < now.examples
            for decision in decisions
        )


def _is_merged(changes: Sequence[Change]) -> bool:
    """Whether there may be one more trial, of several settings together."""
    return len({change.setting for change in changes if change.score == "loss"}) > 1


def lowered(workload: Workload, snapshot: Snapshot, factor: float = LOWERED) -> Snapshot:
    """The snapshot with smaller scheduled rates, within their bounds."""
    rates = {}
    for name in workload.scheduled:
        axis = workload.space.get(name)
        if isinstance(axis, Scale):
            rates[name] = axis.scaled(float(snapshot.settings[name]), factor)
    return changed(workload, snapshot, rates)
