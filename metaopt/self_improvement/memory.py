"""Memory of past runs: the most similar one proposes where a new run starts.

A run is one row of the table `TABLE`, written as JSON in one transaction: in a SQLite file or,
by its URL, in a PostgreSQL or MySQL database that a team shares. Several processes may use it.

A memory never stops a run. An empty one logs nothing; one that is damaged, locked or out of
reach is logged once on standard error, and the run continues without it.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import as_record, local_path
from metaopt.self_improvement.records import past_search
from metaopt.self_improvement.workload import Settings
from metaopt.statistics import Curve, RankAmongRuns, rank_among_runs
from metaopt.training.runs import versions

Task = Mapping[str, Any]  # descriptors of a task: sizes and counts as numbers, kinds as strings

CATEGORY_MISMATCH = 2.0  # as much as a size that is 7.4 times as large
MISSING_COST = 1.0
TIE_DISTANCE, MAX_DISTANCE = 0.1, 3.0

TABLE = "metaopt_runs_1"  # with the version of its format
CONNECT_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")  # drivers that have the option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is remembered of a run. All of it must be writable as JSON.

    Attributes:
      name: name of the run, such as ``'adapt_languages/cpu-20260102-030405'``.
      task: descriptors of what it learned, for finding similar runs.
      settings: settings that a similar run should start with, after all improvements.
      loss: held-out loss at the end; NaN or inf if the run diverged.
      tokens: tokens (or examples) seen.
      seconds: duration.
      curve: ``(tokens, held-out loss)``.
      decisions: what was tried and changed, with the evidence; first the decisions of the past
        runs whose search this one continued.
      seed: seed of the run.
      when: time of its end, in ISO 8601.
      versions: versions of Python, jax, flax, optax and metaopt.
    """

    name: str
    task: Task
    settings: Mapping[str, Any]
    loss: float
    tokens: int
    seconds: float
    curve: Curve = ()
    decisions: Sequence[Mapping[str, Any]] = ()
    seed: int | None = None
    when: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)


class Proposal(NamedTuple):
    """A start for a new run, and where it comes from.

    Attributes:
      settings, run: settings of the past run, and its name.
      distance: distance from the new task to that run's, see `distance`.
      reason: explanation in words.
      decisions: decisions of that run if its task is the same one: they hold for the new run too.
        After them the choices with which another run of that task, no shorter, ended worse.
    """

    settings: dict[str, Any]
    run: str
    distance: float
    reason: str
    decisions: Sequence[Mapping[str, Any]] = ()


def distance(here: Task, there: Task) -> float:
    """How far apart two tasks are: the sum over their descriptors, 0 for the same.

    Positive numbers differ by ``|log(a / b)|``: a model twice as large is 0.69 away. Others
    (zero, negative) differ by ``|a - b| / max(|a|, |b|)``. Anything else is equal or
    `CATEGORY_MISMATCH` apart; a descriptor that only one of them has costs `MISSING_COST`.
    """
    return math.fsum(_gaps(here, there).values())


def choose(runs: Sequence[RunRecord], task: Task, within: float = MAX_DISTANCE) -> Proposal | None:
    """The settings of the best of the runs most similar to a task; None if none is ``within``.

    Most similar are the runs that are at most `TIE_DISTANCE` farther away than the nearest; best
    is the lowest final loss among them, and of equal ones the fastest. Runs that diverged
    propose nothing.
    """
    similar = [(distance(task, run.task), run) for run in runs if math.isfinite(run.loss)]
    similar = [(far, run) for far, run in similar if far <= within]
    if not similar:
        return None
    limit = min(far for far, _ in similar) + TIE_DISTANCE
    nearest = [(far, run) for far, run in similar if far <= limit]
    far, run = min(nearest, key=lambda pair: (pair[1].loss, pair[1].seconds))
    decisions = [] if far else list(run.decisions)
    for away, other in similar:
        if away == far == 0 and other.loss > run.loss and other.tokens >= run.tokens:
            decisions += _rejected_choices(other.decisions, run.settings)
    return Proposal(dict(run.settings), run.name, far, _reason(task, far, run), decisions)


def _rejected_choices(decisions: Sequence[Any], better: Settings) -> list[dict[str, Any]]:
    """The accepted choices that ``better`` does not have, as worse; none if unreadable."""
    found = []
    for decision in past_search(decisions) or []:
        rejected = [
            trial._replace(verdict="worse", accepted=False)
            for trial in decision.trials
            if trial.accepted and trial.direction == 0
            if better.get(trial.setting) != trial.settings.get(trial.setting)
        ]
        if rejected:
            found.append(decision._replace(verdict="kept", changes={}, trials=rejected))
    return as_record(found)


def _reason(task: Task, far: float, run: RunRecord) -> str:
    gaps = _gaps(task, run.task)
    most = sorted((name for name in gaps if gaps[name]), key=lambda name: (-gaps[name], name))
    told = [f"{n} {run.task.get(n, 'unknown')} there, {task.get(n, 'unknown')} here" for n in most]
    differs = "the same task" if not most else f"distance {far:.2f}: {', '.join(told[:3])}"
    reached = f"loss {run.loss:.4g} after {run.tokens:.3g} tokens"
    return f"starts with the settings of {run.name}, which reached {reached} ({differs})"


def _gaps(here: Task, there: Task) -> dict[str, float]:
    return {
        name: _gap(here[name], there[name]) if name in here and name in there else MISSING_COST
        for name in sorted({*here, *there})
    }


def _gap(a: Any, b: Any) -> float:
    if not all(type(x) is int or (type(x) is float and math.isfinite(x)) for x in (a, b)):
        return 0.0 if type(a) is type(b) and a == b else CATEGORY_MISMATCH
    if a > 0 and b > 0:
        return abs(math.log(a) - math.log(b))
    return abs(a - b) / (max(abs(a), abs(b)) or 1)


def locate(path_or_url: Path | str) -> Any:
    """The path of a file, or the `sqlalchemy.URL` of a server; nothing is opened.

    Raises:
      UserError: it names no database, or SQLAlchemy or the driver of its URL is not installed.
    """
    if isinstance(path_or_url, Path) or "://" not in path_or_url:
        path = local_path(path_or_url)
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the path of a file in it")
        return path
    try:
        from sqlalchemy.engine import make_url

        url = make_url(path_or_url)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise UserError(
            f"the URL of a memory needs a driver of its database and SQLAlchemy ({error}): install "
            "the driver and 'metaopt[improve]', or give the path of a file"
        ) from None
    except Exception:  # SQLAlchemy's own, which may name a password
        scheme = path_or_url.split("://")[0]
        raise UserError(
            f"the memory's URL ({scheme}://...) is of no known database; write it as "
            "postgresql://user:password@host/database, or give the path of a file"
        ) from None
    if url.get_backend_name() != "sqlite":
        return url
    if url.database in (None, "", ":memory:"):
        raise UserError("a memory within the process is lost at its end; give a file's path")
    return locate(Path(url.database))


class Damaged(Exception):
    """A file that is no SQLite database, or no longer a whole one, or whose table is garbled."""


class Memory:
    """The past runs at a path or URL. Nothing is opened, nor a file made, before it is used.

    In a run of several processes let one remember, and give the proposal of one to all.

    Example::

        memory = Memory("runs/memory.sqlite")
        proposal = memory.propose(task)
        settings = {**settings, **(proposal.settings if proposal else {})}
        ...
        memory.remember(RunRecord(name=name, task=task, settings=settings, loss=loss, ...))
    """

    def __init__(self, path_or_url: Path | str, *, patience: float = 10.0):
        """Waits ``patience`` seconds for a lock or a connection. Raises UserError as `locate`."""
        self._place = place = locate(path_or_url)
        self._patience = patience
        self._logged: set[str] = set()
        if isinstance(place, Path):
            self.where = str(place)
        else:  # without user, password and options
            self.where = f"{place.get_backend_name()}://{place.host or ''}/{place.database or ''}"

    def remember(self, record: RunRecord) -> bool:
        """Adds a run; False, and the reason on standard error, if that is not possible.

        A damaged file is first renamed to ``damaged-<time>-<name>``, and a new one begun. A file
        that is another program's, of another version, locked or read-only is left as it is.
        """
        try:
            text = json.dumps(as_record(vars(record)))
            if isinstance(self._place, Path):
                self._place.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._add(text)
            except Damaged as error:
                aside = set_aside(self._place)
                self._log(error, f"it is set aside as {aside.name}, and a new one begun")
                self._add(text)
        except Exception as error:  # never let a storage error stop a run
            self._log(error, "this run is not remembered")
            return False
        return True

    def records(self) -> list[RunRecord]:
        """All runs remembered, oldest first; none, and the reason, if they cannot be read."""
        if isinstance(self._place, Path) and not self._place.exists():
            return []
        try:
            with self._open(writing=False) as (execute, has_table):
                query = f"SELECT record FROM {TABLE} ORDER BY added, id"
                rows = execute(query).fetchall() if has_table else []
        except Exception as error:  # never let a storage error stop a run
            self._log(error, "it is left as it is, and this run continues without it")
            return []
        found = [_as_run(text) for (text,) in rows]
        if lost := found.count(None):
            self._log(ValueError(f"{lost} of {len(found)} entries are no runs"), "they are skipped")
        return [run for run in found if run is not None]

    def propose(self, task: Task, within: float = MAX_DISTANCE) -> Proposal | None:
        """The start of a new run, see `choose`; None if there is no similar run."""
        return choose(self.records(), as_record(task), within)

    def rank(self, task: Task, curve: Curve) -> RankAmongRuns | None:
        """The rank of a run among past ones of the same task, up to `TIE_DISTANCE`.

        They are compared by their held-out losses at the tokens of its last point, see
        `rank_among_runs`; None if no run can be compared.
        """
        here = as_record(task)
        similar = [r for r in self.records() if distance(here, r.task) <= TIE_DISTANCE]
        return rank_among_runs(curve, [run.curve for run in similar])

    def _add(self, text: str) -> None:
        """Adds a row, or leaves all as it was."""
        with self._open(writing=True) as (execute, has_table):
            if not has_table:
                # TEXT of MySQL ends at 64 KiB.
                text_type = "LONGTEXT" if self.where.startswith(("mysql:", "mariadb:")) else "TEXT"
                execute(
                    f"CREATE TABLE IF NOT EXISTS {TABLE} (id VARCHAR(32) PRIMARY KEY, "
                    f"added DOUBLE PRECISION NOT NULL, record {text_type} NOT NULL)"
                )
            row = {"id": uuid.uuid4().hex, "added": time.time(), "record": text}
            execute(f"INSERT INTO {TABLE} (id, added, record) VALUES (:id, :added, :record)", row)

    @contextlib.contextmanager
    def _open(self, *, writing: bool) -> Iterator[tuple[Callable[..., Any], bool]]:
        """A transaction: a function that executes SQL, and whether the table is there.

        Raises:
          Damaged: the file is not whole.
          ValueError: it is the database of another program.
        """
        place = self._place
        if not isinstance(place, Path):
            import sqlalchemy

            has_timeout = place.get_driver_name() in CONNECT_TIMEOUT
            options = {"connect_timeout": max(2, round(self._patience))} if has_timeout else {}
            pool = sqlalchemy.NullPool
            engine = sqlalchemy.create_engine(place, poolclass=pool, connect_args=options)
            with engine.begin() as server:
                has_table = sqlalchemy.inspect(server).has_table(TABLE)
                yield (
                    lambda sql, values=None: server.execute(sqlalchemy.text(sql), values),
                    has_table,
                )
            return
        uri = f"{place.resolve().as_uri()}?mode={'rwc' if writing else 'rw'}"
        try:
            file = sqlite3.connect(uri, uri=True, timeout=self._patience, isolation_level=None)
            with contextlib.closing(file):
                file.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
                yield file.execute, _check(file)
                file.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            garbled = re.search("no such column|has no column|unsupported file format", str(error))
            if garbled or code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise Damaged(f"damaged ({error})") from None
            raise

    def _masked(self, text: str) -> str:
        """The text without the URL, its password and its options, which may hold one."""
        url = self._place
        if isinstance(url, Path):
            return text
        text = text.replace(url.render_as_string(hide_password=False), self.where)
        options = itertools.chain(*url.normalized_query.values())
        secrets = [str(secret) for secret in (url.password, *options) if secret]
        forms = {form for x in secrets for form in (x, quote(x, ""), quote_plus(x))}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
        return text

    def _log(self, error: Exception, consequence: str) -> None:
        """Warns in one line without secrets, once for each reason."""
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        line = f"memory {self.where}: {self._masked(cause).splitlines()[0]}; {consequence}"
        if line not in self._logged:
            self._logged.add(line)
            log(line)


def _check(file: sqlite3.Connection) -> bool:
    """Whether the table is in a file, which is whole and not another program's."""
    found = file.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise Damaged(f"damaged ({' '.join(found.split())})")
    tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master")}
    if tables and TABLE not in tables:
        raise ValueError(f"it is of another program or version, without {TABLE}: give another path")
    return bool(tables)


def set_aside(path: Path) -> Path:
    """Renames a damaged file to ``damaged-<time>-<name>``, and its journals with it.

    SQLite would play a journal that is left behind into the file's successor.
    """
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    aside = path.with_name(f"damaged-{stamp}-{path.name}")
    for ending in ("-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    return path.rename(aside)


def _as_run(text: str) -> RunRecord | None:
    """The run that `Memory.remember` wrote, with null for NaN; None if it is no run."""
    try:
        fields = json.loads(text)
        curve = [(float(tokens), float("nan" if x is None else x)) for tokens, x in fields["curve"]]
        loss = float("nan" if fields["loss"] is None else fields["loss"])
        run = RunRecord(**fields | {"loss": loss, "curve": curve})
        valid = isinstance(run.task, dict) and isinstance(run.settings, dict)
        spent = [run.seconds, run.tokens, *(tokens for tokens, _ in curve)]
        return run if valid and all(0 <= float(x) < math.inf for x in spent) else None
    except (KeyError, TypeError, ValueError):
        return None
