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
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.console import log
from metaopt.self_improvement.assess import as_record
from metaopt.self_improvement.kinship import LIKE, NEAR, Proposal, RunRecord, choose, distance
from metaopt.self_improvement.location import Damaged, check_file, is_damage, locate, set_aside
from metaopt.self_improvement.standing import Curve

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

    def propose(self, task: Mapping[str, Any], within: float = NEAR) -> Proposal | None:
        """The start of a new run from its nearest kin; None where it has none.

        Args:
          task: descriptors of the new run, as in `RunRecord`.
          within: no run farther than this is kin, see `metaopt.self_improvement.kinship`.
        """
        return choose(self.records(), as_record(task), within)

    def history(self, task: Mapping[str, Any], within: float = LIKE) -> list[Curve]:
        """The learning curves of like runs, for `metaopt.self_improvement.standing`."""
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
            log(line)


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
