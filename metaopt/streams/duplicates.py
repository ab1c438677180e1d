"""Duplicates among passages of tokens: equal ones, and near ones by MinHash.

Two passages are near duplicates if the Jaccard similarity of their shingles, the runs of
`SHINGLE` consecutive tokens, is estimated at the threshold or more. A passage is found again where
it is cut at the same place: a copy that is cut elsewhere shares fewer shingles.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from metaopt.ranges import Range

SHINGLE = 5
"""Tokens in a shingle."""
NUM_HASHES = 128
"""Hash values of a signature: the estimate of a similarity J has a variance of J (1 - J) / 128."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bits are lost

Similarity = Annotated[float, Range(0.05, 1.0)]
"""Jaccard similarity, from which on passages are near duplicates; 1 finds equal ones alone."""


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
    for i, hashes in enumerate(_shingles(np.asarray(passages))):
        one = empty.copy()
        one.update_batch(hashes.tolist())
        found[i] = one.hashvalues
    return found


def _shingles(passages: np.ndarray) -> Iterable[np.ndarray]:
    """The shingles of each passage as 32-bit numbers."""
    tokens = passages.astype(np.uint64)
    count = tokens.shape[1] - SHINGLE + 1
    hashed = np.zeros((len(tokens), count), np.uint64)
    for i in range(SHINGLE):  # of wrapped arithmetic, and then the upper half, which is well mixed
        hashed = (hashed + tokens[:, i : i + count] + np.uint64(1)) * _MULTIPLIER
    return hashed >> np.uint64(32)


def are_equal(passages: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which passages are equal to one that is kept, or to one before them.

    Args:
      passages: tokens ``[n, P]`` that come in.
      kept: tokens ``[m, P]`` of earlier passages.

    Returns:
      bool ``[n]``.
    """
    seen, found = {_digest(passage) for passage in kept}, np.zeros(len(passages), bool)
    for i, passage in enumerate(passages):
        digest = _digest(passage)
        found[i] = digest in seen
        seen.add(digest)
    return found


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


def _digest(passage: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(passage, np.int32).tobytes()).digest()
