"""What a run writes down and resumes from: decisions, assessments, alarms and checkpoints.

A line of ``decisions.jsonl`` or ``metrics.jsonl`` has a checksum, since a resumed run believes it.
"""

import dataclasses
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metaopt import files, parallel
from metaopt.autotune import TimedOptions
from metaopt.console import is_first_process, log
from metaopt.errors import UserError
from metaopt.measure import compile_seconds
from metaopt.resources import peak_memory
from metaopt.self_improvement.assess import Assessment, CostConfig, assess, curve_of
from metaopt.self_improvement.workload import (
    Score,
    Setting,
    Settings,
    Snapshot,
    Workload,
    changed,
    check_settings,
)
from metaopt.statistics import Curve, RankAmongRuns
from metaopt.training import runs
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.monitor import Alarm


class TriedChange(NamedTuple):
    """One trial of a search, beside the trial without a change.

    Attributes:
      setting: Name of the setting that was varied; ``a and b`` for several together.
      settings: Values of all settings that changed with it.
      direction: 1 for more of the setting, -1 for less, 0 if there is no such order.
      score: What the change was judged by.
      loss: Mean held-out loss at the end of the trial; None if not finite.
      difference: What was compared, less that of no change; None if not finite.
      ci95: Half the width of its 95 % interval; None if there is none.
      verdict: Outcome of the comparison with no change.
      accepted: Whether it was taken.
      seconds: Time of its steps, without compiling.
      examples: Examples that it used, those to anneal among them.
      error: Why it could not be run; empty if it could.
      from_start: Whether it began at the start of the run.
    """

    setting: str
    settings: dict[str, Setting]
    direction: int
    score: Score
    loss: float | None
    difference: float | None
    ci95: float | None
    verdict: Literal["better", "worse", "noise"]
    accepted: bool
    seconds: float
    examples: int
    error: str = ""
    from_start: bool = False


class Decision(NamedTuple):
    """What was decided, and on which evidence: a line of ``decisions.jsonl``.

    Attributes:
      kind: ``search`` for a trial round, ``execution options`` for the fastest way to compute a
        step, ``rollback`` for the response to an alarm that the state is damaged, ``response`` for
        that to any other alarm (`metaopt.self_improvement.responses`).
      step: Number of updates of the state when it was taken.
      examples: Examples gone through by then.
      verdict: ``accepted``, ``kept`` (nothing was better, or nothing could be done), ``rolled
        back``, ``stopped`` (the run ends here), or ``reported``: it would have been accepted, but
        nothing was to be changed.
      changes: Settings that changed, ``{name: (old, new)}``; of a response also ``workers``, the
        number of threads that draw the data.
      reason: The rule and the threshold that decided, in words.
      seconds: Time that it took; a search that begins in response notes its own.
      phase: Number of the search; None outside of one.
      trials, timings, alarm: Evidence of a search, for the options, or for a rollback or response.
      trial_examples: Examples spent on discarded trials, if this decision is the last of its
        search, and on evaluations (`Workload.evaluation_examples`).
      left_out: Stretch of the data, ``(first, end)``, that is not trained on from now on.
      size: Examples of each trial, those to anneal aside.
      gained: Examples by which the run advances if it continues from the winner.
      from_start: Whether the run continues from a trial that began at the start of the run.
    """

    kind: Literal["search", "execution options", "rollback", "response"]
    step: int
    examples: int
    verdict: Literal["accepted", "kept", "rolled back", "stopped", "reported"]
    changes: dict[str, tuple[Setting, Setting]]
    reason: str
    seconds: float
    phase: int | None = None
    trials: Sequence[TriedChange] = ()
    timings: Sequence[TimedOptions] = ()
    alarm: Alarm | None = None
    trial_examples: int = 0
    left_out: tuple[int, int] | None = None
    size: int = 0
    gained: int = 0
    from_start: bool = False


def differences(old: Settings, new: Settings) -> dict[str, tuple[Setting, Setting]]:
    """What changed, ``{name: (old, new)}``."""
    return {name: (old[name], new[name]) for name in new if old.get(name) != new[name]}


def decision_of(line: Any) -> Decision:
    """The decision that a line holds.

    Raises:
      ValueError: a field is missing or of another type, a count is negative, or something was
        accepted that was not tried.
    """
    if not isinstance(line, Mapping):
        raise ValueError("it is no decision")
    for trial in line["trials"] if files.matches(line.get("trials"), list[dict[str, Any]]) else ():
        if problem := files.what_is_wrong(trial, TriedChange):
            raise ValueError(f"in its trials, {problem}")
    counts = ("step", "examples", "seconds", "trial_examples", "size", "gained")
    decision: Decision = _parsed(line, Decision, counts)
    left_out, phase = decision.left_out, decision.phase
    if left_out and not 0 <= left_out[0] < left_out[1]:
        raise ValueError(f"'left_out' is {left_out}, no stretch of examples")
    if (decision.verdict == "stopped") > (decision.kind == "response"):
        raise ValueError("'verdict' is 'stopped', and it is no response")
    if decision.kind == "response" and (decision.alarm is None or not decision.alarm.raised):
        raise ValueError("'alarm' is none that was raised, and it is a response to one")
    if decision.kind != "search":
        return decision
    if phase is None or phase < 0:
        raise ValueError(f"'phase' is {phase}, none of a search")
    for trial in decision.trials:
        tried = trial.setting.split(" and ")  # if several settings were changed, all of them
        is_known = trial.setting in trial.settings or set(tried) <= trial.settings.keys()
        if trial.direction not in (-1, 0, 1) or not is_known:
            raise ValueError(f"in its trials, {trial.setting!r} is no change that was tried")
    accepted = [trial.settings for trial in decision.trials if trial.accepted]
    for name, (_, new) in decision.changes.items() if decision.verdict == "accepted" else ():
        if not any(settings.get(name) == new for settings in accepted):
            raise ValueError(f"the change of {name!r} to {new} is none that a trial accepts")
    return decision


def _parsed(line: Mapping[str, Any], schema: type, counts: Sequence[str]) -> Any:
    """The named tuple that a line holds. Raises ValueError, in words, if it holds none."""
    record = {name: value for name, value in line.items() if name != "checksum"}
    if line.get("checksum") not in (None, _checksum(record)):
        raise ValueError("its checksum does not match")
    if problem := files.what_is_wrong(line, schema):
        raise ValueError(problem)
    for name in counts:
        if (line.get(name) or 0) < 0:
            raise ValueError(f"{name!r} is {line[name]}, below 0")
    return files.parsed(line, schema)


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def past_search(lines: Sequence[Any]) -> list[Decision] | None:
    """The first search among the decisions of a past run; None if any of it is damaged."""
    try:
        return [decision_of(x) for x in lines if not isinstance(x, Mapping) or x.get("phase") == 0]
    except ValueError:
        return None


def _assessment_of(line: Mapping[str, Any]) -> Assessment:
    """What `RunLog.assessed` wrote. Raises ValueError as `decision_of` does."""
    found: Assessment = _parsed(line, Assessment, ("step", "tokens", "seconds", "flops"))
    if math.isnan(found.loss.mean):
        raise ValueError("the mean loss is no number")
    return found


class Ledger(NamedTuple):
    """What a run has cost.

    Attributes:
      examples: Examples gone through by the training itself.
      trial_examples: Examples of discarded trials and of steps that were taken back, and what
        it cost to evaluate them (`Workload.evaluation_examples`).
      seconds: Time without compiling, over all processes that resumed the run.
      compile_seconds: Time of tracing and compiling.
      assessment_examples: Cost of the assessments, `Workload.evaluation_examples` each.
    """

    examples: int = 0
    trial_examples: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    assessment_examples: float = 0.0


@dataclasses.dataclass
class RunLog:
    """Decisions, assessments, alarms and checkpoints of one training in a run directory.

    Several trainings may share the directory: a line says whose it is. Only process 0 writes.

    Attributes:
      workload, directory, checkpoints: The training, and where it writes.
      identity: What the run is; checkpoints of another are refused.
      flops_per_example: Operations, for the efficiency; None if not known.
      cost, rank: Weights of the cost; rank of a curve among past runs, None without a memory.
      decisions, curve, alarms: What there was up to now; the curve is of assessments.
    """

    workload: Workload
    directory: Path
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    flops_per_example: float | None = None
    cost: CostConfig = dataclasses.field(default_factory=CostConfig)
    rank: Callable[[Curve], RankAmongRuns | None] | None = None
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    curve: list[Assessment] = dataclasses.field(default_factory=list)
    alarms: list[Alarm] = dataclasses.field(default_factory=list)
    _losses: list[float] = dataclasses.field(default_factory=list)
    _spent: Ledger = dataclasses.field(default_factory=Ledger)
    _began: float = dataclasses.field(default_factory=time.perf_counter)
    _compiled: float = dataclasses.field(default_factory=compile_seconds)

    @property
    def assessed_at(self) -> int:
        """Examples gone through at the latest assessment; -1 if there was none."""
        return self.curve[-1].tokens // self.workload.tokens_per_example if self.curve else -1

    def resume(self, first: Snapshot) -> tuple[Snapshot, dict[str, Any]]:
        """The latest saved snapshot and the notes beside it, or ``first`` and no notes.

        What was decided since then in a search from that snapshot is on disk and is taken up;
        other lines of this training from after the checkpoint are dropped.

        Raises:
          UserError: the checkpoint is of another run, or a line that is needed is damaged.
        """

        def example(notes: dict[str, Any]):
            if found := runs.differences(notes.get("run"), runs.as_json(self.identity)):
                raise UserError(
                    f"the checkpoints of {self.workload.name!r} in {self.directory} are of "
                    f"another run ({found}); go back to it, or give a new directory"
                )
            # Another optimiser has another state.
            return changed(self.workload, first, notes["settings"]).state

        restored = self.checkpoints.restore_latest(example)
        notes, snapshot = restored.notes if restored else {}, first
        self.decisions = self._first("decisions.jsonl", notes.get("num_decisions", 0), decision_of)
        self.curve = self._first("metrics.jsonl", notes.get("num_assessments", 0), _assessment_of)
        if restored:
            self._losses, self._spent = notes["losses"], Ledger(*notes["ledger"])
            self.alarms = [Alarm(*alarm) for alarm in notes["alarms"]]
            snapshot = Snapshot(restored.state, notes["settings"], notes["examples"])
            snapshot = self._replayed(snapshot)
            left_out = [decision.left_out for decision in self.decisions if decision.left_out]
            snapshot = snapshot._replace(left_out=frozenset(left_out))
        self._drop_after("decisions.jsonl", len(self.decisions))
        self._drop_after("metrics.jsonl", len(self.curve))
        return snapshot, notes

    def _replayed(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot after what was decided since in a search from it, which is taken up.

        From a damaged decision on, or one that cannot have been taken there, or one after which the
        run has another state than its settings tell, it is decided again.
        """
        space = self.workload.all_axes
        for at, line in self._lines("decisions.jsonl")[len(self.decisions) :]:
            try:
                decision = decision_of(line)
                if decision.kind != "search" or decision.examples != snapshot.examples:
                    break
                if decision.from_start:  # its state was not saved, and is not this one
                    break
                now, is_said = snapshot.settings, decision.verdict == "reported"
                for name, (old, _) in decision.changes.items():
                    if now.get(name) != old and not is_said:
                        raise ValueError(f"{name!r} was {now.get(name)}, not {old}")
                new = {name: value for name, (_, value) in decision.changes.items()}
                new = {} if is_said else new
                check_settings({name: space[name] for name in new if name in space}, now | new)
            except (ValueError, UserError) as error:
                log(f"{self.directory}/decisions.jsonl:{at} is left out ({error}), decided again")
                break
            snapshot = changed(self.workload, snapshot, new) if new else snapshot
            self.decisions.append(decision)
            self._spent = self._spent._replace(seconds=self._spent.seconds + decision.seconds)
        return snapshot

    def _lines(self, file: str) -> list[tuple[int, dict[str, Any]]]:
        """The lines of this training in a file, with their numbers in it."""
        lines = enumerate(files.read_json_lines(self.directory / file, files.Named), start=1)
        return [(at, line) for at, line in lines if line["name"] == self.workload.name]

    def _first(self, file: str, number: int, parse: Callable[[Mapping[str, Any]], Any]) -> list:
        """The records of the first lines of this training in a file."""
        records = []
        for at, line in self._lines(file)[:number]:
            try:
                records.append(parse(line))
            except ValueError as error:
                raise UserError(
                    f"{self.directory / file}:{at} of {self.workload.name!r} is damaged "
                    f"({error}); put back a good copy, or give a new directory"
                ) from None
        return records

    def _drop_after(self, file: str, number: int) -> None:
        """Drops the lines of this training in a file after the first ones."""
        if is_first_process():
            name, at, path = self.workload.name, itertools.count(), self.directory / file
            files.keep_json_lines(path, lambda x: x["name"] != name or next(at) < number)

    def decided(self, decision: Decision) -> None:
        """Notes a decision."""
        self.decisions.append(decision)
        self._write("decisions.jsonl", decision._asdict())

    def assessed(self, snapshot: Snapshot, losses: np.ndarray) -> None:
        """Notes how good the run is, by its held-out losses, float64 ``[E]``."""
        workload = self.workload
        predictions = workload.predictions and workload.predictions(snapshot.state)
        ledger = self.ledger(snapshot)
        examples = ledger.examples + ledger.trial_examples + ledger.assessment_examples
        found = assess(
            losses,
            (self.curve[-1], np.array(self._losses)) if self.curve else None,
            step=int(snapshot.state.step),
            tokens=snapshot.examples * workload.tokens_per_example,
            seconds=ledger.seconds,
            flops=None if self.flops_per_example is None else self.flops_per_example * examples,
            resources=len(parallel.default_devices()),
            groups=workload.groups,
            gib=peak_memory() / 2**30,
            cost=self.cost,
            predictions=predictions,
        )
        if self.rank is not None and snapshot.examples >= workload.num_examples:
            found = found._replace(rank=self.rank(curve_of([*self.curve, found])))
        self.curve.append(found)
        self._losses = losses.tolist()
        line: dict[str, Any] = {"valid_loss": found.loss.mean, **found._asdict()}
        if workload.scores is not None:  # whose time is not the run's
            began, compiled = time.perf_counter(), compile_seconds()
            line["scores"] = dict(workload.scores(snapshot.state))
            self._began += time.perf_counter() - began
            self._compiled += compile_seconds() - compiled
        self._write("metrics.jsonl", line)

    def _write(self, file: str, line: Mapping[str, Any]) -> None:
        if is_first_process():
            record = files.as_record({"name": self.workload.name, **line})
            files.append_json_line(self.directory / file, record | {"checksum": _checksum(record)})

    def save(self, snapshot: Snapshot, **notes: Any) -> None:
        """Saves a snapshot, and the notes that a resumed run is given back.

        Raises:
          FloatingPointError: a meta-parameter is not finite; nothing is written.
        """
        notes |= dict(run=self.identity, settings=snapshot.settings, examples=snapshot.examples)
        notes |= dict(ledger=self.ledger(snapshot), losses=self._losses, alarms=self.alarms)
        notes |= dict(num_decisions=len(self.decisions), num_assessments=len(self.curve))
        valid_loss = self.curve[-1].loss.mean if self.assessed_at == snapshot.examples else math.inf
        self.checkpoints.save(snapshot.state, valid_loss=valid_loss, notes=runs.as_json(notes))

    def ledger(self, snapshot: Snapshot) -> Ledger:
        """What was spent up to now."""
        compiling = compile_seconds() - self._compiled
        seconds = time.perf_counter() - self._began - compiling
        return Ledger(
            snapshot.examples,
            sum(decision.trial_examples for decision in self.decisions),
            self._spent.seconds + seconds,
            self._spent.compile_seconds + compiling,
            len(self.curve) * self.workload.evaluation_examples,
        )
