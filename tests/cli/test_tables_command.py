import json
import shutil

import pytest

from metaopt.cli import tables
from metaopt.errors import UserError

RECORD = {
    **{"table": "a/first", "row": "MAML", "column": "5 steps", "value": 2.5, "ci95": 0.1},
    **{"unit": "nats", "n": 3, "seeds": [0], "preset": "cpu", "device": "CPU"},
    **{"versions": {"jax": "0.10"}, "command": "python -m experiments.x"},
}
MARKED = "before\n<!-- table: a/cpu -->\n<!-- end -->\nafter\n"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "a" / "cpu"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    records = [RECORD, RECORD | {"table": "a/second", "row": "ANIL"}]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "results"


def test_the_readme_and_the_committed_results_agree(capsys):
    tables.check(tables.RESULTS, tables.ROOT / "README.md")
    assert "cells with their configs and commands" in capsys.readouterr().out


def test_a_marker_names_a_table_or_takes_the_first(results):
    text = tables.with_tables(MARKED, results)
    assert "| MAML | 2.50 ± 0.10 |" in text and text.startswith("before") and "ANIL" not in text
    assert tables.with_tables(text, results) == text
    named = MARKED.replace("a/cpu", "a/cpu a/second")
    assert "| ANIL | 2.50 ± 0.10 |" in tables.with_tables(named, results)
    with pytest.raises(UserError, match="a/third"):
        tables.with_tables(MARKED.replace("a/cpu", "a/cpu a/third"), results)


def test_check_names_all_that_is_amiss(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(tables.with_tables(MARKED, results))
    tables.check(results, readme)
    readme.write_text(readme.read_text().replace("2.50", "2.40"))
    folder = results / "a" / "cpu"
    (folder / "config.json").unlink()
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(RECORD | {"table": "a/second", "command": ""}) + "\n")
    with pytest.raises(UserError, match=r"no config\.json.*lacks command.*--write-readme"):
        tables.check(results, readme)
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"value": NaN}\n')
    with pytest.raises(UserError, match=r"no config\.json.*results\.jsonl:4 is damaged"):
        tables.check(results, readme)


def test_only_finished_runs_are_kept(tmp_path, monkeypatch, results):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "kept")
    run = tmp_path / "runs" / "a" / "cpu-1"
    shutil.copytree(results / "a" / "cpu", run)
    with pytest.raises(UserError, match="not a finished run"):
        tables.keep(run, "cpu")
    (run / "finished").touch()
    kept = tables.keep(run, "cpu")
    assert {path.name for path in kept.iterdir()} == {"config.json", "results.jsonl"}


@pytest.mark.parametrize(
    ("run", "name"),
    [
        *(("runs/a/cpu-1", name) for name in ("../../../name", "..", "", "/etc", "a/b", "a\0b")),
        *(("runs/a/cpu-1", name) for name in ("x" * 300, "out", "loop")),
        *(("runs/a/absent", "cpu"), ("runs/a/damaged", "cpu"), ("gs://runs/a", "cpu")),
    ],
)
def test_nothing_is_kept_outside_the_results(tmp_path, monkeypatch, results, run, name):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    for place in ("cpu-1", "damaged"):
        shutil.copytree(results / "a" / "cpu", tmp_path / "runs" / "a" / place)
        (tmp_path / "runs" / "a" / place / "finished").touch()
    (tmp_path / "runs" / "a" / "damaged" / "results.jsonl").write_text("[1]\n")
    (tmp_path / "kept" / "a").mkdir(parents=True)
    (tmp_path / "kept" / "a" / "out").symlink_to(tmp_path)
    (tmp_path / "kept" / "a" / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    config = tables.Config(keep=(run, name))
    with pytest.raises(UserError):
        tables.run(config)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["../../secret", "a/../../secret", "/etc", "a//cpu", "a/out"])
def test_a_marker_reads_nothing_outside_the_results(results, tmp_path, place):
    shutil.copytree(results / "a" / "cpu", tmp_path / "secret")
    (results / "a" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError):
        tables.with_tables(MARKED.replace("a/cpu", place), results)


def test_what_is_done_of_an_unfinished_run_is_kept_with_its_tables(tmp_path, monkeypatch, results):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "kept")
    run = tmp_path / "runs" / "a" / "cpu-1"
    shutil.copytree(results / "a" / "cpu", run)
    kept = tables.keep(run, "cpu", unfinished=True)
    names = {"config.json", "results.jsonl", "table.md", "table.tex"}
    assert {path.name for path in kept.iterdir()} == names
    assert "| MAML | 2.50 ± 0.10 |" in (kept / "table.md").read_text()
