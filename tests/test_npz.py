"""Files of arrays that are damaged, of another kind, or larger than they look: one line each."""

import io
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.npz import LARGEST, Form, read_npz

FORMS = {"x": Form(np.uint8, ("N", 28, 28)), "y": Form(np.integer, ("N",))}
X, Y = np.zeros((3, 28, 28), np.uint8), np.arange(3)


def header(shape, descr="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def raw(path, packing=zipfile.ZIP_DEFLATED, **members):
    """A zip of members that are bytes."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def bomb(path, name="x"):
    """3.9 GB of zeros of the right form in 3.8 MB."""
    count = 5_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        info = zipfile.ZipInfo(f"{name}.npy")
        info.compress_type = zipfile.ZIP_STORED
        archive.writestr(info, header((count, 28, 28)))
        archive.writestr("y.npy", b"")
    lie(path, f"{name}.npy", file_size=count * 784 + 128)


def lie(path, name, file_size):
    """Changes the size that the directory of a zip declares for a member."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    data[at + 24 : at + 28] = struct.pack("<I", file_size)
    path.write_bytes(data)


def declares_more(path):
    raw(path, x=header((10**9, 28, 28)) + bytes(99), y=b"")


def declares_less(path):
    raw(path, x=header((3, 28, 28)) + bytes(10**6), y=b"")


def unpacks_to_more(path):
    """The directory says what the header says, and the packed bytes are many more."""
    file = io.BytesIO()
    np.save(file, Y)
    raw(path, x=header((3, 28, 28)) + bytes(10**7), y=file.getvalue())
    lie(path, "x.npy", file_size=3 * 784 + len(header((3, 28, 28))))


def flipped(path):
    np.savez(path, x=X, y=Y)
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 500] ^= 1  # one pixel
    path.write_bytes(data)


def cut(path):
    np.savez(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-99])


def text(path):
    path.write_text("not an npz file\n" * 9)


def npy(path):
    with path.open("wb") as file:
        np.save(file, X)


DAMAGED = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "text": (text, "not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip file"),
    "one array": (npy, "not a zip file"),
    "cut": (cut, "not a zip file"),
    "one bit": (flipped, "CRC"),
    "a member is no array": (lambda path: raw(path, x=b"hello" * 9, y=b""), "magic"),
    "other names": (lambda path: np.savez(path, a=X, b=Y), "no array x, only a, b"),
    "floats": (lambda path: np.savez(path, x=X / 255, y=Y), r"x is float64 \[3, 28, 28\], not"),
    "flat": (lambda path: np.savez(path, x=X.reshape(3, -1), y=Y), r"x is uint8 \[3, 784\], not"),
    "other number": (lambda path: np.savez(path, x=X, y=Y[:2]), r"y is int64 \[2\], not"),
    "objects": (lambda path: np.savez(path, x=X.astype(object), y=Y), "Python objects"),
    "bzip2": (lambda path: raw(path, zipfile.ZIP_BZIP2, x=b"", y=b""), "does not use"),
    "bomb": (bomb, "would take 3.7 GiB"),
    "declares more": (declares_more, "is declared uint8"),
    "declares less": (declares_less, "is declared uint8"),
    "unpacks to more": (unpacks_to_more, "CRC"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_at_once_in_one_line(tmp_path, kind):
    write, words = DAMAGED[kind]
    path = tmp_path / "arrays.npz"
    write(path)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot read .*arrays.npz: .*{words}") as caught:
        read_npz(path, FORMS)
    assert "\n" not in str(caught.value) and "x uint8 [N, 28, 28], y integers [N]" in str(caught)
    assert time.monotonic() - began < 2


def test_what_numpy_writes_is_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "arrays.npz", x=X, y=Y, more=np.ones(2))
        found = read_npz(tmp_path / "arrays.npz", FORMS)
        assert list(found) == ["x", "y"]
        np.testing.assert_array_equal(found["x"], X)
        assert list(read_npz(tmp_path / "arrays.npz")) == ["x", "y", "more"]


def test_a_bomb_takes_no_memory(tmp_path):
    """The real thing: its zeros are packed, and the limit is below them."""
    size = LARGEST + 784
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            file.write(header((size // 784, 28, 28)))
            chunk = bytes(2**24)
            for _ in range(0, 2**26, 2**24):  # of which the test packs a part only, to be quick
                file.write(chunk)
        archive.writestr("y.npy", b"")
    lie(path, "x.npy", file_size=size // 784 * 784 + len(header((1, 28, 28))))
    code = (
        "import resource, sys; from metaopt.npz import *; from tests.test_npz import FORMS\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_npz(sys.argv[1], FORMS)\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    line, grown = done.stdout.splitlines()
    assert "would take 1.0 GiB" in line and int(grown) < 50_000
