"""The built wheel, installed outside the repository: what a user has of `pip install`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import metaopt

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
BUILT_FROM = ("metaopt", "experiments", "benchmarks", "pyproject.toml", "README.md", "LICENSE")
LOADS = """
    import sys

    import metaopt

    found = metaopt.load(sys.argv[1], "Meta-SGD")
    print(sorted(found.meta_params), float(found.hparams["inner_learning_rate"]) > 0)
"""


def run(command, place, **environment):
    done = subprocess.run(
        command,
        cwd=place,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy: a build leaves files beside its sources."""
    place = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, place / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."]
    run(build, place)
    (found,) = (place / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs Python on the installed wheel; what it depends on is there already."""
    target, elsewhere = (tmp_path_factory.mktemp(name) for name in ("target", "elsewhere"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    run([*pip, str(wheel)], elsewhere)

    def python(*args):
        command = [str(target / "bin" / args[0]), *args[1:]] if args[0] == "metaopt" else args
        return run(command, elsewhere, PYTHONPATH=str(target))

    place = python(sys.executable, "-c", "import metaopt; print(metaopt.__file__)")
    assert place.startswith(str(target))
    return python


def script(text):
    lines = text.strip("\n").splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"metaopt"}
    assert "metaopt/py.typed" in names
    modules = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "metaopt").rglob("*.py")}
    assert modules <= set(names)


def test_the_command(installed):
    assert installed("metaopt", "--version") == f"metaopt {metaopt.__version__}\n"
    assert "doctor" in installed("metaopt", "--help")
    assert "usage: metaopt tables" in installed("metaopt", "tables", "--help")
    as_module = installed(sys.executable, "-m", "metaopt", "--help")
    assert as_module == installed("metaopt", "--help")


def test_the_code_of_the_readme_meta_trains_and_adapts(installed):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    judged, by_hand = installed(sys.executable, "-c", code).splitlines()[-2:]
    said = re.search(r"# (\d.* ± .*)", code)
    assert said
    means = [[float(x) for x in re.findall(r"(\S+) ±", line)] for line in (said[1], judged)]
    np.testing.assert_allclose(*means, atol=0.02)
    before, after = by_hand.split()
    assert 0 < float(after) < float(before)


def test_a_row_of_a_run_is_loaded(installed, tmp_path):
    flags = "--preset smoke --rows Meta-SGD --vocab-size 4 --inner.num-steps 1 "
    flags += "--comparison.max-inner-steps 1"
    command = [sys.executable, "-m", "experiments.adapt_languages", *shlex.split(flags)]
    run([*command, "--run-dir", str(tmp_path / "run")], REPOSITORY, PYTHONPATH=str(REPOSITORY))
    found = installed(sys.executable, "-c", script(LOADS), str(tmp_path / "run"))
    assert found == "['log_rates', 'params'] True\n"


def test_a_model_lives_from_the_wheel(installed, tmp_path):
    """With a folder of six domains, and what it keeps is scored."""
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(6):
        words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 4)) for _ in range(20)]
        text = " ".join(rng.choice(words, 2000))
        (tmp_path / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    sizes = "--num-held-out 1 --width 8 --num-layers 1 --length 12 --num-support 2 --num-query 2"
    short = "--steps 4 --meta-steps 0 --episodes 2"
    place = tmp_path / "life"
    command = ["metaopt", "evolve", str(tmp_path / "texts"), "--life", str(place)]
    told = installed(*command, *sizes.split(), *short.split())
    assert "generation 1" in told and (place / "report.html").is_file()
    file = tmp_path / "texts" / "0.txt"
    assert "bits/byte" in installed("metaopt", "score", str(place), "--on", str(file))
