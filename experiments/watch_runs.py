"""What `experiments.watch` reads: the files of a run, while it writes them."""

import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from metaopt.errors import UserError

POINTS = 480  # of a loss curve that are kept
DECISIONS = 5  # of a run that are kept
QUIET = 60.0  # seconds without a line after which a run is called silent


class Tail:
    """Reads on in a JSON-lines file that grows, or is written anew, while it is read."""

    def __init__(self, path: Path):
        self._path, self._file, self._offset = path, None, 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last call, and whether they are the first of a new file.

        A last line that is half written is left for the next call; one that is no JSON
        object is left out.
        """
        try:
            with open(self._path, "rb") as file:
                is_new = self._is_new(os.fstat(file.fileno()))
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or no longer
            return [], False
        self._offset += len(whole) + len(newline)
        return [r for line in whole.splitlines() if (r := _record(line)) is not None], is_new

    def _is_new(self, status: os.stat_result) -> bool:
        file = status.st_dev, status.st_ino
        if file == self._file and status.st_size >= self._offset:
            return False
        self._file, self._offset = file, 0
        return True


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


class Training:
    """How one training stands: its latest values and the end of its loss curve."""

    def __init__(self):
        self.values: dict[str, Any] = {}
        self.alarms: dict[str, str] = {}  # the latest message of each kind
        self.curve: deque[tuple[int, float]] = deque(maxlen=POINTS)

    def add(self, record: dict[str, Any]) -> None:
        """Takes one line of ``monitor.jsonl`` or ``metrics.jsonl``."""
        step, loss, alarm = record.get("step", 0), record.get("loss"), record.get("alarm")
        while record.get("kind") == "forget" and self.curve and self.curve[-1][0] > step:
            self.curve.pop()
        if loss is not None and is_number(loss):
            self.curve.append((step, loss))
        if alarm:
            self.alarms[alarm["kind"]] = f"step {step}: {alarm['message']}"
        self.values |= record


class RunView:
    """One run: all its trainings, by name, and what was decided in it."""

    def __init__(self, directory: Path):
        self.directory, self.total = directory, _num_steps(_config(directory))
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
                name = str(record.get("name", ""))
                self._found[file].setdefault(name, Training()).add(record)
        decisions, is_new = self._decided.read()
        if is_new:
            self.decisions.clear()
        self.decisions.extend(decisions)

    @property
    def trainings(self) -> dict[str, Training]:
        """By name; what a monitor says goes before what else was logged."""
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
        """``finished``, or for how long nothing was written."""
        if (self.directory / "finished").exists():
            return "finished"
        files = [self.directory, *self.directory.glob("*.jsonl")]
        quiet = time.time() - max(file.stat().st_mtime for file in files)
        return "running" if quiet < QUIET else f"silent for {quiet / 60:.0f} min"


def open_view(directory: Path) -> RunView:
    """The view of a run.

    Raises:
      UserError: this is no directory of a run.
    """
    marks = ("config.json", "metrics.jsonl", "monitor.jsonl")
    if not any((directory / mark).is_file() for mark in marks):
        what = "holds no run" if directory.is_dir() else "is not there"
        raise UserError(
            f"{directory} {what}: give a directory that has one of {', '.join(marks)}, "
            "such as runs/EXPERIMENT/PRESET-TIME"
        )
    return RunView(directory)


def _config(directory: Path) -> Any:
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None


def _num_steps(config: Any) -> int | None:
    """The length of the trainings, from a `TrainConfig` somewhere in the config."""
    if not isinstance(config, dict):
        return None
    if {"num_steps", "checkpoint_every"} <= config.keys():
        return config["num_steps"]
    return next((n for part in config.values() if (n := _num_steps(part)) is not None), None)


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
