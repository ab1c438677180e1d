"""Where a memory is: a SQLite file or the URL of a database, its password shown to nobody."""

import contextlib
import itertools
import re
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

from metaopt.errors import UserError
from metaopt.files import local_path

_SECRET = "***"
_PATIENCE = {  # what drivers call the seconds to wait for a lock or a connection
    "pysqlite": "timeout",
    "psycopg": "connect_timeout",
    "psycopg2": "connect_timeout",
    "pymysql": "connect_timeout",
    "mysqldb": "connect_timeout",
}


class Location(NamedTuple):
    """A database.

    Attributes:
      url: of SQLAlchemy, with the password: for connecting only.
      path: of the SQLite file; None for a server.
      shown: what may be shown: the path, or the URL without user, password and options.
      secrets: what must not be, wherever it turns up.
      driver: the name of the database driver.
    """

    url: str
    path: Path | None
    shown: str
    secrets: tuple[str, ...]
    driver: str

    def __repr__(self):
        return f"Location({self.shown})"

    def masked(self, text: str) -> str:
        """The text with every secret in it made unreadable."""
        text = text.replace(self.url, self.shown) if self.path is None else text
        for secret in self.secrets:
            text = text.replace(secret, _SECRET)
        return text

    def connect_args(self, patience: float) -> dict[str, Any]:
        """What makes the driver give up after ``patience`` seconds, where it can be told."""
        name = _PATIENCE.get(self.driver)
        if name is None:
            return {}
        return {name: patience if self.path else max(2, round(patience))}


def locate(path_or_url: Path | str) -> Location:
    """The database that a path or URL (what has ``://`` in it) names; nothing is opened.

    Raises:
      UserError: Optuna or the driver is not installed, or it names no database.
    """
    try:
        import optuna  # noqa: F401
        from sqlalchemy.engine import URL, make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError as error:
        raise UserError("the memory needs Optuna: pip install 'metaopt[improve]'") from error
    if isinstance(path_or_url, Path) or "://" not in path_or_url:
        return _file(local_path(path_or_url), URL)
    try:
        url = make_url(path_or_url)
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except ImportError as error:
        raise UserError(f"the memory's database needs a driver: {error}; install it") from None
    except (ArgumentError, ValueError):
        scheme = path_or_url.split("://")[0]
        raise UserError(
            f"the memory's URL ({scheme}://...) is of no known database; write it as "
            "postgresql://user:password@host/database, or give the path of a file"
        ) from None
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise UserError("a memory within the process forgets at its end; give a file's path")
        return _file(Path(url.database), URL)
    whole = url.render_as_string(hide_password=False)
    shown = f"{url.get_backend_name()}://{url.host or ''}/{url.database or ''}"
    return Location(whole, None, shown, _secrets(url), url.get_driver_name())


def _file(path: Path, URL) -> Location:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a file in it, such as memory.sqlite")
    url = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    return Location(url, path, str(path), (), "pysqlite")


def _secrets(url) -> tuple[str, ...]:
    """The password and the options of a URL, which may hold one, as they may be written."""
    options = [value for values in url.normalized_query.values() for value in values]
    plain = [str(secret) for secret in (url.password, *options) if secret]
    written = {form for secret in plain for form in (secret, quote(secret, ""), quote_plus(secret))}
    return tuple(sorted(written, key=len, reverse=True))


class Damaged(Exception):
    """A file that is a database of SQLite no longer, or never was, or whose tables are garbled."""


_GARBLED = "no such (column|table)|has no column|malformed|unsupported file format"


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite says, at whatever depth of causes, that a file or its tables are damaged."""
    if isinstance(error, sqlite3.DatabaseError):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        damaged = code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        return damaged or re.search(_GARBLED, str(error)) is not None
    return error is not None and is_damage(error.__cause__)


def check_file(path: Path, patience: float, *, writing: bool = False) -> bool:
    """Whether a memory is in a SQLite file that is whole; nothing in it is changed.

    Args:
      path: of the file. Where there is none, or an empty one, no memory is.
      patience: seconds to wait for a lock.
      writing: whether it must also be free to write to.

    Raises:
      Damaged: it is no database, or not whole.
      sqlite3.Error: it is locked or cannot be read (or written).
      ValueError: it is the database of another program.
    """
    if not path.exists():
        return False
    uri = f"{path.resolve().as_uri()}?mode=rw"  # unlike a path, it makes no file
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=patience)) as connection:
            return _check(connection, writing)
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            raise Damaged(f"damaged ({error})") from None
        raise


def _check(connection: sqlite3.Connection, writing: bool) -> bool:
    if writing:
        connection.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise Damaged(f"damaged ({found})")
    if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        return False
    try:
        connection.execute("SELECT study_id, study_name FROM studies LIMIT 0")
    except sqlite3.OperationalError as error:
        raise ValueError(f"a database of another program ({error}): give another path") from None
    return True


def set_aside(path: Path) -> Path:
    """Rename a damaged file to ``damaged-<time>-<name>``, and its journals with it.

    SQLite would play a journal that is left behind into the file's successor.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        aside = path.with_name(f"damaged-{stamp}{f'-{number}' * (number > 1)}-{path.name}")
        if not aside.exists():
            break
    for ending in ("-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    return path.rename(aside)
