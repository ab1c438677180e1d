"""Where text comes from: named domains whose bytes are read at any position.

A domain is pieces laid end to end: the files of a package, the blocks of a prepared
dataset, the examples of one class. `join` turns any of them into a `Domain`, and that
is all that `metaopt.tasks.text` sees. `metaopt.tasks.sources.tfds` builds on this module.
"""

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaopt.errors import UserError

STDLIB_MIN_BYTES = 64 * 1024
"""A module or package of the standard library with less source than this is no domain."""

_NOT_WRITTEN_BY_HAND = {"encodings", "pydoc_data"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Domain(NamedTuple):
    """One body of text.

    Attributes:
      name: any string, distinct among the domains of a source.
      size: number of bytes.
      read: ``(start, length) -> uint8 [length]``, in bytes; IndexError outside the domain.
    """

    name: str
    size: int
    read: Callable[[int, int], np.ndarray]


def join(
    name: str, sizes: Sequence[int], read_piece: Callable[[int, int, int], np.ndarray]
) -> Domain:
    """Makes a domain of pieces laid end to end.

    Args:
      name: name of the domain.
      sizes: sizes of the pieces, in bytes.
      read_piece: ``(piece, start, length) -> uint8 [length]`` within one piece.
    """
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    size = int(starts[-1])

    def read(start: int, length: int) -> np.ndarray:
        if start < 0 or length < 0 or start + length > size:
            raise IndexError(f"bytes {start} to {start + length} of {name!r}, which has {size}")
        parts = [np.empty(0, np.uint8)]
        piece = int(np.searchsorted(starts, start, side="right")) - 1
        while length:
            count = min(length, int(starts[piece + 1]) - start)
            parts.append(read_piece(piece, start - int(starts[piece]), count))
            start, length, piece = start + count, length - count, piece + 1
        return np.concatenate(parts)

    return Domain(name, size, read)


def array_domain(name: str, data: np.ndarray) -> Domain:
    """Makes a domain of bytes in memory, uint8."""
    return join(name, [len(data)], lambda _, start, length: data[start : start + length])


def draw_window(
    rng: np.random.Generator, domain: Domain, size: int, low: int = 0, high: int | None = None
) -> np.ndarray:
    """Consecutive bytes of a domain, or of its part from ``low`` to ``high``, uint8 ``[size]``.

    All positions are equally likely.
    """
    high = domain.size if high is None else high
    return domain.read(int(rng.integers(low, high - size + 1)), size)


def file_domain(name: str, paths: Sequence[Path]) -> Domain:
    """Makes a domain of files, one after the other, read in place.

    Raises:
      UserError: a path is not a file or may not be read.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is not a file: a text folder holds one file a domain")
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; mend it or move it") from error

    def read_piece(piece: int, start: int, length: int) -> np.ndarray:
        return np.fromfile(paths[piece], np.uint8, count=length, offset=start)

    return join(name, [path.stat().st_size for path in paths], read_piece)


def folder_domains(folder: Path) -> tuple[Domain, ...]:
    """The files of a folder, one a domain, named and ordered by file name.

    Hidden files (a leading dot) are passed over.

    Raises:
      UserError: the folder is missing, empty, or holds what cannot be read as a file.
    """
    if not folder.is_dir():
        raise UserError(
            f"text source {str(folder)!r} is no folder: give a folder with one file a domain, "
            "'stdlib', or 'tfds:NAME'"
        )
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the text folder {folder}: {error.strerror}") from error
    if not paths:
        raise UserError(f"the text folder {folder} is empty: put one file a domain in it")
    return tuple(file_domain(path.name, [path]) for path in paths)


def stdlib_domains() -> tuple[Domain, ...]:
    """The running Python's own library: one top-level module or package a domain.

    Source that people wrote, found wherever Python is; it differs a little from one
    Python version to the next. Tests and generated tables are left out, and so is
    whatever has less than `STDLIB_MIN_BYTES` of source. Ordered by name.
    """
    domains = []
    for entry in sorted(Path(sysconfig.get_paths()["stdlib"]).iterdir()):
        if entry.name in _NOT_WRITTEN_BY_HAND | _NOT_LIBRARY:
            continue
        found = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]
        paths = [
            path
            for path in found
            if path.suffix == ".py" and not _NOT_LIBRARY & set(path.relative_to(entry).parts)
        ]
        if sum(path.stat().st_size for path in paths) >= STDLIB_MIN_BYTES:
            domains.append(file_domain(entry.stem, paths))
    return tuple(domains)


def fingerprint(domains: Sequence[Domain], chunk: int = 1 << 20) -> str:
    """The names, sizes and contents of domains as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(
            f"{len(domain.name)} {domain.size} {domain.name}".encode(errors="backslashreplace")
        )
        for start in range(0, domain.size, chunk):
            digest.update(domain.read(start, min(chunk, domain.size - start)).tobytes())
    return digest.hexdigest()[:16]


def safe_name(name: str) -> str:
    """A name as one that any file system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "text"


def require_tfds(name: str) -> None:
    """Raises UserError if the dataset ``tfds:NAME`` cannot be read for want of a library."""
    if not has_tfds():
        raise UserError(
            f"'tfds:{name}' needs TensorFlow Datasets: pip install tensorflow-datasets array_record"
        )


def data_directory(given: str | None) -> Path:
    """Where datasets are stored: the directory given, ``$METAOPT_DATA`` or ``data``."""
    return Path(given or os.environ.get("METAOPT_DATA") or "data").expanduser()


def python_help() -> str:
    """The text of Python's own help, 465,000 characters of English that are on every machine."""
    from pydoc_data import topics  # late: half a megabyte

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def has_tfds() -> bool:
    """Whether tensorflow-datasets and the reader of its files are installed."""
    wanted = ("tensorflow_datasets", "array_record")
    return all(importlib.util.find_spec(name) is not None for name in wanted)
