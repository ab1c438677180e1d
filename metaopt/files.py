"""Files: paths and names from outside, text written whole, and JSON lines. Imports no JAX.

What is written is there whole or not at all: on a full disk, or after a kill, the file is
as it was before. What cannot be read or written is a `UserError` of one line.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import mmap
import os
import re
import stat
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from metaopt.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, on the file systems in use
DEEPEST = 64  # dicts and lists within one another in a record
ROOM_BELOW = 512  # bytes of the paths in a run directory, of which orbax's are the longest


class Named(typing.TypedDict):
    """What a line of a file holds that several trainings share."""

    name: str


class Line(Named):
    """What a line of ``metrics.jsonl`` or ``monitor.jsonl`` holds."""

    step: int
    valid_loss: typing.NotRequired[float | None]


def local_path(text: Path | str) -> Path:
    """A path from outside, with ``~`` expanded.

    Raises:
      UserError: it is a URL, holds a NUL, or names the home of nobody.
    """
    text = os.fspath(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # a Path has made gs:/x of gs://x
        raise UserError(f"{text} is a URL: give a directory of this machine, mounted if need be")
    if "\0" in text or not text:
        raise UserError(f"{text!r} is no path: it is empty or holds a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}; write the path out") from None


def check_directory(path: Path | str) -> Path:
    """The path of a directory that is there or can be made, for a run to write to.

    Nothing is made or written.

    Raises:
      UserError: it cannot be made or written to, for the reason given.
    """
    path = local_path(path)
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError:  # which orbax, written in C++, does not take
        raise UserError(f"{path} is not UTF-8, as checkpoints need: give another") from None
    if len(os.fsencode(path.absolute())) > LONGEST_PATH - ROOM_BELOW:
        raise UserError(f"{path} is too long a path for the files below it: give a shorter one")
    existing = path.absolute()
    with one_line(path, "used"):
        while not os.path.lexists(existing) and _is_name(existing.name):
            existing = existing.parent
        mode = os.stat(existing).st_mode
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path} cannot be used: {existing} is no directory; give another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be used: {existing} may not be written to; give another")
    return path


def inside(folder: Path, *names: str) -> Path:
    """``folder / name / name ...`` with names from outside, each of a file or folder in the last.

    Raises:
      UserError: a name is none (empty, ``..``, with a slash or NUL, too long), or the path
        leaves the folder by a link.
    """
    for name in names:
        if not _is_name(name):
            raise UserError(f"{name!r} is no name of a file or folder in {folder}: give another")
    path = folder.joinpath(*names)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        is_inside = False
    if not is_inside:
        raise UserError(f"{path} is a link that leaves {folder}: remove it or give another name")
    return path


def _is_name(name: str) -> bool:
    try:
        length = len(os.fsencode(name))
    except UnicodeError:
        return False
    separators = {"/", "\\", "\0"} & set(name)
    return name not in ("", ".", "..") and not separators and length <= LONGEST_NAME


@contextlib.contextmanager
def one_line(path: Path | str, what: str):
    """An `OSError` of the file system as a `UserError`; ``what`` could not be done: "written"."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be {what} ({error.strerror or error}): put that right and run again, "
            "or give another place"
        ) from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: it cannot be read or is not UTF-8.
    """
    with one_line(path, "read"):
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); repair it") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it cannot be read or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8; at every moment either the old or the new one is there, whole.

    Raises:
      UserError: it cannot be written; the old one is then there still.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`, with bytes."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with one_line(path, "written"):
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a machine that stops may leave an empty file
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def to_json(value: Any) -> str:
    """JSON as Python writes it, with NaN and Infinity; dataclasses, arrays and paths are taken."""
    return json.dumps(value, default=_plain)


def strict_json(value: Any, non_finite: Callable[[str], Any], indent: int | None = None) -> str:
    """As `to_json`, but JSON by its standard: ``non_finite("NaN")`` is written in place of NaN."""
    plain = json.loads(to_json(value), parse_constant=non_finite)
    return json.dumps(plain, allow_nan=False, indent=indent)


def as_record(value: Any) -> Any:
    """A record as it is read back from JSON lines: NaN and inf as None, named tuples as dicts.

    Arrays become lists, paths strings.
    """
    return json.loads(to_json(_named(value)), parse_constant=lambda _: None)


def _named(value: Any) -> Any:
    """A value with its named tuples as dicts, which JSON would write as lists."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _named(entry) for key, entry in value.items()}
    return [_named(entry) for entry in value] if isinstance(value, list | tuple) else value


def append_json_line(path: Path | str, record: Mapping[str, Any]) -> None:
    """Add one record to a JSON-lines file, whole or not at all; NaN and infinities become null.

    A last line that was cut short by a kill is taken away first.

    Raises:
      UserError: it cannot be written, for want of space say; the file is then as it was.
    """
    line = memoryview(_line(record).encode())
    with one_line(path, "written"), open(path, "a+b", buffering=0) as file:
        end = _end_of_last_line(file)
        try:
            while line:
                line = line[file.write(line) :]
        except BaseException:
            file.truncate(end)
            raise


def _end_of_last_line(file: typing.BinaryIO) -> int:
    """The length of the file without a last line that lacks its newline, which is cut off."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
    if end < size:
        file.truncate(end)
    return end


def read_json_lines(path: Path | str, schema: type | None = None) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; empty where there is no file.

    A last line without its newline was cut short by a kill and is left out.

    Args:
      path: of the file.
      schema: a `TypedDict` or `NamedTuple` whose fields every record must have; it may have
        others.

    Raises:
      UserError: the file cannot be read, or another line is damaged; it is named.
    """
    path, records = Path(path), []
    with one_line(path, "read"):
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_record(line)
            problem = schema and what_is_wrong(record, schema)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UserError(f"{path}:{number} is damaged ({problem}); repair or delete the line")
        records.append(record)
    return records


def keep_json_lines(
    path: Path | str, keep: Callable[[dict[str, Any]], bool], schema: type | None = None
) -> None:
    """Rewrite a JSON-lines file with the records for which ``keep`` is true, atomically.

    Raises:
      UserError: a line is damaged, or the file cannot be written; it is then as it was.
    """
    if Path(path).exists():
        write_json_lines(path, [record for record in read_json_lines(path, schema) if keep(record)])


def write_json_lines(path: Path | str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file whole, in place of what was there; NaN and inf become null."""
    write_text(Path(path), "".join(map(_line, records)))


def _line(record: Mapping[str, Any]) -> str:
    return strict_json(record, lambda _: None) + "\n"


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
      ValueError: it is not UTF-8 or not JSON (which has no NaN and no infinity), or another
        thing than an object.
    """
    try:
        record = json.loads(line.decode(), parse_constant=_refuse, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    brackets = line.count(b"[") + line.count(b"{")  # few in most lines, which is quick to see
    if brackets > DEEPEST and _is_deeper(record, DEEPEST):
        raise ValueError("too deeply nested")
    return record


def _is_deeper(value: Any, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_deeper(part, depth - 1) for part in parts)


def _refuse(constant: str) -> typing.NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def what_is_wrong(record: Mapping[str, Any], schema: type) -> str | None:
    """The first field of a `TypedDict` or `NamedTuple` that is missing or of another type."""
    optional = getattr(schema, "__optional_keys__", getattr(schema, "_field_defaults", {}))
    for name, hint in _hints(schema).items():
        if name not in record and name not in optional:
            return f"it lacks {name!r}"
        if name in record and not matches(record[name], hint):
            return f"{name!r} is {json.dumps(record[name])[:40]}, of the wrong type"
    return None


_hints = functools.cache(typing.get_type_hints)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type. A float may be an int, and is finite."""
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, arg) for arg in args)
    if origin is typing.Literal:
        return isinstance(value, str) and value in args
    if origin is dict:
        return isinstance(value, dict) and all(matches(v, args[1]) for v in value.values())
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(args) and all(map(matches, value, args))
        )
    if origin is not None:  # a list or a sequence
        return isinstance(value, list) and all(matches(v, args[0]) for v in value)
    if hint in (int, float):
        number = isinstance(value, int | (float if hint is float else int))
        return number and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if typing.is_typeddict(hint):
        return isinstance(value, dict) and what_is_wrong(value, hint) is None
    if hasattr(hint, "_fields"):  # a NamedTuple of numbers; NaN was written as null
        return isinstance(value, dict) and all(
            matches(value[name], of_field | None) if name in value else name in hint._field_defaults
            for name, of_field in _hints(hint).items()
        )
    return isinstance(value, hint)


def parsed(value: Any, hint: Any) -> Any:
    """A value from JSON that `matches` a type, as that type.

    A list becomes a tuple, a dict the named tuple that it is of; a null for a float is NaN.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return parsed(value, next(arg for arg in args if matches(value, arg)))
    if hasattr(hint, "_fields"):
        hints = {name: of_field for name, of_field in _hints(hint).items() if name in value}
        return hint(**{name: parsed(value[name], of_field) for name, of_field in hints.items()})
    if origin is dict:
        return {key: parsed(entry, args[1]) for key, entry in value.items()}
    if isinstance(value, list) and args:
        return tuple(map(parsed, value, args if origin is tuple else itertools.repeat(args[0])))
    return math.nan if value is None and hint is float else value


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays and their scalars
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
