"""What every table gets from the harness, on a table without training."""

import dataclasses
import importlib
import json
import math
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from experiments import harness
from metaopt.cli import command_line, evolve
from metaopt.errors import Diverged, UserError
from metaopt.files import read_json_lines
from metaopt.ranges import Checked, Positive
from metaopt.reporting.results import Published
from metaopt.self_improvement.improving import improving_train
from metaopt.statistics import Interval
from metaopt.training.loop import train
from metaopt.training.runs import as_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Checked):
    rate: Positive = 0.1
    clip: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """A toy.

    Attributes:
      width: Width of it.
    """

    size: Literal["small", "large"] = "small"
    width: int = 8
    folder: str | None = None
    outer: Outer = dataclasses.field(default_factory=Outer)


class Row(NamedTuple):
    name: str
    value: float


ROWS = [Row("one", 1.0), Row("two", 2.0), Row("three", 3.0)]


def presets(preset: str = "cpu", size: str = "small") -> Config:
    width = {"smoke": 1, "cpu": 8, "gpu": 512}[preset] * (2 if size == "large" else 1)
    return Config(preset=preset, size=size, width=width)  # type: ignore[arg-type]


def parse(line):
    return harness.parse("toy", presets, "A toy.", shlex.split(line))


def open_table(tmp_path, config=None, **options):
    config = dataclasses.replace(config or Config(), root=str(tmp_path / "runs"))
    names = [row.name for row in ROWS]
    options = {"table": "toy", "unit": "nats", "rows": names, "seeds": [0]} | options
    return harness.TableRun("toy", config, presets, **options)


def add(table, row, value=None, **fields):
    value = row.value if value is None else value
    table.add(row.name, "loss", Interval(value, 0.5, 4), **fields)


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("", 8),
        ("--preset gpu", 512),
        ("--preset=gpu --size large", 1024),
        ("--size large --rows a --preset smoke", 2),
        ("--width 3 --preset gpu", 3),
        ("--preset gpu --preset cpu", 8),  # the last one counts
    ],
)
def test_flags_choose_the_defaults_of_the_others(line, width):
    assert parse(line).width == width


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset tpu", "unknown preset 'tpu': choose smoke, cpu or gpu"),
        ("--size huge", "unknown size 'huge': choose small or large"),
        ("--preset", "preset"),
        ("--widht 3", "--widht"),
        ("--width wide", "--width"),
    ],
)
def test_what_cannot_be_read_is_named(line, message):
    with pytest.raises(UserError, match=message):
        parse(line)


def test_help_shows_the_defaults_of_the_chosen_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset gpu --help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "Width of it. (default: 512)" in shown


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--preset gpu",
        "--preset gpu --size large",
        "--width 512",
        "--outer.no-clip",
        "--rows 'a b' c --improve",
        "--folder '$HOME/my \"text\"' --outer.rate 1e-05",
        "--root 'my runs' --run-dir mine",
    ],
)
def test_the_command_of_a_config_is_the_shortest_that_gives_it(line):
    config = parse(line)
    found = harness.command("toy", config, presets)
    prefix = "python -m experiments.toy"
    assert set(shlex.split(found)) == set(shlex.split(f"{prefix} {line}"))
    assert parse(found.removeprefix(prefix)) == config


def test_a_row_is_written_when_the_next_one_is_asked_for(tmp_path):
    table = open_table(tmp_path)
    for row in table.pending(ROWS):
        written = {r["row"] for r in read_json_lines(table.directory / "results.jsonl")}
        assert written == {other.name for other in ROWS[: ROWS.index(row)]}
        add(table, row)
    assert [r["row"] for r in table.records] == ["one", "two", "three"]
    assert all(r["unit"] == "nats" and r["seconds"] >= 0 for r in table.records)
    assert table.records[0]["command"].startswith("python -m experiments.toy")


def test_rows_that_are_finished_are_read_and_not_run_again(tmp_path):
    table = open_table(tmp_path)
    with pytest.raises(Diverged):
        for row in table.pending(ROWS):
            add(table, row)
            table.keep(row.name, losses=np.arange(3.0))
            if row.name == "two":
                raise Diverged("in the middle of a row")
    before = table.records[0]
    table.close()
    table = open_table(tmp_path)
    assert table.has("one") and not table.has("two")
    np.testing.assert_array_equal(table.kept("one")["losses"], np.arange(3.0))
    ran = []
    for row in table.pending(ROWS):
        ran.append(row.name)
        add(table, row)
    assert ran == ["two", "three"] and table.records[0] == before
    table.finish()
    assert open_table(tmp_path).directory != table.directory  # a finished run is not resumed


def test_single_cells_are_resumed_too(tmp_path):
    cells = [(row, column) for row in ROWS for column in ("a", "b")]

    def run(table, number):
        pending = table.pending(cells, lambda cell: cell[0].name, lambda cell: cell[1])
        for ran, (row, column) in enumerate(pending):
            if ran == number:
                return ran
            table.add(row.name, column, Interval(1.0, 0.1, 3))
        return None

    table = open_table(tmp_path)
    run(table, 3)
    table.close()
    table = open_table(tmp_path)
    assert table.has("two", "a") and not table.has("two", "b")
    assert run(table, 4) is None and len(table.records) == 6  # three were left


def test_other_data_or_another_config_make_another_run(tmp_path):
    first = open_table(tmp_path, data="aaa")
    first.close()
    saved = json.loads((first.directory / "config.json").read_text(encoding="utf-8"))
    assert saved["data"] == "aaa" and saved["width"] == 8 and "root" not in saved
    for config, data in [(Config(), "bbb"), (Config(width=3), "aaa")]:
        other = open_table(tmp_path, config, data=data)
        assert other.directory != first.directory
        other.close()
    given = Config(run_dir=str(first.directory))
    with pytest.raises(UserError, match=r"another config .data: .aaa. saved, .bbb. now"):
        open_table(tmp_path, given, data="bbb")
    assert open_table(tmp_path, given, data="aaa").directory == first.directory


def test_rows_have_the_order_of_the_table_whatever_ran_first(tmp_path):
    table = open_table(tmp_path)
    table.add("limit", "loss", Interval(0.0, math.nan, 1), limit=True)
    for row in table.pending(reversed(ROWS)):
        add(table, row)
    assert [r["row"] for r in table.records] == ["one", "two", "three", "limit"]
    add(table, ROWS[0], 7.0)  # in place of the first one
    assert [r["value"] for r in table.records] == [7.0, 2.0, 3.0, 0.0]


def test_several_tables_with_titles_notes_and_published_numbers(tmp_path, capsys):
    table = open_table(tmp_path)
    for row in table.pending(ROWS[::2]):  # their intervals do not meet
        add(table, row, published=Published(1.5, "A. Author, 2020", 0.1))
        table.add(row.name, "time", Interval(math.nan, math.nan, 1), table="toy/time", unit="s")
    table.finish(["a note"], titles={"toy": "", "toy/time": "How long"})
    text = (table.directory / "table.md").read_text(encoding="utf-8")
    assert text.startswith("| |") and "\n### How long\n" in text and text.endswith("- a note\n")
    assert "| one | **1.00 ± 0.50** (paper 1.5 ± 0.1) |" in text and "| one | – |" in text
    assert "seconds" not in text and "s; preset cpu" in text
    assert (table.directory / "table.tex").exists() and (table.directory / "finished").exists()
    assert "a note" in capsys.readouterr().out


def test_arrays_that_are_gone_are_said(tmp_path):
    table = open_table(tmp_path)
    with pytest.raises(UserError, match=r"one\.npz"):
        table.kept("one")


def test_rows_are_chosen_by_name():
    assert harness.select(ROWS, ["three", "one"]) == [ROWS[0], ROWS[2]]
    assert harness.select(ROWS, []) == ROWS
    with pytest.raises(UserError, match="no row 'four'; there are one, two, three"):
        harness.select(ROWS, ["four"])


RESULTS = Path(harness.__file__).parent / "results"
RECORDED = sorted(
    {
        (record["command"], str(path.parent.relative_to(RESULTS)))
        for path in RESULTS.glob("*/*/results.jsonl")
        for record in read_json_lines(path)
    }
)


@pytest.mark.parametrize(("command", "place"), RECORDED, ids=[place for _, place in RECORDED])
def test_a_recorded_command_gives_its_config_and_is_the_shortest_that_does(command, place):
    program, _, *flags = shlex.split(command)
    if program == "metaopt":
        config = command_line.parse(evolve.Config, flags, "metaopt evolve", "")
        shortest = " ".join(
            ["metaopt evolve", *command_line.changed_flags(config, evolve.Config())]
        )
    else:
        module = importlib.import_module(flags[0])
        name = flags[0].removeprefix("experiments.")
        config = harness.parse(name, module.presets, "", flags[1:])
        shortest = harness.command(name, config, module.presets)
    assert shortest == command
    now, saved = as_json(config), json.loads((RESULTS / place / "config.json").read_text("utf-8"))
    flat, recorded = dict(leaves(now)), dict(leaves(saved))
    # The preset cpu was once called reference, and improve was true or false.
    shared = flat.keys() & recorded.keys() - {"preset", "improve"}
    assert len(shared) > 5
    assert {key: flat[key] for key in shared} == {key: recorded[key] for key in shared}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
        )


def test_the_closed_loop_remembers_where_the_environment_says(monkeypatch):
    assert harness.begin() is train
    monkeypatch.delenv("METAOPT_MEMORY", raising=False)
    config = harness.TrainedConfig(improve="on")
    chosen: Any = harness.begin(config)
    assert chosen.func is improving_train and chosen.keywords["memory"] is None
    assert not chosen.keywords["loop"].report_only
    monkeypatch.setenv("METAOPT_MEMORY", "runs/memory.sqlite")
    chosen = harness.begin(config)
    assert chosen.keywords["memory"].where.endswith("memory.sqlite")
    chosen = harness.begin(harness.TrainedConfig(improve="report", memory="runs/mine.sqlite"))
    assert chosen.keywords["memory"].where.endswith("mine.sqlite")
    assert chosen.keywords["loop"].report_only


def test_the_flag_of_a_memory_is_a_file_and_needs_the_loop():
    with pytest.raises(UserError, match=r"give it in .METAOPT_MEMORY"):
        harness.TrainedConfig(improve="on", memory="postgresql://me:secret@host/runs")
    with pytest.raises(UserError, match="give --improve too"):
        harness.TrainedConfig(memory="runs/memory.sqlite")
