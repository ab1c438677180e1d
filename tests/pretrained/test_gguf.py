"""GGUF files: written here by the library, in llama.cpp's order of rotary features."""

import json

import gguf
import jax
import numpy as np
import pytest
from transformers_models import FIXTURES

from metaopt.errors import UserError
from metaopt.pretrained.gguf_file import read_gguf, tokenizer_of
from metaopt.pretrained.huggingface import open_tensors, read_folder
from metaopt.tasks.tokenizers import tokenizer, train_bpe

PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def of_llama_cpp(rows, num_heads):
    """As its converter permutes the rows of a matrix of queries or keys."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, name="llama", rotary=None, **changes):
    """The fixture as a GGUF file."""
    found = json.loads((FIXTURES / name / "config.json").read_text())
    heads, groups = found["num_attention_heads"], found["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, name)
    writer.add_embedding_length(found["hidden_size"])
    writer.add_block_count(found["num_hidden_layers"])
    writer.add_feed_forward_length(found["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(found["rms_norm_eps"])
    writer.add_rope_freq_base(found["rope_parameters"]["rope_theta"])
    if rotary is not None:
        writer.add_rope_dimension_count(rotary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(found["vocab_size"])])
    for key, value in changes.items():
        writer.add_string(key.replace("__", "."), value)
    with open_tensors(FIXTURES / name) as tensors:
        for key in tensors.shapes:
            if key == "lm_head.weight" and found["tie_word_embeddings"]:
                continue
            tensor = tensors.read(key).astype(np.float32)
            place, _, kind = key.rpartition(".")
            layer = place.removeprefix("model.layers.").partition(".")
            part = PARTS.get(place) or f"blk.{layer[0]}.{PARTS[layer[2]]}"
            if name == "llama" and part.endswith(("attn_q", "attn_k")):
                tensor = of_llama_cpp(tensor, heads if part.endswith("attn_q") else groups)
            writer.add_tensor(f"{part}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_file_gives_the_model_that_it_was_made_of(name, tmp_path):
    config, params, _ = read_gguf(write(tmp_path / "model.gguf", name), "float32")
    expected, others, _ = read_folder(FIXTURES / name, "float32")
    assert abs(config.norm_epsilon / expected.norm_epsilon - 1) < 1e-6  # float32 in the file
    assert vars(config) | {"norm_epsilon": 0} == vars(expected) | {"norm_epsilon": 0}
    for a, b in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_known_or_damaged_is_one_line(tmp_path):
    path = write(tmp_path / "model.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match="rotary scaling 'yarn' is not known"):
        read_gguf(path, "float32")
    path = write(tmp_path / "half.gguf", rotary=2)
    with pytest.raises(UserError, match="of 4 features of a head 2 are rotary"):
        read_gguf(path, "float32")
    path = write(tmp_path / "whole.gguf")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="is no whole GGUF file") as refused:
        read_gguf(path, "float32")
    assert "\n" not in str(refused.value)
    path.write_bytes(b"no such file")
    with pytest.raises(UserError, match="is no whole GGUF file"):
        read_gguf(path, "float32")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_vocabulary_and_merges_make_a_tokenizer_that_gives_every_text_back(pre):
    text = "It's 2026: naïve café, 12345 — 日本語\r\n\tdef f(x):\n    return x\n" * 3
    trained = json.loads(train_bpe([text], 300))["model"]
    tokens = [t for t, _ in sorted(trained["vocab"].items(), key=lambda item: item[1])]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<|end|>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in trained["merges"]],
    }
    codec = tokenizer(tokenizer_of(fields), "it")
    assert codec.vocab_size == len(tokens) + 1
    found = codec.encode(text.encode())
    assert codec.decode(found) == text.encode() and len(found) < len(text.encode())
    digits = codec.encode(b"12345")
    assert (len(digits) == 5) or pre not in ("smollm", "qwen2")  # one token a digit
    assert tokenizer_of(fields | {"tokenizer.ggml.pre": "other"}) is None
    assert codec.decode([len(tokens)]) == b""  # the mark stands for no text
    assert codec.decode(codec.encode(b"the <|end|> of it")) == b"the <|end|> of it"
