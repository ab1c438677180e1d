"""What a run under the loop leaves on disk, and where another process takes it up again.

A line of ``decisions.jsonl`` or ``metrics.jsonl`` has a checksum, since a resumed run believes it.
"""

import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import numpy as np

from metaopt import parallel
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import (
    Named,
    append_json_line,
    keep_json_lines,
    read_json_lines,
    strict_json,
    what_is_wrong,
)
from metaopt.measure import compile_seconds
from metaopt.self_improvement.assess import Assessment, Measurement, as_record, assess
from metaopt.self_improvement.monitor import Alarm
from metaopt.self_improvement.workload import (
    LeftOut,
    Setting,
    Settings,
    Snapshot,
    Workload,
    changed,
    check_settings,
)
from metaopt.statistics import Interval
from metaopt.training import runs
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.runs import as_json


class Decision(NamedTuple):
    """What was decided, and on which evidence.

    Attributes:
      step: of the state, when it was taken.
      examples: gone through by then.
      phase: of the search; every phase starts it anew.
      verdict: ``accepted``, ``kept`` (nothing was better) or ``rolled back`` (an alarm).
      changes: the settings that changed, ``{name: [from, to]}``.
      reason: in words, with the rule and the threshold that decided.
      evidence: one entry a change that was tried: its settings, the difference to changing
        nothing with its 95 % interval, the verdict, and whether it was accepted.
      trial_examples: spent on what is not gone on with, if this decision is the last of its
        search, and on evaluations (`Workload.evaluation_examples`).
      seconds: that it took.
      left_out: a stretch of the data that is not trained on from now on, ``(first, end)``.
      size: examples of each of its trials, those to anneal aside.
      gained: how far the run comes by going on from the winner, in examples.
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
    left_out: tuple[int, int] | None = None
    size: int = 0
    gained: int = 0

    def as_json(self) -> dict[str, Any]:
        """A line of ``decisions.jsonl``."""
        return as_record(self)


def differences(old: Settings, new: Settings) -> dict[str, list[Setting]]:
    """What changed, ``{name: [from, to]}``."""
    return {name: [old[name], new[name]] for name in new if old.get(name) != new[name]}


COUNTS = ("step", "examples", "trial_examples", "seconds", "size", "gained")


class Evidence(TypedDict):
    """What a proposer reads of a change that was tried."""

    setting: str
    settings: dict[str, Setting]
    way: int
    verdict: Literal["better", "worse", "noise"]
    accepted: bool


def what_is_damaged(line: Any) -> str | None:
    """What is wrong with a decision from a file or a memory; None where nothing is.

    Its fields are there and finite, counts are not negative, and what was accepted is what was
    tried. The evidence of decisions outside of a search (a phase below 0) is not read.
    """
    if not isinstance(line, Mapping):
        return "it is no decision"
    if problem := what_is_wrong(line, Decision):
        return problem
    for name in COUNTS:
        if line.get(name, 0) < 0:
            return f"{name!r} is {line[name]}, below 0"
    left_out = line.get("left_out")
    if left_out and not 0 <= left_out[0] < left_out[1]:
        return f"'left_out' is {left_out}, no stretch of examples"
    for name, pair in line["changes"].items():
        if len(pair) != 2:
            return f"the change of {name!r} is {pair}, not from one value to another"
    return None if line["phase"] < 0 else _damage_of_evidence(line)


def _damage_of_evidence(line: Mapping[str, Any]) -> str | None:
    accepted: list[dict[str, Setting]] = []
    for entry in line["evidence"]:
        if problem := what_is_wrong(entry, Evidence):
            return f"in its evidence, {problem}"
        tried = entry["setting"].split(" and ")  # of a change of several, all
        if entry["way"] not in (-1, 0, 1) or not set(tried) <= entry["settings"].keys():
            return f"in its evidence, {entry['setting']!r} is no change that was tried"
        accepted += [entry["settings"]] * entry["accepted"]
    if line["verdict"] != "accepted":
        return None
    for name, (_, new) in line["changes"].items():
        if not any(settings.get(name) == new for settings in accepted):
            return f"the change of {name!r} to {new} is none that its evidence accepts"
    return None


def known_decisions(lines: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """The first search of a past run as a proposer reads it; none where any of it is damaged."""
    try:
        first = [line for line in lines if line["phase"] == 0]
        if any(map(what_is_damaged, first)):
            return []
        return [Decision(**line) for line in first]
    except (TypeError, KeyError):  # of another version, or no decisions at all
        return []


def is_search(lines: Sequence[Any]) -> bool:
    """Whether a past run has searched at all, as far as its decisions can be read."""
    return any(isinstance(line, Mapping) and line.get("phase") == 0 for line in lines)


class Ledger(NamedTuple):
    """What a run has cost.

    Attributes:
      examples: gone through by the training itself.
      trial_examples: gone through by trials that were not gone on with, or taken back, and
        what it cost to evaluate them (`Workload.evaluation_examples`).
      seconds: in all, without compiling; of all processes that it was resumed in.
      compile_seconds: of tracing and compiling.
      assessment_examples: what the assessments cost, `Workload.evaluation_examples` each.
    """

    examples: int = 0
    trial_examples: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    assessment_examples: float = 0.0


class Journal:
    """Decisions, assessments, alarms and checkpoints of one training in a run directory.

    Several trainings may share the directory: a line says whose it is. Only process 0 writes.
    """

    def __init__(
        self,
        workload: Workload,
        directory: Path,
        checkpoints: Checkpoints,
        identity: Any,
        flops_per_example: float | None = None,
    ):
        """Nothing is read or written yet.

        Args:
          workload: the training.
          directory: of the run.
          checkpoints: of this training.
          identity: what decides the states; a checkpoint of another is refused.
          flops_per_example: operations, for the efficiency; None where they are not known.
        """
        self._flops = flops_per_example
        self._workload, self._directory, self._checkpoints = workload, directory, checkpoints
        self._identity = as_json(identity)
        self._losses: list[float] = []
        self._spent = Ledger()
        self._began, self._compiled = time.perf_counter(), compile_seconds()
        self.decisions: list[Decision] = []
        self.curve: list[Assessment] = []
        self.alarms: list[Alarm] = []

    @property
    def left_out(self) -> LeftOut:
        """The stretches of the data that were decided not to be trained on."""
        return frozenset((d.left_out[0], d.left_out[1]) for d in self.decisions if d.left_out)

    @property
    def assessed_at(self) -> int:
        """The examples gone through at the latest assessment; -1 where there was none."""
        if not self.curve:
            return -1
        return self.curve[-1].tokens // self._workload.tokens_per_example

    def resume(self, first: Snapshot) -> tuple[Snapshot, dict[str, Any]]:
        """The latest snapshot that was saved and the notes beside it, or ``first`` and none.

        What was decided since then in a search that stands there, all of which is on disk, is
        taken up; other lines of this training from after the checkpoint are dropped.

        Raises:
          UserError: the checkpoint is of another run.
        """

        def example(notes: dict[str, Any]):
            self._check(notes)  # another optimiser has another state
            return changed(self._workload, first, notes["settings"]).state

        restored = self._checkpoints.restore_latest(example)
        notes = restored.notes if restored else {}
        number, examples = notes.get("num_decisions", 0), notes.get("examples", -1)
        self._reopen(number, notes.get("num_assessments", 0), examples, notes.get("settings", {}))
        if restored is None:
            return first, {}
        self._losses, self._spent = notes["losses"], Ledger(*notes["ledger"])
        self.alarms = [Alarm(*alarm) for alarm in notes["alarms"]]
        snapshot, since = Snapshot(restored.state, notes["settings"], examples), {}
        for decision in self.decisions[number:]:
            since |= {name: new for name, (_, new) in decision.changes.items()}
            self._spent = self._spent._replace(seconds=self._spent.seconds + decision.seconds)
        return (changed(self._workload, snapshot, since) if since else snapshot), notes

    def _check(self, notes: Mapping[str, Any]) -> None:
        found = runs.differences(notes.get("run"), self._identity)
        if found:
            raise UserError(
                f"the checkpoints of {self._workload.name!r} in {self._directory} are of another "
                f"run ({found}); go back to it, or give a new directory"
            )

    def _reopen(
        self, num_decisions: int, num_assessments: int, examples: int, settings: Settings
    ) -> None:
        """Goes on after so many lines of this training; those of others stay.

        Decisions that follow them in the same search are taken up too, up to one that is damaged:
        from there on the same is decided again.
        """
        found = self._mine("decisions.jsonl")
        num_decisions = min(num_decisions, len(found))
        for number, line in found[num_decisions:]:
            problem = _damage(line, what_is_damaged) or self._does_not_follow(line, settings)
            if problem:
                path = self._directory / "decisions.jsonl"
                log(f"{path}:{number} is left out ({problem}); what it decided is decided again")
            if problem or line["phase"] < 0 or line["examples"] != examples:
                break
            settings = {**settings, **{name: new for name, (_, new) in line["changes"].items()}}
            num_decisions += 1
        decisions = self._first("decisions.jsonl", num_decisions, what_is_damaged)
        self.decisions = [
            Decision(**{key: value for key, value in line.items() if key in Decision._fields})
            for line in decisions
        ]
        assessments = self._first("metrics.jsonl", num_assessments, _what_is_damaged)
        self.curve = [_assessment(line) for line in assessments]

    def _does_not_follow(self, line: Mapping[str, Any], settings: Settings) -> str | None:
        """Why a decision is not one that was taken at these settings; None where it is."""
        if line["phase"] < 0:
            return None
        changes = line["changes"]
        for name, (old, _) in changes.items():
            if settings.get(name) != old:
                return f"{name!r} was {settings.get(name)}, not {old}"
        after = {**settings, **{name: new for name, (_, new) in changes.items()}}
        space = self._workload.space
        try:
            check_settings({name: space[name] for name in changes if name in space}, after)
        except UserError as error:
            return str(error)
        return None

    def _mine(self, file: str) -> list[tuple[int, dict[str, Any]]]:
        """The lines of this training in a file, with their numbers in it."""
        lines = enumerate(read_json_lines(self._directory / file, Named), start=1)
        return [(n, line) for n, line in lines if line["name"] == self._workload.name]

    def _first(
        self, file: str, number: int, judge: Callable[[Mapping[str, Any]], str | None]
    ) -> list[dict[str, Any]]:
        """The first lines of this training in a file, the others of it dropped.

        Raises:
          UserError: one of the first is damaged.
        """
        path, name = self._directory / file, self._workload.name
        mine = self._mine(file)[:number]
        for at, line in mine:
            if problem := _damage(line, judge):
                raise UserError(
                    f"{path}:{at} of {name!r} is damaged ({problem}); put back a good copy, or "
                    "give a new directory"
                )
        if jax.process_index() == 0:
            numbers = itertools.count()
            keep_json_lines(path, lambda x: x["name"] != name or next(numbers) < number)
        return [line for _, line in mine]

    def decided(self, decision: Decision) -> None:
        """Notes a decision."""
        self.decisions.append(decision)
        self._write("decisions.jsonl", decision.as_json())

    def assessed(self, snapshot: Snapshot, losses: np.ndarray) -> None:
        """Notes how the run stands, by its held-out losses, and saves it."""
        workload = self._workload
        ledger = self.ledger(snapshot)
        tokens = snapshot.examples * workload.tokens_per_example
        examples = ledger.examples + ledger.trial_examples + ledger.assessment_examples
        flops = None if self._flops is None else self._flops * examples
        now = Measurement(int(snapshot.state.step), tokens, ledger.seconds, losses, flops)
        last = None
        if self.curve:
            before = self.curve[-1]
            last = Measurement(
                before.step, before.tokens, before.seconds, np.array(self._losses), before.flops
            )
        found = assess(now, last, resources=len(parallel.default_devices()))
        self.curve.append(found)
        self._losses = losses.tolist()
        line = {"valid_loss": found.loss.mean, **found._asdict()}
        self._write("metrics.jsonl", line | self._scores(snapshot))

    def _scores(self, snapshot: Snapshot) -> dict[str, Any]:
        """What the workload would have noted beside an assessment; its time is not the run's."""
        if self._workload.scores is None:
            return {}
        began, compiled = time.perf_counter(), compile_seconds()
        scores = self._workload.scores(snapshot.state)
        self._began += time.perf_counter() - began
        self._compiled += compile_seconds() - compiled
        return {"scores": dict(scores)}

    def _write(self, file: str, line: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            record = as_record({"name": self._workload.name, **line})
            append_json_line(self._directory / file, {**record, "checksum": _checksum(record)})

    def save(self, snapshot: Snapshot, **notes: Any) -> None:
        """Saves a snapshot, and what of the notes a resumed run is to be given back.

        Raises:
          FloatingPointError: a meta-parameter is not finite; nothing is written.
        """
        assessed = self.curve and self.assessed_at == snapshot.examples
        valid_loss = self.curve[-1].loss.mean if assessed else math.inf
        notes |= {
            "run": self._identity,
            "settings": snapshot.settings,
            "examples": snapshot.examples,
            "ledger": list(self.ledger(snapshot)),
            "losses": self._losses,
            "alarms": [list(alarm) for alarm in self.alarms],
            "num_decisions": len(self.decisions),
            "num_assessments": len(self.curve),
        }
        self._checkpoints.save(snapshot.state, valid_loss=valid_loss, notes=as_json(notes))

    def went_back(self, snapshot: Snapshot) -> None:
        """Takes back the checkpoints from after the snapshot."""
        self._checkpoints.forget_after(int(snapshot.state.step))

    def wait(self) -> None:
        """Waits until all is written."""
        self._checkpoints.wait()

    def ledger(self, snapshot: Snapshot) -> Ledger:
        """What was spent up to now."""
        compiling = compile_seconds() - self._compiled
        seconds = time.perf_counter() - self._began - compiling
        return Ledger(
            snapshot.examples,
            sum(decision.trial_examples for decision in self.decisions),
            self._spent.seconds + seconds,
            self._spent.compile_seconds + compiling,
            len(self.curve) * self._workload.evaluation_examples,
        )


def _checksum(record: Mapping[str, Any]) -> str:
    """Of a line as it is read back, where NaN has become null."""
    plain = json.loads(strict_json(record, lambda _: None))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def _damage(line: Mapping[str, Any], judge: Callable[[Mapping[str, Any]], str | None]):
    """What is wrong with a line, in words; one from before there were checksums has none."""
    record = dict(line)
    if record.pop("checksum", None) not in (None, _checksum(record)):
        return "its checksum does not match"
    return judge(record)


def _what_is_damaged(line: Mapping[str, Any]) -> str | None:
    """What is wrong with an assessment; None where nothing is."""
    if problem := what_is_wrong(line, Assessment):
        return problem
    for name in ("step", "tokens", "seconds", "flops"):
        if (line[name] or 0) < 0:
            return f"{name!r} is {line[name]}, below 0"
    return "the mean loss is no number" if line["loss"]["mean"] is None else None


def _assessment(line: Mapping[str, Any]) -> Assessment:
    """What `Journal.assessed` wrote; JSON has no NaN."""
    fields = {name: line[name] for name in Assessment._fields}
    for name in ("loss", "improvement"):
        interval = fields[name]
        if interval is not None:
            known = {k: math.nan if v is None else v for k, v in interval.items()}
            fields[name] = Interval(**known)  # type: ignore[arg-type]
    return Assessment(**fields)
