"""The closed loop: a training that watches itself, tries changes, and goes back where one hurts.

Between two decisions it trains as usual. A decision is a set of short trials (`trials`) of
what a proposer names (`proposers`); an alarm that the state is damaged brings the last
sound snapshot back. What was decided, and on which evidence, is in ``decisions.jsonl``; a
memory of past runs, where there is one, gives the start and is told the end.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, Self

import jax
import numpy as np

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.measure import count_flops
from metaopt.ranges import Checked, Range, Seconds, Steps, StepsOr0
from metaopt.resources import peak_flops
from metaopt.self_improvement.assess import Assessment, as_record
from metaopt.self_improvement.autotune import quickest_way
from metaopt.self_improvement.memory import Memory, RunRecord
from metaopt.self_improvement.monitor import CONSECUTIVE_CHECKS, Alarm, Monitor, MonitorConfig
from metaopt.self_improvement.proposers import pattern_search
from metaopt.self_improvement.records import Journal, Ledger, is_search, known_decisions
from metaopt.self_improvement.trials import (
    LOWERED,
    Decision,
    Ground,
    Margin,
    Proposer,
    TrialConfig,
    differences,
    is_bad,
    is_closed,
    lowered,
    races,
)
from metaopt.self_improvement.workload import (
    Settings,
    Snapshot,
    Space,
    Step,
    Workload,
    after_steps,
    begin,
    changed,
    copied,
    known_settings,
    searched_space,
    steps,
)
from metaopt.signals import StopSignals, exit_on_signal
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint, of_step
from metaopt.training.loop import checkpoint_directory
from metaopt.training.progress import Progress
from metaopt.training.recorder import Diverged
from metaopt.training.runs import lock_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """When the loop does what; fractions are of the examples of the run.

    Attributes:
      phases: when a search begins anew; none for a run that changes nothing.
      shares: how much each phase may spend on trials that are not gone on with, and on judging
        all of them where that counts (`Workload.evaluation_examples`).
      margins: in each phase, what `TrialConfig.margin` is: short trials prefer small rates all
        the more the later it is, annealed or not (halving it seemed to gain 1 % of the loss of a
        language model and 16 % of a classifier's, and cost some in the end), so what is changed
        late is what is plainly wrong.
      trials: how changes are tried.
      ways_seconds: for the search through a workload's ``ways`` to compute a step, compiling
        included: at the start, and after a search that changed the batch, if there are phases.
      memory_budget: bytes a device that a step may take; up to 1, a fraction of what it has.
      assess_every: a held-out evaluation, and a checkpoint.
      keep_every: steps from one snapshot to go back to to the next.
      max_roll_backs: in a row without a decision or an assessment between them; then the
        run has `Diverged`.
      count_flops: of a step, by tracing it once more, for its FLOP/s and their share of the peak
        of the devices, which is measured once a process; for nothing if they cannot be counted.
        Those of an example are taken for the same whatever is changed later.
      monitor: thresholds of the alarms.
    """

    phases: tuple[Annotated[float, Range(0, 0.999)], ...] = (0.0, 0.35)
    shares: tuple[Annotated[float, Range(0, 1000)], ...] = (0.2, 0.03)
    margins: tuple[Margin, ...] = (0.002, 0.1)
    trials: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    ways_seconds: Seconds = 60.0
    memory_budget: Annotated[float, Range(1e-6, 1e15)] = 0.8
    assess_every: Annotated[float, Range(1e-6, 1)] = 0.1
    keep_every: Steps = 20
    max_roll_backs: StepsOr0 = 5
    count_flops: bool = True
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)

    def __post_init__(self):
        super().__post_init__()
        if len(self.margins) < len(self.phases) or len(self.shares) != len(self.phases):
            raise UserError(
                f"phases {self.phases} need a share each, not {self.shares}, and a margin each, "
                f"not {self.margins}"
            )
        if list(self.phases) != sorted(self.phases):
            raise UserError(f"phases {self.phases} must ascend")


class Outcome(NamedTuple):
    """What a run gives.

    Attributes:
      snapshot: where it ended: the state and the settings.
      decisions: in order.
      curve: one assessment each `LoopConfig.assess_every`.
      ledger: what it cost.
      alarms: those raised.
      earlier: decisions of past runs of the same task, with whose search it went on.
      from_checkpoint: step of the checkpoint that holds the result, if nothing had to be trained.
    """

    snapshot: Snapshot
    decisions: list[Decision]
    curve: list[Assessment]
    ledger: Ledger
    alarms: list[Alarm]
    earlier: Sequence[Decision] = ()
    from_checkpoint: int | None = None


DAMAGE = ("nan", "divergence")
"""Alarms after which the state is not gone on with."""
LOOKS_AHEAD = max(CONSECUTIVE_CHECKS[kind] for kind in DAMAGE)
"""Steps after a snapshot in which damage to it shows."""


class Damage(NamedTuple):
    """The alarm that a state is damaged, and the data of the step at which it was seen."""

    alarm: Alarm
    stretch: tuple[int, int] | None = None


class Sentinel:
    """A `Monitor`, and a snapshot to go back to. A context manager, as the monitor is.

    The loss of a step says nothing about the state that it leaves, and divergence is called
    out at the second look, so a snapshot is only trusted some steps later.
    """

    def __init__(
        self,
        workload: Workload,
        start: Snapshot,
        alarms: list[Alarm],
        *,
        directory: Path,
        config: MonitorConfig,
        keep_every: int,
        flops_per_example: float | None = None,
        **monitor: Any,
    ):
        """Begins at a snapshot, which is taken for sound.

        Args:
          workload: the training.
          start: where it stands.
          alarms: those that are raised are added to it.
          directory: of the run.
          config: thresholds of the monitor.
          keep_every: steps from one snapshot to the next.
          flops_per_example: for the monitor; None where it is not known.
          monitor: further arguments of `Monitor`.
        """
        self._workload, self._alarms, self._keep_every = workload, alarms, keep_every
        self._flops_per_example = flops_per_example
        size = workload.examples_per_step(start.settings)
        self._monitor = Monitor(
            config,
            tokens_per_step=size * workload.tokens_per_example,
            directory=directory,
            name=workload.name,
            start=int(start.state.step),
            num_steps=workload.num_examples // size,
            **monitor,
        )
        self.trust(start)
        self.new_work(start)

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._monitor.__exit__(*error)

    def trust(self, snapshot: Snapshot) -> None:
        """From now on this is the snapshot to go back to."""
        self.good, self._candidate = copied(snapshot), None

    def keep(self, number: int, snapshot: Snapshot) -> None:
        """Offers the snapshot after a step; one of `keep_every` is kept until it is trusted."""
        if number % self._keep_every == 0 and self._candidate is None:
            self._candidate = number, copied(snapshot)

    def back(self) -> Snapshot:
        """The snapshot to go back to, bit for bit; all after it was never observed."""
        self._candidate = None
        self._monitor.discard_after(int(self.good.state.step))
        self.new_work(self.good)
        return copied(self.good)

    def new_work(self, snapshot: Snapshot) -> None:
        """A step is no longer what it was: how long steps took is forgotten."""
        size = self._workload.examples_per_step(snapshot.settings)
        flops = self._flops_per_example
        self._monitor.reset_speed(
            size * self._workload.tokens_per_example, None if flops is None else size * flops
        )

    def observe(
        self, number: int, step: Step, seconds: float | None = None
    ) -> tuple[Mapping[str, float], Damage | None]:
        """Waits for the metrics of a step; the scalars among them, and the damage, if any.

        Args:
          number: of the step.
          step: as it happened.
          seconds: that it took; up to now where it is not given.
        """
        metrics = jax.device_get(step.metrics)
        seconds = time.perf_counter() - step.began if seconds is None else seconds
        values = {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}
        times = {"step_seconds": seconds, "data_seconds": step.data_seconds}
        raised = [alarm for alarm in self._monitor.observe(number, values | times) if alarm.raised]
        for alarm in raised:
            if alarm.kind not in {before.kind for before in self._alarms}:
                log(f"{self._workload.name}, step {number}: {alarm.kind}: {alarm.message}")
            self._alarms.append(alarm)
        damage = [alarm for alarm in raised if alarm.kind in DAMAGE]
        if damage:
            return values, Damage(damage[0], (step.position, step.snapshot.examples))
        if self._candidate is not None and number >= self._candidate[0] + LOOKS_AHEAD:
            self.good, self._candidate = self._candidate[1], None
        return values, None


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
        of_no_account = workload.execution_options.keys() | (workload.space.keys() - space.keys())
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
        if not (self.workload.execution_options and config.phases and config.ways_seconds):
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


def run(
    workload: Workload,
    settings: Settings,
    *,
    directory: Path | str,
    config: LoopConfig | None = None,
    proposer: Proposer | None = None,
    memory: Memory | None = None,
    interventions: Sequence[tuple[int, Settings]] = (),
    fingerprint: Fingerprint | None = None,
    monitor: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains to the end, from the latest checkpoint if there is one, improving on the way.

    Writes to ``directory``: checkpoints in a folder of the workload's name; ``metrics.jsonl``
    with the assessments; ``monitor.jsonl``; and ``decisions.jsonl``. Ctrl-C or SIGTERM saves
    and leaves; the same call goes on.

    Args:
      workload: the training.
      settings: to start with; every setting that may be changed has a value.
      directory: of the run.
      config: when to do what; `LoopConfig` if not given.
      proposer: what names changes; `pattern_search` over all of the space if not given.
      memory: of past runs; it proposes the start, and is told the end.
      interventions: settings that are changed from outside while the run goes on, as
        ``(examples, settings)``: someone at the console, or a fault that is put in.
      fingerprint: what decides the states beside the settings; a checkpoint of another is refused.
        If not given, it is `of_step` of the first settings.
      monitor: further arguments of `Monitor`: ``read_memory``, and ``flops_per_step`` and
        ``peak_flops`` in place of those that `LoopConfig.count_flops` finds.

    Returns:
      `Outcome`.

    Raises:
      UserError: a setting is missing or out of bounds; the checkpoints are of another run;
        another process has the directory.
      Diverged: going back did not help.
      Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    config = config or LoopConfig()
    if jax.process_count() > 1:
        _check_agreement(workload, memory)
    first, interventions = begin(workload, settings), sorted(interventions, key=lambda e: e[0])
    if fingerprint is None:
        batch = workload.sample(settings, 0)
        fingerprint = of_step({}, workload.step(settings), first.state, batch)
    directory, path = Path(directory), checkpoint_directory(directory, workload.name)
    options = _per_example(monitor or {}, workload.examples_per_step(settings))
    with (
        lock_directory(directory),
        Checkpoints(path, fingerprint=fingerprint) as checkpoints,
        StopSignals() as stop,
    ):
        if config.count_flops and "flops_per_example" not in options:
            options = _counted(workload, first) | options
        identity = _identity(workload, settings, config, interventions)
        flops = options.get("flops_per_example")
        journal = Journal(workload, directory, checkpoints, identity, flops)
        loop = Course(workload, config, proposer, journal, stop, interventions)
        snapshot, new = loop.start(first, memory)
        step = int(snapshot.state.step)
        with loop.watched(snapshot, directory, options):
            outcome = loop.run(snapshot)
    if memory is not None and new:
        memory.remember(record_of(workload, outcome))
    return outcome if new else outcome._replace(from_checkpoint=step)


def _check_agreement(workload: Workload, memory: Memory | None) -> None:
    """Raises UserError where several processes might decide differently, each by what it sees."""
    if memory is not None:
        raise UserError("several processes: ask the memory before, and give all one start")
    timed = [name for name, axis in workload.space.items() if axis.score != "loss"]
    if timed := sorted([*timed, *workload.execution_options]):
        raise UserError(
            f"several processes: {', '.join(timed)} would be chosen by the clock of each; "
            "find the values in one process, and leave them out of the space and the ways"
        )


def _identity(workload, settings, config, interventions) -> dict[str, Any]:
    """What decides the states."""
    loop = {name: value for name, value in vars(config).items() if name != "count_flops"}
    return {
        "task": dict(workload.task),
        "num_examples": workload.num_examples,
        "space": dict(workload.space),
        "settings": dict(settings),
        "loop": loop,
        "interventions": list(interventions),
    }


def _per_example(monitor: Mapping[str, Any], size: int) -> dict[str, Any]:
    options = dict(monitor)
    flops = options.pop("flops_per_step", None)
    return options if flops is None else options | {"flops_per_example": flops / size}


def _counted(workload: Workload, first: Snapshot) -> dict[str, float]:
    """The operations of an example and the peak of the devices; nothing where it is not known."""
    settings = first.settings
    batch = workload.sample(settings, 0)
    try:
        flops = count_flops(workload.step(settings), first.state, batch).total
    except Exception:  # a run is not lost for its statistics, whatever cannot be traced
        return {}
    size = workload.examples_per_step(settings)
    return {"peak_flops": peak_flops(), "flops_per_example": flops / size}


def record_of(workload: Workload, outcome: Outcome) -> RunRecord:
    """What is worth remembering of a run."""
    tokens = outcome.snapshot.examples * workload.tokens_per_example
    return RunRecord(
        name=workload.name,
        task=workload.task,
        settings=outcome.snapshot.settings,
        loss=outcome.curve[-1].loss.mean,
        tokens=tokens,
        seconds=outcome.ledger.seconds,
        curve=[(point.tokens, point.loss.mean) for point in outcome.curve],
        decisions=[d.as_json() for d in [*outcome.earlier, *outcome.decisions]],
    )
