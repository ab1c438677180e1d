"""The commands that use a trained row: adapt, score, generate."""

import re
import shlex
import shutil

import numpy as np
import pytest

from experiments import adapt_languages, harness
from metaopt import cli
from metaopt.console import printable
from metaopt.load import load

SIZES = "--preset smoke --tasks text --model bigram --rows Meta-SGD FOMAML --num-support 2 "
SIZES += "--num-query 2 --length 6 --num-valid-domains 1 --num-test-domains 1 "
SIZES += "--inner.num-steps 2 --comparison.max-inner-steps 2 --comparison.pretrain-steps 0 "
SIZES += "--comparison.meta-steps 2 --comparison.inner-rates 10"
TEXT = b"the cat sat on the mat; the dog sat on the cat. " * 8


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A finished run in another place, of a folder of text that is there no more."""
    place = tmp_path_factory.mktemp("use")
    folder = place / "folder"
    folder.mkdir()
    for name in ("on the mat", "in the hat", "at the door", "by the sea"):
        (folder / f"{name}.txt").write_text(f"{name} sat a cat, and {name} it stayed. " * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAOPT_DATA", str(place / "data"))
        args = [*shlex.split(SIZES), "--folder", str(folder), "--root", str(place / "runs")]
        harness.main("adapt_languages", adapt_languages.run, adapt_languages.presets, "", args)
    (directory,) = place.glob("runs/adapt_languages/*")
    shutil.move(directory, place / "moved")
    for name in ("folder", "data", "runs"):
        shutil.rmtree(place / name, ignore_errors=True)
    return place / "moved"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT)
    return tmp_path / "text.txt"


def metaopt(capsys, *args):
    """What a command prints, and what it says."""
    cli.main([str(arg) for arg in args])
    return capsys.readouterr()


def test_what_is_adapted_is_scored_by_hand(moved, file, tmp_path, capsys):
    path, found = tmp_path / "adapted.npz", load(moved, "FOMAML")
    before = {p: p.stat().st_mtime_ns for p in moved.rglob("*")}
    args = ("adapt", moved, "--on", file, "--row", "FOMAML", "--seed", 3, "--save", path)
    shown = metaopt(capsys, *args)
    assert {p: p.stat().st_mtime_ns for p in moved.rglob("*")} == before
    end = (384 // 7 - 5) * 7  # of 54 sequences of 7, the last 5 are held out
    adapted = found.adapt(TEXT[:end], seed=3)
    for params, line in zip((found.start, adapted), shown.out.splitlines(), strict=True):
        assert line.endswith(str(found.score(params, TEXT[end:])))
    assert f"{found.steps_of(TEXT[:end])} steps of 2 sequences of 6 at rate 10" in shown.err
    assert "loading" in shown.err and "adapting" in shown.err and "saved" in shown.err
    np.testing.assert_array_equal(found.read(path)["head"]["table"], adapted["head"]["table"])

    args = ("score", moved, "--on", file, "--row", "FOMAML", "--adapted", path)
    lines = metaopt(capsys, *args).out.splitlines()
    assert lines[0] == f"not adapted: {found.score(found.start, TEXT)}"
    assert lines[1] == f"adapted:     {found.score(adapted, TEXT)}"
    value = re.search(r"([\d.]+) ± ", lines[0])
    assert value and float(value[1]) == pytest.approx(8, abs=0.1)  # bits of a byte, before

    args = ("generate", moved, "--adapted", path, "--row", "FOMAML", "--prompt", "the c")
    text = found.generate(adapted, "the c", 12)
    lines = [printable(line) for line in text.split("\n")]
    assert metaopt(capsys, *args, "--length", 12).out == "\n".join([*lines, ""])


def test_a_reader_is_a_transformer(moved, file, capsys):
    with pytest.raises(SystemExit) as stop:
        metaopt(capsys, "read", file, "--run", moved, "--row", "FOMAML")
    assert stop.value.code == 2 and "its model is bigram" in capsys.readouterr().err


def test_the_same_seed_generates_the_same_text(moved, file, capsys):
    args = (
        "generate",
        moved,
        "--row",
        "Meta-SGD",
        "--on",
        file,
        "--length",
        40,
        "--temperature",
        2,
    )
    first, again, other = (metaopt(capsys, *args, "--seed", seed).out for seed in (0, 0, 1))
    assert first == again != other
    assert first.startswith(TEXT[-6:].decode())  # it continues the file


def test_what_adaptation_made_worse_is_said(moved, file, capsys):
    args = ("adapt", moved, "--on", file, "--row", "FOMAML")
    assert "worse" not in metaopt(capsys, *args).err
    assert "worse: try a lower --rate" in metaopt(capsys, *args, "--rate", 5000).err


def test_the_best_row_is_said(moved, file, capsys):
    shown = metaopt(capsys, "score", moved, "--on", file)
    assert f"row {load(moved).row!r} of seed 0, the best" in shown.err
    assert len(shown.out.splitlines()) == 1


REFUSED = [
    ("adapt RUN/absent --on FILE", "there is no run .*absent"),
    ("score UNFINISHED --on FILE", "not the directory of a finished run"),
    ("generate RUN --row Reptile", "no row 'Reptile'; there are FOMAML, Meta-SGD"),
    ("generate RUN --run-seed 7", "the seeds 0, not 7"),
    ("adapt RUN --on absent.txt", r"absent\.txt cannot be read"),
    ("adapt RUN --row Meta-SGD --on EMPTY", "empty.txt is empty"),
    ("adapt RUN --row Meta-SGD --on SHORT", r"27 bytes and needs 28, 4 sequences of 7"),
    ("adapt RUN --row Meta-SGD --on FILE --sequences 60", r"384 bytes and needs 434, 62 sequences"),
    ("generate RUN --row Meta-SGD --on TINY", r"13 bytes and needs 14, 2 sequences of 7"),
    ("score RUN --row Meta-SGD --on PACKED", "not plain text but gzip"),
    ("score RUN --row Meta-SGD --on FILE --adapted FILE", "text.txt"),
    ("score RUN --row Meta-SGD --on FILE --adapted OTHER", "another run or row"),
    ("generate RUN --row Meta-SGD --on FILE --adapted OTHER", "not both"),
    ("adapt RUN --row Meta-SGD --on FILE --save FILE", "--save .*text.txt is there already"),
    ("adapt RUN --row Meta-SGD --on FILE --save absent/a.npz", "there is no folder absent"),
    ("adapt RUN --row Meta-SGD --on FILE --steps 0", "--steps is 0"),
    ("generate RUN --row Meta-SGD --temperature -1", "--temperature is -1"),
    ("adapt --on FILE", "give the directory of a run, or --model PATH"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_what_cannot_be_is_one_line(moved, file, tmp_path, monkeypatch, capsys, line, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(TEXT[:27])
    (tmp_path / "tiny.txt").write_bytes(TEXT[:13])
    (tmp_path / "packed.txt").write_bytes(b"\x1f\x8b\x08" + TEXT)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(moved / "config.json", tmp_path / "unfinished")
    if "OTHER" in line:
        found = load(moved, "FOMAML")
        found.save(found.start, tmp_path / "other.npz")
    names = {"RUN": moved, "FILE": file, "UNFINISHED": tmp_path / "unfinished"}
    names |= {n.upper(): tmp_path / f"{n}.txt" for n in ("empty", "short", "tiny", "packed")}
    names["OTHER"] = tmp_path / "other.npz"
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    args = [re.sub("|".join(names), lambda m: str(names[m[0]]), arg) for arg in line.split()]
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    shown = capsys.readouterr()
    *phases, error = shown.err.splitlines()
    assert stop.value.code == 2 and not shown.out
    assert error.startswith("error: ") and re.search(message, error)
    assert all(phase.startswith(("loading", "row ")) for phase in phases)
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_bytes() == TEXT
