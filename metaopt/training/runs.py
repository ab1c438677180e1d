"""Run directories: where a run writes, who writes there, and what it says about itself.

A run lives in ``<root>/<experiment>/<preset>-<time>/`` with ``config.json``,
``metrics.jsonl``, ``results.jsonl`` and the checkpoints. It is finished once it holds
a file named ``finished``; an unfinished one is taken up again by the same command.
One process at a time has a directory, by a lock that the system releases when it ends.
This module imports JAX only inside functions, so that tables are read without it.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import filelock

from metaopt.console import is_first_process, log
from metaopt.errors import UserError
from metaopt.files import (
    check_directory,
    inside,
    keep_json_lines,
    local_path,
    one_line,
    read_json,
    strict_json,
    to_json,
    write_text,
)

LOCK, HOLDER = ".lock", ".lock-holder"  # the second says in words who has the first
LONGEST_SLUG = 100  # characters


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, which no other process may open until this one is closed.

    The same process may open it again, as a notebook does whose cell is run twice. A
    context manager: leaving it closes the run; so does the end of the process, however it
    ends, and that of the last `Run` of the directory.

    Attributes:
      directory: where everything of the run is written.
      resumed: whether an earlier, unfinished run is being continued.
    """

    directory: Path
    resumed: bool
    _lock: filelock.BaseFileLock | None = dataclasses.field(default=None, repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def results(self) -> Path:
        """The file of results, one JSON object a table cell."""
        return self.directory / "results.jsonl"

    def finish(self) -> None:
        """Mark the run as finished and close it; the same command then starts a new one."""
        write_text(self.directory / "finished", time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))
        self.close()

    def close(self) -> None:
        """Let other processes open the directory."""
        if self._lock is not None:
            self._lock.release(force=True)


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
      UserError: the directory cannot be used, another process has it, ``run_dir`` holds a
        run of another config or something that is no run, or is missing where several
        processes must agree on a directory.
    """
    check_directory(root if run_dir is None else run_dir)
    import jax

    wanted = json.loads(_config_text(config))
    if run_dir is not None:
        return _open_given(local_path(run_dir), wanted)
    if jax.process_count() > 1:
        raise UserError("several processes must write to one place: give each the same run_dir")
    parent = inside(local_path(root), experiment)
    for directory in _runs_newest_first(parent, preset):
        if not (directory / "finished").exists() and read_json(directory / "config.json") == wanted:
            return _resume(directory, _lock(directory))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with one_line(parent, "written"):
        directory = _new_directory(inside(parent, f"{preset}-{stamp}"))
    return _create(directory, wanted, _lock(directory))


@contextlib.contextmanager
def lock_directory(directory: Path | str) -> Iterator[None]:
    """Keep other processes out of a directory for as long as the context lasts.

    This process may lock it again within. Of several processes that train together only
    the first takes the lock. The directory is made where it is not there.

    Raises:
      UserError: another process has it, or it cannot be written to.
    """
    lock = _lock(check_directory(directory))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def as_json(config: Any) -> Any:
    """The config as JSON would give it back: dicts, lists, strings, numbers and None.

    Dataclasses become dicts, tuples lists, paths strings, arrays nested lists. So a
    config can be compared with one that was read from a file.
    """
    return json.loads(to_json(config))


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
    """A name as one that any file system takes: ``'Meta-SGD'`` as ``'meta-sgd'``.

    Names that are long or of other letters are told apart by a checksum at the end.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain and name.isascii() and len(plain) <= LONGEST_SLUG:
        return plain
    checksum = zlib.crc32(name.encode(errors="backslashreplace"))
    return f"{plain[:LONGEST_SLUG] or 'unnamed'}-{checksum:08x}"


def versions() -> dict[str, str]:
    """The versions that a result depends on: Python, jax, flax, optax and metaopt."""
    packages = ("jax", "flax", "optax", "metaopt")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def git_commit() -> str | None:
    """The short hash of the commit that this package runs from, ``-dirty`` if files differ.

    None where its source is in no git repository, or lies in one that does not track it.
    """
    file = Path(__file__)
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--exclude=*")


def _git(directory: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *args],
            cwd=directory,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
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
    _is_new(directory, wanted)  # what is no run is not even locked
    if not is_first_process():
        return Run(directory, resumed=(directory / "config.json").exists())
    lock = _lock(directory)
    if _is_new(directory, wanted):  # no other process has made a run of it meanwhile
        return _create(directory, wanted, lock)
    return _resume(directory, lock)


def _is_new(directory: Path, wanted: Any) -> bool:
    """Whether a run may be started there, or else that of this config be continued."""
    with one_line(directory, "read"):
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if all(name in (LOCK, HOLDER) or name.endswith(".tmp") for name in names):
        return True
    saved = read_json(directory / "config.json")
    if saved is None:
        raise UserError(f"{directory} is no run (no readable config.json); give a new directory")
    if saved != wanted:
        raise UserError(
            f"{directory} is a run of another config ({differences(saved, wanted)}); "
            "go back to that config or give a new directory"
        )
    return False


def _create(directory: Path, config: Any, lock: filelock.BaseFileLock | None) -> Run:
    run = Run(directory, False, lock)
    write_text(directory / "config.json", _config_text(config, indent=2) + "\n")
    return run


def _resume(directory: Path, lock: filelock.BaseFileLock | None) -> Run:
    run = Run(directory, True, lock)
    (directory / "finished").unlink(missing_ok=True)  # it is taken up again
    for pattern in ("*.tmp", "*/*.tmp"):  # left by a process that was killed
        for unfinished in directory.glob(pattern):
            unfinished.unlink()
    keep_json_lines(run.results, lambda record: True)  # so that damage is found now
    return run


def _config_text(config: Any, indent: int | None = None) -> str:
    """A config as strict JSON, which has no infinity: it becomes the text "Infinity"."""
    return strict_json(config, non_finite=str, indent=indent)


def _lock(directory: Path) -> filelock.BaseFileLock | None:
    """The lock of a directory, taken; None where this process needs none or can have none."""
    if not is_first_process():
        return None
    with one_line(directory, "written"):
        directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / LOCK  # one lock, however the directory is named
    lock = filelock.FileLock(path, blocking=False, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        with one_line(directory, "written"):
            path.touch()  # what may not be written to looks as if it were in use
        holder = "another process"
        with contextlib.suppress(OSError):
            holder = (directory / HOLDER).read_text(encoding="utf-8", errors="replace")[:200]
        raise UserError(
            f"{directory} is in use by {holder}: wait until that ends, or give "
            "another directory (--run-dir or --root)"
        ) from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            with one_line(directory, "written"):
                raise
        log(f"warning: {directory} cannot be locked ({error}): let no second process use it")
        return None
    if lock.lock_counter == 1:
        write_text(directory / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
    return lock


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


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    fields = {}
    for key, value in tree.items():
        fields |= _flatten(value, f"{name}.{key}" if name else key)
    return fields
