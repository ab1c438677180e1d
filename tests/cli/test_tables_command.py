import json
import shutil
from pathlib import Path

import pytest

from metaopt.cli import tables
from metaopt.cli.tables import results_of
from metaopt.errors import UserError

RECORD = {
    **{"table": "a/first", "row": "MAML", "column": "5 steps", "value": 2.5, "ci95": 0.1},
    **{"unit": "nats", "n": 3, "seeds": [0], "preset": "cpu", "device": "CPU"},
    **{"versions": {"jax": "0.10"}, "command": "python -m experiments.x"},
}
MARKED = "before\n<!-- table: a/cpu -->\n<!-- end -->\nafter\n"


PROJECT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one experiment, in the current directory."""
    folder = results_of(tmp_path) / "a" / "cpu"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    records = [RECORD, RECORD | {"table": "a/second", "row": "ANIL"}]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(project):
    """An unfinished run."""
    directory = project / "runs" / "a" / "cpu-1"
    shutil.copytree(results_of(project) / "a" / "cpu", directory)
    return directory


def page(project, text, name="README.md"):
    path = project / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def shown(project, text):
    """The text of a page with its tables."""
    return tables.with_tables(page(project, text), results_of(project))


def test_the_pages_and_the_committed_results_agree(capsys):
    tables.check(PROJECT)
    assert "cells with their configs and commands" in capsys.readouterr().out


def test_a_marker_names_a_table_or_takes_the_first(project):
    text = shown(project, MARKED)
    assert "| MAML | 2.50 ± 0.10 |" in text and text.startswith("before") and "ANIL" not in text
    assert shown(project, text) == text
    assert "| ANIL | 2.50 ± 0.10 |" in shown(project, MARKED.replace("a/cpu", "a/cpu a/second"))
    with pytest.raises(UserError, match=r"README\.md asks a/cpu for a/third"):
        shown(project, MARKED.replace("a/cpu", "a/cpu a/third"))


def test_the_pages_of_the_current_project_are_written(project, capsys):
    written = [page(project, MARKED), page(project, MARKED, "docs/numbers.md")]
    other = page(project, "no table\n", "docs/other.md")
    with pytest.raises(UserError, match=r"README\.md are not .*numbers\.md are not .*--write"):
        tables.run(tables.Config(check=True))
    tables.run(tables.Config(write=True))
    assert all("| MAML |" in path.read_text() for path in written)
    assert other.read_text() == "no table\n"
    tables.run(tables.Config(check=True, project=project))
    assert capsys.readouterr().out.startswith("2 cells")


def test_a_place_without_results_is_named(project, monkeypatch):
    monkeypatch.chdir(project / "experiments")
    for config in (tables.Config(), tables.Config(check=True), tables.Config(write=True)):
        with pytest.raises(UserError, match=r"holds no results.*--project"):
            tables.run(config)


def test_check_names_all_that_is_amiss(project):
    readme = page(project, shown(project, MARKED))
    tables.check(project)
    readme.write_text(readme.read_text().replace("2.50", "2.40"))
    folder = results_of(project) / "a" / "cpu"
    (folder / "config.json").unlink()
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(RECORD | {"table": "a/second", "command": ""}) + "\n")
    with pytest.raises(UserError, match=r"no config\.json.*lacks command.*--write"):
        tables.check(project)
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"value": NaN}\n')
    with pytest.raises(UserError, match=r"no config\.json.*results\.jsonl:4 is damaged"):
        tables.check(project)


def test_only_finished_runs_are_kept(project, run):
    with pytest.raises(UserError, match="not a finished run"):
        tables.run(tables.Config(keep=(str(run), "new")))
    (run / "finished").touch()
    tables.run(tables.Config(keep=(str(run), "new")))
    kept = results_of(project) / "a" / "new"
    assert {path.name for path in kept.iterdir()} == {"config.json", "results.jsonl"}


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("runs/a/cpu-1", name) for name in ("../../../name", "..", "", "/etc", "a/b", "a\0b")),
        *(("runs/a/cpu-1", name) for name in ("x" * 300, "out", "loop")),
        *(("runs/a/absent", "cpu"), ("runs/a/damaged", "cpu"), ("gs://runs/a", "cpu")),
    ],
)
def test_nothing_is_kept_outside_the_results(project, run, place, name):
    shutil.copytree(run, run.with_name("damaged"))
    for directory in (run, run.with_name("damaged")):
        (directory / "finished").touch()
    (run.with_name("damaged") / "results.jsonl").write_text("[1]\n")
    (results_of(project) / "a" / "out").symlink_to(project)
    (results_of(project) / "a" / "loop").symlink_to("loop")
    before = sorted(project.rglob("*"))
    with pytest.raises(UserError):
        tables.run(tables.Config(keep=(place, name)))
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize("place", ["../../secret", "a/../../secret", "/etc", "a//cpu", "a/out"])
def test_a_marker_reads_nothing_outside_the_results(project, place):
    results = results_of(project)
    shutil.copytree(results / "a" / "cpu", project / "secret")
    (results / "a" / "out").symlink_to(project / "secret")
    with pytest.raises(UserError):
        shown(project, MARKED.replace("a/cpu", place))


def test_what_is_done_of_an_unfinished_run_is_kept_with_its_tables(project, run):
    kept = tables.keep(results_of(project), run, "new", unfinished=True)
    names = {"config.json", "results.jsonl", "table.md", "table.tex"}
    assert {path.name for path in kept.iterdir()} == names
    assert "| MAML | 2.50 ± 0.10 |" in (kept / "table.md").read_text()
