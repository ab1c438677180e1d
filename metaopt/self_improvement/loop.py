"""The closed loop: a training that monitors, assesses, optimises and remembers itself.

Between two decisions it trains as usual. A decision is a round of short trials (`trials`) of
what a proposer names (`proposers`); an alarm that the state is damaged restores the last good
snapshot. What was decided, and on which evidence, is in ``decisions.jsonl``; a memory of past
runs, if there is one, gives the start and is given the end.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, Self

import jax
import numpy as np

from metaopt.console import log
from metaopt.errors import Diverged, UserError
from metaopt.files import as_record
from metaopt.measure import count_flops
from metaopt.ranges import Checked, Range, Seconds, Steps, StepsOr0
from metaopt.resources import peak_flops
from metaopt.self_improvement.assess import Assessment
from metaopt.self_improvement.autotune import fastest_settings
from metaopt.self_improvement.memory import Memory, RunRecord
from metaopt.self_improvement.monitor import CONSECUTIVE_CHECKS, Alarm, Monitor, MonitorConfig
from metaopt.self_improvement.proposers import pattern_search
from metaopt.self_improvement.records import Decision, Ledger, RunLog, differences, past_search
from metaopt.self_improvement.trials import (
    LOWERED,
    Change,
    Margin,
    Proposer,
    Search,
    TrialConfig,
    is_bad_batch,
    lowered,
)
from metaopt.self_improvement.workload import (
    Setting,
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
from metaopt.training.runs import lock_directory

DAMAGE = ("nan", "divergence")
"""Alarms after which the state is discarded."""
STEPS_UNTIL_GOOD = max(CONSECUTIVE_CHECKS[kind] for kind in DAMAGE)
"""Number of steps after a snapshot in which damage to it shows."""

Intervention = tuple[int, Settings]
"""``(examples, settings)``: settings changed from outside, after that number of examples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """When the loop does what; fractions are of the examples of the run.

    Attributes:
      phases: Starts of the searches; none for a run that changes nothing.
      shares: Budget of each phase for discarded trials, and for judging all trials if that
        counts (`Workload.evaluation_examples`).
      margins: Value of `TrialConfig.margin` in each phase. The later, the more short trials
        prefer small rates (halving a rate seemed to gain 1 % of the loss of a language model and
        16 % of a classifier's, and cost some in the end), so only what is plainly wrong is
        changed late.
      trials: How changes are tried.
      options_seconds: Time for the search through a workload's execution options, compiling
        included: at the start, and after a search that changed the batch, if there are phases.
      memory_budget: Bytes a device that a step may take; up to 1, a fraction of what it has.
      assess_every: Fraction of the run between two held-out evaluations, each with a checkpoint.
      keep_every: Rollback snapshot interval, in steps.
      max_roll_backs: Number of rollbacks in a row, without a decision or an assessment between
        them, after which the run has `Diverged`.
      count_flops: Whether the operations of a step are counted, by tracing it once more, for its
        FLOP/s and their share of the peak of the devices, which is measured once a process. The
        operations of an example are taken to be the same whatever is changed later.
      monitor: Thresholds of the alarms.
    """

    phases: tuple[Annotated[float, Range(0, 0.999)], ...] = (0.0, 0.35)
    shares: tuple[Annotated[float, Range(0, 1000)], ...] = (0.2, 0.03)
    margins: tuple[Margin, ...] = (0.002, 0.1)
    trials: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    options_seconds: Seconds = 60.0
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
      snapshot: State and settings at the end.
      decisions: All decisions, in order.
      curve: Assessments, one each `LoopConfig.assess_every`.
      ledger: What the run cost.
      alarms: Alarms that were raised.
      earlier: Decisions of past runs of the same task, whose search the run continued.
      from_checkpoint: Step of the checkpoint that holds the result, if nothing had to be trained.
    """

    snapshot: Snapshot
    decisions: list[Decision]
    curve: list[Assessment]
    ledger: Ledger
    alarms: list[Alarm]
    earlier: Sequence[Decision] = ()
    from_checkpoint: int | None = None


def run(
    workload: Workload,
    settings: Settings,
    *,
    directory: Path | str,
    config: LoopConfig | None = None,
    proposer: Proposer | None = None,
    memory: Memory | None = None,
    interventions: Sequence[Intervention] = (),
    fingerprint: Fingerprint | None = None,
    monitor: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains to the end, from the latest checkpoint if there is one, improving on the way.

    Writes to ``directory``: checkpoints in a folder of the workload's name; ``metrics.jsonl``
    with the assessments; ``monitor.jsonl``; and ``decisions.jsonl``. Ctrl-C or SIGTERM saves
    and exits; the same call resumes.

    Args:
      workload: the training.
      settings: to start with; every setting that may be changed has a value.
      directory: of the run.
      config: when to do what; `LoopConfig` if not given.
      proposer: what names changes; `pattern_search` over all of the space if not given.
      memory: of past runs; it proposes the start, and is given the end.
      interventions: settings that are changed from outside during the run, as
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
      Diverged: rolling back did not help.
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
    options = dict(monitor or {})
    if "flops_per_step" in options:
        size = workload.examples_per_step(settings)
        options["flops_per_example"] = options.pop("flops_per_step") / size
    with (
        lock_directory(directory),
        Checkpoints(path, fingerprint=fingerprint) as checkpoints,
        StopSignals() as stop,
    ):
        if config.count_flops and "flops_per_example" not in options:
            options = _counted(workload, first) | options
        identity = {
            "task": dict(workload.task),
            "num_examples": workload.num_examples,
            "space": dict(workload.space),
            "settings": dict(settings),
            "loop": {name: value for name, value in vars(config).items() if name != "count_flops"},
            "interventions": interventions,
        }
        flops = options.get("flops_per_example")
        run_log = RunLog(workload, directory, checkpoints, identity, flops)
        loop = Loop(workload, config, run_log, stop, proposer, interventions)
        snapshot = loop.start(first, memory)
        is_new, step = snapshot.examples < workload.num_examples, int(snapshot.state.step)
        done, total = snapshot.examples, workload.num_examples
        with (
            Progress(workload.name, total=total, start=min(done, total)) as loop.progress,
            RollbackGuard(
                workload, config, run_log.alarms, loop.progress, snapshot, directory, options
            ) as loop.guard,
        ):
            outcome = loop.run(snapshot)
    if memory is not None and is_new:
        memory.remember(record_of(workload, outcome))
    return outcome if is_new else outcome._replace(from_checkpoint=step)


def _check_agreement(workload: Workload, memory: Memory | None) -> None:
    """Raises UserError if several processes might decide differently, each by what it sees."""
    if memory is not None:
        raise UserError("several processes: ask the memory before, and give all one start")
    timed = [name for name, axis in workload.space.items() if axis.score != "loss"]
    if timed := sorted([*timed, *workload.execution_options]):
        raise UserError(
            f"several processes: {', '.join(timed)} would be chosen by the clock of each; find "
            "the values in one process, and leave them out of the space and the execution options"
        )


def _counted(workload: Workload, first: Snapshot) -> dict[str, float]:
    """Operations an example and the peak of the devices; nothing if they cannot be counted."""
    batch = workload.sample(first.settings, 0)
    try:
        flops = count_flops(workload.step(first.settings), first.state, batch).total
    except Exception:  # never let statistics stop a run, whatever cannot be traced
        return {}
    size = workload.examples_per_step(first.settings)
    return {"peak_flops": peak_flops(), "flops_per_example": flops / size}


def record_of(workload: Workload, outcome: Outcome) -> RunRecord:
    """What is worth remembering of a run."""
    return RunRecord(
        name=workload.name,
        task=workload.task,
        settings=outcome.snapshot.settings,
        loss=outcome.curve[-1].loss.mean,
        tokens=outcome.snapshot.examples * workload.tokens_per_example,
        seconds=outcome.ledger.seconds,
        curve=[(point.tokens, point.loss.mean) for point in outcome.curve],
        decisions=as_record([*outcome.earlier, *outcome.decisions]),
    )


class Stopped(Exception):
    """A trial was given up because the run is to stop."""


@dataclasses.dataclass
class Loop:
    """One run under the loop, and what it carries beside the snapshot.

    Attributes:
      workload: The training.
      config: When to do what.
      run_log: What is written down and resumed from.
      stop: Whether Ctrl-C or SIGTERM was received.
      proposer: What names changes; `pattern_search` if None.
      interventions: Changes from outside, in order.
      num_interventions: Number of those that were made.
      num_roll_backs: Number of rollbacks since the last decision or assessment.
      earlier: Decisions of past runs, whose search this one continues.
    """

    workload: Workload
    config: LoopConfig
    run_log: RunLog
    stop: StopSignals
    proposer: Proposer | None
    interventions: Sequence[Intervention]
    num_interventions: int = 0
    num_roll_backs: int = 0
    earlier: list[Decision] = dataclasses.field(default_factory=list)
    guard: "RollbackGuard" = dataclasses.field(init=False)
    progress: Progress = dataclasses.field(init=False)
    _spaces: dict[frozenset[tuple[str, Setting]], Space] = dataclasses.field(default_factory=dict)
    _said_nothing: set[int] = dataclasses.field(default_factory=set)

    def run(self, snapshot: Snapshot) -> Outcome:
        """Optimises, trains under the monitor and assesses in turns until the end."""
        run_log = self.run_log
        if not run_log.curve:
            snapshot = self.assess(self.choose_options(snapshot))
        while snapshot.examples < self.workload.num_examples:
            snapshot = self.intervene(self.optimise(snapshot))
            snapshot = self.train(snapshot, self._next_stop(snapshot))
            if self._assessment_due(snapshot):
                snapshot = self.assess(snapshot)
        run_log.checkpoints.wait()
        ledger = run_log.ledger(snapshot)
        return Outcome(
            snapshot, run_log.decisions, run_log.curve, ledger, run_log.alarms, self.earlier
        )

    # Start

    def start(self, first: Snapshot, memory: Memory | None) -> Snapshot:
        """The snapshot of the latest checkpoint, else the start that the memory proposes."""
        snapshot, notes = self.run_log.resume(first)
        if notes:
            self.num_interventions = notes["intervened"]
            self.earlier = past_search(notes["earlier"]) or []
            log(f"{self.workload.name}: resumed after {snapshot.examples} examples")
            return snapshot
        return self._recall(first, memory) if memory is not None else first

    def _recall(self, first: Snapshot, memory: Memory) -> Snapshot:
        """The start that the memory proposes, within the bounds.

        If it is of the same task, the search continues where that run's has ended.
        """
        workload, proposal = self.workload, memory.propose(self.workload.task)
        if proposal is None:
            return first
        log(f"{workload.name}: {proposal.reason}")
        space = self._searched(first)
        known = known_settings(space, proposal.settings)
        # What it decided holds if all is as it was there, but for what decides no state.
        here, there = as_record(first.settings | known), as_record(proposal.settings)
        of_no_account = workload.execution_options.keys() | (workload.space.keys() - space.keys())
        if all(there.get(name) == here[name] for name in here.keys() - of_no_account):
            earlier = past_search(proposal.decisions)
            self.earlier = earlier or []
            if earlier is None:
                log(f"{workload.name}: the decisions of {proposal.run} cannot be read; not used")
        return changed(workload, first, known)

    # Assess

    def assess(self, snapshot: Snapshot) -> Snapshot:
        """Evaluates, notes how good the run is, and saves; rolls back if the loss is not finite."""
        losses = np.asarray(self.workload.evaluate(snapshot.state), np.float64)
        if not np.isfinite(losses).all():
            return self.roll_back(snapshot, self._not_finite(snapshot))
        self.num_roll_backs = 0
        self.run_log.assessed(snapshot, losses)
        self._save(snapshot)
        return snapshot

    def _assessment_due(self, snapshot: Snapshot) -> bool:
        """Whether another multiple of `assess_every` was passed."""
        total = self.workload.num_examples
        if snapshot.examples >= total:
            return True
        every = self.config.assess_every * total
        done = math.floor(self.run_log.assessed_at / every + 1e-9)
        return math.floor(snapshot.examples / every + 1e-9) > done

    def _save(self, snapshot: Snapshot) -> None:
        earlier = as_record(self.earlier)
        self.run_log.save(snapshot, intervened=self.num_interventions, earlier=earlier)

    # Optimise

    def optimise(self, snapshot: Snapshot) -> Snapshot:
        """Tries what is proposed for as long as something is and the budget allows it."""
        fraction = snapshot.examples / self.workload.num_examples
        phase = sum(fraction >= start for start in self.config.phases) - 1
        if phase < 0:
            return snapshot
        decisions = self.run_log.decisions
        config = dataclasses.replace(self.config.trials, margin=self.config.margins[phase])
        workload = self.workload._replace(space=self._searched(snapshot))
        search = Search(workload, config, phase, self._check_stop)
        if search.is_over(snapshot, decisions):
            return snapshot
        state, share = None, self.config.shares[phase]
        try:
            for state, decision in search.rounds(snapshot, self._propose, share, decisions):
                self._take(state.snapshot, decision)
        except Stopped:
            self._leave(state.snapshot if state else snapshot)
        except FloatingPointError:
            return self.roll_back(snapshot, self._not_finite(snapshot))
        decided = [d for d in decisions if d.phase == phase and d.examples == snapshot.examples]
        if not decided:
            self._say_nothing_is_tried(snapshot, phase)
            return snapshot
        return self._end_search(state.reached if state else snapshot, decided)

    def _propose(
        self, snapshot: Snapshot, decisions: Sequence[Decision], phase: int
    ) -> Sequence[Change]:
        """What is proposed, but for scalars that the updates from here do not read."""
        space = self._searched(snapshot)
        propose = self.proposer or pattern_search(space)
        unread = self.workload.space.keys() - space.keys()
        changes = propose(snapshot, [*self.earlier, *decisions], phase)
        return [change for change in changes if change.setting not in unread]

    def _searched(self, snapshot: Snapshot) -> Space:
        """`searched_space`, once for all settings that have the same step."""
        scalars = snapshot.state.hparams.keys()
        chosen = frozenset((k, v) for k, v in snapshot.settings.items() if k not in scalars)
        if chosen not in self._spaces:
            self._spaces[chosen] = space = searched_space(self.workload, snapshot)
            if unread := sorted(self.workload.space.keys() - space.keys()):
                names = ", ".join(unread)
                log(f"{self.workload.name}: not searched, since no update reads it: {names}")
        return self._spaces[chosen]

    def _say_nothing_is_tried(self, snapshot: Snapshot, phase: int) -> None:
        """Says, once a phase, that its search tries nothing though something is proposed."""
        if phase in self._said_nothing | {decision.phase for decision in self.run_log.decisions}:
            return
        self._said_nothing.add(phase)
        if self._propose(snapshot, self.run_log.decisions, phase):
            share, done = self.config.shares[phase], snapshot.examples / self.workload.num_examples
            log(
                f"{self.workload.name}: nothing is tried from {done:.0%} of the run on: a trial "
                f"takes more than the {share:.0%} that this search may cost, or than is left"
            )

    def _end_search(self, reached: Snapshot, decided: Sequence[Decision]) -> Snapshot:
        """The end of a search, with the execution options that are fastest for its batch."""
        before, size = dict(reached.settings), self.workload.examples_per_step
        for decision in reversed(decided):
            before |= {name: old for name, (old, _) in decision.changes.items()}
        if size(reached.settings) != size(before):
            reached = self.choose_options(reached)
        self.progress.update(min(reached.examples, self.workload.num_examples))
        self.guard.mark_good(reached)
        return reached

    def choose_options(self, snapshot: Snapshot) -> Snapshot:
        """Finds the fastest execution options, if the workload has several."""
        config = self.config
        if not (self.workload.execution_options and config.phases and config.options_seconds):
            return snapshot
        after, decision = fastest_settings(
            self.workload,
            snapshot,
            seconds_budget=config.options_seconds,
            memory_budget=config.memory_budget,
        )
        self._take(after, decision)
        return after

    def _take(self, snapshot: Snapshot, decision: Decision) -> None:
        """Notes a decision; its snapshot is good, since its losses were finite."""
        self.run_log.decided(decision)
        if decision.verdict == "accepted":
            log(f"{self.workload.name}, step {decision.step}: {decision.reason}")
        if decision.verdict != "rolled back":
            self.num_roll_backs = 0
        self.guard.mark_good(snapshot)
        if decision.changes:
            self.guard.reset_speed(snapshot)

    def _check_stop(self) -> None:
        if self.stop.received is not None:
            raise Stopped

    # Train

    def intervene(self, snapshot: Snapshot) -> Snapshot:
        """Makes the changes from outside that are due."""
        for examples, settings in self.interventions[self.num_interventions :]:
            if examples > snapshot.examples:
                break
            snapshot = changed(self.workload, snapshot, settings)
            self.num_interventions += 1
            self.guard.reset_speed(snapshot)
        return snapshot

    def _next_stop(self, snapshot: Snapshot) -> int:
        total, every = self.workload.num_examples, self.config.assess_every
        stops = [math.ceil(i * every * total - 1e-6) for i in range(1, math.ceil(1 / every))]
        stops += [round(phase * total) for phase in self.config.phases]
        stops += [examples for examples, _ in self.interventions[self.num_interventions :]]
        return min([stop for stop in stops if snapshot.examples < stop < total], default=total)

    def train(self, snapshot: Snapshot, end: int) -> Snapshot:
        """Trains until ``end``, or until an alarm restores the last good snapshot."""
        number, unseen, damage = int(snapshot.state.step), None, None
        size = self.workload.examples_per_step(snapshot.settings)
        examples = after_steps(snapshot.examples, end, size)
        for step in steps(self.workload, snapshot, end):
            number, snapshot = number + 1, step.snapshot
            if unseen:  # while the device computes this step, look at the one before
                damage = self.guard.observe(number - 1, unseen, step.began - unseen.began)
            unseen = step
            if damage or self.stop.received is not None:
                break
            self.guard.offer(number, snapshot)
        if unseen and not damage:
            damage = self.guard.observe(number, unseen)
        if damage:
            return self.roll_back(snapshot, damage)
        if self.stop.received is not None:
            self._leave(snapshot)
        return snapshot._replace(examples=examples)

    def _leave(self, snapshot: Snapshot) -> NoReturn:
        """Saves and exits; if the state became NaN or inf, the last good one is saved."""
        try:
            self._save(snapshot)
        except FloatingPointError:
            self._save(self.guard.last_good)
        self.run_log.checkpoints.wait()
        total = self.workload.num_examples // self.workload.examples_per_step(snapshot.settings)
        exit_on_signal(self.workload.name, int(snapshot.state.step), total, self.stop.received or 0)

    # Roll back

    def _not_finite(self, snapshot: Snapshot) -> "Damage":
        """Damage that was seen in an evaluation."""
        message, step = "the held-out loss is not finite", int(snapshot.state.step)
        alarm = Alarm("nan", step, True, math.nan, math.inf, message)
        self.run_log.alarms.append(alarm)
        return Damage(alarm)

    def roll_back(self, snapshot: Snapshot, damage: "Damage") -> Snapshot:
        """The last good snapshot, bit for bit, and what is done differently from there.

        A batch that gives NaN or inf from there too is left out from now on. If it is another
        reason, and the same part of the run fails again, the rates are lowered further each time.
        """
        alarm, stretch = damage
        self.num_roll_backs += 1
        if self.num_roll_backs > self.config.max_roll_backs:
            raise Diverged(
                f"{self.workload.name}: {alarm.message}, and going back did not help; look at "
                "decisions.jsonl and at the data, and start with smaller rates"
            )
        good = self.guard.restore()._replace(left_out=snapshot.left_out)
        self.run_log.checkpoints.forget_after(int(good.state.step))
        after, reason = good, f"{alarm.kind}: {alarm.message}"
        left_out = None
        if alarm.kind == "nan" and stretch and is_bad_batch(self.workload, good, stretch):
            left_out, reason = stretch, f"{reason}; the batch is left out"
            after = good._replace(left_out=good.left_out | {stretch})
        elif self.num_roll_backs > 1:
            within = self.workload._replace(space=self._searched(good))
            factor = LOWERED ** (self.num_roll_backs - 1)
            after = lowered(within, good, factor)
            reason += f"; the rates are lowered to {factor:.2g} of what they were"
        log(f"{self.workload.name}: back to step {int(good.state.step)}; {reason}")
        self.run_log.decided(
            Decision(
                kind="rollback",
                step=alarm.step,
                examples=good.examples,
                verdict="rolled back",
                changes=differences(snapshot.settings, after.settings),
                reason=reason,
                seconds=0.0,
                alarm=alarm,
                trial_examples=max(0, snapshot.examples - good.examples),
                left_out=left_out,
            )
        )
        return after


class Damage(NamedTuple):
    """The alarm that a state is damaged, and the data of the step at which it was seen."""

    alarm: Alarm
    stretch: tuple[int, int] | None = None


class RollbackGuard:
    """A `Monitor`, and a snapshot to roll back to. A context manager, as the monitor is.

    The loss of a step says nothing about the state after it, and divergence is called out at
    the second check, so a snapshot only counts as good some steps later.
    """

    def __init__(
        self,
        workload: Workload,
        config: LoopConfig,
        alarms: list[Alarm],
        progress: Progress,
        start: Snapshot,
        directory: Path,
        options: Mapping[str, Any],
    ):
        """Begins at a snapshot, which counts as good; ``alarms`` is added to.

        ``options`` are further arguments of `Monitor`, and ``flops_per_example``.
        """
        self._workload, self._alarms, self._keep_every = workload, alarms, config.keep_every
        self._progress, monitor = progress, dict(options)
        self._flops_per_example: float | None = monitor.pop("flops_per_example", None)
        size = workload.examples_per_step(start.settings)
        self._monitor = Monitor(
            config.monitor,
            tokens_per_step=size * workload.tokens_per_example,
            directory=directory,
            name=workload.name,
            start=int(start.state.step),
            num_steps=workload.num_examples // size,
            **monitor,
        )
        self.mark_good(start)
        self.reset_speed(start)

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._monitor.__exit__(*error)

    def mark_good(self, snapshot: Snapshot) -> None:
        """From now on this is the snapshot to roll back to."""
        self.last_good, self._candidate = copied(snapshot), None

    def offer(self, number: int, snapshot: Snapshot) -> None:
        """Takes the snapshot after a step, one of `keep_every`, until it counts as good."""
        if number % self._keep_every == 0 and self._candidate is None:
            self._candidate = number, copied(snapshot)

    def restore(self) -> Snapshot:
        """The snapshot to roll back to, bit for bit; all after it was never observed."""
        self._candidate = None
        self._monitor.discard_after(int(self.last_good.state.step))
        self.reset_speed(self.last_good)
        return copied(self.last_good)

    def reset_speed(self, snapshot: Snapshot) -> None:
        """A step does other work from now on: how long steps took is forgotten."""
        size = self._workload.examples_per_step(snapshot.settings)
        flops = self._flops_per_example
        self._monitor.reset_speed(
            size * self._workload.tokens_per_example, None if flops is None else size * flops
        )

    def observe(self, number: int, step: Step, seconds: float | None = None) -> Damage | None:
        """Waits for the metrics of a step; the damage that they show, if any.

        ``seconds`` is the time of the step; up to now if not given.
        """
        metrics = jax.device_get(step.metrics)
        seconds = time.perf_counter() - step.began if seconds is None else seconds
        values = {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}
        done = min(step.snapshot.examples, self._workload.num_examples)
        self._progress.update(done, loss=values["loss"])
        times = {"step_seconds": seconds, "data_seconds": step.data_seconds}
        raised = [alarm for alarm in self._monitor.observe(number, values | times) if alarm.raised]
        for alarm in raised:
            if alarm.kind not in {before.kind for before in self._alarms}:
                log(f"{self._workload.name}, step {number}: {alarm.kind}: {alarm.message}")
            self._alarms.append(alarm)
        damage = [alarm for alarm in raised if alarm.kind in DAMAGE]
        if damage:
            return Damage(damage[0], (step.position, step.snapshot.examples))
        if self._candidate is not None and number >= self._candidate[0] + STEPS_UNTIL_GOOD:
            self.last_good, self._candidate = self._candidate[1], None
        return None
