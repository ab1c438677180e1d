"""Adjusted data: noise and augmentation of passages, numbers and images, as pure functions."""

import numpy as np


def replace_tokens(
    rng: np.random.Generator, passages: np.ndarray, share: float, vocab_size: int
) -> np.ndarray:
    """Passages in which a share of the tokens, each by chance, is any token of the vocabulary.

    Args:
      rng: source of the noise.
      passages: integers ``[n, P]``.
      share: from 0 to 1, at which nothing of a passage is left: random tokens.
      vocab_size: V.
    """
    others = rng.integers(0, vocab_size, passages.shape, dtype=passages.dtype)
    return np.where(rng.random(passages.shape) < share, others, passages)


def shuffle_words(rng: np.random.Generator, passages: np.ndarray, separator: int) -> np.ndarray:
    """Passages whose words, the runs between separators, are in random order.

    Args:
      rng: source of the orders.
      passages: integers ``[n, P]``.
      separator: the token between words, such as the blank, 32, of bytes.
    """
    return np.stack([_shuffled(rng, passage, separator) for passage in passages])


def _shuffled(rng: np.random.Generator, passage: np.ndarray, separator: int) -> np.ndarray:
    words = np.split(passage, np.flatnonzero(passage == separator))
    first, *rest = words
    return np.concatenate([first, *(rest[i] for i in rng.permutation(len(rest)))])


def jitter(rng: np.random.Generator, numbers: np.ndarray, scale: float) -> np.ndarray:
    """Numbers ``[n, ...]`` with Gaussian noise of ``scale`` standard deviations of each column."""
    spread = numbers.std(axis=0, keepdims=True)
    return numbers + scale * spread * rng.standard_normal(numbers.shape)


def shift(rng: np.random.Generator, images: np.ndarray, pixels: int) -> np.ndarray:
    """Images ``[n, H, W, ...]``, each moved by up to so many pixels; what comes in is 0."""
    moved = np.zeros_like(images)
    height, width = images.shape[1:3]
    for i, (down, right) in enumerate(rng.integers(-pixels, pixels + 1, (len(images), 2)).tolist()):
        into = (
            slice(max(down, 0), height + min(down, 0)),
            slice(max(right, 0), width + min(right, 0)),
        )
        of = (
            slice(max(-down, 0), height - max(down, 0)),
            slice(max(-right, 0), width - max(right, 0)),
        )
        moved[(i, *into)] = images[(i, *of)]
    return moved
