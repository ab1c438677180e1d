"""The course of one run under the loop: it decides, trains, goes back and assesses in turns."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from metaopt.console import log
from metaopt.self_improvement.alarms import Alarm
from metaopt.self_improvement.assess import as_record
from metaopt.self_improvement.attempts import is_bad
from metaopt.self_improvement.evidence import is_search, known_decisions
from metaopt.self_improvement.loop_config import Outcome
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.proposers import pattern_search
from metaopt.self_improvement.races import is_closed, races
from metaopt.self_improvement.searched import searched_space
from metaopt.self_improvement.sentinel import Damage, Sentinel
from metaopt.self_improvement.space import Space
from metaopt.self_improvement.trials import LOWERED, Decision, Ground, differences, lowered
from metaopt.self_improvement.ways import quickest_way
from metaopt.self_improvement.workload import (
    Snapshot,
    Step,
    after_steps,
    changed,
    known_settings,
    steps,
)
from metaopt.signals import exit_on_signal
from metaopt.training.progress import Progress
from metaopt.training.recorder import Diverged


class Stopped(Exception):
    """A trial was given up because the run is to stop."""


class Course:
    """The loop of one run, and what it carries beside the snapshot."""

    def __init__(self, workload, config, proposer, journal, stop, interventions):
        self.workload, self.config, self.journal, self.stop = workload, config, journal, stop
        self.proposer, self._spaces, self._told = proposer, {}, set()
        self.interventions, self.intervened = interventions, 0
        self.roll_backs, self.earlier = 0, []

    def start(self, first: Snapshot, memory: Memory | None) -> tuple[Snapshot, bool]:
        """Where the run begins or goes on, and whether there is anything left to do."""
        snapshot, notes = self.journal.resume(first)
        if notes:
            self.intervened = notes["intervened"]
            self.earlier = known_decisions(notes.get("earlier", []))
            log(f"{self.workload.name}: going on from {snapshot.examples} examples")
        elif memory is not None:
            snapshot = self._recall(first, memory)
        return snapshot, snapshot.examples < self.workload.num_examples

    def _recall(self, first: Snapshot, memory: Memory) -> Snapshot:
        """The start that the memory proposes, within the bounds.

        Where it is of the same task, the search goes on where that run's has ended.
        """
        proposal = memory.propose(self.workload.task)
        if proposal is None:
            return first
        workload = self.workload
        space = self._searched(first)
        known = known_settings(space, proposal.settings)
        log(f"{workload.name}: {proposal.reason}")
        # What it had decided holds where all is as it was there, but for how a step is computed.
        here, there = as_record(first.settings | known), as_record(proposal.settings)
        of_no_account = workload.ways.keys() | (workload.space.keys() - space.keys())
        if all(there.get(name) == here[name] for name in here.keys() - of_no_account):
            self.earlier = known_decisions(proposal.decisions)
            if is_search(proposal.decisions) and not self.earlier:
                log(f"{workload.name}: what {proposal.run} decided cannot be read; searched anew")
        return changed(workload, first, known)

    @contextlib.contextmanager
    def watched(
        self, snapshot: Snapshot, directory: Path, monitor: Mapping[str, Any]
    ) -> Iterator[None]:
        """With the monitor and the progress open."""
        total, name = self.workload.num_examples, self.workload.name
        self.progress = Progress(name, total=total, start=min(snapshot.examples, total))
        self.sentinel = Sentinel(
            self.workload,
            snapshot,
            self.journal.alarms,
            directory=directory,
            config=self.config.monitor,
            keep_every=self.config.keep_every,
            **monitor,
        )
        with self.sentinel, self.progress:
            yield

    def run(self, snapshot: Snapshot) -> Outcome:
        """Decides, trains and assesses in turns until the examples are gone through."""
        if not self.journal.curve:
            snapshot = self._assess(self._provide(snapshot))
        while snapshot.examples < self.workload.num_examples:
            snapshot = self._intervene(self._decide(snapshot))
            snapshot = self._advance(snapshot, self._next_stop(snapshot))
            if self._assessment_due(snapshot):
                snapshot = self._assess(snapshot)
        self.journal.wait()
        journal = self.journal
        ledger = journal.ledger(snapshot)
        return Outcome(
            snapshot, journal.decisions, journal.curve, ledger, journal.alarms, self.earlier
        )

    def _intervene(self, snapshot: Snapshot) -> Snapshot:
        for examples, settings in self.interventions[self.intervened :]:
            if examples > snapshot.examples:
                break
            snapshot = changed(self.workload, snapshot, settings)
            self.intervened += 1
            self.sentinel.new_work(snapshot)
        return snapshot

    def _next_stop(self, snapshot: Snapshot) -> int:
        total, every = self.workload.num_examples, self.config.assess_every
        stops = [math.ceil(i * every * total - 1e-6) for i in range(1, math.ceil(1 / every))]
        stops += [round(phase * total) for phase in self.config.phases]
        stops += [examples for examples, _ in self.interventions[self.intervened :]]
        return min([stop for stop in stops if snapshot.examples < stop < total], default=total)

    def _assessment_due(self, snapshot: Snapshot) -> bool:
        """Whether another multiple of `assess_every` was passed."""
        total = self.workload.num_examples
        if snapshot.examples >= total:
            return True
        every = self.config.assess_every * total
        done = math.floor(self.journal.assessed_at / every + 1e-9)
        return math.floor(snapshot.examples / every + 1e-9) > done

    # Deciding

    def _decide(self, snapshot: Snapshot) -> Snapshot:
        """Tries what is proposed for as long as something is, and there is budget for it."""
        fraction = snapshot.examples / self.workload.num_examples
        phase = sum(fraction >= start for start in self.config.phases) - 1
        decisions = self.journal.decisions
        if phase < 0 or is_closed(decisions, snapshot, phase):
            return snapshot
        ground: Ground | None = None
        try:
            for ground, decision in races(
                self.workload._replace(space=self._searched(snapshot)),
                snapshot,
                self._propose,
                dataclasses.replace(self.config.trials, margin=self.config.margins[phase]),
                self.config.shares[phase],
                phase,
                decisions,
                skip=lambda: self.journal.left_out,
                check=self._check_stop,
            ):
                self._take(ground.snapshot, decision)
        except Stopped:
            self._leave(ground.snapshot if ground else snapshot)
        except FloatingPointError as error:
            return self._roll_back(snapshot, self._damage(snapshot, str(error)))
        if ground is None and phase not in self._told | {d.phase for d in decisions}:
            self._tell_of_nothing(snapshot, phase)
        decided = [d for d in decisions if d.phase == phase and d.examples == snapshot.examples]
        return self._arrived(ground.reached if ground else snapshot, decided)

    def _propose(self, snapshot: Snapshot, decisions: Sequence[Decision], phase: int):
        """What is proposed, but for scalars that the updates from here do not read."""
        space = self._searched(snapshot)
        propose = self.proposer or pattern_search(space)
        left_out = self.workload.space.keys() - space.keys()
        changes = propose(snapshot, [*self.earlier, *decisions], phase)
        return [change for change in changes if change.setting not in left_out]

    def _tell_of_nothing(self, snapshot: Snapshot, phase: int) -> None:
        """Says, once a phase, that its search tries nothing though something is proposed."""
        self._told.add(phase)
        if self._propose(snapshot, self.journal.decisions, phase):
            share, done = self.config.shares[phase], snapshot.examples / self.workload.num_examples
            log(
                f"{self.workload.name}: nothing is tried from {done:.0%} of the run on: a trial "
                f"takes more than the {share:.0%} that this search may cost, or than is left"
            )

    def _searched(self, snapshot: Snapshot) -> Space:
        """`searched_space`, once for all settings that have the same step."""
        scalars = snapshot.state.hparams.keys()
        chosen = frozenset((k, v) for k, v in snapshot.settings.items() if k not in scalars)
        if chosen not in self._spaces:
            self._spaces[chosen] = space = searched_space(self.workload, snapshot)
            if left_out := sorted(self.workload.space.keys() - space.keys()):
                names = ", ".join(left_out)
                log(f"{self.workload.name}: not searched, since no update reads it: {names}")
        return self._spaces[chosen]

    def _arrived(self, reached: Snapshot, decided: Sequence[Decision]) -> Snapshot:
        """Where a search has come to, in the way that is the quickest for its batch."""
        if not decided:
            return reached
        before, size = dict(reached.settings), self.workload.examples_per_step
        for decision in reversed(decided):
            before |= {name: old for name, (old, _) in decision.changes.items()}
        if size(reached.settings) != size(before):
            reached = self._provide(reached)
        self.progress.update(min(reached.examples, self.workload.num_examples))
        self.sentinel.trust(reached)
        return reached

    def _provide(self, snapshot: Snapshot) -> Snapshot:
        """Finds the quickest way to compute a step, where the workload has several."""
        config = self.config
        if not (self.workload.ways and config.phases and config.ways_seconds):
            return snapshot
        after, decision = quickest_way(
            self.workload,
            snapshot,
            seconds_budget=config.ways_seconds,
            memory_budget=config.memory_budget,
        )
        self._take(after, decision)
        return after

    def _check_stop(self) -> None:
        if self.stop.received is not None:
            raise Stopped

    def _take(self, snapshot: Snapshot, decision: Decision) -> None:
        """Notes a decision; it was made on sound ground, which can be come back to."""
        self.journal.decided(decision)
        if decision.verdict == "accepted":
            log(f"{self.workload.name}, step {decision.step}: {decision.reason}")
        if decision.verdict != "rolled back":
            self.roll_backs = 0
        self.sentinel.trust(snapshot)
        if decision.changes:
            self.sentinel.new_work(snapshot)

    # Training

    def _advance(self, snapshot: Snapshot, end: int) -> Snapshot:
        """Trains until ``end``, or until an alarm brings the last sound snapshot back."""
        number, unseen, sentinel = int(snapshot.state.step), None, self.sentinel
        size = self.workload.examples_per_step(snapshot.settings)
        examples, damage = after_steps(snapshot.examples, end, size), None
        for step in steps(self.workload, snapshot, end, skip=self.journal.left_out):
            number, snapshot = number + 1, step.snapshot
            if unseen:  # while the device computes this step, look at the one before
                damage = self._observe(number - 1, unseen, step.began - unseen.began)
            unseen = step
            if damage or self.stop.received is not None:
                break
            sentinel.keep(number, snapshot)
        if unseen and not damage:
            damage = self._observe(number, unseen)
        if damage:
            return self._roll_back(snapshot, damage)
        if self.stop.received is not None:
            self._leave(snapshot)
        return snapshot._replace(examples=examples)

    def _observe(self, number: int, step: Step, seconds: float | None = None) -> Damage | None:
        values, damage = self.sentinel.observe(number, step, seconds)
        done = min(step.snapshot.examples, self.workload.num_examples)
        self.progress.update(done, loss=values["loss"])
        return damage

    def _leave(self, snapshot: Snapshot) -> NoReturn:
        """Saves, and leaves; where the state is no longer finite, the last sound one is saved."""
        try:
            self._save(snapshot)
        except FloatingPointError:
            self._save(self.sentinel.good)
        self.journal.wait()
        total = self.workload.num_examples // self.workload.examples_per_step(snapshot.settings)
        exit_on_signal(self.workload.name, int(snapshot.state.step), total, self.stop.received or 0)

    def _damage(self, snapshot: Snapshot, message: str) -> Damage:
        """Damage that was seen in an evaluation."""
        step = int(snapshot.state.step)
        alarm = Alarm("nan", step, True, math.nan, math.inf, message)
        self.journal.alarms.append(alarm)
        return Damage(alarm)

    def _roll_back(self, snapshot: Snapshot, damage: Damage) -> Snapshot:
        """The last sound snapshot, bit for bit; what to do differently from there.

        A batch that gives no number even from there is gone past from now on. Where it is
        another reason, and the same stretch fails again, the rates are lowered further each time.
        """
        alarm, stretch = damage
        self.roll_backs += 1
        if self.roll_backs > self.config.max_roll_backs:
            raise Diverged(
                f"{self.workload.name}: {alarm.message}, and going back did not help; look at "
                "decisions.jsonl and at the data, and start with smaller rates"
            )
        reached, good = snapshot.examples, self.sentinel.back()
        self.journal.went_back(good)
        after, reason = good, f"{alarm.kind}: {alarm.message}"
        bad = alarm.kind == "nan" and stretch and is_bad(self.workload, good, stretch)
        if bad:
            reason += "; the batch is left out"
        elif self.roll_backs > 1:
            within = self.workload._replace(space=self._searched(good))
            factor = LOWERED ** (self.roll_backs - 1)
            after = lowered(within, good, factor)
            reason += f"; the rates are lowered to {factor:.2g} of what they were"
        log(f"{self.workload.name}: back to step {int(good.state.step)}; {reason}")
        self.journal.decided(
            Decision(
                step=alarm.step,
                examples=good.examples,
                phase=-1,
                verdict="rolled back",
                changes=differences(snapshot.settings, after.settings),
                reason=reason,
                evidence=[alarm._asdict()],
                trial_examples=max(0, reached - good.examples),
                seconds=0.0,
                left_out=stretch if bad else None,
            )
        )
        return after

    # Assessing

    def _assess(self, snapshot: Snapshot) -> Snapshot:
        """Evaluates, notes how the run stands, and saves; goes back where the loss is no number."""
        losses = np.asarray(self.workload.evaluate(snapshot.state), np.float64)
        if not np.isfinite(losses).all():
            damage = self._damage(snapshot, "the held-out loss is not finite")
            return self._roll_back(snapshot, damage)
        self.roll_backs = 0
        self.journal.assessed(snapshot, losses)
        self._save(snapshot)
        return snapshot

    def _save(self, snapshot: Snapshot) -> None:
        earlier = [decision.as_json() for decision in self.earlier]
        self.journal.save(snapshot, intervened=self.intervened, earlier=earlier)
