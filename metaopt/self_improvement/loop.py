"""The closed loop: a training that monitors, assesses, optimises and remembers itself.

Between two decisions it trains as usual. A decision is a round of short trials (`trials`) of
what a proposer names (`proposers`); an alarm that the state is damaged restores the last good
snapshot. What was decided, and on which evidence, is in ``decisions.jsonl``; a memory of past
runs, if there is one, gives the start and is given the end.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import jax
import numpy as np

from metaopt.autotune import TimedOptions, leanest_options, tune_options
from metaopt.console import log
from metaopt.errors import Diverged, UserError
from metaopt.files import as_record
from metaopt.measure import count_flops
from metaopt.ranges import Checked, Range, Seconds, Steps, StepsOr0
from metaopt.resources import MemoryUse, memory_use, peak_flops
from metaopt.self_improvement import responses
from metaopt.self_improvement.assess import Assessment, CostConfig, curve_of, rank_in_words
from metaopt.self_improvement.memory import Memory, RunRecord
from metaopt.self_improvement.proposers import data_shares, pattern_search
from metaopt.self_improvement.records import (
    Decision,
    Ledger,
    RunLog,
    differences,
    past_search,
)
from metaopt.self_improvement.trials import (
    LOWERED,
    Change,
    Margin,
    Proposer,
    Search,
    TrialConfig,
)
from metaopt.self_improvement.workload import (
    Choice,
    Scale,
    Settings,
    Snapshot,
    Space,
    Step,
    Workload,
    after_steps,
    begin,
    changed,
    copied,
    is_share,
    known_settings,
    one_behind,
    scalars_read,
    steps,
)
from metaopt.signals import Interrupted, StopSignals, exit_on_signal
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint, of_step
from metaopt.training.loop import checkpoint_directory
from metaopt.training.monitor import CONSECUTIVE_CHECKS, Alarm, Monitor, MonitorConfig
from metaopt.training.progress import Progress
from metaopt.training.runs import lock_directory

REPORTED = ("count_flops", "cost")
"""Fields of `LoopConfig` that a resumed run may change: they decide nothing."""
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
      phases: Starts of the searches, but none begins before a warm-up is over; none for a run that
        is not searched.
      shares: Budget of each phase for discarded trials, and for judging all trials if that
        counts (`Workload.evaluation_examples`).
      margins: Relative difference in the held-out loss below which it does not count, by phase.
        Late trials prefer small rates (halving one seemed to gain 1 % of the loss of a language
        model and 16 % of a classifier's, and cost some in the end): little is changed then.
      trials: How changes are tried.
      options_seconds: Time for the search through a workload's execution options, compiling
        included: at the start, and after a search that changed the batch, if there are phases; and
        in response to an alarm.
      options_share: Part of the seconds left that this may take. Below 1 it waits for the first
        assessment after the start, which tells how long steps and compiling take, and is left out
        if two of them cannot be compiled in that time.
      memory_budget: Bytes a device that a step may take; up to 1, a fraction of what it has.
      assess_every: Fraction of the run between two held-out evaluations, each with a checkpoint.
      assessment_share: Most that these may cost, as a fraction of the examples of the run, for a
        workload whose evaluations count as examples (`Workload.evaluation_examples`). They are
        farther apart if needed; those at the start and at the end always take place.
      cost: Weights of the cost that assessments report; it decides nothing.
      keep_every: Rollback snapshot interval, in steps.
      max_roll_backs: Number of rollbacks in a row, without a decision or an assessment between
        them, after which the run has `Diverged`.
      count_flops: Whether the operations of a step are counted, by tracing it once more, for its
        FLOP/s and their share of the peak, measured once a process. Those of an example are taken
        to be the same whatever is changed later.
      monitor: Thresholds of the alarms.
      max_responses: Number of responses to each kind of alarm; 0 for a run that only says what
        it was alarmed by. Damage to the state is rolled back in any case.
      alarm_share: Budget of a search in response to a plateau, as for `shares`.
      stop_on_plateau: Whether a plateau ends the run instead.
      report_only: Whether the run only says what it would change, and why, at the cost of trying
        it. Nothing is changed then, and damage that would be rolled back ends the run.
    """

    phases: tuple[Annotated[float, Range(0, 0.999)], ...] = (0.0, 0.35)
    shares: tuple[Annotated[float, Range(0, 1000)], ...] = (0.2, 0.03)
    margins: tuple[Margin, ...] = (0.002, 0.1)
    trials: TrialConfig = dataclasses.field(default_factory=TrialConfig)
    options_seconds: Seconds = 60.0
    options_share: Annotated[float, Range(0, 1)] = 1.0
    memory_budget: Annotated[float, Range(1e-6, 1e15)] = 0.8
    assess_every: Annotated[float, Range(1e-6, 1)] = 0.1
    assessment_share: Annotated[float, Range(1e-6, 1)] = 0.05
    cost: CostConfig = dataclasses.field(default_factory=CostConfig)
    keep_every: Steps = 20
    max_roll_backs: StepsOr0 = 5
    count_flops: bool = True
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    max_responses: StepsOr0 = 2
    alarm_share: Annotated[float, Range(0, 1000)] = 0.03
    stop_on_plateau: bool = False
    report_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        is_sorted, number = list(self.phases) == sorted(self.phases), len(self.phases)
        if not (is_sorted and len(self.shares) == number <= len(self.margins)):
            raise UserError(
                f"phases {self.phases} must ascend and need a share each, not {self.shares}, and a "
                f"margin each, not {self.margins}"
            )


def assessment_interval(config: LoopConfig, workload: Workload) -> float:
    """Examples between two assessments; it depends on nothing that a run does."""
    least = workload.evaluation_examples / config.assessment_share
    return max(config.assess_every * workload.num_examples, least)


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
    read_memory: Callable[[], MemoryUse] = memory_use,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Trains to the end, from the latest checkpoint if there is one, improving on the way.

    Ctrl-C or SIGTERM saves and exits; the same call resumes.

    Args:
      workload: the training.
      settings: to start with; every setting that may be changed has a value.
      directory: of the run: checkpoints in a folder of the workload's name, ``metrics.jsonl`` with
        the assessments, ``monitor.jsonl``, and ``decisions.jsonl``.
      config: when to do what; `LoopConfig` if not given.
      proposer: what names changes; `pattern_search` over all of the space if not given.
      memory: of past runs; it proposes the start, and is given the end.
      interventions: settings that are changed from outside during the run, as
        ``(examples, settings)``: someone at the console, or a fault that is put in.
      fingerprint: what decides the states beside the settings; a checkpoint of another is refused.
        If not given, it is `of_step` of the first settings.
      read_memory: gives the memory in use and its limits.
      clock: gives the time in seconds, for the alarms about speed.

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
    directory, path = Path(directory), checkpoint_directory(directory, workload.name)
    if fingerprint is None:
        batch = workload.sample(settings, 0)
        fingerprint = of_step({}, workload.step(settings), first.state, batch)
    with (
        lock_directory(directory),
        Checkpoints(path, fingerprint=fingerprint) as checkpoints,
        StopSignals() as stop,
    ):
        flops = _flops_per_example(workload, first) if config.count_flops else None
        identity = {
            "task": dict(workload.task),
            "num_examples": workload.num_examples,
            "space": {name: _anywhere(axis) for name, axis in workload.all_axes.items()},
            "settings": {k: v for k, v in settings.items() if k not in workload.execution_options},
            "loop": {name: x for name, x in vars(config).items() if name not in REPORTED},
            "interventions": interventions,
        }
        rank = None if memory is None else functools.partial(memory.rank, workload.task)
        run_log = RunLog(workload, directory, checkpoints, identity, flops, config.cost, rank)
        loop = Loop(workload, config, run_log, stop, proposer, interventions, flops, clock)
        snapshot = loop.start(first, memory)
        is_new, step = not loop.is_over(snapshot), int(snapshot.state.step)
        done = min(snapshot.examples, workload.num_examples)
        monitor = Monitor(
            config.monitor,
            **loop.work_of_step(snapshot),
            peak_flops=peak_flops() if flops else None,
            directory=directory,
            name=workload.name,
            start=step,
            num_steps=workload.num_examples // workload.examples_per_step(snapshot.settings),
            read_memory=read_memory,
        )
        progress = Progress(workload.name, total=workload.num_examples, start=done)
        with progress as loop.progress, monitor as loop.monitor:
            loop.monitor.restore(loop.monitored)
            loop.mark_good(snapshot)
            outcome = loop.run(snapshot)
    if is_new and (rank := outcome.curve[-1].rank) is not None:
        log(f"{workload.name}: {rank_in_words(rank)}")
    if memory is not None and is_new:
        memory.remember(record_of(workload, outcome))
    return outcome if is_new else outcome._replace(from_checkpoint=step)


def _anywhere(axis: Scale | Choice) -> Scale | Choice:
    """The axis without what depends on the number of devices."""
    return dataclasses.replace(axis, multiple=1) if isinstance(axis, Scale) else axis


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


def _flops_per_example(workload: Workload, first: Snapshot) -> float | None:
    """Operations an example; None if they cannot be counted."""
    step, batch = workload.step(first.settings), workload.sample(first.settings, 0)
    try:
        flops = count_flops(step, first.state, batch).total
        return flops / workload.examples_per_step(first.settings)
    except Exception:  # never let statistics stop a run, whatever cannot be traced
        return None


def record_of(workload: Workload, outcome: Outcome) -> RunRecord:
    """What is worth remembering of a run."""
    return RunRecord(
        name=workload.name,
        task=workload.task,
        settings=outcome.snapshot.settings,
        loss=outcome.curve[-1].loss.mean,
        tokens=outcome.snapshot.examples * workload.tokens_per_example,
        seconds=outcome.ledger.seconds,
        curve=curve_of(outcome.curve),
        decisions=as_record([*outcome.earlier, *outcome.decisions]),
    )


@dataclasses.dataclass
class Loop:
    """One run under the loop, and what it carries beside the snapshot.

    The loss of a step says nothing about the state after it, and divergence is called out at the
    second check, so a snapshot only counts as good some steps later.

    Attributes:
      workload, config, proposer, interventions: As for `run`.
      run_log: What is written down and resumed from.
      stop: Whether Ctrl-C or SIGTERM was received.
      flops_per_example: Operations an example; None if not known.
      clock: The time in seconds, of steps.
      pending: Alarms that are to be responded to, once the step in flight is done.
      monitored: What the monitor knew at the checkpoint from which the run resumed.
      num_interventions: Number of those that were made.
      num_roll_backs: Number of rollbacks since the last decision or assessment.
      earlier: Decisions of past runs, whose search this one continues.
      last_good: Snapshot to roll back to.
    """

    workload: Workload
    config: LoopConfig
    run_log: RunLog
    stop: StopSignals
    proposer: Proposer | None
    interventions: Sequence[Intervention]
    flops_per_example: float | None
    clock: Callable[[], float] = time.perf_counter
    pending: list[Alarm] = dataclasses.field(default_factory=list)
    monitored: Mapping[str, Any] | None = None
    num_interventions: int = 0
    num_roll_backs: int = 0
    earlier: list[Decision] = dataclasses.field(default_factory=list)
    last_good: Snapshot = dataclasses.field(init=False)
    monitor: Monitor = dataclasses.field(init=False)
    progress: Progress = dataclasses.field(init=False)
    _candidate: tuple[int, Snapshot] | None = None
    _spaces: dict[frozenset, Space] = dataclasses.field(default_factory=dict)
    _said_nothing: set[int] = dataclasses.field(default_factory=set)

    def run(self, snapshot: Snapshot) -> Outcome:
        """Optimises, trains under the monitor and assesses in turns until the end."""
        if not self.run_log.curve:
            is_known = self.config.options_share == 1
            snapshot = self.assess(self.choose_options(snapshot) if is_known else snapshot)
        while not self.is_over(snapshot := self.respond(snapshot)):
            if self._are_options_due(snapshot):
                snapshot = self.choose_options(snapshot)
                self.run_log.checkpoints.forget_after(int(snapshot.state.step) - 1)
                self._save(snapshot)  # another time they might be others
            snapshot = self.intervene(self.optimise(snapshot))
            snapshot = self.train(snapshot, self._next_stop(snapshot))
            if snapshot.examples >= self._next_assessment(self.run_log.assessed_at):
                snapshot = self.assess(snapshot)
        found = self.run_log
        found.checkpoints.wait()
        ledger = found.ledger(snapshot)
        return Outcome(snapshot, found.decisions, found.curve, ledger, found.alarms, self.earlier)

    def start(self, first: Snapshot, memory: Memory | None) -> Snapshot:
        """The snapshot of the latest checkpoint, else what the memory proposes, within the bounds.

        If that is of the same task, the search continues where that run's has ended.
        """
        workload, (snapshot, notes) = self.workload, self.run_log.resume(first)
        if notes:
            self.num_interventions, self.monitored = notes["intervened"], notes.get("monitor")
            self.pending = [Alarm(*alarm) for alarm in notes.get("pending", ())]
            self.earlier = past_search(notes["earlier"]) or []
            log(f"{workload.name}: resumed after {snapshot.examples} examples")
            return snapshot
        proposal = None if memory is None else memory.propose(workload.task)
        if proposal is None:
            return first
        log(f"{workload.name}: {proposal.reason}")
        space = self._searched(first)
        axes = self.workload._replace(space=space).all_axes
        if proposal.distance > 0:  # what is fast depends on all of a task
            axes = {name: axis for name, axis in axes.items() if axis.score == "loss"}
        known = known_settings(axes, proposal.settings)
        # What it decided holds if all is as it was there, but for what decides no state.
        here, there = as_record(first.settings | known), as_record(proposal.settings)
        of_no_account = workload.execution_options.keys() | (workload.space.keys() - space.keys())
        if all(there.get(name) == here[name] for name in here.keys() - of_no_account):
            earlier = past_search(proposal.decisions)
            self.earlier = earlier or []
            if earlier is None:
                log(f"{workload.name}: the decisions of {proposal.run} cannot be read; not used")
        try:
            return changed(workload, first, known)
        except UserError as error:
            log(f"{workload.name}: not begun like {proposal.run}: {error}")
            self.earlier = []
            return first

    def assess(self, snapshot: Snapshot) -> Snapshot:
        """Evaluates, notes how good the run is, and saves; rolls back if the loss is not finite."""
        losses = np.asarray(self.workload.evaluate(snapshot.state), np.float64)
        if not np.isfinite(losses).all():
            return self._not_finite(snapshot)
        self.num_roll_backs = 0
        self.run_log.assessed(snapshot, losses)
        self._save(snapshot)
        return snapshot

    def _next_assessment(self, examples: int) -> int:
        """The next multiple of the interval after some examples, or the end of the run."""
        every = assessment_interval(self.config, self.workload)
        multiple = math.floor(examples / every + 1e-9) + 1
        return min(self.workload.num_examples, math.ceil(multiple * every - 1e-6))

    def _save(self, snapshot: Snapshot) -> None:
        self.run_log.save(
            snapshot,
            intervened=self.num_interventions,
            earlier=as_record(self.earlier),
            monitor=self.monitor.noted(),
            pending=self.pending,
        )

    def optimise(self, snapshot: Snapshot) -> Snapshot:
        """Tries what is proposed for as long as something is and the budget allows it."""
        workload, config, decisions = self.workload, self.config, self.run_log.decisions
        done = snapshot.examples / workload.num_examples
        phase = sum(snapshot.examples >= start for start in self._phase_starts) - 1
        if phase < 0 or (config.report_only and any(d.phase == phase for d in decisions)):
            return snapshot
        within, share = workload._replace(space=self._searched(snapshot)), config.shares[phase]
        search = Search(within, config.trials, phase, config.margins[phase], self._is_stopped)
        if reached := self._searched_from(snapshot, search, self._propose, share):
            return reached
        is_first = phase not in self._said_nothing | {decision.phase for decision in decisions}
        self._said_nothing.add(phase)
        if is_first and self._propose(snapshot, decisions, phase):
            share = min(share, config.trials.probe)
            log(
                f"{workload.name}: nothing is tried from {done:.0%} of the run on: a round "
                f"takes more than the {share:.0%} that it may cost, or than is left"
            )
        return snapshot

    def _searched_from(
        self, snapshot: Snapshot, search: Search, propose: Proposer, share: float
    ) -> Snapshot | None:
        """Where the run continues after the rounds of a search; None if there were none."""
        config, decisions, state = self.config, self.run_log.decisions, None
        try:
            for state, decision in search.rounds(snapshot, propose, share, decisions):
                self._take(snapshot if config.report_only else state.snapshot, decision)
                if config.report_only:
                    continue
                if decision.from_start:  # the steps up to here are others than those saved
                    self.run_log.checkpoints.forget_after(int(snapshot.state.step) - 1)
                    self._save(state.snapshot)
        except Interrupted:
            self._leave(state.snapshot if state else snapshot)
        except FloatingPointError:
            return self._not_finite(snapshot)
        place = search.phase, snapshot.examples
        decided = [d for d in decisions if (d.phase, d.examples) == place]
        if not decided or config.report_only:
            return snapshot if decided else None
        return self._end_search(state.reached if state else snapshot, decided)

    @property
    def _phase_starts(self) -> list[int]:
        """Examples at which the searches begin."""
        total, least = self.workload.num_examples, self.workload.warmup_examples
        return [max(least, round(phase * total)) for phase in self.config.phases]

    def _propose(self, now: Snapshot, past: Sequence[Decision], phase: int) -> list[Change]:
        """What is proposed, but for scalars that the updates from here do not read.

        If nothing is left of that, the shares of the domains that the latest assessment found weak.
        """
        space, past = self._searched(now), [*self.earlier, *past]
        propose = self.proposer or pattern_search(space)
        unread = self.workload.space.keys() - space.keys()
        changes = [x for x in propose(now, past, phase) if x.setting not in unread]
        if changes or not self.run_log.curve:
            return changes
        domains, assessment = self.workload.domains, self.run_log.curve[-1]
        return data_shares(domains, assessment, now.settings, past, phase)

    def _searched(self, snapshot: Snapshot) -> Space:
        """The space without scalars that updates from here do not read; all if it is not known.

        It is looked at once for all settings that have the same step.
        """
        workload, scalars = self.workload, snapshot.state.hparams.keys()
        names = [k for k in snapshot.settings if k not in scalars and not is_share(k)]
        chosen = frozenset((name, snapshot.settings[name]) for name in names)
        if chosen not in self._spaces:
            unread = scalars & workload.space.keys()
            try:
                if unread:
                    batch = workload.sample(snapshot.settings, snapshot.examples)
                    step = workload.step(snapshot.settings)
                    unread -= scalars_read(step, snapshot.state, batch)
            except Exception:  # never let a step that cannot be traced stop a run
                unread = set()
            self._spaces[chosen] = {k: x for k, x in workload.space.items() if k not in unread}
            if unread:
                names = ", ".join(sorted(unread))
                log(f"{workload.name}: not searched, since no update reads it: {names}")
        return self._spaces[chosen]

    def _end_search(self, reached: Snapshot, decided: Sequence[Decision]) -> Snapshot:
        """The end of a search, with the execution options that are fastest for its batch."""
        size, before = self.workload.examples_per_step, dict(reached.settings)
        for decision in reversed(decided):
            before |= {name: old for name, (old, _) in decision.changes.items()}
        if self.config.options_share == 1 and size(reached.settings) != size(before):
            reached = self.choose_options(reached)
        self.progress.update(min(reached.examples, self.workload.num_examples))
        self.mark_good(reached)
        return reached

    def _are_options_due(self, snapshot: Snapshot) -> bool:
        """Whether it is time to choose execution options, and there is enough of it."""
        config, now, found = self.config, snapshot.examples, self.run_log
        is_first = len(found.curve) == 2 and found.assessed_at == now
        if config.options_share == 1 or not is_first or not self.workload.execution_options:
            return False
        if any(d.kind == "execution options" and d.examples == now for d in found.decisions):
            return False
        return self._seconds_for_options(snapshot) > 2 * found.ledger(snapshot).compile_seconds

    def _seconds_for_options(self, snapshot: Snapshot) -> float:
        """What choosing them may take."""
        config = self.config
        if config.options_share == 1:
            return config.options_seconds
        ledger = self.run_log.ledger(snapshot)
        each = ledger.seconds / (ledger.examples + ledger.trial_examples)
        left = each * (self.workload.num_examples - snapshot.examples)
        return min(config.options_seconds, config.options_share * left)

    def choose_options(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the fastest execution options, if the workload has several.

        Steps are timed on one batch again and again (`tune_options`), and their results are
        discarded, so this costs seconds and no examples.
        """
        config, began = self.config, time.perf_counter()
        if not (self.workload.execution_options and config.phases and config.options_seconds):
            return snapshot
        after, timings = self._other_options(snapshot, self._seconds_for_options(snapshot))
        changes = differences(snapshot.settings, after.settings)
        decision = Decision(
            kind="execution options",
            step=int(snapshot.state.step),
            examples=snapshot.examples,
            verdict="accepted" if changes else "kept",
            changes=changes,
            reason=responses.said_of_options(changes),
            timings=timings,
            seconds=time.perf_counter() - began,
        )
        after = snapshot if config.report_only else after
        self._take(after, decision)
        return after

    def _other_options(
        self, snapshot: Snapshot, seconds: float, *, least_memory: bool = False
    ) -> tuple[Snapshot, Sequence[TimedOptions]]:
        """The snapshot with the fastest execution options or the leanest, and the evidence."""
        workload, config, options = self.workload, self.config, self.workload.execution_options

        def build(values: Settings):
            settings = {**snapshot.settings, **values}
            batch = workload.sample(settings, snapshot.examples)
            return workload.step(settings), (snapshot.state, batch)

        start = {name: snapshot.settings[name] for name in options}
        if least_memory:
            found = leanest_options(build, options, start, seconds_budget=seconds)
        else:
            found = tune_options(
                build,
                options,
                start,
                memory_budget=config.memory_budget,
                seconds_budget=seconds,
            )
        return changed(workload, snapshot, found.settings), found.timings

    def respond(self, snapshot: Snapshot) -> Snapshot:
        """Does what the pending alarms ask for, and saves what was done.

        So a resumed run either has the response in its checkpoint, or raises the alarm again
        (`Monitor.restore`). A search that began in response is continued, as one of a phase is.
        """
        run_log, num_decided = self.run_log, len(self.run_log.decisions)
        step = int(snapshot.state.step)
        is_due = any(alarm.step < step for alarm in self.pending)  # one step later, as in flight
        if is_due and snapshot.examples < self.workload.num_examples:
            while self.pending:
                snapshot = self._answered(self.pending.pop(0), snapshot, step)
            run_log.checkpoints.forget_after(step - 1)
            if self.is_over(snapshot) and run_log.assessed_at < snapshot.examples:
                return self.assess(snapshot)
            try:
                self._save(snapshot)
            except FloatingPointError:
                return self._not_finite(snapshot)
            self.mark_good(snapshot)
            if any(decision.changes for decision in run_log.decisions[num_decided:]):
                self.monitor.reset_speed(**self.work_of_step(snapshot))
        begun = responses.searches_of(run_log.decisions)
        is_begun = bool(begun) and begun[-1].examples == snapshot.examples
        return self.search_for(len(begun), snapshot) if is_begun else snapshot

    def is_over(self, snapshot: Snapshot) -> bool:
        """Whether the run is at its end, or a response has ended it."""
        decisions = self.run_log.decisions
        is_stopped = bool(decisions) and decisions[-1].verdict == "stopped"
        return is_stopped or snapshot.examples >= self.workload.num_examples

    def search_for(self, number: int, snapshot: Snapshot) -> Snapshot:
        """The search of the learning rates in response to an alarm, the one of this number."""
        config, space = self.config, responses.rates_of(self._searched(snapshot))
        within, phase = self.workload._replace(space=space), max(1, len(config.phases)) + number - 1
        trials = config.trials
        trials = dataclasses.replace(trials, examples=responses.SHORTER * trials.examples)
        search = Search(within, trials, phase, responses.MARGIN, self._is_stopped)
        propose = self.proposer or responses.rate_search(space)
        return self._searched_from(snapshot, search, propose, config.alarm_share) or snapshot

    def _response_to(self, alarm: Alarm, settings: Settings) -> responses.Response:
        return responses.choose(
            alarm,
            self.workload,
            settings,
            self.run_log.decisions,
            max_responses=self.config.max_responses,
            stop_on_plateau=self.config.stop_on_plateau,
            active=self.monitor.active,
            num_processes=jax.process_count(),
        )

    def _answered(self, alarm: Alarm, snapshot: Snapshot, step: int) -> Snapshot:
        """The snapshot after the response to an alarm, which is noted as taken at a step."""
        began, response = time.perf_counter(), self._response_to(alarm, snapshot.settings)
        after, said = self._carried_out(response, snapshot)
        reason = f"{alarm.kind}: {alarm.message}; {said.pop('reason')}"
        log(f"{self.workload.name}, step {alarm.step}: {reason}")
        self.run_log.decided(
            Decision(
                kind="response",
                step=step,
                examples=snapshot.examples,
                reason=reason,
                alarm=alarm,
                seconds=time.perf_counter() - began,
                **said,
            )
        )
        return after

    def _carried_out(
        self, response: responses.Response, snapshot: Snapshot
    ) -> tuple[Snapshot, dict[str, Any]]:
        """The snapshot after a response, and the fields of the decision that say what was done."""
        said: dict[str, Any] = {"reason": response.reason, "verdict": "accepted", "changes": {}}
        if response.action == "nothing":
            return snapshot, said | {"verdict": "kept"}
        if self.config.report_only:
            return snapshot, said | {
                "verdict": "reported",
                "reason": f"would be done: {response.reason}",
            }
        if response.action == "stop":
            return snapshot, said | {"verdict": "stopped"}
        if response.action == "search":
            return snapshot, said
        if response.action == "add workers":
            before = responses.workers_of(self.run_log.decisions)
            return snapshot, said | {"changes": {"workers": (before, response.workers)}}
        is_lean = response.action == "save memory"
        try:
            seconds = self.config.options_seconds
            after, timings = self._other_options(snapshot, seconds, least_memory=is_lean)
        except UserError as error:
            return snapshot, said | {"verdict": "kept", "reason": f"no response: {error}"}
        changes = differences(snapshot.settings, after.settings)
        return after, {
            "reason": responses.said_of_options(changes, timings if is_lean else ()),
            "verdict": "accepted" if changes else "kept",
            "changes": changes,
            "timings": timings,
        }

    def _take(self, snapshot: Snapshot, decision: Decision) -> None:
        """Notes a decision; its snapshot is good, since its losses were finite."""
        if self.config.report_only and decision.verdict == "accepted":
            reason = f"would be changed: {decision.reason}"
            decision = decision._replace(verdict="reported", reason=reason)
        self.run_log.decided(decision)
        if decision.verdict in ("accepted", "reported"):
            log(f"{self.workload.name}, step {decision.step}: {decision.reason}")
        if decision.verdict != "rolled back":
            self.num_roll_backs = 0
        self.mark_good(snapshot)
        if decision.changes:
            self.monitor.reset_speed(**self.work_of_step(snapshot))

    def _is_stopped(self) -> bool:
        return self.stop.received is not None

    def intervene(self, snapshot: Snapshot) -> Snapshot:
        """Makes the changes from outside that are due."""
        for examples, settings in self.interventions[self.num_interventions :]:
            if examples > snapshot.examples:
                break
            before, snapshot = snapshot, changed(self.workload, snapshot, settings)
            self.num_interventions += 1
            work = self.work_of_step(snapshot)
            if work != self.work_of_step(before):  # what else makes it slower is worth an alarm
                self.monitor.reset_speed(**work)
        return snapshot

    def _next_stop(self, snapshot: Snapshot) -> int:
        total, stops = self.workload.num_examples, [self._next_assessment(snapshot.examples)]
        stops += self._phase_starts
        stops += [examples for examples, _ in self.interventions[self.num_interventions :]]
        return min([stop for stop in stops if snapshot.examples < stop], default=total)

    def train(self, snapshot: Snapshot, end: int) -> Snapshot:
        """Trains until ``end``, until there is an alarm to respond to, or to roll back."""
        number, size = int(snapshot.state.step), self.workload.examples_per_step(snapshot.settings)
        examples = after_steps(snapshot.examples, end, size)
        taken = steps(
            self.workload,
            snapshot,
            end,
            check=lambda: self._is_stopped() or bool(self.pending),
            workers=responses.workers_of(self.run_log.decisions),
            clock=self.clock,
        )
        for step, after in one_behind(taken):
            snapshot = after.snapshot if after else snapshot
            if after and not step:  # or it would take as long as it is to dispatch it
                jax.block_until_ready(after.metrics)
            if step:
                number += 1
                now = after.began if after else self.clock()
                if alarm := self._observe(number, step, now - step.began):
                    break
            if after and (number + 1) % self.config.keep_every == 0 and self._candidate is None:
                self._candidate = number + 1, copied(snapshot)
        else:
            if self._is_stopped():
                self._leave(snapshot)
            return snapshot if self.pending else snapshot._replace(examples=examples)
        self.pending.clear()
        return self.roll_back(snapshot, alarm, (step.position, step.snapshot.examples))

    def _observe(self, number: int, step: Step, seconds: float) -> Alarm | None:
        """Waits for the metrics of a step; the alarm that the state is damaged, if any."""
        metrics = jax.device_get(step.metrics)
        values = {name: float(x) for name, x in metrics.items() if np.ndim(x) == 0}
        done = min(step.snapshot.examples, self.workload.num_examples)
        self.progress.update(done, loss=values["loss"])
        values |= {"step_seconds": seconds, "data_seconds": step.data_seconds}
        raised = [alarm for alarm in self.monitor.observe(number, values) if alarm.raised]
        for alarm in raised:
            is_new = alarm.kind not in {before.kind for before in self.run_log.alarms}
            self.run_log.alarms.append(alarm)
            if alarm.kind not in DAMAGE and self.config.max_responses > 0:
                if self._response_to(alarm, step.snapshot.settings).action == "nothing":
                    self._answered(alarm, step.snapshot, number)
                else:
                    self.pending.append(alarm)
            elif is_new:
                log(f"{self.workload.name}, step {number}: {alarm.kind}: {alarm.message}")
        damage = next((alarm for alarm in raised if alarm.kind in DAMAGE), None)
        if not damage and self._candidate and number >= self._candidate[0] + STEPS_UNTIL_GOOD:
            self.last_good, self._candidate = self._candidate[1], None
        return damage

    def _leave(self, snapshot: Snapshot) -> NoReturn:
        """Saves and exits; if the state became NaN or inf, the last good one is saved."""
        try:
            self._save(snapshot)
        except FloatingPointError:
            self.pending.clear()
            self.monitor.discard_after(int(self.last_good.state.step))
            self._save(self.last_good)
        self.run_log.checkpoints.wait()
        total = self.workload.num_examples // self.workload.examples_per_step(snapshot.settings)
        exit_on_signal(self.workload.name, int(snapshot.state.step), total, self.stop.received or 0)

    def work_of_step(self, snapshot: Snapshot) -> dict[str, Any]:
        """What a step works off, as `Monitor` takes it."""
        size, flops = self.workload.examples_per_step(snapshot.settings), self.flops_per_example
        tokens = size * self.workload.tokens_per_example
        return {"tokens_per_step": tokens, "flops_per_step": flops and size * flops}

    def mark_good(self, snapshot: Snapshot) -> None:
        """From now on this is the snapshot to roll back to."""
        self.last_good, self._candidate = copied(snapshot), None

    def _not_finite(self, snapshot: Snapshot) -> Snapshot:
        """Rolls back from damage that was seen in an evaluation."""
        message, step = "the held-out loss is not finite", int(snapshot.state.step)
        alarm = Alarm("nan", step, True, math.nan, math.inf, message)
        self.run_log.alarms.append(alarm)
        self.pending.clear()
        return self.roll_back(snapshot, alarm)

    def roll_back(
        self, snapshot: Snapshot, alarm: Alarm, stretch: tuple[int, int] | None = None
    ) -> Snapshot:
        """The last good snapshot, bit for bit, and what is done differently from there.

        A batch that gives NaN or inf from there too is left out from now on. If it is another
        reason, and the same part of the run fails again, the rates are lowered further each time.
        ``stretch`` is the data of the step at which the alarm was raised, ``(first, end)``.
        """
        self.num_roll_backs += 1
        if self.config.report_only:
            raise Diverged(
                f"{self.workload.name}: {alarm.message}; it would be rolled back, but nothing is "
                "to be changed: give --improve, or smaller rates"
            )
        if self.num_roll_backs > self.config.max_roll_backs:
            raise Diverged(
                f"{self.workload.name}: {alarm.message}, and going back did not help; look at "
                "decisions.jsonl and at the data, and start with smaller rates"
            )
        good, step = copied(self.last_good), int(self.last_good.state.step)
        self._candidate = None
        self.monitor.discard_after(step)
        self.monitor.reset_speed(**self.work_of_step(good))
        self.run_log.checkpoints.forget_after(step)
        good = good._replace(left_out=snapshot.left_out)
        again, batch = self.num_roll_backs - 1, stretch if alarm.kind == "nan" else None
        space = self._searched(good) if again else {}
        search = Search(self.workload._replace(space=space), self.config.trials)
        after, reason = search.mended(good, batch, LOWERED**again)
        reason = f"{alarm.kind}: {alarm.message}; {reason}"
        log(f"{self.workload.name}: back to step {step}; {reason}")
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
                left_out=next(iter(after.left_out - good.left_out), None),
            )
        )
        return after
