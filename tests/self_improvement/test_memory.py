import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy

from metaopt.errors import UserError
from metaopt.files import as_record
from metaopt.self_improvement import memory as module
from metaopt.self_improvement.memory import (
    CATEGORY_MISMATCH,
    MISSING_COST,
    TABLE,
    Memory,
    RunRecord,
    choose,
    distance,
)
from metaopt.self_improvement.records import Decision, TriedChange

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
    assert memory.records() == [] and memory.propose(TASK) is None
    assert not path.parent.exists() and capsys.readouterr().err == ""
    path.parent.mkdir()
    path.touch()
    assert memory.records() == [] and path.stat().st_size == 0
    assert memory.remember(record()) and len(memory.records()) == 1
    assert names_in(path.parent) == [path.name]


def test_the_next_run_starts_where_a_similar_one_ended(path):
    memory = Memory(str(path))
    memory.remember(record("worse", 2.0, settings={"rate": 0.2}))
    memory.remember(record("better", 1.0, settings={"rate": 0.3}))
    memory.remember(record("far", 0.1, task=TASK | {"width": 256}))
    proposal = Memory(path).propose(TASK | {"tokens": np.float64(1.05e6)})
    assert proposal is not None and (proposal.run, proposal.settings) == ("better", {"rate": 0.3})


def test_runs_that_diverged_are_remembered_but_propose_nothing(path):
    memory = Memory(path)
    for loss in (math.nan, math.inf):
        assert memory.remember(record(loss=loss, decisions=[{"loss": loss}]))
    found = memory.records()
    assert [math.isnan(run.loss) for run in found] == [True, True]
    assert math.isnan(found[0].curve[1][1]) and found[0].decisions == [{"loss": None}]
    assert memory.propose(TASK) is None


def test_a_long_curve_is_kept_whole(path):
    curve = [(float(t), 1.0 / (t + 1)) for t in range(5000)]
    memory = Memory(path)
    memory.remember(record(curve=curve))
    assert memory.records()[0].curve == curve


def test_it_is_one_table_of_json_that_others_may_stand_beside(filled):
    with sqlite3.connect(filled) as connection:
        connection.execute("CREATE TABLE another (id)")
    assert Memory(f"sqlite:///{filled}").remember(record("b", 0.5))
    with sqlite3.connect(filled) as connection:
        rows = connection.execute(f"SELECT record FROM {TABLE} ORDER BY added").fetchall()
    assert [json.loads(text)["loss"] for (text,) in rows] == [1.5, 0.5]
    assert all(json.dumps(json.loads(text)) == text for (text,) in rows)


def test_what_others_put_into_the_table_is_skipped_and_logged_once(filled, capsys):
    with sqlite3.connect(filled) as connection:
        insert = f"INSERT INTO {TABLE} VALUES (?, ?, ?)"
        connection.executemany(insert, [("x", 1.0, "no JSON"), ("y", 2.0, '{"task": "x"}')])
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
    assert names_in(path.parent) == [path.name]


def _killed(path):
    def dies(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    memory = Memory(path)
    with memory._open(writing=True) as (execute, _):
        execute("PRAGMA cache_spill = 1", {})
        execute(f"UPDATE {TABLE} SET record = :x", {"x": "x" * 10**7})  # spills to the file
        dies()


def test_a_process_killed_while_it_writes_leaves_all_as_it_was(filled):
    other = multiprocessing.get_context("spawn").Process(target=_killed, args=(filled,))
    other.start()
    other.join()
    assert other.exitcode == -signal.SIGKILL
    assert f"{filled.name}-journal" in names_in(filled.parent)
    assert [run.name for run in Memory(filled).records()] == ["a"]
    assert Memory(filled).remember(record("b")) and names_in(filled.parent) == [filled.name]


def _random(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _scribbled(path):
    content = bytearray(path.read_bytes())
    content[4096:20480] = np.random.default_rng(0).bytes(16384)
    path.write_bytes(content)


def _garbled(path):
    """Whole for SQLite, and no table of a memory."""
    with sqlite3.connect(path) as connection:
        connection.execute(f"ALTER TABLE {TABLE} RENAME COLUMN record TO recrod")


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
    kept = sorted(path.read_text() for path in tmp_path.iterdir())
    assert kept == ["of one", "one", "three", "two"]
    (file, journal) = (p for p in sorted(tmp_path.iterdir()) if "one" in p.read_text())
    assert journal.name == f"{file.name}-journal" and file.name.startswith("damaged-20260102-03")


@pytest.mark.parametrize("table", ["experiments (id)", "studies (study_id)", "metaopt_runs_2 (id)"])
def test_the_database_of_another_program_is_left_alone(tmp_path, table, capsys):
    path = tmp_path / "theirs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table}")
    before, memory = path.read_bytes(), Memory(path)
    assert memory.records() == [] and not memory.remember(record())
    assert path.read_bytes() == before and names_in(tmp_path) == [path.name]
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "another program or version" in said


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
        ("sqlite://", "is lost"),
        ("sqlite:///:memory:", "is lost"),
        (Path("."), "a folder"),
    ],
)
def test_what_can_be_no_memory_is_refused_at_once(where, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=message) as error:
        Memory(where)
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value)


def test_only_a_url_needs_an_extra(monkeypatch, filled):
    monkeypatch.setitem(sys.modules, "sqlalchemy.engine", None)
    with pytest.raises(UserError, match=r"metaopt\[improve\]"):
        Memory("postgresql://host/runs")
    assert len(Memory(filled).records()) == 1


SERVER = "postgresql+psycopg2://me:p%7Bw%26d@db.example/runs?sslpassword=k3y"


def test_a_server_keeps_runs_as_a_file_does(monkeypatch, path):
    """By the same SQL: a SQLite file stands in for the server."""
    monkeypatch.setitem(sys.modules, "psycopg2", types.ModuleType("psycopg2"))
    path.parent.mkdir()
    file = sqlalchemy.URL.create("sqlite", database=str(path))
    create = sqlalchemy.create_engine
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda url, **_: create(file))
    memory = Memory(SERVER)
    assert memory.records() == [] and memory.remember(record()) and memory.remember(record("b"))
    assert [run.name for run in memory.records()] == ["a", "b"]
    assert memory.records() == Memory(path).records()


def test_a_password_is_never_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psycopg2", types.ModuleType("psycopg2"))
    tried = []

    def unreachable(url, poolclass, connect_args):
        tried.append(connect_args)
        whole = url.render_as_string(hide_password=False)
        raise ConnectionError(f"no connection to {whole} by p{{w&d or p%7Bw%26d, key {'k3y'}")

    monkeypatch.setattr(sqlalchemy, "create_engine", unreachable)
    memory = Memory(SERVER, patience=3.0)
    assert memory.where == "postgresql://db.example/runs" and "p%7B" not in repr(vars(memory))
    assert memory.records() == [] and not memory.remember(record())
    assert tried == [{"connect_timeout": 3}] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "db.example/runs" in said
    assert not any(secret in said for secret in ("p{w&d", "p%7Bw%26d", "k3y"))


def test_a_memory_that_cannot_be_written_is_still_read(filled):
    filled.chmod(0o444)
    assert len(Memory(filled).records()) == 1


SIMILAR_TASK = {"family": "markov", "width": 64, "order": 1}


def past(name, loss=1.0, seconds=1.0, decisions=None, **task):
    settings, decisions = {"rate": name}, decisions or [{"phase": 0, "reason": name}]
    return RunRecord(
        name=name,
        task=SIMILAR_TASK | task,
        settings=settings,
        loss=loss,
        tokens=10,
        seconds=seconds,
        decisions=decisions,
    )


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, 0.0),
        ({"width": 128}, math.log(2)),
        ({"width": 32}, math.log(2)),
        ({"family": "text"}, CATEGORY_MISMATCH),
        ({"order": "1"}, CATEGORY_MISMATCH),
        ({"order": True}, CATEGORY_MISMATCH),
        ({"order": 0}, 1.0),
        ({"depth": 2}, MISSING_COST),
        ({"width": 128, "family": "text"}, math.log(2) + CATEGORY_MISMATCH),
        ({"width": math.nan}, CATEGORY_MISMATCH),
    ],
)
def test_the_distance_is_a_sum_over_descriptors_and_the_same_both_ways(there, expected):
    assert distance(SIMILAR_TASK, SIMILAR_TASK | there) == pytest.approx(expected)
    assert distance(SIMILAR_TASK | there, SIMILAR_TASK) == pytest.approx(expected)


def test_the_distance_does_not_depend_on_units():
    here, there = {"tokens": 3e6, "rate": 0.1}, {"tokens": 2e6, "rate": 0.3}
    rescaled = [{"tokens": t["tokens"] / 1e6, "rate": t["rate"]} for t in (here, there)]
    assert distance(here, there) == pytest.approx(distance(*rescaled))
    assert distance({"x": -2.0}, {"x": 2.0}) == 2.0 and distance({"x": 0}, {"x": 0.0}) == 0.0
    assert distance({"n": 10**400}, {"n": 1}) > 0  # beyond any float


def test_the_best_of_the_nearest_proposes():
    near = [past("same", 1.0), past("slow", 0.9, 5.0), past("quick", 0.9, 2.0, width=66)]
    far = [past("elsewhere", 0.1, width=128), past("other", 0.0, family="text")]
    diverged = past("diverged", math.nan)
    proposal = choose([diverged, *far, *near], SIMILAR_TASK)
    assert proposal is not None and proposal.run == "quick"
    assert proposal.distance == pytest.approx(math.log(66 / 64))
    assert proposal.settings == {"rate": "quick"} and "quick" in proposal.reason
    assert proposal.decisions == []  # they were made on another task
    proposal = choose([*far, *near[:2]], SIMILAR_TASK)
    assert proposal is not None and (proposal.run, proposal.distance) == ("slow", 0.0)
    assert "the same task" in proposal.reason
    assert proposal.decisions == [{"phase": 0, "reason": "slow"}]

    proposal = choose([diverged, *far], SIMILAR_TASK)
    assert proposal is not None and proposal.run == "elsewhere"
    assert proposal.distance == pytest.approx(math.log(2))
    assert "width 128 there, 64 here" in proposal.reason


def test_without_similar_runs_nothing_is_proposed():
    assert choose([], SIMILAR_TASK) is None
    assert choose([past("diverged", math.inf)], SIMILAR_TASK) is None
    assert choose([past("far", width=64 * 25)], SIMILAR_TASK) is None
    assert choose([past("far", width=64 * 25)], SIMILAR_TASK, within=3.3) is not None
    assert module.TIE_DISTANCE < math.log(2) < module.MAX_DISTANCE


def test_a_choice_with_which_a_run_ended_worse_is_worse():
    def chose(value):
        compared = ("loss", 1.0, -0.5, 0.1, "better", True, 1.0, 40)
        choice = TriedChange("o", {"o": value}, 0, *compared)
        rate = TriedChange("r", {"r": 1.0}, 1, *compared)
        changes = {"o": ("a", value)}
        first = Decision("search", 1, 4, "accepted", changes, "", 1.0, 0, [choice, rate])
        return [as_record(first), as_record(first._replace(phase=1))]

    best = past("best", 0.5, decisions=chose("b"))
    best = dataclasses.replace(best, settings={"o": "b"})
    worse = past("worse", 0.6, decisions=chose("c"))
    shorter = dataclasses.replace(past("shorter", 0.9, decisions=chose("d")), tokens=9)
    same = past("same", 0.7, decisions=chose("b"))
    damaged = past("damaged", 0.7, decisions=[{"phase": 0, "trials": [{"direction": 0}]}, "x"])
    other = past("other", 0.8, decisions=chose("e"), width=65)
    proposal = choose([worse, best, shorter, same, other, damaged], SIMILAR_TASK)
    assert proposal is not None and proposal.run == "best"
    *own, refuted = proposal.decisions
    assert own == best.decisions and refuted["changes"] == {} and refuted["verdict"] == "kept"
    (entry,) = refuted["trials"]
    assert (entry["settings"], entry["verdict"], entry["accepted"]) == ({"o": "c"}, "worse", False)
