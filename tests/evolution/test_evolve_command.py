import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from words import write

from metaopt import cli
from metaopt.reporting.tables import read_records

SIZES = {
    "num-held-out": 1,
    "width": 8,
    "num-layers": 1,
    "length": 12,
    "num-support": 2,
    "num-query": 2,
    "inner.num-steps": 1,
    "inner-rates": 0.05,
    "episodes": 2,
    "data.capacity": 64,
}
FLAGS = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]


def generations(place):
    lines = (place / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def rows(place):
    """The rows of the table, without its caption, which says where the life is."""
    lines = (place / "table.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|")]


def test_the_command_lives_on_and_says_so(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["evolve", str(folder), *FLAGS, "--steps", "4", "--meta-steps", "0"]
    cli.main(args)
    place = tmp_path / "runs" / "evolve" / "texts"
    records = read_records(place / "results.jsonl")
    assert {r["row"] for r in records} == {"generation 1"} and records[0]["command"]
    assert "generation 1: 5 new domains" in capsys.readouterr().err
    write(folder, "more.txt", 9)
    cli.main(args)
    captured = capsys.readouterr()
    assert "generation 2: 1 new domains" in captured.err and "generation 2" in captured.out
    assert {r["row"] for r in read_records(place / "results.jsonl")} == {
        "generation 1",
        "generation 2",
    }
    assert (place / "curves.png").exists() and (place / "report.html").exists()
    reading = ["read", str(folder / "more.txt"), "--run", str(place), "--length", "12"]
    cli.main([*reading, "--kind", "all", "--optimizer", "sgd", "--learning-rate", "0.1"])
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {"as it is", "adapting", "gain"}
    assert float(lines["gain"].split()[0]) > 0


@pytest.mark.parametrize(
    "args, said",
    [
        (["nowhere"], "no folder"),
        (["texts", "--length", "800"], "episode"),
        (["texts", "--waves", "6"], "waves"),
        (["texts", "--data.capacity", "1"], "capacity"),
        (["texts", "--seed", "-1"], "seed"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    args, said, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["evolve", *args])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert stop.value.code == 2 and said in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_life_killed_at_random_times_is_the_same_life(folder, tmp_path):
    """Ten times by SIGKILL, which nothing can prepare for."""
    flags = [*FLAGS, "--waves", "2", "--steps", "300", "--meta-steps", "100"]
    command = [sys.executable, "-m", "metaopt", "evolve", str(folder), *flags, "--life"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(place):
        return subprocess.Popen(
            [*command, str(tmp_path / place)], env=environment, stderr=subprocess.DEVNULL
        )

    began = time.monotonic()
    assert start("straight").wait() == 0
    whole = time.monotonic() - began
    rng = random.Random(0)
    for _ in range(10):
        process = start("killed")
        try:
            process.wait(timeout=rng.uniform(0.3, 0.9) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start("killed").wait() == 0
    assert generations(tmp_path / "killed") == generations(tmp_path / "straight")
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
