"""A folder of small domains."""

import numpy as np


def write(folder, name, seed, number=4000):
    """A domain: words of its own, in random order."""
    rng = np.random.default_rng(seed)
    letters = rng.permutation(26)[:8]
    words = ["".join(chr(97 + c) for c in rng.choice(letters, 3)) for _ in range(12)]
    (folder / name).write_text(" ".join(rng.choice(words, number)) + "\n", encoding="utf-8")
