import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt import files
from metaopt.console import printable
from metaopt.errors import UserError


class Interval(NamedTuple):
    mean: float
    n: int


class Row(NamedTuple):
    spans: dict[str, tuple[int, float]]
    intervals: Sequence[Interval]
    best: Interval | None
    values: Sequence[float] = ()
    other: Interval | None = None
    label: str | None = None


class Fields(TypedDict):
    name: str
    step: int
    loss: NotRequired[float | None]
    kind: NotRequired[Literal["a", "b"]]
    seeds: NotRequired[list[int]]
    more: NotRequired[dict[str, Interval]]


WHOLE = {"name": "a", "step": 3, "loss": 1, "kind": "b", "seeds": [1], "other": [{}]}
WHOLE["more"] = {"x": {"mean": None, "n": 2}}

FULL = """
import resource, sys
from pathlib import Path
from metaopt import files
from metaopt.errors import UserError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

path, text = Path(sys.argv[1]), Path(sys.argv[2])
for size in range(0, 400, 7):
    for file in (path, text):
        file.write_text('{"step": -1}\\n')
    done = [-1]
    limit(size)
    for step in range(20):
        try:
            files.append_json_line(path, {"step": step})
        except UserError as error:
            assert "\\n" not in str(error) and str(path) in str(error)
        else:
            done.append(step)
    try:
        files.write_text(text, "x" * 100)
        assert size >= 100
    except UserError:
        assert text.read_text() == '{"step": -1}\\n'
    limit(10000)
    files.append_json_line(path, {"step": 99})
    assert files.read_json_lines(path) == [{"step": step} for step in [*done, 99]], size
    assert len(list(path.parent.iterdir())) == 2
"""


def test_on_a_full_disk_a_file_stays_as_it_was_and_goes_on_whole(tmp_path):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL, str(tmp_path / "a.jsonl"), str(tmp_path / "a.md")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_what_a_kill_left_of_a_line_does_not_reach_the_next(tmp_path):
    path, lines = tmp_path / "lines.jsonl", b'{"step": 1}\n{"step": 2}\n'
    for cut in range(len(lines) + 1):
        path.write_bytes(lines[:cut])
        before = files.read_json_lines(path)
        files.append_json_line(path, {"step": 3, "pad": "é" * 5000})
        files.append_json_line(path, {"step": 4})
        steps = [line["step"] for line in files.read_json_lines(path)]
        assert steps == [*(line["step"] for line in before), 3, 4]
        path.write_bytes(path.read_bytes()[:-20])  # the long line and a bit of the last
    assert files.read_json_lines(tmp_path / "none.jsonl") == []


def test_lines_are_kept_by_what_they_hold_and_arrays_are_lists(tmp_path):
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


@pytest.mark.parametrize("other", [None, Interval(2.0, 4)])
def test_a_named_tuple_comes_back_as_it_was(other):
    row = Row({"a": (1, 2.5)}, (Interval(math.nan, 3), Interval(1.0, 2)), other, (0.5, 1.5))
    line = json.loads(json.dumps(files.as_record(row), allow_nan=False))
    assert line["intervals"][0] == {"mean": None, "n": 3}
    assert files.what_is_wrong(line, Row) is None
    assert str(files.parsed(line, Row)) == str(row)  # NaN is not equal to itself
    del line["label"], line["other"]
    assert str(files.parsed(line, Row)) == str(row)


def test_json_is_strict(tmp_path):
    path = tmp_path / "lines.jsonl"
    record = {"a": math.nan, "b": [1.5, -math.inf], "c": np.float32([np.nan, 2]), "d": Path("x")}
    files.append_json_line(path, record)
    files.write_json_lines(tmp_path / "whole.jsonl", [record])
    for file in (path, tmp_path / "whole.jsonl"):
        (line,) = file.read_text().splitlines()
        found = json.loads(line, parse_constant=pytest.fail)
        assert found == {"a": None, "b": [1.5, None], "c": [None, 2], "d": "x"}


@pytest.mark.parametrize(
    "line",
    [
        b'{"name": "\xff", "step": 1}',
        b'{"name": "a", "st',
        b"[1, 2]",
        b"7",
        b"null",
        b"",
        b'{"name": "a"}',
        b'{"name": 1, "step": 1}',
        b'{"name": "a", "step": true}',
        b'{"name": "a", "step": 1.5}',
        b'{"name": "a", "step": 1' + b"0" * 400 + b"}",
        b'{"name": "a", "step": 1' + b"0" * 5000 + b"}",
        b'{"name": "a", "step": 1, "loss": NaN}',
        b'{"name": "a", "step": 1, "other": -Infinity}',
        b'{"name": "a", "step": 1, "loss": 1e999}',
        b'{"name": "a", "step": 1, "other": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"name": "a", "step": 1, "other": ' + b"[" * 99999,
        b'{"name": "a", "step": 1}\0',
        b'{"name": "a", "step": 1, "kind": "c"}',
        b'{"name": "a", "step": 1, "kind": ["a"]}',
        b'{"name": "a", "step": 1, "seeds": [1, "2"]}',
        b'{"name": "a", "step": 1, "more": {"x": {"mean": "2", "n": 1}}}',
    ],
)
def test_a_damaged_line_is_named_and_the_file_left_alone(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    good = json.dumps(WHOLE).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    before = path.read_bytes()
    for call in (
        lambda: files.read_json_lines(path, Fields),
        lambda: files.keep_json_lines(path, lambda line: True, Fields),
    ):
        with pytest.raises(UserError, match=r"lines\.jsonl:2 ") as error:
            call()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    path.write_bytes(good + b"\n")
    assert files.read_json_lines(path, Fields) == [WHOLE]


def test_what_cannot_be_read_or_written_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", tmp_path / "no" / "folder"):
        for call in (
            lambda path=path: files.write_text(path, "x"),
            lambda path=path: files.append_json_line(path, {}),
            lambda path=path: files.read_text(path),
        ):
            with pytest.raises(UserError):
                call()
    with pytest.raises(UserError):
        files.read_json_lines(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        files.read_text(tmp_path / "file")


def test_a_directory_that_cannot_be_used_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    refused = ["file", "file/below/it", "loop", "loop/below", "dangling", "a\0b", "", "x" * 300]
    refused += [f"{'x' * 200}/" * 19, "gs://bucket/runs", "s3:/bucket", "file:///tmp/runs"]
    refused += ["~nobody-of-this-name/runs", "new/../../../up", "caf\udce9"]
    for path in refused:
        with pytest.raises(UserError) as error:
            files.check_directory(path)
        assert "\n" not in str(error.value)
    for path in (Path("gs://bucket"), Path("file/below")):  # as a command line gives them
        with pytest.raises(UserError):
            files.check_directory(path)
    assert files.check_directory("~/runs") == tmp_path / "home" / "runs"
    assert files.check_directory("new/runs") == Path("new/runs")
    assert files.check_directory(Path(".")) == Path(".")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop", "dangling"}


def test_names_stay_in_their_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "in").symlink_to("real")
    (folder / "loop").symlink_to("loop")
    for names in (["a"], ["a", "b.c"], ["real"], ["in", "x"], ["..."], ["a b"], ["é"]):
        assert files.inside(folder, *names) == folder.joinpath(*names)
    for name in ("", ".", "..", "/etc", "a/../..", "a/b", "a\\b", "a\0", "x" * 256, "é" * 128):
        with pytest.raises(UserError):
            files.inside(folder, name)
    for names in (["out"], ["out", "x"], ["loop"], ["\ud800"]):
        with pytest.raises(UserError):
            files.inside(folder, *names)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()) | st.text("\x1b[2J\x07\r\n\u2028\u202e\x9b\udcffab "))
def test_printable_text_is_one_line_that_any_file_takes(text):
    shown = printable(text)
    assert shown.isprintable() and shown.splitlines() in ([shown], [])
    assert shown.encode() and shown == printable(shown) if shown else text == ""
    assert shown == text or not text.isprintable()
    assert str(UserError(text)) == shown
