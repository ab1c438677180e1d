"""Manifests: which files a directory holds, with a checksum of each.

Storage notices some damage, by errors of every kind, and passes over some. With a manifest
all of it is found before anything in the directory is understood.
"""

import hashlib
import json
from pathlib import Path

from metaopt.files import read_json, write_text

MANIFEST = "sha256.json"


def write_manifest(directory: Path, parts: tuple[str, ...]) -> None:
    """Note what the folders ``parts`` of a directory hold, in a file of it."""
    found = {part: _digests(directory / part) for part in parts}
    write_text(directory / MANIFEST, json.dumps(found, indent=1))


def what_is_damaged(directory: Path, part: str) -> str | None:
    """What differs in a folder from the manifest, in words; None where all is as it was.

    A directory without a manifest is damaged.
    """
    found = read_json(directory / MANIFEST)
    noted = found.get(part) if isinstance(found, dict) else None
    if not isinstance(noted, dict):
        return f"{MANIFEST} is missing or no manifest"
    try:
        now = _digests(directory / part)
    except OSError as error:
        return f"{part}: {error.strerror or error}"
    for name in sorted(noted.keys() | now.keys()):
        if noted.get(name) != now.get(name):
            kind = "is missing" if name not in now else "is new" if name not in noted else "changed"
            return f"{part}/{name} {kind}"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder, by its path in it."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found
