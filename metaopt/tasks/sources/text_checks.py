"""What is wrong with text before it is trained on: packed files, encodings, copies.

Text is read byte by byte, so anything can be read; what cannot be meant is refused, and what may
be is said.
"""

import codecs
import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.tasks.sources.text import Domain

WINDOW = 32
"""Bytes of the windows by which domains are compared."""

SHARED = 0.2
"""Two domains of which the smaller has this share of its windows in the other are said."""

_NUM_SAMPLED = 2**19  # windows that are compared, of all domains together
_CHUNK = 2**20
_FORMATS = {  # how files begin, and what to do with them
    rb"\x1f\x8b\x08": "gzip: unpack it by gunzip",
    rb"BZh[1-9]1AY&SY": "bzip2: unpack it by bunzip2",
    rb"\xfd7zXZ\0": "xz: unpack it by unxz",
    rb"\x28\xb5\x2f\xfd": "Zstandard: unpack it by unzstd",
    rb"7z\xbc\xaf\x27\x1c": "7-Zip: unpack it by 7z x",
    rb"PK\x03\x04": "zip, as are docx, odt, epub and npz: unpack it or save it as text",
    rb"%PDF-": "PDF: save it as text, by pdftotext",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP": "an image: move it away",
    rb"\x93NUMPY": "a numpy array: move it away",
    rb"PAR1[\x00-\x1f]": "Parquet: save its text as text",
    rb"SQLite format 3\0": "an SQLite database: save its text as text",
    rb"\xd0\xcf\x11\xe0": "an Office document: save it as text",
    rb"\x7fELF|MZ\x90\0": "a program: move it away",
    rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff": "UTF-16 or UTF-32: convert it to UTF-8, as iconv does",
}
_MOST_ZEROS = 0.2  # of the bytes of text, which in UTF-8 has none


def check_text(domains: Sequence[Domain], where: Callable[[int], str] = lambda i: "") -> None:
    """Checks that domains are text and no copies of one another, and says what is doubtful.

    All of the text is read once, at some 40 MB a second.

    Args:
      domains: distinct by name.
      where: ``index -> split``, for the words.

    Raises:
      UserError: see `check_readable` and `check_distinct`.
    """
    for line in (check_readable(domains), check_distinct(domains, where)):
        if line is not None:
            log(f"note: {line}")


def check_readable(domains: Sequence[Domain]) -> str | None:
    """Checks that what domains hold may be meant as text.

    Returns:
      A line that names the domains that are not UTF-8, with the encoding that they seem to have;
      None if all are.

    Raises:
      UserError: one is packed, an image or the like, or text in UTF-16 or UTF-32.
    """
    others = []
    for domain in domains:
        start = domain.read(0, min(domain.size, 2**14)).tobytes()
        for beginning, what in _FORMATS.items():
            if re.match(beginning, start, re.DOTALL):
                raise UserError(f"{domain.name} is not plain text but {what}")
        if start.count(0) > _MOST_ZEROS * len(start):
            raise UserError(
                f"{domain.name} is not plain text: {start.count(0) / len(start):.0%} of its bytes "
                "are zeros, as in UTF-16, UTF-32 or binary data; convert it to UTF-8"
            )
        position = _first_wrong(domain)
        if position is not None:
            others.append(f"{domain.name} ({_guess(domain, position)})")
    return (
        f"not UTF-8, and read byte by byte as it is: {_first(others, 'file')}" if others else None
    )


def _first(items: Sequence[str], what: str) -> str:
    more = len(items) - 3
    return ", ".join(items[:3]) + (f" and {more} more {what}{'s' * (more > 1)}" if more > 0 else "")


def _first_wrong(domain: Domain) -> int | None:
    """The position of the first byte that is no UTF-8; None if all is."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in _chunks(domain):
        kept = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return position - kept + error.start
        position += len(chunk)
    return None  # also where the domain ends within a character


def _guess(domain: Domain, position: int) -> str:
    from charset_normalizer import from_bytes  # late: it takes its time, and is seldom needed

    start = max(0, position - 2**12)
    best = from_bytes(domain.read(start, min(2**13, domain.size - start)).tobytes()).best()
    return "binary" if best is None else f"perhaps {best.encoding}"


def check_distinct(domains: Sequence[Domain], where: Callable[[int], str]) -> str | None:
    """Checks that no domain is another once more.

    Args:
      domains: distinct by name.
      where: ``index -> split``, for the words.

    Returns:
      A line that names domains that share much of their text; None if none do.

    Raises:
      UserError: two are identical. A task would count twice, or be trained on and tested.
    """
    found: dict[bytes, int] = {}
    every = max(1, sum(domain.size for domain in domains) // _NUM_SAMPLED)
    samples = []
    for i, domain in enumerate(domains):
        digest, sampled = _profile(domain, every)
        first = found.setdefault(digest, i)
        if first != i:
            names = " and ".join(f"{domains[j].name} {where(j)}".strip() for j in (first, i))
            raise UserError(f"{names} are identical: remove one, since a domain is one task")
        samples.append(sampled)
    alike = [
        f"{domains[i].name} {where(i)} and {domains[j].name} {where(j)} {share:.0%}"
        for share, i, j in _alike(samples)
        if where(i) != where(j)
    ]
    return f"the same text in two splits: {_first(alike, 'pair')}" if alike else None


def _alike(samples: Sequence[np.ndarray]) -> list[tuple[float, int, int]]:
    """Pairs that share at least `SHARED` of the smaller's sample, those that share most first.

    This is the containment of Broder, 1997, "On the resemblance and containment of documents",
    by sampling modulo a number, which finds a small text in a large one too.
    """
    sizes = np.array([len(sample) for sample in samples])
    owners = np.repeat(np.arange(len(samples)), sizes)
    _, windows = np.unique(np.concatenate(samples), return_inverse=True)
    has = scipy.sparse.csr_array((np.ones(len(owners), np.int32), (owners, windows)))
    both = scipy.sparse.triu(has @ has.T, k=1).tocoo()
    shares = both.data / np.maximum(np.minimum(sizes[both.row], sizes[both.col]), 1)
    pairs = [
        (float(share), int(i), int(j))
        for share, i, j in zip(shares, both.row, both.col, strict=True)
        if share >= SHARED and min(sizes[i], sizes[j]) >= 20
    ]
    return sorted(pairs, key=lambda pair: -pair[0])


def _profile(domain: Domain, every: int) -> tuple[bytes, np.ndarray]:
    """A digest of the text, and the distinct hashes of one in ``every`` windows, chosen by hash."""
    digest, sampled, tail = hashlib.sha256(), [], b""
    for chunk in _chunks(domain):
        digest.update(chunk)
        hashes = _window_hashes(np.frombuffer(tail + chunk, np.uint8))
        sampled.append(np.unique(hashes[hashes % np.uint64(every) == 0]))
        tail = (tail + chunk)[-WINDOW + 1 :]
    return digest.digest(), np.unique(np.concatenate([np.empty(0, np.uint64), *sampled]))


def _window_hashes(data: np.ndarray) -> np.ndarray:
    """A hash of each window of `WINDOW` bytes, uint64 ``[n - WINDOW + 1]``."""
    hashes, width, base = data.astype(np.uint64), 1, 0x9E3779B97F4A7C15
    while width < WINDOW:  # those of twice the width, from two each; none where there are too few
        hashes = hashes[:-width] * np.uint64(base) + hashes[width:]
        base, width = base * base % 2**64, 2 * width
    return (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(8)


def _chunks(domain: Domain):
    for start in range(0, domain.size, _CHUNK):
        yield domain.read(start, min(_CHUNK, domain.size - start)).tobytes()
