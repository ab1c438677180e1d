import dataclasses

import pytest

import metaopt
from experiments import harness
from experiments.evolve import ALL, ONCE, Config, presets, run
from metaopt.reporting.page import page
from metaopt.reporting.tables import read_records

SMOKE = presets("smoke")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A life of two waves of Python's library, with what it is compared with."""
    root = tmp_path_factory.mktemp("runs")
    run(dataclasses.replace(SMOKE, root=str(root)))
    (place,) = (root / "evolve").iterdir()
    return root, place


def test_a_row_a_generation_and_two_beside_them(done):
    _, place = done
    records = read_records(place / "results.jsonl")
    rows = ["generation 1", "generation 2", ONCE, ALL]
    assert list(dict.fromkeys(r["row"] for r in records)) == rows
    found = {(r["row"], r["column"]): r["value"] for r in records}
    assert found["generation 1", "old"] is None and found["generation 2", "forgetting"] is not None
    assert all(0 < found[row, "held-out"] < 9 for row in rows)
    assert (place / "curves.png").exists()
    told = (place / "table.md").read_text(encoding="utf-8")
    assert f"minus {ONCE}" in told and f"minus {ALL}" in told


def test_the_same_command_adds_nothing_and_changes_nothing(done):
    root, place = done
    files = [place / "generations.jsonl", place / "results.jsonl"]
    before = [file.read_bytes() for file in files]
    run(dataclasses.replace(SMOKE, root=str(root)))
    assert [file.read_bytes() for file in files] == before


def test_what_is_kept_is_loaded_and_shown(done):
    _, place = done
    found = metaopt.load(place)
    assert found.row == "MAML"
    told = page(place)
    assert "Generations" in told and "domains, weakest first" in told


def test_a_folder_is_recorded_without_a_flag():
    config = Config(folder="my texts", waves=3)
    command = harness.command("evolve", config, presets)
    assert command == "python -m experiments.evolve 'my texts' --waves 3"
    assert harness.parse("evolve", presets, None, ["my texts", "--waves", "3"]) == config
