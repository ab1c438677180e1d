import jax
import numpy as np
import pytest
from pretrained_text import TEXT

from metaopt.errors import UserError
from metaopt.pretrained import export, open_pretrained
from metaopt.tasks.tokenizers import train_bpe


def test_a_folder_gives_a_model_that_reads_text(folder, tmp_path):
    found = open_pretrained(folder)
    data = TEXT.encode()
    tokens = found.codec.encode(data)
    assert found.codec.decode(tokens) == data
    assert found.codec.decode(found.codec.encode("e\u0301".encode())) == "e\u0301".encode()
    assert found.model.apply(found.params, tokens[None]).shape == (1, len(tokens), 290)
    adapted = jax.tree.map(lambda x: x + 1, found.params)
    export(tmp_path / "adapted", found, adapted)
    again = open_pretrained(tmp_path / "adapted")
    assert again.config == found.config and again.tokenizer == found.tokenizer
    jax.tree.map(np.testing.assert_array_equal, again.params, adapted)


def test_bfloat16_computes_in_it(folder):
    whole, half = open_pretrained(folder), open_pretrained(folder, "bfloat16")
    tokens = whole.codec.encode(TEXT.encode())[None, :20]
    expected, found = (each.model.apply(each.params, tokens) for each in (whole, half))
    assert found.dtype == np.float32
    assert 0 < np.abs(expected - found).max() < 0.1


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere is not there"):
        open_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype"):
        open_pretrained(folder, "float8")  # type: ignore[arg-type]
    tokenizer = folder / "tokenizer.json"
    large = train_bpe([TEXT * 2 + "and more of other words, such as these"], 300)
    tokenizer.write_text(large)
    with pytest.raises(UserError, match="the tokenizer has 300 tokens, and the model 290"):
        open_pretrained(folder)
    tokenizer.write_text("{")
    with pytest.raises(UserError, match="the tokenizer is no JSON"):
        open_pretrained(folder)
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"put its tokenizer\.json there"):
        open_pretrained(folder)
