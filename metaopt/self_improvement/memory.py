"""Self-learning: a knowledge base of runs that proposes where the next one starts.

Runs are kept in Optuna's relational storage (Akiba et al., 2019): a SQLite file, or by its
URL a PostgreSQL or MySQL database that a team shares. The knowledge base is one study, a run
one finished trial of it: the final loss is its value, all else are its user attributes, which
are JSON. Settings are attributes and no parameters of the trial, since Optuna holds a
parameter to one type in all trials. Only JSON is ever read back: nothing is unpickled.

A memory never stops a run. One that is empty says nothing; one that is damaged, locked or out
of reach is said once on standard error, and the run goes on without it.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import numpy as np

from metaopt.console import say
from metaopt.errors import UserError
from metaopt.files import local_path
from metaopt.self_improvement.assess import as_record
from metaopt.self_improvement.records import past_search
from metaopt.self_improvement.workload import Settings
from metaopt.statistics import Curve
from metaopt.training.runs import versions

Task = Mapping[str, Any]
"""Descriptors of a task: sizes and counts as numbers, kinds as strings."""

CATEGORY_MISMATCH = 2.0  # as much as a size that is 7.4 times as large
MISSING_COST = 1.0
TIE_DISTANCE = 0.1
MAX_DISTANCE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is remembered of a run. All of it must be writable as JSON.

    Attributes:
      name: of the run, such as ``'adapt_languages/cpu-20260102-030405'``.
      task: what it was about, for finding its kin.
      settings: with which a run like it should start; after all that was improved.
      loss: held-out loss at the end; not finite where the run diverged.
      tokens: tokens (or examples) seen.
      seconds: that it took.
      curve: ``(tokens, held-out loss)``; a memory keeps some 200 points of a longer one.
      decisions: what was tried and changed on the way, with the evidence; before that what the
        runs had decided whose search this one went on with.
      seed: of the run.
      when: its end, in ISO 8601.
      versions: of Python, jax, flax, optax and metaopt.
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
      settings: those of the past run.
      run: its name.
      distance: from the new task to that run's, see `distance`.
      reason: in words.
      decisions: of that run, where it was of the very task: they hold for the new one too. After
        them those for a choice with which another such run, no shorter, did not get as far.
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


def choose(
    records: Sequence[RunRecord], task: Task, within: float = MAX_DISTANCE
) -> Proposal | None:
    """The settings of the best of the nearest kin.

    Nearest are the runs that are at most `TIE_DISTANCE` farther away than the nearest of all;
    best is the lowest final loss among them, and of equal ones the quickest. Runs that diverged
    propose nothing.

    Args:
      records: past runs.
      task: of the new run.
      within: no run farther than this is kin.

    Returns:
      `Proposal`, or None where there is no kin.
    """
    kin = [(distance(task, run.task), run) for run in records if math.isfinite(run.loss)]
    kin = [(far, run) for far, run in kin if far <= within]
    if not kin:
        return None
    nearest = min(far for far, _ in kin)
    far, run = min(
        (pair for pair in kin if pair[0] <= nearest + TIE_DISTANCE),
        key=lambda pair: (pair[1].loss, pair[1].seconds),
    )
    decisions = [] if far else list(run.decisions)
    for away, other in kin:
        if away == far == 0 and other.loss > run.loss and other.tokens >= run.tokens:
            decisions += _rejected_choices(other.decisions, run.settings)
    return Proposal(dict(run.settings), run.name, far, _reason(task, far, run), decisions)


def _rejected_choices(decisions: Sequence[Any], better: Settings) -> list[dict[str, Any]]:
    """The choices that a search accepted and a better run does without, as worse than no change.

    None, if the decisions cannot be read.
    """
    found = []
    for decision in past_search(decisions) or []:
        rejected = tuple(
            trial._replace(verdict="worse", accepted=False)
            for trial in decision.trials
            if trial.accepted and trial.direction == 0
            if better.get(trial.setting) != trial.settings.get(trial.setting)
        )
        if rejected:
            kept = decision._replace(verdict="kept", changes={}, trials=rejected)
            found.append(kept.as_json())
    return found


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
    if not (_is_number(a) and _is_number(b)):
        return 0.0 if type(a) is type(b) and a == b else CATEGORY_MISMATCH
    if a == b:
        return 0.0
    if a > 0 and b > 0:
        return abs(math.log(a) - math.log(b))
    return abs(a - b) / max(abs(a), abs(b))


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


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


STUDY = "metaopt"
CURVE_POINTS = 200
_FIELDS = ("name", "task", "settings", "tokens", "seconds", "seed", "when", "versions")


class Memory:
    """The knowledge base at a path or URL. Nothing is opened, nor a file made, before it is used.

    Several processes may use one at the same time. In a run of several processes let one
    remember, and give the proposal of one to all.

    Example::

        memory = Memory("runs/memory.sqlite")
        proposal = memory.propose(task)
        settings = {**settings, **(proposal.settings if proposal else {})}
        ...
        memory.remember(RunRecord(name=name, task=task, settings=settings, loss=loss, ...))
    """

    def __init__(self, path_or_url: Path | str, *, patience: float = 10.0):
        """Use the memory there; wait ``patience`` seconds for a lock or a connection.

        Raises:
          UserError: Optuna or the driver of the database is not installed, or the URL or
            path cannot be one of a memory.
        """
        self._location = locate(path_or_url)
        self._patience = patience
        self._said: set[str] = set()

    @property
    def where(self) -> str:
        """The path, or the URL without user, password and options."""
        return self._location.shown

    def remember(self, record: RunRecord) -> bool:
        """Add a run; False, and why on standard error, where that cannot be done.

        A file that is damaged is first renamed to ``damaged-<time>-<name>``, and a new one
        begun. One that is another program's, of another version of Optuna, locked or
        read-only is left as it is.
        """
        try:
            trial = _as_trial(record)
            self._prepare_to_write()
            try:
                self._add(trial)
            except Exception as error:
                if self._location.path is None or not is_damage(error):
                    raise
                # SQLite found nothing amiss, but Optuna's tables are garbled.
                self._set_aside(self._location.path, error)
                self._add(trial)
        except Exception as error:  # a run is not lost for its diary, whatever this is
            self._say(error, "this run is not remembered")
            return False
        return True

    def records(self) -> list[RunRecord]:
        """All runs remembered, oldest first; none, and why, where they cannot be read."""
        try:
            path = self._location.path
            if path and not check_file(path, self._patience):
                return []
            with self._study(create=False) as study:
                trials = study.get_trials(deepcopy=False) if study else []
        except Exception as error:
            self._say(error, "it is left as it is, and this run goes on without it")
            return []
        found = [_as_run(trial) for trial in trials]
        if lost := found.count(None):
            self._say(ValueError(f"{lost} of {len(found)} entries are no runs"), "they are skipped")
        return [run for run in found if run is not None]

    def propose(self, task: Mapping[str, Any], within: float = MAX_DISTANCE) -> Proposal | None:
        """The start of a new run from its nearest kin; None where it has none.

        Args:
          task: descriptors of the new run, as in `RunRecord`.
          within: no run farther than this is similar, see `distance`.
        """
        return choose(self.records(), as_record(task), within)

    def history(self, task: Mapping[str, Any], within: float = TIE_DISTANCE) -> list[Curve]:
        """The learning curves of like runs, for `metaopt.statistics.rank_among_runs`."""
        here = as_record(task)
        like = [run for run in self.records() if distance(here, run.task) <= within]
        return [run.curve for run in like if run.curve]

    def _add(self, trial) -> None:
        with self._study(create=True) as study:
            study.add_trial(trial)

    def _prepare_to_write(self) -> None:
        path = self._location.path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            check_file(path, self._patience, writing=True)
        except Damaged as error:
            self._set_aside(path, error)

    def _set_aside(self, path: Path, error: Exception) -> None:
        aside = set_aside(path)
        self._say(error, f"it is set aside as {aside.name}, and a new one begun")

    @contextlib.contextmanager
    def _study(self, *, create: bool) -> Iterator[Any]:
        """The study; None where there is none and none is to be made."""
        import optuna

        with _quiet():
            storage = self._connect()
            try:
                if create:
                    yield optuna.create_study(
                        storage=storage, study_name=STUDY, load_if_exists=True
                    )
                elif STUDY in (study.study_name for study in storage.get_all_studies()):
                    yield optuna.load_study(storage=storage, study_name=STUDY)
                else:
                    yield None
            finally:
                storage.remove_session()
                storage.engine.dispose()

    def _connect(self):
        """Optuna's storage; a moment later where another process makes its tables just now."""
        from optuna.storages import RDBStorage
        from sqlalchemy.exc import SQLAlchemyError

        url = self._location.url.replace("{", "{{").replace("}", "}}")  # it takes a template
        waits = [0.1, 0.2, 0.4, 0.8] if self._location.path else []
        while True:
            options = {"connect_args": self._location.connect_args(self._patience)}
            try:
                return RDBStorage(url, engine_kwargs=options)
            except (SQLAlchemyError, AssertionError):
                if not waits:
                    raise
                time.sleep(waits.pop(0))

    def _say(self, error: Exception, consequence: str) -> None:
        """Warn in one line without secrets, once for each reason."""
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        cause = self._location.masked(cause).split("\n")[0]
        cause = f"damaged ({cause})" if is_damage(error) else cause
        line = f"memory {self.where}: {cause}; {consequence}"
        if line not in self._said:
            self._said.add(line)
            say(line)


def _as_trial(record: RunRecord):
    from optuna.trial import TrialState, create_trial

    attributes = {name: as_record(getattr(record, name)) for name in _FIELDS}
    attributes["curve"] = as_record(_thinned(record.curve))
    # One attribute each: MySQL cuts an attribute at 64 KiB.
    decisions = {f"decision {i:06d}": as_record(d) for i, d in enumerate(record.decisions)}
    known = math.isfinite(record.loss)
    return create_trial(
        state=TrialState.COMPLETE if known else TrialState.FAIL,
        value=float(record.loss) if known else None,
        user_attrs=attributes | decisions,
    )


def _as_run(trial) -> RunRecord | None:
    """What `_as_trial` wrote; None for a trial that is none of a run."""
    attributes = dict(trial.user_attrs)
    try:
        fields = {name: attributes[name] for name in _FIELDS}
        curve = [(float(tokens), _number(loss)) for tokens, loss in attributes["curve"]]
        decisions = [
            attributes[name] for name in sorted(attributes) if name.startswith("decision ")
        ]
        run = RunRecord(**fields, loss=_number(trial.value), curve=curve, decisions=decisions)
        valid = isinstance(run.task, dict) and isinstance(run.settings, dict)
        spent = [run.seconds, run.tokens, *(tokens for tokens, _ in curve)]
        return run if valid and all(0 <= float(x) < math.inf for x in spent) else None
    except (KeyError, TypeError, ValueError):
        return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """At most `CURVE_POINTS` points, evenly in the logarithm of their number, both ends kept."""
    if len(curve) <= CURVE_POINTS:
        return list(curve)
    chosen = np.unique(np.geomspace(1, len(curve), CURVE_POINTS).round().astype(int)) - 1
    return [curve[i] for i in chosen]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word from Optuna; its verbosity is afterwards what it was."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
