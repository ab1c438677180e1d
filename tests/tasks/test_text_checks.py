"""Text that is packed, in another encoding, or there twice: refused or said, in one line."""

import bz2
import dataclasses
import gzip
import io
import lzma
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.sources import text_checks
from metaopt.tasks.sources.text import folder_domains
from metaopt.tasks.text import TextConfig, text

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text_domains"
WORDS = ["une", "phrase", "courte", "sur", "la", "forêt", "très", "ancienne", "où", "l'été", "dort"]


def prose(seed, size=9000):
    """Words in random order: 32 bytes in a row are seldom found twice."""
    words = np.random.default_rng(seed).choice(WORDS, size // 3)
    numbers = np.random.default_rng(seed + 100).integers(10**6, size=size // 3)
    return " ".join(f"{word} {number}" for word, number in zip(words, numbers, strict=True))[:size]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # read in place, which is quicker
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, name in enumerate("abcdef"):
        (folder / f"{name}.txt").write_bytes(prose(seed).encode())
    return TextConfig(
        source=str(folder),
        num_support=2,
        num_query=2,
        length=12,
        num_valid_domains=1,
        num_test_domains=2,
        test_domains=("e.txt", "f.txt"),
        data_dir=str(tmp_path / "data"),
    )


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


TEXT = prose(7)
REFUSED = {
    "gzip": (gzip.compress(TEXT.encode()), "gzip: unpack it by gunzip"),
    "bzip2": (bz2.compress(TEXT.encode()), "bzip2: unpack it"),
    "xz": (lzma.compress(TEXT.encode()), "xz: unpack it"),
    "zip": (zipped(TEXT), "zip, as are docx"),
    "Zstandard": (b"\x28\xb5\x2f\xfd" + TEXT.encode(), "unzstd"),
    "PDF": (b"%PDF-1.7\n" + TEXT.encode(), "pdftotext"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + TEXT.encode(), "an image"),
    "numpy": (b"\x93NUMPY\x01" + TEXT.encode(), "a numpy array"),
    "UTF-16 with a mark": (TEXT.encode("utf-16"), "UTF-16 or UTF-32: convert it"),
    "UTF-16": (TEXT.encode("utf-16-le"), "bytes are zeros, as in UTF-16"),
    "UTF-32": (TEXT.encode("utf-32-be"), "bytes are zeros, as in UTF-16"),
    "the same": (prose(0).encode(), r"a\.txt \(training\) and g\.bin \(.*\) are identical"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(config, tmp_path, kind):
    data, words = REFUSED[kind]
    (tmp_path / "source" / "g.bin").write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        text(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("data", "guess"),
    [(TEXT.encode("latin-1"), "perhaps"), (np.random.default_rng(0).bytes(9000), "binary")],
    ids=["latin-1", "binary"],
)
def test_what_is_no_utf8_is_said_and_read(config, tmp_path, capsys, data, guess):
    (tmp_path / "source" / "caf\udce9.txt").write_bytes(data)
    family = text(config)
    assert len(family.train.task_names) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "not UTF-8, and read byte by byte as it is: caf" in line
    assert f"({guess}" in line


def test_utf8_and_text_of_its_own_pass_without_a_word(config, capsys):
    text(config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "copy",
    [
        lambda data: data + b" and a few more words at the end",
        lambda data: data[2000:5000],
        lambda data: b"Chapter 1\n" + data.replace(b"dort", b"veille"),
        lambda data: data * 20 + prose(50, 200_000).encode(),
    ],
    ids=["appended", "a part", "edited", "within a larger one"],
)
def test_text_of_one_split_in_another_is_said(config, tmp_path, capsys, copy):
    source = tmp_path / "source"
    (source / "copy.txt").write_bytes(copy((source / "e.txt").read_bytes()))
    text(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the same text in two splits: copy.txt (")
    assert "and e.txt (test) " in line and line.endswith("%")


def test_copies_within_one_split_are_no_leak(config, tmp_path, capsys):
    source = tmp_path / "source"
    (source / "f.txt").write_bytes((source / "e.txt").read_bytes()[:-1])
    text(config)
    assert capsys.readouterr().err == ""
    (source / "f.txt").write_bytes((source / "e.txt").read_bytes())
    with pytest.raises(UserError, match="identical"):
        text(dataclasses.replace(config, data_dir=str(tmp_path / "other")))


def test_windows_are_hashed_alike_wherever_chunks_begin(config, monkeypatch):
    domain = folder_domains(Path(config.source))[0]
    whole = text_checks._profile(domain, 4)
    monkeypatch.setattr(text_checks, "_CHUNK", 100)
    parts = text_checks._profile(domain, 4)
    assert whole[0] == parts[0]
    np.testing.assert_array_equal(whole[1], parts[1])
    assert 0.2 < len(whole[1]) / domain.size < 0.3


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="the text domains are not on this machine")
def test_real_domains_pass_without_a_word():
    domains = folder_domains(REAL_TEXT)
    assert text_checks.check_readable(domains) is None
    assert text_checks.check_distinct(domains, str) is None
