"""What `metaopt watch` reads: the files of a run, while it writes them."""

import contextlib
import os
import time
import typing
from collections import deque
from pathlib import Path
from typing import Any

from metaopt.console import printable
from metaopt.errors import UserError
from metaopt.files import local_path, matches, one_line, parse_record, read_json

POINTS = 480  # of a loss curve that are kept
DECISIONS = 5  # of a run that are kept
QUIET = 60.0  # seconds without a line after which a run is called silent


class Shown(typing.TypedDict, total=False):
    """What is shown of a line of ``monitor.jsonl`` or ``metrics.jsonl``."""

    step: int
    num_steps: int
    loss: float
    valid_loss: float
    tokens_per_second: float
    utilisation: float
    device: float
    host: float
    active: list[str]
    kind: str
    alarm: dict[str, Any]
    cost: float
    strengths: list[str]
    weaknesses: list[str]
    classes: dict[str, Any]
    rank: dict[str, Any]


SHOWN = typing.get_type_hints(Shown)


class Tail:
    """Reads a JSON-lines file that grows, or is replaced, while it is read."""

    def __init__(self, path: Path):
        self._path, self._file, self._offset = path, None, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last call, and whether they are the first of a new file.

        A last line that is half written is left for the next call. A line that is not a JSON
        object is skipped.
        """
        try:
            with open(self._path, "rb") as file:
                is_new = self._is_new(os.fstat(file.fileno()))
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or no longer
            return [], False
        self._offset += len(whole) + len(newline)
        records = []
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError):
                records.append(parse_record(line))
        return records, is_new

    def _is_new(self, status: os.stat_result) -> bool:
        file = status.st_dev, status.st_ino
        if file == self._file and status.st_size >= self._offset:
            return False
        self._file, self._offset = file, 0
        return True


class Training:
    """The state of one training: its latest values and the end of its loss curve."""

    def __init__(self):
        self.values: dict[str, Any] = {}
        self.alarms: dict[str, str] = {}  # the latest message of each kind
        self.curve: deque[tuple[int, float]] = deque(maxlen=POINTS)

    def add(self, record: dict[str, Any]) -> None:
        """Adds one line of ``monitor.jsonl`` or ``metrics.jsonl``.

        A value of the wrong type is treated as unknown.
        """
        values = {k: v if matches(v, SHOWN[k]) else None for k, v in record.items() if k in SHOWN}
        step, loss, alarm = values.get("step") or 0, values.get("loss"), values.get("alarm")
        while values.get("kind") == "forget" and self.curve and self.curve[-1][0] > step:
            self.curve.pop()
        if loss is not None:
            self.curve.append((step, loss))
        if alarm:
            self.alarms[str(alarm.get("kind"))] = f"step {step}: {alarm.get('message')}"
        self.values |= values


class RunView:
    """One run: all its trainings, by name, and its decisions."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.total = _num_steps(read_json(directory / "config.json"))
        self.decisions: deque[dict[str, Any]] = deque(maxlen=DECISIONS)
        self._files = {f: Tail(directory / f"{f}.jsonl") for f in ("metrics", "monitor")}
        self._found: dict[str, dict[str, Training]] = {file: {} for file in self._files}
        self._decided = Tail(directory / "decisions.jsonl")

    def update(self) -> None:
        """Reads what is new."""
        for file, tail in self._files.items():
            records, is_new = tail.read()
            if is_new:
                self._found[file] = {}
            for record in records:
                name = printable(str(record.get("name", "")))
                self._found[file].setdefault(name, Training()).add(record)
        decisions, is_new = self._decided.read()
        if is_new:
            self.decisions.clear()
        self.decisions.extend(decisions)

    @property
    def trainings(self) -> dict[str, Training]:
        """Trainings by name; values of a monitor take precedence over other logged ones."""
        merged = {}
        for name in self._found["metrics"] | self._found["monitor"]:
            logged, watched = (self._found[file].get(name) for file in ("metrics", "monitor"))
            merged[name] = watched or logged
            if logged and watched:
                merged[name] = both = Training()
                both.values = logged.values | watched.values
                both.alarms, both.curve = watched.alarms, watched.curve or logged.curve
        return merged

    @property
    def state(self) -> str:
        """``finished``, ``running``, or for how long nothing was written."""
        if (self.directory / "finished").exists():
            return "finished"
        written = []
        for file in [self.directory, *self.directory.glob("*.jsonl")]:
            with contextlib.suppress(OSError):  # it may go at any time
                written.append(file.stat().st_mtime)
        if not written:
            return "gone"
        quiet = time.time() - max(written)
        return "running" if quiet < QUIET else f"silent for {quiet / 60:.0f} min"


def open_view(directory: Path) -> RunView:
    """The view of a run.

    Raises:
      UserError: this is not the directory of a run.
    """
    directory = local_path(directory)
    marks = ("config.json", "metrics.jsonl", "monitor.jsonl")
    with one_line(directory, "read"):
        is_run = any((directory / mark).is_file() for mark in marks)
    if not is_run:
        what = "holds no run" if directory.is_dir() else "is not there"
        raise UserError(
            f"{directory} {what}: give a directory that has one of {', '.join(marks)}, "
            "such as runs/EXPERIMENT/PRESET-TIME"
        )
    return RunView(directory)


def _num_steps(config: Any) -> int | None:
    """The length of the trainings, from a `TrainConfig` somewhere in the config."""
    if not isinstance(config, dict):
        return None
    if {"num_steps", "checkpoint_every"} <= config.keys() and matches(config["num_steps"], int):
        return config["num_steps"]
    return next((n for part in config.values() if (n := _num_steps(part)) is not None), None)
