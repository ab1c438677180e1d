import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from metaopt import files, runs
from metaopt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    data: Path = Path("texts")
    outer: Outer = Outer()


def test_the_same_config_continues_an_unfinished_run_and_no_other(tmp_path):
    first = runs.open_run(tmp_path, "toy", "cpu", Config())
    assert not first.resumed
    assert re.fullmatch(r"cpu-\d{8}-\d{6}", first.directory.name)
    again = runs.open_run(tmp_path, "toy", "cpu", Config())
    assert again.resumed and again.directory == first.directory

    others = [
        runs.open_run(tmp_path, "toy", "cpu", Config(seed=1)),
        runs.open_run(tmp_path, "toy", "cpu-large", Config()),
        runs.open_run(tmp_path, "other", "cpu", Config()),
    ]
    first.finish()
    others.append(runs.open_run(tmp_path, "toy", "cpu", Config()))
    assert not any(run.resumed for run in others)
    assert len({run.directory for run in [first, *others]}) == 5


def test_the_newest_unfinished_run_is_the_one_continued(tmp_path):
    parent = tmp_path / "toy"
    for name in ("cpu-20200101-000000-2", "cpu-20200101-000000-10", "cpu-20190101-000000"):
        runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=parent / name)
    run = runs.open_run(tmp_path, "toy", "cpu", Config())
    assert run.directory.name == "cpu-20200101-000000-10"


def test_a_given_directory_of_another_config_is_refused_by_field(tmp_path):
    given = tmp_path / "mine"
    runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=given)
    assert runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=given).resumed
    other = Config(outer=Outer(learning_rate=0.2))
    before = (given / "config.json").read_text()
    with pytest.raises(UserError, match=r"outer\.learning_rate: 0\.1 saved, 0\.2 now") as error:
        runs.open_run(tmp_path, "toy", "cpu", other, run_dir=given)
    assert "seed" not in str(error.value) and "\n" not in str(error.value)
    assert (given / "config.json").read_text() == before


def test_a_given_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="is no run"):
        runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_differences_name_absent_fields():
    text = runs.differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"d": None}})
    assert text == "b.c: 2 saved, absent now, b.d: absent saved, null now"
    assert runs.differences(runs.as_json(Config()), runs.as_json(Config())) == ""


def test_json_lines_survive_a_write_that_was_cut_short(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_json_lines(path) == []
    for step in range(3):
        files.append_json_line(path, {"step": step, "losses": np.full(2, step, np.float32)})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in files.read_json_lines(path)] == [0, 1, 2]
    files.keep_json_lines(path, lambda line: line["step"] != 1)
    files.append_json_line(path, {"step": 3})
    assert files.read_json_lines(path) == [
        {"step": 0, "losses": [0.0, 0.0]},
        {"step": 2, "losses": [2.0, 2.0]},
        {"step": 3},
    ]


def test_a_damaged_line_is_named_and_the_file_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    before = path.read_text()
    with pytest.raises(UserError, match=r"lines\.jsonl:2"):
        files.keep_json_lines(path, lambda line: True)
    assert path.read_text() == before


def test_what_a_result_depends_on():
    assert set(runs.versions()) == {"python", "jax", "flax", "optax", "metaopt"}
    assert re.fullmatch(r"\d+-core CPU", runs.device_name())
    assert re.fullmatch(r"None|[0-9a-f]{7,}(-dirty)?", str(runs.git_commit()))
