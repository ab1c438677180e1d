"""Run directories: where a run writes, what it says about itself, and its JSON-lines files.

A run lives in ``<root>/<experiment>/<preset>-<time>/`` with ``config.json``,
``metrics.jsonl``, ``results.jsonl`` and the checkpoints. It is finished once it holds
a file named ``finished``; an unfinished one is taken up again by the same command.
This module imports JAX only inside functions, so that tables are read without it.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from metaopt.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      directory: where everything of the run is written.
      resumed: whether an earlier, unfinished run is being continued.
    """

    directory: Path
    resumed: bool

    @property
    def results(self) -> Path:
        """The file of results, one JSON object a table cell."""
        return self.directory / "results.jsonl"

    def finish(self) -> None:
        """Mark the run as finished; the same command then starts a new one."""
        (self.directory / "finished").write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))


def open_run(
    root: Path | str,
    experiment: str,
    preset: str,
    config: Any,
    *,
    run_dir: Path | str | None = None,
) -> Run:
    """Continue the newest unfinished run of this very config, or start a new one.

    Args:
      root: directory of all runs.
      experiment: name of the experiment.
      preset: name of its preset.
      config: (nested) dataclass that decides the results; written to ``config.json``.
      run_dir: this directory and no other, new or of the same config.

    Raises:
      UserError: ``run_dir`` holds a run of another config or something that is no run,
        or is missing where several processes must agree on a directory.
    """
    wanted = as_json(config)
    if run_dir is not None:
        return _open_given(Path(run_dir), wanted)
    _require_single_process()
    parent = Path(root) / experiment
    for directory in _runs_newest_first(parent, preset):
        if not (directory / "finished").exists() and _read_config(directory) == wanted:
            return _resume(directory)
    return _create(_new_directory(parent / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"), wanted)


def as_json(config: Any) -> Any:
    """The config as JSON would give it back: dicts, lists, strings, numbers and None.

    Dataclasses become dicts, tuples lists, paths strings, arrays nested lists. So a
    config can be compared with one that was read from a file.
    """
    return json.loads(_dumps(config))


def differences(saved: Any, now: Any) -> str:
    """The fields that differ between two configs (as `as_json` gives them), in words.

    Nested fields are joined by dots: ``'outer.learning_rate: 0.1 saved, 0.2 now'``.
    The empty string where nothing differs.
    """
    before, after = _flatten(saved), _flatten(now)
    names = [name for name in before | after if before.get(name, "") != after.get(name, "")]

    def value(fields: dict[str, Any], name: str) -> str:
        return json.dumps(fields[name]) if name in fields else "absent"

    return ", ".join(f"{n}: {value(before, n)} saved, {value(after, n)} now" for n in names)


def slug(name: str) -> str:
    """A name as one that any file system takes: ``'Meta-SGD'`` as ``'meta-sgd'``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def append_json_line(path: Path | str, record: Mapping[str, Any]) -> None:
    """Add one record to a JSON-lines file; it is handed to the system in a single write."""
    with open(path, "ab", buffering=0) as file:
        file.write((_dumps(record) + "\n").encode())


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; empty where there is no file.

    A last line without its newline was cut short by a kill and is left out.

    Raises:
      UserError: another line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number} is not JSON ({error}); repair or delete the line"
            ) from error
    return records


def keep_json_lines(path: Path | str, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file with the records for which ``keep`` is true, atomically.

    Raises:
      UserError: a line is not JSON; the file is then as it was.
    """
    if Path(path).exists():
        write_json_lines(path, [record for record in read_json_lines(path) if keep(record)])


def write_json_lines(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file whole, in place of what was there, atomically."""
    _write_whole(Path(path), "".join(_dumps(record) + "\n" for record in records))


def versions() -> dict[str, str]:
    """The versions that a result depends on: Python, jax, flax, optax and metaopt."""
    packages = ("jax", "flax", "optax", "metaopt")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def git_commit() -> str | None:
    """The short hash of the commit that this package runs from, or None outside git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name() -> str:
    """What computes: ``'2-core CPU'``, ``'NVIDIA H100'``, ``'8 x NVIDIA H100'``."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{os.cpu_count()}-core CPU"
    kind = devices[0].device_kind
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def _open_given(directory: Path, wanted: Any) -> Run:
    if not directory.exists() or not any(directory.iterdir()):
        directory.mkdir(parents=True, exist_ok=True)
        return _create(directory, wanted)
    saved = _read_config(directory)
    if saved is None:
        raise UserError(f"{directory} is no run (no readable config.json); give a new directory")
    if saved != wanted:
        raise UserError(
            f"{directory} is a run of another config ({differences(saved, wanted)}); "
            "go back to that config or give a new directory"
        )
    return _resume(directory)


def _create(directory: Path, config: Any) -> Run:
    _write_whole(directory / "config.json", json.dumps(config, indent=2) + "\n")
    return Run(directory, resumed=False)


def _resume(directory: Path) -> Run:
    run = Run(directory, resumed=True)
    keep_json_lines(run.results, lambda record: True)  # drops a last line that was cut short
    return run


def _new_directory(path: Path) -> Path:
    """Make ``path``, or ``path-2``, ``path-3`` ... where it was taken within the second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def _runs_newest_first(parent: Path, preset: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(preset)}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    found = [(pattern.fullmatch(path.name), path) for path in parent.glob(f"{preset}-*")]
    dated = [(match[1], int(match[2] or 1), path) for match, path in found if match]
    return [path for _, _, path in sorted(dated, reverse=True)]


def _read_config(directory: Path) -> Any:
    try:
        return json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return None


def _require_single_process() -> None:
    import jax

    if jax.process_count() > 1:
        raise UserError("several processes must write to one place: give each the same run_dir")


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    fields = {}
    for key, value in tree.items():
        fields |= _flatten(value, f"{name}.{key}" if name else key)
    return fields


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new one is there, whole."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _dumps(value: Any) -> str:
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays and their scalars
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
