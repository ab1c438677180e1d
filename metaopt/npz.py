"""The one reader of npz files: what they declare is checked before it is unpacked.

An npz file is a zip of arrays, and zeros pack a thousand times smaller: what a file declares
may be larger than the memory. Nothing is unpickled.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaopt.errors import UserError

LARGEST = 2**30
"""Bytes that the arrays of one file may have together, unpacked."""

_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be unpacked bit by bit
_ERRORS = (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error)


class Form(NamedTuple):
    """What an array must be.

    Attributes:
      kind: its dtype, or an abstract one such as `numpy.integer` or `numpy.str_`.
      shape: of sizes, and of letters for sizes that are free but equal under one letter; None
        for any.
    """

    kind: Any
    shape: tuple[int | str, ...] | None = None

    def __str__(self) -> str:
        kind = {np.integer: "integers", np.str_: "text", np.number: "numbers"}
        word = kind.get(self.kind, getattr(self.kind, "__name__", str(self.kind)))
        return word if self.shape is None else f"{word} [{', '.join(map(str, self.shape))}]"


def read_npz(path: Path | str, forms: Mapping[str, Form] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of an npz file.

    Args:
      path: of the file.
      forms: the arrays to read, and what each must be; None reads all, which must be numbers.

    Raises:
      UserError: it is no such file or a damaged one; an array is missing or of another form; or
        they are larger than `LARGEST` together. Nothing large was unpacked then.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            forms = {name: Form(np.number) for name in names} if forms is None else forms
            members = {name: _member(archive, name, names) for name in forms}
            total = sum(member.file_size for member in members.values())
            if total > LARGEST:
                raise ValueError(
                    f"its arrays would take {total / 2**30:.1f} GiB of memory, more than the "
                    f"{LARGEST / 2**30:g} GiB allowed"
                )
            sizes: dict[str, int] = {}
            for name, member in members.items():
                _check_header(archive, member, name, forms[name], sizes)
            return {name: _read(archive, member) for name, member in members.items()}
    except (*_ERRORS, zipfile.BadZipFile) as error:
        wanted = ", ".join(f"{name} {form}" for name, form in (forms or {}).items())
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot read {path}: {' '.join(reason.split())}; it must be an npz file, as "
            f"numpy.savez writes it{wanted and f', with the arrays {wanted}'}"
        ) from error


def _member(archive: zipfile.ZipFile, name: str, names: list[str]) -> zipfile.ZipInfo:
    if name not in names:
        raise ValueError(f"it has no array {name}, only {', '.join(names[:8]) or 'nothing'}")
    member = archive.NameToInfo.get(f"{name}.npy") or archive.getinfo(name)
    if member.compress_type not in _PACKINGS:
        raise ValueError(f"{name} is packed in a way that numpy does not use")
    return member


def _check_header(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    name: str,
    form: Form,
    sizes: dict[str, int],
) -> None:
    """Checks what is declared of an array, whose values are not unpacked yet."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"{name} is of a format that is not read here, {version}")
        shape, _, dtype = read(file)
        values = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never loaded")
    if math.prod(shape) * dtype.itemsize != values:
        raise ValueError(f"{name} is declared {dtype} {list(shape)}, and has {values} bytes")
    fits = np.issubdtype(dtype, form.kind)
    if form.shape is not None:
        fits = fits and len(shape) == len(form.shape)
        for wanted, size in zip(form.shape, shape, strict=False):
            wanted = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            fits = fits and wanted == size
    if not fits:
        raise ValueError(f"{name} is {dtype} {list(shape)}, not {form}")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # reaches the end, where the checksum is compared
        return array
