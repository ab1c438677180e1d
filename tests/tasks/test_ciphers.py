import dataclasses

import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.ciphers import (
    CipherConfig,
    ciphers,
    codec,
    digest,
    encrypt,
    read_books,
    to_symbols,
)

SMALL = CipherConfig(num_support=3, num_query=2, length=7)
PLAIN = dataclasses.replace(SMALL, cipher="none")


def to_text(tokens, alphabet="letters"):
    return codec(dataclasses.replace(SMALL, alphabet=alphabet)).show(tokens)


def flat(episode):
    """The symbols of each passage, ``[T, (S + Q) * (L + 1)]``."""
    batches = (episode.support, episode.query)
    whole = [np.concatenate([b.inputs, b.targets[..., -1:]], axis=-1) for b in batches]
    sequences = np.concatenate(whole, axis=1)
    return sequences.reshape(len(sequences), -1)


def drawn(config, num_tasks=6, split="train"):
    episode = getattr(ciphers(config), split).sample(jax.random.key(5), num_tasks)
    np.testing.assert_array_equal(episode.query.inputs[..., 1:], episode.query.targets[..., :-1])
    return flat(episode)


@pytest.fixture
def books(tmp_path):
    for i in range(5):
        letter = "abcde"[i]
        (tmp_path / f"{letter}.txt").write_text(f"{letter} " * 40 + letter * 40)
    return str(tmp_path)


def test_letters_lose_case_and_accents_and_the_rest_is_blank():
    symbols = to_symbols("Éa, 12 «ß»\n\nz\xff".encode(), "letters")
    assert to_text(symbols, "letters") == "ea ss zy"
    text = "naïve\n".encode()
    assert to_text(to_symbols(text, "bytes"), "bytes") == "naïve\n"


def test_passages_are_consecutive_text():
    whole = to_text(
        np.concatenate([text for texts in read_books(PLAIN) for text in texts]), "letters"
    )
    for passage in drawn(PLAIN):
        assert to_text(passage, "letters") in whole


def test_a_substitution_renames_the_symbols_of_the_same_passage_anew_for_every_task():
    keys = []
    for plain, hidden in zip(drawn(PLAIN), drawn(SMALL), strict=True):
        assert len(set(zip(plain, hidden, strict=True))) == len(set(plain)) == len(set(hidden))
        keys.append(hidden[plain == 5][:1].tolist())  # the symbol for e
    assert len({tuple(key) for key in keys}) > 3


@pytest.mark.parametrize("cipher", ["caesar", "vigenere"])
def test_shifts_repeat_with_the_length_of_the_key(cipher):
    config = dataclasses.replace(SMALL, cipher=cipher, key_length=3)
    period = 1 if cipher == "caesar" else 3
    shifts = (drawn(config) - drawn(PLAIN)) % 27
    np.testing.assert_array_equal(shifts[:, period:], shifts[:, :-period])
    assert len(np.unique(shifts[:, 0])) > 2
    if period > 1:
        assert (shifts[:, 1:] != shifts[:, :-1]).any()


def test_reversed_turns_the_order_of_words_and_not_the_words():
    config = dataclasses.replace(SMALL, cipher="reversed")
    plain = to_symbols(b"one two three", "letters")
    read = {
        to_text(encrypt(config, key, plain), "letters")
        for key in jax.random.split(jax.random.key(0), 8)
    }
    assert read == {"one two three", "threetwo one "}


def test_a_cipher_of_bytes():
    config = dataclasses.replace(SMALL, alphabet="bytes")
    plain = drawn(dataclasses.replace(config, cipher="none"))
    hidden = drawn(config)
    assert hidden.max() > 127 and plain.max() < 128
    assert len(set(zip(plain[0], hidden[0], strict=True))) == len(set(plain[0]))


def test_no_book_is_in_two_splits_and_no_passage_in_two_books(books):
    config = dataclasses.replace(PLAIN, folder=books, num_valid_domains=1, num_test_domains=2)
    found = {}
    for split in ("train", "valid", "test"):
        passages = [set(to_text(p, "letters")) - {" "} for p in drawn(config, 40, split)]
        assert all(len(letters) == 1 for letters in passages)
        found[split] = set.union(*passages)
    assert sorted(letter for letters in found.values() for letter in letters) == list("abcde")
    assert [len(found[split]) for split in ("train", "valid", "test")] == [2, 1, 2]


def test_the_digest_follows_the_text(books, tmp_path):
    config = dataclasses.replace(SMALL, folder=books, num_valid_domains=1, num_test_domains=1)
    before = digest(config)
    assert before == digest(dataclasses.replace(config, cipher="caesar"))
    (tmp_path / "a.txt").write_text("another " * 40)
    assert digest(config) != before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_test_domains": 4}, "has 5 books, too few for 1 to validate, 4 to test"),
        ({"length": 70}, "'a.txt' has 120 symbols, and an episode needs 355"),
        ({"folder": "no-such-folder"}, "no folder"),
    ],
)
def test_books_that_do_not_serve_are_refused(books, changed, message):
    config = dataclasses.replace(SMALL, folder=books, num_valid_domains=1, num_test_domains=1)
    with pytest.raises(UserError, match=message):
        ciphers(dataclasses.replace(config, **changed))


def test_an_episode_longer_than_the_embedded_text_is_refused():
    with pytest.raises(UserError, match="does not fit a text of"):
        ciphers(dataclasses.replace(SMALL, length=20_000))
