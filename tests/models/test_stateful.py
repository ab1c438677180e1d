"""Reading on gives what reading all at once does."""

import dataclasses

import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import (
    TransformerConfig,
    recurrent,
    transformer,
    with_cache,
    with_memory,
    with_window,
)
from metaopt.models.attention import RopeScaling

CONFIGS = {
    "plain": {},
    "window": {"window": 4},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "rope_scaling": RopeScaling(factor=2.0)},
    "gpt2": {"positions": "learned", "max_length": 16, "norm": "layer", "biases": "all"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}


def make(name):
    fields = {"vocab_size": 7, "width": 16, "num_heads": 2, "num_layers": 2} | CONFIGS[name]
    config = TransformerConfig(**fields)
    model = transformer(config)
    params = model.init(jax.random.key(0))
    return (
        config,
        model,
        jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), params),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_in_parts_have_the_logits_of_all_at_once(name):
    config, model, params = make(name)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 14)).astype(np.int32)
    expected = model.apply(params, tokens)
    _, start, read = with_cache(config, 16)
    cache, found = start(2), []
    step = jax.jit(read)
    for begin, end in ((0, 6), (6, 12), (12, 13), (13, 14)):
        logits, cache = step(params, cache, tokens[:, begin:end])
        found.append(logits)
    tolerance = 0.05 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=tolerance, rtol=tolerance)
    assert cache[0].length == 14


def test_a_place_that_is_written_again_is_as_if_it_were_new():
    config, model, params = make("plain")
    _, start, read = with_cache(config, 8)
    tokens = np.array([[1, 2, 3, 4]])
    _, cache = read(params, start(1), np.array([[1, 2, 6, 6]]))
    cache = tuple(past._replace(length=past.length - 2) for past in cache)
    logits, _ = read(params, cache, tokens[:, 2:])
    np.testing.assert_allclose(logits, model.apply(params, tokens)[:, 2:], rtol=1e-5, atol=1e-5)


def read_in_parts(model, params, tokens, cuts):
    """The logits of tokens ``[S, L]`` that are read in parts, and the context after them."""
    context, found, step = model.start(len(tokens)), [], jax.jit(model.read)
    for part in np.split(tokens, cuts, axis=1):
        logits, context = step(params, context, part)
        found.append(logits)
    return np.concatenate(found, 1), context


@pytest.mark.parametrize(("name", "window"), [("window", 1), ("grouped", 5), ("window", 40)])
def test_a_window_that_moves_on_is_attention_to_a_window(name, window):
    config, _, params = make(name)
    config = dataclasses.replace(config, window=window)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 23)).astype(np.int32)
    expected = transformer(config).apply(params, tokens)
    model = with_window(config)
    found, context = read_in_parts(model, params, tokens, (1, 7, 15, 16))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert context[0].keys.shape[2] == window - 1  # constant, however much was read
    assert context[0].length == min(window - 1, 23)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_recurrent_model_reads_on(cell):
    model, whole = with_memory(7, 8, cell, 2), recurrent(7, 8, cell, 2)
    params = whole.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 7, (2, 9)).astype(np.int32)
    found, _ = read_in_parts(model, params, tokens, (1, 5))
    np.testing.assert_allclose(found, whole.apply(params, tokens), atol=1e-6, rtol=1e-5)


def test_what_cannot_read_on_is_refused():
    with pytest.raises(UserError, match="cannot read on"):
        with_cache(TransformerConfig(vocab_size=7, causal=False), 8)
    with pytest.raises(UserError, match="positions are learned for 16"):
        with_cache(make("gpt2")[0], 17)
    with pytest.raises(UserError, match="a window and rotary positions"):
        with_window(make("plain")[0])
