"""Duplicates among passages of tokens: equal ones, near ones by MinHash, and shifted ones.

Two passages are near duplicates if the Jaccard similarity of their shingles, the runs of
`SHINGLE` consecutive tokens, is estimated at the threshold or more. A text that was cut elsewhere,
since something was put in before it, has other passages: those are found by windows, runs of
`WINDOW` tokens of which an eighth is remembered, chosen by their content.
"""

import hashlib
from typing import Annotated, Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from metaopt.ranges import Range

SHINGLE, WINDOW = 5, 32
"""Tokens in a shingle, and in a window."""
SAMPLED = 8
"""One of so many windows is remembered."""
NUM_HASHES = 128
"""Hash values of a signature: the estimate of a similarity J has a variance of J (1 - J) / 128."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bits are lost

Similarity = Annotated[float, Range(0.05, 1.0)]
"""Jaccard similarity, from which on passages are near duplicates; 1 finds equal ones alone."""


def digests(passages: np.ndarray) -> np.ndarray:
    """A number for each passage that is that of its content alone, uint64 ``[n]``."""
    whole = np.ascontiguousarray(passages, np.int32)
    found = [hashlib.sha256(passage.tobytes()).digest()[:8] for passage in whole]
    return np.frombuffer(b"".join(found), np.uint64)


def signatures(passages: np.ndarray) -> np.ndarray:
    """The MinHash signature of each passage.

    Args:
      passages: tokens, integers ``[n, P]`` with P at least `SHINGLE`.

    Returns:
      uint32 ``[n, NUM_HASHES]``: the least value of each hash function over the shingles.

    References:
      Broder, 1997, "On the Resemblance and Containment of Documents".
    """
    found = np.empty((len(passages), NUM_HASHES), np.uint32)
    empty = MinHash(NUM_HASHES, scheme="affine32", hashfunc=int)
    for i, passage in enumerate(np.asarray(passages)):
        one = empty.copy()
        one.update_batch((_runs(passage, SHINGLE) >> np.uint64(32)).tolist())
        found[i] = one.hashvalues
    return found


def windows(tokens: np.ndarray) -> np.ndarray:
    """The windows of a text that are remembered, as different numbers.

    Args:
      tokens: integers ``[n]``.

    Returns:
      Ascending uint64; about an eighth of the windows, the same ones wherever they lie.
    """
    found = _runs(np.asarray(tokens), WINDOW)
    return np.unique(found[(found >> np.uint64(40)) % np.uint64(SAMPLED) == 0])


def overlap(passages: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The share of the windows of each passage that is among those known, ``[n]``.

    Args:
      passages: tokens ``[n, P]``.
      known: ascending windows of other text; see `windows`.
    """
    shares = np.zeros(len(passages))
    if not known.size:
        return shares
    for i, passage in enumerate(passages):
        mine = windows(passage)
        if mine.size:
            places = np.searchsorted(known, mine).clip(max=len(known) - 1)
            shares[i] = (known[places] == mine).mean()
    return shares


def are_repeated(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which numbers ``[n]`` are among those known, or among those before them, bool ``[n]``."""
    found = np.isin(numbers, known)
    _, first = np.unique(numbers, return_index=True)
    is_first = np.zeros(len(numbers), bool)
    is_first[first] = True
    return found | ~is_first


def are_near(marks: np.ndarray, kept: np.ndarray, threshold: float) -> np.ndarray:
    """Which passages are near duplicates of one that is kept, or of one before them that is none.

    A passage is compared with what is no duplicate alone, so that a chain of small changes is not
    all taken for its first link.

    Args:
      marks: signatures ``[n, H]`` of the passages that come in.
      kept: signatures ``[m, H]`` of earlier passages.
      threshold: see `Similarity`; at 1 nothing is near.

    Returns:
      bool ``[n]``.
    """
    found = np.zeros(len(marks), bool)
    if threshold >= 1:
        return found
    # Candidates are compared in full, so that it is better to have too many of them.
    index = MinHashLSH(0.8 * threshold, NUM_HASHES, weights=(0.1, 0.9))
    signed: dict[Any, np.ndarray] = {}

    def add(mark: np.ndarray, one: MinHash) -> None:
        index.insert(len(signed), one, check_duplication=False)
        signed[len(signed)] = mark

    for mark in kept:
        add(mark, _signed(mark))
    for i, mark in enumerate(marks):
        one = _signed(mark)
        found[i] = any((signed[k] == mark).mean() >= threshold for k in index.query(one))
        if not found[i]:
            add(mark, one)
    return found


def _signed(mark: np.ndarray) -> MinHash:
    return MinHash(hashvalues=mark, scheme="affine32", hashfunc=int)


def _runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """A number of mixed bits for each run of so many tokens, uint64 ``[n - length + 1]``."""
    count = max(0, len(tokens) - length + 1)
    given, hashed = tokens.astype(np.uint64), np.zeros(count, np.uint64)
    for i in range(length if count else 0):  # of wrapped arithmetic: the upper bits are well mixed
        hashed = (hashed + given[i : i + count] + np.uint64(1)) * _MULTIPLIER
        hashed ^= hashed >> np.uint64(29)
    return hashed
