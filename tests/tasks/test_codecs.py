import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt.errors import UserError
from metaopt.languages import LanguageConfig, make_codec
from metaopt.tasks.codecs import BYTES, letters, symbols


@given(st.binary())
def test_bytes_come_back(data):
    tokens = BYTES.encode(data)
    assert tokens.dtype == np.int32 and tokens.tolist() == list(data)
    assert BYTES.decode(tokens) == data


@given(st.lists(st.integers(0, 29)))
def test_symbols_come_back(tokens):
    codec = letters(30)
    assert codec.encode(codec.decode(tokens)).tolist() == tokens


def test_tokens_are_letters_and_then_numbers():
    assert letters(28).decode([0, 25, 26, 27]) == b"az<26><27>"
    assert letters(28).encode(b"a\nz\r\n<27>\n").tolist() == [0, 25, 27]
    assert symbols(" ab").encode(b"b a").tolist() == [2, 0, 1]


@pytest.mark.parametrize("data", [b"ae", b"a b", b"<26>", b"\xff", "é".encode()])
def test_what_is_not_in_the_vocabulary_is_named(data):
    with pytest.raises(UserError, match=r"is not in the vocabulary of 4 symbols, 'a' to 'd'"):
        letters(4).encode(data)


def test_what_is_no_utf_8_is_shown():
    assert BYTES.show([104, 255, 105]) == "h�i"


@pytest.mark.parametrize(
    ("tasks", "is_text"), [("markov", False), ("text", True), ("stdlib", True), ("a:b", False)]
)
def test_the_codec_of_tasks_has_their_vocabulary(tasks, is_text):
    codec = make_codec(LanguageConfig(tasks=tasks, vocab_size=5))
    assert codec.is_text == is_text and codec.vocab_size == (256 if is_text else 5)
    assert len(codec.encode(codec.opening)) == 1
