"""Classical ways to read a substitution cipher: what a learner that adapts is measured by.

Each gives the loss on the query of an episode, in nats a symbol, and none is trained by gradients.
`Ngrams` is the language model of all of them: with the key it is the limit from below. Frequency
analysis matches symbols by how often they are; hill climbing improves that key by exchanges as
long as the support, read with it, becomes more likely. Numpy, on the host.
"""

from collections.abc import Callable, Sequence

import numpy as np

_MOST_COUNTS = 2**24
UNIFORM_SHARES = (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
"""Shares of the uniform distribution that a predictor with a found key is mixed with."""


class Ngrams:
    """A language model of counted n-grams, interpolated as by Witten and Bell (1991).

    With c the counts after a context h, of T(h) different symbols, and h' the context without its
    oldest symbol, ``p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))``; after the empty
    context it is mixed with the uniform distribution likewise.
    """

    def __init__(self, texts: Sequence[np.ndarray], vocab_size: int):
        """Counts the n-grams of texts ``[n]`` of symbols from 0 to V - 1.

        The longest n-grams are the longest whose table has at most 2^24 counts: 5 letters or 3
        bytes.
        """
        self.vocab_size = vocab_size
        self.order = int(np.log(_MOST_COUNTS) / np.log(vocab_size))
        self._counts, self._totals, self._kinds = [], [], []
        for n in range(1, self.order + 1):
            counts = np.zeros(vocab_size**n, np.int32)
            for text in texts:
                np.add.at(counts, _ngrams(text, n, vocab_size), 1)
            by_context = counts.reshape(-1, vocab_size)
            self._counts.append(counts)
            self._totals.append(by_context.sum(axis=1))
            self._kinds.append((by_context > 0).sum(axis=1))

    def log_probs(self, texts: np.ndarray, order: int | None = None) -> np.ndarray:
        """Log-probability of each symbol but the first after those before it, ``[B, n - 1]``.

        Args:
          texts: symbols ``[B, n]``.
          order: Longest n-grams that are used; those of the model by default. 1 is the unigram
            distribution.
        """
        probs = np.full(texts.shape, 1 / self.vocab_size)
        for n in range(1, (order or self.order) + 1):
            of_ngram = _ngrams(texts, n, self.vocab_size)
            of_context = of_ngram // self.vocab_size
            kinds, total = self._kinds[n - 1][of_context], self._totals[n - 1][of_context]
            shorter = probs[:, n - 1 :]
            seen = total > 0
            mixed = (self._counts[n - 1][of_ngram] + kinds * shorter) / np.maximum(total + kinds, 1)
            probs[:, n - 1 :] = np.where(seen, mixed, shorter)
        return np.log(probs[:, 1:])

    @property
    def frequencies(self) -> np.ndarray:
        """The share of each symbol ``[V]``."""
        return self._counts[0] / self._counts[0].sum()

    @property
    def log_bigrams(self) -> np.ndarray:
        """Smoothed log-probability of each symbol after each, ``[V, V]``."""
        pairs = np.stack(np.divmod(np.arange(self.vocab_size**2), self.vocab_size), axis=1)
        return self.log_probs(pairs, order=2).reshape(self.vocab_size, self.vocab_size)


def frequency_key(support: np.ndarray, ngrams: Ngrams) -> np.ndarray:
    """The plain symbol of each symbol ``[V]``, matched by the rank of their frequencies."""
    seen = np.bincount(support.ravel(), minlength=ngrams.vocab_size)
    key = np.empty(ngrams.vocab_size, np.int64)
    key[np.argsort(-seen, kind="stable")] = np.argsort(-ngrams.frequencies, kind="stable")
    return key


def climbed_key(
    support: np.ndarray, ngrams: Ngrams, rng: np.random.Generator, restarts: int = 8
) -> np.ndarray:
    """The key ``[V]`` under which the support is likeliest, found by exchanges of two symbols.

    The steepest exchange is taken until none helps, by the likelihood of bigrams (Jakobsen, 1995,
    compares tables of bigrams likewise); from the key of `frequency_key`, and again from that key
    with some symbols exchanged. The likeliest of all is returned.

    Args:
      support: symbols ``[S, n]``.
      ngrams: the language model of the plain text.
      rng: where the restarts are drawn from.
      restarts: number of climbs after the first.
    """
    pairs = np.zeros((ngrams.vocab_size,) * 2)
    np.add.at(pairs, (support[:, :-1].ravel(), support[:, 1:].ravel()), 1)
    log_bigrams, start = ngrams.log_bigrams, frequency_key(support, ngrams)
    best, likeliest = start, -np.inf
    for attempt in range(restarts + 1):
        key = start if attempt == 0 else _shuffled(best, rng)
        key, log_likelihood = _climb(key, pairs, log_bigrams)
        if log_likelihood > likeliest:
            best, likeliest = key, log_likelihood
    return best


def _shuffled(key: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The key with the places of a third of its symbols drawn anew."""
    chosen = rng.choice(len(key), max(2, len(key) // 3), replace=False)
    shuffled = key.copy()
    shuffled[chosen] = key[rng.permutation(chosen)]
    return shuffled


def _climb(key: np.ndarray, pairs: np.ndarray, log_bigrams: np.ndarray) -> tuple[np.ndarray, float]:
    while True:
        here = log_bigrams[np.ix_(key, key)]
        gains = exchange_gains(pairs, here)
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] <= 1e-9:
            return key, float((pairs * here).sum())
        key = key.copy()
        key[[i, j]] = key[[j, i]]


def exchange_gains(pairs: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """What ``(pairs * log_probs).sum()`` gains if two symbols of ``log_probs`` are exchanged.

    An exchange of i and j changes rows and columns i and j alone. Their four common entries are
    counted both by the rows and by the columns, which the last term puts right.

    Args:
      pairs: counts ``[V, V]``.
      log_probs: log-probabilities ``[V, V]``.

    Returns:
      float ``[V, V]``, for each i and j.
    """

    def corners(x: np.ndarray) -> np.ndarray:
        return np.diag(x)[:, None] + np.diag(x) - x - x.T

    moved = pairs @ log_probs.T + pairs.T @ log_probs
    return corners(log_probs) * corners(pairs) - corners(moved)


class Solver:
    """The classical predictors of a cipher, fitted to plain texts for training.

    A key that was found can be wrong, and then certain of what is wrong: predictors with such a
    key are mixed with the uniform distribution, by the share that is best on validation episodes.
    """

    def __init__(self, texts: Sequence[np.ndarray], vocab_size: int):
        """Counts the n-grams of texts ``[n]`` of symbols from 0 to V - 1."""
        self.ngrams = Ngrams(texts, vocab_size)

    def with_key(self, plain: np.ndarray, order: int | None = None) -> np.ndarray:
        """The losses of n-grams that know the key, ``[E]``; of order 1, of frequencies alone.

        Args:
          plain: plain text of the queries, ``[E, Q, L + 1]``.
          order: longest n-grams used.
        """
        return -self._log_probs(plain, order).mean(axis=1)

    def with_found_key(
        self,
        find: Callable[[np.ndarray], np.ndarray],
        valid: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """The losses of n-grams with a key found on the support, ``[E]``.

        Args:
          find: ``support [S, L + 1] -> key [V]``.
          valid: supports and queries of validation episodes, ``[E, S, L + 1]``.
          test: supports and queries of test episodes.
        """

        def log_probs(supports: np.ndarray, queries: np.ndarray) -> np.ndarray:
            read = [find(support)[query] for support, query in zip(supports, queries, strict=True)]
            return self._log_probs(np.stack(read))

        def loss(log_probs: np.ndarray, share: float) -> np.ndarray:
            uniform = share / self.ngrams.vocab_size
            return -np.log((1 - share) * np.exp(log_probs) + uniform).mean(axis=1)

        of_valid = log_probs(*valid)
        best = min(UNIFORM_SHARES, key=lambda share: loss(of_valid, share).mean())
        return loss(log_probs(*test), best)

    def _log_probs(self, plain: np.ndarray, order: int | None = None) -> np.ndarray:
        """Of each target, ``[E, Q * L]``."""
        found = self.ngrams.log_probs(plain.reshape(-1, plain.shape[-1]), order)
        return found.reshape(len(plain), -1)


def _ngrams(texts: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """The number of each run of n symbols, its symbols as digits, ``[..., L - n + 1]``."""
    count = max(0, texts.shape[-1] - n + 1)
    numbers = np.zeros((*texts.shape[:-1], count), np.int64)
    for i in range(n):
        numbers = numbers * vocab_size + texts[..., i : i + count]
    return numbers
