import itertools

import numpy as np
import pytest

from metaopt.tasks.cipher_solvers import Ngrams, Solver, climbed_key, exchange_gains, frequency_key
from metaopt.tasks.ciphers import CipherConfig, read_books

TRAIN, VALID, TEST = (texts[0] for texts in read_books(CipherConfig()))


def test_ngrams_are_a_distribution_that_counting_by_hand_gives():
    text = np.array([0, 1, 0, 1, 0, 2])
    ngrams = Ngrams([text], vocab_size=3)
    p1 = (np.array([3, 2, 1]) + 3 / 3) / (6 + 3)
    after_0 = (np.array([0, 2, 1]) + 2 * p1) / (3 + 2)  # 0 is followed by 1 twice and by 2 once
    found = np.exp(ngrams.log_probs(np.array([[0, w] for w in range(3)]), order=2))[:, 0]
    np.testing.assert_allclose(found, after_0, rtol=1e-12)
    contexts = itertools.product(range(3), repeat=4)
    texts = np.array([[*context, w] for context in contexts for w in range(3)])
    probs = np.exp(ngrams.log_probs(texts))[:, -1].reshape(-1, 3)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-12)


def test_longer_ngrams_predict_held_out_text_better():
    ngrams = Ngrams([TRAIN], vocab_size=27)
    losses = [-ngrams.log_probs(TEST[None], order).mean() for order in (1, 2, 3, 5)]
    assert losses == sorted(losses, reverse=True) and losses[0] < 2.95 and losses[-1] < 2.0


def test_the_gains_of_exchanges_are_those_of_scoring_again():
    rng = np.random.default_rng(0)
    pairs, log_probs = rng.integers(0, 9, (5, 5)).astype(float), rng.normal(size=(5, 5))
    gains = exchange_gains(pairs, log_probs)
    for i, j in itertools.product(range(5), repeat=2):
        order = np.arange(5)
        order[[i, j]] = order[[j, i]]
        exchanged = log_probs[np.ix_(order, order)]
        np.testing.assert_allclose(gains[i, j], (pairs * (exchanged - log_probs)).sum(), atol=1e-9)


@pytest.fixture(scope="module")
def solver():
    return Solver([TRAIN], vocab_size=27)


def messages(text, seed, count=6):
    """Supports and queries under keys of their own, and the keys that read them."""
    rng = np.random.default_rng(seed)
    supports, queries, keys = [], [], []
    for _ in range(count):
        start, key = rng.integers(0, len(text) - 20 * 65), rng.permutation(27)
        passage = key[text[start : start + 20 * 65]].reshape(20, 65)
        supports.append(passage[:16])
        queries.append(passage[16:])
        keys.append(np.argsort(key))
    return np.stack(supports), np.stack(queries), np.stack(keys)


def test_hill_climbing_finds_keys_that_frequencies_alone_do_not(solver):
    supports, _, keys = messages(TEST, 0)
    rng = np.random.default_rng(0)
    counts = [np.bincount(support.ravel(), minlength=27) for support in supports]

    def share_read(find):
        right = [c[find(s) == key].sum() for s, key, c in zip(supports, keys, counts, strict=True)]
        return np.sum(right) / np.sum(counts)

    by_frequency = share_read(lambda support: frequency_key(support, solver.ngrams))
    climbed = share_read(lambda support: climbed_key(support, solver.ngrams, rng))
    assert by_frequency < 0.6 and climbed > 0.95


def test_the_losses_of_the_predictors_are_in_their_order(solver):
    (vs, vq, _), (ts, tq, keys) = messages(VALID, 1), messages(TEST, 2)
    plain = np.stack([key[query] for key, query in zip(keys, tq, strict=True)])
    rng = np.random.default_rng(0)
    with_key, unigram = solver.with_key(plain), solver.with_key(plain, order=1)
    climbed = solver.with_found_key(
        lambda support: climbed_key(support, solver.ngrams, rng), (vs, vq), (ts, tq)
    )
    guessed = solver.with_found_key(
        lambda support: frequency_key(support, solver.ngrams), (vs, vq), (ts, tq)
    )
    assert with_key.shape == climbed.shape == (6,)
    assert with_key.mean() <= climbed.mean() + 1e-3
    assert climbed.mean() < 0.8 * unigram.mean() < guessed.mean() < np.log(27) + 0.1
