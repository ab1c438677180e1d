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
from metaopt.pytrees import all_finite
from metaopt.ranges import Checked, Range, Share, Steps
from metaopt.self_improvement.records import Decision, TriedChange, differences
from metaopt.self_improvement.workload import (
    SCHEDULED,
    Scale,
    Score,
    Setting,
    Settings,
    Snapshot,
    Workload,
    after_steps,
    begin,
    changed,
    copied,
    one_behind,
    steps,
)
from metaopt.signals import Interrupted
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
      from_start: Whether its trial begins at the start of the run, and so repeats what was trained
        up to now with the new settings: what a rate that is far too large has done outlasts it.
    """

    settings: dict[str, Setting]
    setting: str
    score: Score
    reason: str
    direction: int = 0
    level: int = 0
    rank: int = 0
    parts: tuple["Change", ...] = ()
    from_start: bool = False


NO_CHANGE = Change({}, "", "loss", "no change")
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
      least_steps: Least number of steps of a trial; a batch that would have fewer is not tried.
      probe: What a search may cost at most that has found nothing yet, as a fraction of the run.
    """

    examples: Annotated[float, Range(1e-9, 0.999)] = 0.01
    longer: Annotated[float, Range(1, 1000)] = 4.0
    anneal: Share = 0.33
    least_steps: Steps = 4
    probe: Annotated[float, Range(0, 1000)] = 1000.0

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
      change: What was tried.
      after: Snapshot at its end, before annealing.
      start: Snapshot where the others began, if it began at the start of the run; else None.
      losses: Held-out losses, float64 ``[E]``; not finite if it diverged or could not be run.
      seconds: Time of its steps, without compiling.
      examples: Examples that it used, those to anneal among them.
      broken: First stretch of the data whose metrics became NaN or inf, ``(first, end)``.
      error: Why it could not be run; empty if it could.
      verdict: Comparison with the trial without a change, by the score of the change.
      rule: Rule and threshold by which it is taken, in words.
      gain: Rank, and improvement a second, by which the best is chosen; empty if it is not taken.
    """

    change: Change
    after: Snapshot
    losses: np.ndarray
    seconds: float
    examples: int
    broken: tuple[int, int] | None = None
    error: str = ""
    verdict: Verdict = Verdict("noise", math.nan, math.nan, 0)
    rule: str = ""
    gain: tuple[float, ...] = ()
    start: Snapshot | None = None


@dataclasses.dataclass
class TrialRound:
    """Trials that are judged one by one; only the best keeps the snapshot at its end.

    Attributes:
      before: Held-out losses at the common start, float64 ``[E]``.
      unchanged: The trial without a change.
      margin: Relevant difference of losses, as a fraction of the loss.
      trials: All that were entered, in order.
    """

    before: np.ndarray
    unchanged: Trial
    margin: float
    trials: list[Trial] = dataclasses.field(default_factory=list)

    def enter(self, trial: Trial) -> None:
        """Judges one more."""
        self.trials.append(self._judged(trial))
        best, after = self.best, self.unchanged.after
        self.trials = [x if x is best else x._replace(after=after, start=None) for x in self.trials]

    def _judged(self, trial: Trial) -> Trial:
        """The trial with its verdict beside the one without a change, by the change's score.

        The verdict is on the held-out loss; for ``efficiency`` on the negative improvement a
        second, or on the speed if that is about the same. If it refines, or its trial began at the
        start of the run, the smaller value wins a tie (see the module). What is judged by the loss
        ranks before what is judged by a clock, which can only be told once the loss falls as it
        should, unless that makes everything after it much faster. It is given the time of no
        change, so that the winner does not depend on the noise of clocks.
        """
        change, before, unchanged = trial.change, self.before, self.unchanged
        if trial.error or not np.isfinite(trial.losses).all():
            return trial._replace(verdict=Verdict("worse", math.inf, math.nan, trial.losses.size))
        if change.score == "loss":
            rank, seconds = 1, unchanged.seconds
            limit = self.margin * abs(float(np.mean(unchanged.losses)))
            verdict = compare(unchanged.losses, trial.losses, margin=limit)
            tied = change.direction < 0 and verdict.outcome == "noise"
            tied &= change.from_start or change.level > 0
            rule = f"loss {verdict.difference:.3g} ± {verdict.ci95:.2g}"
            if verdict.outcome == "better":
                rule += f" beyond the margin of {limit:.2g}"
            else:
                rule += f", noise or within the margin of {limit:.2g}: the smaller wins"
        else:
            speed = unchanged.seconds / unchanged.examples / (trial.seconds / trial.examples)
            rank, seconds, tied = 2 * (speed > MUCH_FASTER), trial.seconds, False
            rates = [(t.losses - before) / max(t.seconds, 1e-9) for t in (unchanged, trial)]
            limit = EFFICIENCY_MARGIN * abs(float(np.mean(rates[0])))
            verdict = compare(rates[0], rates[1], margin=limit)
            rule = f"improvement a second {-verdict.difference:+.3g} ± {verdict.ci95:.2g}"
            if verdict.outcome == "noise" and speed > FASTER:
                verdict = verdict._replace(outcome="better")
                rule += f", within noise, and examples {speed:.3g} times as fast, over {FASTER}"
            else:
                rule += f" beyond {limit:.2g}"
        if verdict.outcome != "better" and not tied:
            return trial._replace(verdict=verdict)
        gain = rank, float(((before - trial.losses) / max(seconds, 1e-9)).mean())
        return trial._replace(verdict=verdict, rule=rule, gain=gain)

    @property
    def best(self) -> Trial | None:
        """What is taken; None if that is no change."""
        best = max(self.trials, key=lambda trial: trial.gain, default=None)
        return best if best and best.gain else None

    def _alone(self) -> dict[str, Trial]:
        """What was the best by the loss, for each setting of which something is taken."""
        found: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.gain and trial.change.score == "loss":
                best = found.setdefault(trial.change.setting, trial)
                if trial.verdict.difference < best.verdict.difference:
                    found[trial.change.setting] = trial
        return found

    def is_needless(self, change: Change) -> bool:
        """Whether all that is left will be much faster, or the other direction was better."""
        if self.best is not None and self.best.gain[0] == 2:
            return True
        better = self._alone().get(change.setting)
        return better is not None and change.direction * better.change.direction < 0

    def together(self) -> Change | None:
        """The best changes of several settings as one, if several were better by the loss."""
        alone = self._alone().values()
        most = min((each.verdict.difference for each in alone), default=0.0)
        parts = [x.change for x in alone if x.verdict.difference <= WORTH_ADDING * most]
        if len(parts) < 2:
            return None
        merged = {name: value for part in parts for name, value in part.settings.items()}
        names = " and ".join(part.setting for part in parts)
        reasons = "; ".join(part.reason for part in parts)
        return Change(merged, names, "loss", reasons, parts=tuple(parts))

    def reason(self) -> str:
        """The rule by which the best is taken, or none is, with what it compared."""
        if self.best is not None:
            return f"{self.best.change.reason}: {self.best.rule}"
        loss = float(np.mean(self.unchanged.losses))
        return (
            f"nothing was better beyond noise than no change, of loss {loss:.4g}: by its 95 % "
            f"interval and a margin of {self.margin * abs(loss):.2g}"
        )

    def records(self) -> tuple[TriedChange, ...]:
        """The record of each trial."""
        accepted = [self.best.change, *self.best.change.parts] if self.best else []

        def finite(value: float) -> float | None:
            return float(value) if math.isfinite(value) else None

        return tuple(
            TriedChange(
                setting=change.setting,
                settings=change.settings,
                direction=change.direction,
                score=change.score,
                loss=finite(trial.losses.mean()),
                difference=finite(trial.verdict.difference),
                ci95=finite(trial.verdict.ci95),
                verdict=trial.verdict.outcome,
                accepted=any(change is each for each in accepted),
                seconds=trial.seconds,
                examples=trial.examples,
                error=trial.error,
                from_start=change.from_start,
            )
            for trial in self.trials
            for change in [trial.change]
        )


class SearchState(NamedTuple):
    """What all rounds of a search are decided on.

    Attributes:
      snapshot: Common start of all trials, with the settings found so far.
      before: Held-out losses there, float64 ``[E]``; a zero if nothing is judged by a clock.
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
      margin: Relative difference in the held-out loss below which it does not count.
      check: Whether to stop, after every step of a trial: the round raises Interrupted.
    """

    workload: Workload
    config: TrialConfig
    phase: int = 0
    margin: float = 0.0
    check: Callable[[], bool] = lambda: False

    @property
    def needs_start(self) -> bool:
        """Whether the loss at the start is needed: improvements a second are compared."""
        return any(axis.score == "efficiency" for axis in self.workload.space.values())

    def begin(self, snapshot: Snapshot) -> SearchState:
        """The state before the first round. Raises FloatingPointError if a loss is not finite."""
        if not self.needs_start and all_finite(snapshot.state.meta_params):
            return SearchState(snapshot, np.zeros(1))
        before = np.asarray(self.workload.evaluate(snapshot.state), np.float64)
        if not np.isfinite(before).all():
            raise FloatingPointError("the held-out loss is not finite")
        return SearchState(snapshot, before)

    def rounds(
        self, snapshot: Snapshot, proposer: Proposer, share: float, decisions: Sequence[Decision]
    ) -> Iterator[tuple[SearchState, Decision]]:
        """The state after each round, and its decision, while the next one can be afforded.

        There are none if the run has trained on since this search. Raises as `begin` does.

        Args:
          snapshot: where all trials start; its arrays stay as they are.
          proposer: names what to try.
          share: of the run that discarded trials may cost.
          decisions: all of the run; each that is given is to be added to them before the next.
        """
        state, now = None, snapshot
        while True:
            own = [d for d in decisions if d.phase == self.phase]
            valid = [d for d in own if d.verdict != "rolled back"]
            if any(decision.examples < now.examples for decision in valid):
                return
            last = valid[-1] if valid and valid[-1] is decisions[-1] else None
            proposed = proposer(now, decisions, self.phase)
            is_good = all(decision.verdict == "kept" for decision in own)
            is_good &= not any(change.from_start for change in proposed)
            allowed = min(share, self.config.probe) if is_good else share
            budget = allowed * self.workload.num_examples - sum(d.trial_examples for d in own)
            size = last.size if last else 0
            changes, size = self.affordable(now, proposed, budget, size, is_probe=not own)
            if not changes:
                return
            state, decision = self.run_round(state or self.begin(snapshot), changes, size, last)
            now = state.snapshot
            yield state, decision

    def affordable(
        self,
        snapshot: Snapshot,
        changes: Sequence[Change],
        budget: float,
        size: int = 0,
        *,
        is_probe: bool = False,
    ) -> tuple[list[Change], int]:
        """The changes that can be tried now, and the examples of their trials.

        Nothing of a higher rank is tried while something of a lower one is possible, and nothing
        is refined while something coarse is left. What refines has trials of its full length; the
        last one that the budget allows may have half of it, and so may those of the first round.
        If it allows only trials of the last size, they are believed against their bias alone: only
        what is smaller is tried.

        Args:
          snapshot: where trials start.
          changes: in the order of their worth.
          budget: examples that discarded trials may cost.
          size: of the trials of the last round; they do not become shorter.
          is_probe: whether this is the first round of a search.
        """
        workload, config, settings = self.workload, self.config, snapshot.settings
        if again := [change for change in changes if change.from_start]:
            cost = snapshot.examples + (1 + config.anneal) * size + workload.evaluation_examples
            if size and cost <= budget:
                return again, size
            changes = [change for change in changes if not change.from_start]
        possible = [change for change in changes if config.judges(workload, settings, change)]
        rank, level = min(((change.rank, change.level) for change in possible), default=(0, 0))
        possible = [change for change in possible if change.rank == rank]
        found = [change for change in possible if change.level == level]
        wanted = max(size, config.size(workload, settings, level))
        each, evaluation = 1 + config.anneal, workload.evaluation_examples
        tried = [settings, *(settings | change.settings for change in possible)]
        batch = max(map(workload.examples_per_step, tried))  # the end of a trial may pass by one
        room = (workload.num_examples - snapshot.examples - 2 * batch) / each

        def judged(changes: Sequence[Change], size: int) -> list[Change]:
            return [x for x in changes if config.judges(workload, settings, x, size)]

        def count(changes: Sequence[Change]) -> int:  # with one of several settings together
            return len(changes) + (len({x.setting for x in changes if x.score == "loss"}) > 1)

        for number in range(len(found), 0, -1) if size != wanted else ():
            trials = 1 + count(found[:number])  # one is without a change
            left = budget - (trials + self.needs_start) * evaluation
            longer = min(wanted, room, left / (each * trials - 1))  # the best is kept
            may_be_half = is_probe or (level and number == 1)
            if longer >= max(size + 1, wanted / 2 if may_be_half else wanted):
                step = workload.examples_per_step(settings) if is_probe else 1
                longer = int(longer) // step * step or int(longer)
                if not is_probe or judged(found[:number], longer):
                    return judged(found[:number], longer), longer
        if not 0 < size <= room:
            return [], size
        if size != wanted and level:
            found = [change for change in possible if change.direction < 0]
        found, one = judged(found, size), each * size + evaluation
        while found and one * count(found) > budget:
            found = found[:-1]
        return found, size

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
          changes: what to try.
          size: examples of a trial, at least those of the last round; of the config if 0.
          last: the last decision of this search.
        """
        began, start = time.perf_counter(), state.snapshot
        size = max(size or self.config.size(self.workload, start.settings), state.size)
        unchanged = self._unchanged(state, size)
        trials = TrialRound(state.before, unchanged, self.margin)
        for change in sorted(changes, key=lambda change: change.score == "loss"):
            if not trials.is_needless(change):
                trials.enter(self._tried(state, change, size))
        if together := trials.together():
            trials.enter(self._tried(state, together, size))
        end, verdict, reason = state._replace(winner=unchanged, size=size), "kept", trials.reason()
        if best := trials.best:
            found = best.start or changed(self.workload, start, best.change.settings)
            end, verdict = end._replace(snapshot=found, winner=best), "accepted"
        elif not np.isfinite(unchanged.losses).all():
            found, reason = self.mended(copied(start), unchanged.broken)
            end, verdict = SearchState(found, state.before), "rolled back"
            reason = f"all trials diverged, no loss is finite: {reason}"
        records = trials.records()
        # A run that was stopped after the last round repeats its winner, at no cost.
        gained, held = end.reached.examples - start.examples, last.gained if last else 0
        again = 0 if last is not None and last.size == size else unchanged.examples - held
        # Of the start, of the trial without a change, and of all that could be run.
        first = last is None and self.needs_start
        evaluations = first + (again > 0) + sum(not record.error for record in records)
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
            from_start=trials.best is not None and trials.best.change.from_start,
        )

    def trial(
        self, snapshot: Snapshot, size: int, change: Change = NO_CHANGE, total: int = 0
    ) -> Trial:
        """Trains from a copy of the snapshot with the change, and evaluates the end.

        Args:
          snapshot: start; its arrays stay as they are.
          size: examples to train on, before those over which the rates go to zero.
          change: what to try.
          total: those of all of the trial, if this is its end; ``size`` if 0.
        """
        workload, anneal = self.workload, round(self.config.anneal * (total or size))
        start, again, before = changed(workload, copied(snapshot), change.settings), None, 0
        if change.from_start:
            first = begin(workload, start.settings)._replace(left_out=start.left_out)
            start, _, _ = self._train(first, snapshot.examples)
            again, before = copied(start), start.examples
        after, seconds, broken = self._train(start, start.examples + size)
        judged = after
        if anneal:
            ended = self._train(copied(after), after.examples + anneal, anneal=True)
            judged, seconds, broken = ended[0], seconds + ended[1], broken or ended[2]
        losses = np.asarray(workload.evaluate(judged.state), np.float64)
        examples = judged.examples - snapshot.examples + before
        return Trial(change, after, losses, seconds, examples, broken, start=again)

    def _train(
        self, snapshot: Snapshot, end: int, anneal: bool = False
    ) -> tuple[Snapshot, float, tuple[int, int] | None]:
        """The snapshot at ``end``, seconds without compiling, the first stretch with NaN or inf."""
        size = self.workload.examples_per_step(snapshot.settings)
        examples, broken = after_steps(snapshot.examples, end, size), None
        compiled, times = compile_seconds(), [time.perf_counter()]
        taken = steps(self.workload, snapshot, end, anneal=anneal, check=self.check)
        for step, after in one_behind(taken):
            snapshot = after.snapshot if after else snapshot
            if step:
                metrics = jax.device_get(step.metrics)
                if not all(np.isfinite(x) for x in metrics.values() if np.ndim(x) == 0):
                    broken = broken or (step.position, step.snapshot.examples)
                times.append(time.perf_counter())
        if self.check():
            raise Interrupted
        # The first step compiles, and waits for its data. The median of the others counts: trials
        # are short, and a busy moment of the machine should decide nothing.
        seconds = np.diff(times)
        if len(seconds) > 1:
            total = float(np.median(seconds[1:]) * len(seconds))
        else:
            total = max(0.0, float(seconds.sum()) - (compile_seconds() - compiled))
        return snapshot._replace(examples=examples), total, broken

    def mended(
        self, good: Snapshot, stretch: tuple[int, int] | None, factor: float = LOWERED
    ) -> tuple[Snapshot, str]:
        """A sound snapshot with what is done differently from there, and that in words.

        If the batch of ``stretch`` gives NaN or inf from this state too, the batch is bad and not
        the state: it is left out. Otherwise the scheduled rates of the space are multiplied by the
        factor, within their bounds.
        """
        if stretch is not None:
            there = copied(good)._replace(examples=stretch[0], left_out=frozenset())
            if self._train(there, stretch[0] + 1)[2] is not None:
                reason = f"examples {stretch[0]} to {stretch[1] - 1} give NaN or inf, are left out"
                return good._replace(left_out=good.left_out | {stretch}), reason
        rates = {
            name: axis.scaled(float(good.settings[name]), factor)
            for name in SCHEDULED
            if isinstance(axis := self.workload.space.get(name), Scale)
        }
        if not rates:
            return good, "nothing else is changed"
        return changed(self.workload, good, rates), f"the rates are multiplied by {factor:.2g}"

    def _tried(self, state: SearchState, change: Change, size: int) -> Trial:
        """The trial of a change, or why it could not be run."""
        try:
            return self.trial(state.snapshot, size, change)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # such as no room in memory
            nothing, reason = np.full_like(state.before, math.inf), str(error).partition("\n")[0]
            return Trial(change, state.snapshot, nothing, 0.0, 0, None, reason)

    def _unchanged(self, state: SearchState, size: int) -> Trial:
        """The trial without a change: the last winner, continued if trials are longer now."""
        start, winner = state.snapshot, state.winner
        if winner is None:
            return self.trial(start, size)
        if state.size == size:
            return winner
        before = winner.after.examples - start.examples
        longer = self.trial(winner.after, size - before, total=size)
        return longer._replace(
            examples=longer.examples + before,
            seconds=longer.seconds + winner.seconds * before / winner.examples,
        )
