import json
import math
import multiprocessing
import re
import sqlite3
import sys
import types
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy.exc

from metaopt.errors import UserError
from metaopt.self_improvement import memory as module
from metaopt.self_improvement.memory import CURVE_POINTS, STUDY, Memory, RunRecord

TASK = {"family": "markov", "width": 64, "tokens": 1e6}


def record(name="a", loss=1.5, **fields):
    given = dict(name=name, task=TASK, settings={"rate": 0.1, "optimiser": "adam"}, loss=loss)
    return RunRecord(
        **given | dict(tokens=1000, seconds=2.5, curve=[(0, 3.0), (1000, loss)]) | fields
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "team" / "memory {x}?#%20é.sqlite"


@pytest.fixture
def filled(tmp_path):
    path = tmp_path / "memory.sqlite"
    assert Memory(path).remember(record())
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_remembered_comes_back_with_its_types(path):
    first = record(
        settings={"rate": 1e-3, "batch": 32, "remat": True, "optimiser": "adam", "decay": None},
        decisions=[{"step": 3, "setting": "rate", "evidence": {"ci95": 0.1}}, {"step": 9}],
        seed=7,
    )
    arrays = record("b", settings={"rate": np.float32(0.5), "batch": np.int64(4)}, loss=1.0)
    memory = Memory(path)
    assert memory.remember(first) and memory.remember(arrays)
    found = Memory(path).records()
    assert found[0] == first
    assert found[1].settings == {"rate": 0.5, "batch": 4} and found[1].name == "b"
    assert {"jax", "metaopt"} <= set(found[0].versions) and re.match(r"\d{4}-", found[0].when)
    assert [type(v) for v in found[0].settings.values()] == [float, int, bool, str, type(None)]


def test_nothing_is_made_before_something_is_remembered(path, capsys):
    memory = Memory(path)
    assert memory.records() == memory.history(TASK) == [] and memory.propose(TASK) is None
    assert not path.parent.exists() and capsys.readouterr().err == ""
    path.parent.mkdir()
    path.touch()
    assert memory.records() == [] and path.stat().st_size == 0
    assert memory.remember(record()) and len(memory.records()) == 1
    assert names_in(path.parent) == [path.name]


def test_the_next_run_starts_where_its_kin_ended(path):
    memory = Memory(str(path))
    memory.remember(record("worse", 2.0, settings={"rate": 0.2}))
    memory.remember(record("better", 1.0, settings={"rate": 0.3}))
    memory.remember(record("far", 0.1, task=TASK | {"width": 256}))
    proposal = Memory(path).propose(TASK | {"tokens": np.float64(1.05e6)})
    assert proposal is not None and (proposal.run, proposal.settings) == ("better", {"rate": 0.3})
    assert memory.history(TASK) == [[(0.0, 3.0), (1000.0, 2.0)], [(0.0, 3.0), (1000.0, 1.0)]]


def test_runs_that_diverged_are_remembered_but_propose_nothing(path):
    memory = Memory(path)
    for loss in (math.nan, math.inf):
        assert memory.remember(record(loss=loss, decisions=[{"loss": loss}]))
    found = memory.records()
    assert [math.isnan(run.loss) for run in found] == [True, True]
    assert math.isnan(found[0].curve[1][1]) and found[0].decisions == [{"loss": None}]
    assert memory.propose(TASK) is None


def test_a_long_curve_is_thinned_and_keeps_its_ends(path):
    curve = [(float(t), 1.0 / (t + 1)) for t in range(5000)]
    memory = Memory(path)
    memory.remember(record(curve=curve))
    kept = memory.records()[0].curve
    assert 100 < len(kept) <= CURVE_POINTS and set(kept) <= set(curve)
    assert kept[:3] == curve[:3] and kept[-1] == curve[-1]


def test_it_is_a_study_of_optuna_that_other_studies_may_stand_beside(filled):
    url = f"sqlite:///{filled}"
    optuna.create_study(storage=url, study_name="another")
    before = optuna.logging.get_verbosity()
    assert Memory(url).remember(record("b", 0.5)) and optuna.logging.get_verbosity() == before
    study = optuna.load_study(storage=url, study_name=STUDY)
    assert [trial.value for trial in study.trials] == [1.5, 0.5]
    assert study.best_trial.user_attrs["settings"] == {"rate": 0.1, "optimiser": "adam"}
    with sqlite3.connect(filled) as connection:
        texts = [t for (t,) in connection.execute("SELECT value_json FROM trial_user_attributes")]
    assert all(json.dumps(json.loads(text)) == text for text in texts)


def test_what_others_put_into_the_study_is_skipped_and_said_once(filled, capsys):
    study = optuna.load_study(storage=f"sqlite:///{filled}", study_name=STUDY)
    study.ask()
    study.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={"task": "x", "name": 3}))
    memory = Memory(filled)
    for _ in range(2):
        assert [run.name for run in memory.records()] == ["a"]
    assert capsys.readouterr().err.count("2 of 3 entries are no runs") == 1


def _remember(path, name, barrier):
    for i in range(4):
        barrier.wait()
        assert Memory(path).remember(record(f"{name}{i}"))


def test_two_processes_write_into_a_new_memory(path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=120)
    other = context.Process(target=_remember, args=(path, "b", barrier))
    other.start()
    _remember(path, "a", barrier)
    other.join()
    assert other.exitcode == 0
    expected = {f"{name}{i}" for name in "ab" for i in range(4)}
    assert {run.name for run in Memory(path).records()} == expected
    with sqlite3.connect(path) as connection:
        numbers = connection.execute("SELECT number FROM trials ORDER BY number").fetchall()
    assert numbers == [(i,) for i in range(8)] and names_in(path.parent) == [path.name]


def test_tables_that_another_process_makes_just_now_are_waited_for(path, monkeypatch):
    busy = [sqlalchemy.exc.SQLAlchemyError("already exists")]

    class Storage(optuna.storages.RDBStorage):
        def __init__(self, *args, **kwargs):
            if busy:
                raise busy.pop()
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Storage)
    assert Memory(path).remember(record()) and len(Memory(path).records()) == 1
    assert not busy


def _random(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _scribbled(path):
    content = bytearray(path.read_bytes())
    content[4096:20480] = np.random.default_rng(0).bytes(16384)
    path.write_bytes(content)


def _garbled(path):
    """Whole for SQLite, and no table of Optuna's."""
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE trials RENAME COLUMN number TO nunber")


@pytest.mark.parametrize("damage", [_random, _truncated, _scribbled, _garbled])
def test_a_damaged_file_is_set_aside_and_none_of_it_lost(filled, damage, capsys):
    damage(filled)
    before, memory = filled.read_bytes(), Memory(filled)
    for _ in range(2):
        assert memory.propose(TASK) is None and memory.records() == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(filled) in said and "damaged" in said
    assert filled.read_bytes() == before  # reading leaves it alone

    assert memory.remember(record("new"))
    assert [run.name for run in Memory(filled).records()] == ["new"]
    [aside] = filled.parent.glob("damaged-*")
    assert aside.read_bytes() == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and aside.name in said
    assert names_in(filled.parent) == [aside.name, filled.name]


def test_files_set_aside_within_a_second_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "strftime", lambda _: "20260102-030405")
    (tmp_path / "m-journal").write_text("of one")  # would be played into the next file
    for content in ("one", "two", "three"):
        (tmp_path / "m").write_text(content)
        module.set_aside(tmp_path / "m")
    found = {
        path.name.removeprefix("damaged-20260102-030405"): path.read_text()
        for path in tmp_path.iterdir()
    }
    assert found == {"-m": "one", "-m-journal": "of one", "-2-m": "two", "-3-m": "three"}


@pytest.mark.parametrize("table", ["experiments (id)", "studies (patient)"])
def test_the_database_of_another_program_is_left_alone(tmp_path, table, capsys):
    path = tmp_path / "theirs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table}")
    before, memory = path.read_bytes(), Memory(path)
    assert memory.records() == [] and not memory.remember(record())
    assert path.read_bytes() == before and names_in(tmp_path) == [path.name]
    assert "another program" in capsys.readouterr().err


def test_a_memory_of_another_version_of_optuna_is_left_alone(filled, capsys):
    with sqlite3.connect(filled) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    before, memory = filled.read_bytes(), Memory(filled)
    assert memory.records() == [] and not memory.remember(record())
    assert filled.read_bytes() == before and names_in(filled.parent) == [filled.name]
    assert "optuna" in capsys.readouterr().err


@pytest.mark.parametrize(("lock", "readable"), [("IMMEDIATE", True), ("EXCLUSIVE", False)])
def test_a_locked_file_is_waited_for_and_then_gone_without(filled, lock, readable, capsys):
    memory = Memory(filled, patience=0.1)
    other = sqlite3.connect(filled)
    other.execute(f"BEGIN {lock}")
    assert not memory.remember(record("b"))
    assert len(memory.records()) == readable
    assert "locked" in capsys.readouterr().err and names_in(filled.parent)[0] == filled.name
    other.execute("ROLLBACK")
    other.close()
    assert memory.remember(record("b")) and len(memory.records()) == 2


def test_what_cannot_be_written_as_json_is_said_and_costs_no_run(filled, capsys):
    assert not Memory(filled).remember(record(settings={"loss": lambda x: x}))
    assert "function" in capsys.readouterr().err and len(Memory(filled).records()) == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("foo://me:s3cret@host/db", "of no known database"),
        ("postgresql://me:s3cret@host:port/db", "of no known database"),
        ("postgresql+psycopg2://me:s3cret@host/db", "needs a driver"),
        ("sqlite://", "forgets"),
        ("sqlite:///:memory:", "forgets"),
        (Path("."), "a folder"),
    ],
)
def test_what_can_be_no_memory_is_refused_at_once(where, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=message) as error:
        Memory(where)
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value)


def test_without_optuna_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"metaopt\[improve\]"):
        Memory(tmp_path / "memory.sqlite")


def test_a_password_is_never_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psycopg2", types.ModuleType("psycopg2"))
    tried = []

    def unreachable(url, engine_kwargs):
        tried.append((url, engine_kwargs))
        raise ConnectionError(f"no connection to {url} by p{{w&d or p%7Bw%26d, key {'k3y'}")

    monkeypatch.setattr(optuna.storages, "RDBStorage", unreachable)
    url = "postgresql+psycopg2://me:p%7Bw%26d@db.example/runs?sslpassword=k3y"
    memory = Memory(url, patience=3.0)
    assert memory.where == "postgresql://db.example/runs" and "p%7B" not in repr(vars(memory))
    assert memory.records() == [] and not memory.remember(record())
    assert len(tried) == 2 and tried[0][1] == {"connect_args": {"connect_timeout": 3}}
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "db.example/runs" in said
    assert not any(secret in said for secret in ("p{w&d", "p%7Bw%26d", "k3y"))


def test_a_memory_that_cannot_be_written_is_still_read(filled):
    filled.chmod(0o444)
    assert len(Memory(filled).records()) == 1
