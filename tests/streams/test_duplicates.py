import numpy as np
import pytest

from metaopt.streams.duplicates import (
    NUM_HASHES,
    SAMPLED,
    SHINGLE,
    WINDOW,
    are_near,
    are_repeated,
    digests,
    overlap,
    signatures,
    windows,
)


def passages(seed, number=40, size=200):
    return np.random.default_rng(seed).integers(32, 127, (number, size)).astype(np.int32)


def edited(found, number, seed=0):
    """Each passage with some of its tokens replaced."""
    rng, changed = np.random.default_rng(seed), found.copy()
    for passage in changed:
        passage[rng.choice(len(passage), number, replace=False)] = 200
    return changed


def jaccard(a, b):
    one, other = (
        {tuple(x[i : i + SHINGLE].tolist()) for i in range(len(x) - SHINGLE + 1)} for x in (a, b)
    )
    return len(one & other) / len(one | other)


def kinds_of(found, kept, threshold=0.7):
    equal = are_repeated(digests(found), digests(kept))
    near = np.zeros(len(found), bool)
    near[~equal] = are_near(signatures(found[~equal]), signatures(kept), threshold)
    return np.where(equal, "equal", np.where(near, "near", "new")).tolist()


@pytest.mark.parametrize("number", [1, 5, 20])
def test_signatures_estimate_the_jaccard_similarity(number):
    found = passages(0)
    other = edited(found, number)
    estimate = (signatures(found) == signatures(other)).mean(axis=1)
    exact = np.array([jaccard(a, b) for a, b in zip(found, other, strict=True)])
    errors = estimate - exact
    assert abs(errors.mean()) < 4 * np.sqrt(0.25 / NUM_HASHES / len(errors))
    assert np.abs(errors).max() < 5 * np.sqrt(0.25 / NUM_HASHES)


def test_equal_near_and_new_passages_are_told_apart():
    kept = passages(0)
    arriving = np.concatenate([kept[:10], edited(kept[10:20], 3), edited(kept[20:30], 60)])
    arriving = np.concatenate([arriving, passages(1, 10)])
    assert kinds_of(arriving, kept) == ["equal"] * 10 + ["near"] * 10 + ["new"] * 20


def test_the_first_of_several_that_are_alike_is_new():
    one = passages(0, 1)
    found = np.concatenate([one, one, edited(one, 2), edited(one, 2)])
    assert kinds_of(found, one[:0]) == ["new", "equal", "near", "equal"]


def test_a_threshold_of_one_finds_equal_passages_alone():
    kept = passages(0, 2)
    assert (
        kinds_of(np.concatenate([kept, edited(kept, 1)]), kept, 1.0) == ["equal"] * 2 + ["new"] * 2
    )


def test_what_is_put_in_twice_is_found_and_little_else():
    """Half of all passages are copies, a third of them with a few tokens changed."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, rng.integers(2, 9)).tolist() for _ in range(400)]
    text = [t for i in rng.zipf(1.3, 60_000) for t in (*words[i % 400], 32)]
    originals = np.array(text[: 520 * 150], np.int32).reshape(150, 520)
    copies = np.concatenate([originals[:100], edited(originals[100:], 5)])
    everything = np.concatenate([originals, copies])
    order = rng.permutation(300)
    shuffled = everything[order]
    found = np.array(kinds_of(shuffled, shuffled[:0])) != "new"
    first = {}
    is_copy = [first.setdefault(i % 150, n) != n for n, i in enumerate(order.tolist())]
    assert found[is_copy].mean() >= 0.95  # recall
    assert np.array(is_copy)[found].mean() >= 0.95  # precision


def test_windows_are_the_same_wherever_they_lie():
    text = passages(0, 1, 20_000)[0]
    found = windows(text)
    assert abs(len(found) - (20_000 - WINDOW) / SAMPLED) < 5 * np.sqrt(20_000 / SAMPLED)
    shifted = windows(np.concatenate([passages(1, 1, 137)[0], text]))
    assert np.isin(found, shifted).all()
    assert windows(text[: WINDOW - 1]).size == 0


def test_the_overlap_is_the_share_of_a_passage_that_is_known():
    text = passages(0, 1, 4000)[0]
    known = windows(text[:2000])
    cut = text[60 : 60 + 3 * 1200].reshape(
        3, 1200
    )  # the second is known for 709 of its 1169 windows
    found = overlap(cut, known)
    np.testing.assert_allclose(found, [1, 709 / 1169, 0], atol=0.1)
    assert overlap(cut, known[:0]).tolist() == [0, 0, 0]
