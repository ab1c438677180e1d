import json

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.tokenizers import bytes_of, tokenizer, train_bpe

pytest.importorskip("tokenizers")
TEXTS = ["the cat sat on the mat, the cat. " * 20, "naïve – the\ttheatre\r\n" * 10]


@pytest.fixture(scope="module")
def definition():
    return train_bpe(TEXTS, 280)


def test_training_is_deterministic_and_learns_what_is_frequent(definition):
    assert definition == train_bpe(TEXTS, 280)
    codec = tokenizer(definition, "bpe:280")
    assert codec.vocab_size == 280
    learned = [codec.decode([token]) for token in range(256, 280)]
    assert b"the" in learned or b" the" in learned
    assert len(codec.encode(b"the cat sat on the mat")) < 15


@pytest.mark.parametrize(
    "text", ["the cat", "  leading", "日本語 \0\x1b", "a\r\n\n b", "", "𝕏 é e\u0301", "ĠĊ"]
)
def test_any_text_comes_back_exactly_and_its_bytes_are_counted(definition, text):
    codec, data = tokenizer(definition, "bpe:280"), text.encode()
    tokens = codec.encode(data)
    assert tokens.dtype == np.int32 and codec.decode(tokens) == data
    assert bytes_of(codec)[tokens].sum() == len(data)


def test_what_is_no_text_or_no_tokenizer_is_refused(definition):
    with pytest.raises(UserError, match="takes UTF-8, and byte 2 is none"):
        tokenizer(definition, "mine").encode(b"ab\xff")
    with pytest.raises(UserError, match="mine is no JSON of the library"):
        tokenizer("{}", "mine")
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(TEXTS, 256)
    changed = json.loads(definition)
    for key, value in (("normalizer", {"type": "Lowercase"}), ("decoder", {"type": "Fuse"})):
        with pytest.raises(UserError, match="not byte-level, or changes a text"):
            tokenizer(json.dumps(changed | {key: value}), "mine")
