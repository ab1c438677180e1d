import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaopt.errors import UserError
from metaopt.training import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    limit: float = math.inf
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


OPEN = """
import sys
from metaopt.training import runs
from metaopt.errors import UserError
try:
    run = runs.open_run(sys.argv[1], "toy", "cpu", {"seed": 0}, run_dir=(sys.argv[2:] or [None])[0])
except UserError as error:
    sys.exit(f"error: {error}")
print(run.directory, run.resumed, flush=True)
input()
"""


def another_process(*args):
    """A process that opens a run and keeps it until it is told to end, and what it says."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", OPEN, *map(str, args)]
    process = subprocess.Popen(command, encoding="utf-8", **pipes)
    return process, process.stdout.readline().split()


@pytest.mark.parametrize("given", [False, True])
def test_one_process_at_a_time_has_a_run(tmp_path, given):
    config, args = {"seed": 0}, [tmp_path, tmp_path / "mine"] if given else [tmp_path]
    first, (directory, _) = another_process(*args)
    options = {"run_dir": directory} if given else {}
    before = {path: path.read_bytes() for path in Path(directory).iterdir()}
    with pytest.raises(UserError, match=f"process {first.pid} on") as error:
        runs.open_run(tmp_path, "toy", "cpu", config, **options)
    assert "\n" not in str(error.value) and "--run-dir" in str(error.value)
    with pytest.raises(UserError), runs.lock_directory(directory):
        pass
    assert {path: path.read_bytes() for path in Path(directory).iterdir()} == before

    first.send_signal(signal.SIGKILL)  # however it ends, the next one goes on
    first.communicate()
    with runs.open_run(tmp_path, "toy", "cpu", config, **options) as run:
        assert run.resumed and str(run.directory) == directory
        again = runs.open_run(tmp_path, "toy", "cpu", config, **options)  # as in a notebook
        (tmp_path / "link").symlink_to(directory)
        with runs.lock_directory(directory), runs.lock_directory(tmp_path / "link"):
            assert again.directory == run.directory
        second, said = another_process(*args)
        assert said == [] and f"process {os.getpid()} on" in second.communicate()[1]
    third, said = another_process(*args)
    assert said == [directory, "True"]
    third.communicate("\n")


def test_a_finished_or_forgotten_run_is_not_locked(tmp_path):
    run = runs.open_run(tmp_path, "toy", "cpu", {"seed": 0}, run_dir=tmp_path / "mine")
    run.finish()
    del run
    runs.open_run(tmp_path, "toy", "cpu", {"seed": 0}, run_dir=tmp_path / "other")  # not kept
    for name in ("mine", "other"):
        process, said = another_process(tmp_path, tmp_path / name)
        assert said[1:] == ["True"]
        process.communicate("\n")


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", "gs://bucket", "x" * 300):
        for places in ((root, None), (tmp_path, root)):
            with pytest.raises(UserError):
                runs.open_run(places[0], "toy", "cpu", Config(), run_dir=places[1])
        with pytest.raises(UserError), runs.lock_directory(root):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and not Path("gs:").exists()


def test_what_a_killed_process_left_is_cleared(tmp_path):
    run = runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=tmp_path / "mine")
    (run.directory / "results.jsonl.123-456.tmp").write_text("half")
    (run.directory / "results.jsonl").write_text('{"row": 1}\n{"ro')
    again = runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=tmp_path / "mine")
    assert again.resumed and again.results.read_text() == '{"row": 1}\n'
    assert not list(again.directory.glob("*.tmp"))


@pytest.mark.parametrize("text", ["[1]", "{", '{"seed": "\\ud800"}', "[" * 99999, "\0", "NaN"])
def test_a_damaged_config_is_no_run_of_this_config(tmp_path, text):
    run = runs.open_run(tmp_path, "toy", "cpu", Config())
    (run.directory / "config.json").write_text(text)
    assert not runs.open_run(tmp_path, "toy", "cpu", Config()).resumed
    with pytest.raises(UserError):
        runs.open_run(tmp_path, "toy", "cpu", Config(), run_dir=run.directory)


def test_names_that_differ_have_folders_that_differ():
    names = ["MAML", "Meta-SGD", "MAML é", "MAML è", "π", "φ", "", "x" * 300, "x" * 299, "\udcff"]
    slugs = [runs.slug(name) for name in names]
    assert slugs[:2] == ["maml", "meta-sgd"] and len({*slugs}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]{1,120}", slug) for slug in slugs)


def test_differences_name_absent_fields():
    text = runs.differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"d": None}})
    assert text == "b.c: 2 saved, absent now, b.d: absent saved, null now"
    assert runs.differences(runs.as_json(Config()), runs.as_json(Config())) == ""


def test_what_a_result_depends_on():
    assert set(runs.versions()) == {"python", "jax", "flax", "optax", "metaopt"}
    assert re.fullmatch(r"\d+-core CPU", runs.device_name())


def test_the_commit_is_that_of_the_package_itself(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    def found():
        code = "import metaopt.training.runs as runs; print(runs.__file__, runs.git_commit())"
        environment = os.environ | {"PYTHONPATH": str(package)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, check=True)
        file, commit = done.stdout.decode().split()
        assert file.startswith(str(package))
        return commit

    package = tmp_path / "env" / "site-packages"
    package.mkdir(parents=True)
    shutil.copytree(Path(runs.__file__).parents[1], package / "metaopt")
    assert found() == "None"
    git("init")
    (tmp_path / "thesis.tex").write_text("...")
    git("add", "thesis.tex")
    git("commit", "-m", "a thesis, and metaopt installed beside it")
    assert found() == "None"
    git("add", "env")
    git("commit", "-m", "metaopt itself")
    clean = found()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    (tmp_path / "thesis.tex").write_text("changed")
    assert found() == f"{clean}-dirty"
