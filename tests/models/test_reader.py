"""Reading on gives what reading all at once does."""

import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import TransformerConfig, reader, transformer
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
    start, read = reader(config)
    cache, found = start(2, 16), []
    step = jax.jit(read)
    for begin, end in ((0, 6), (6, 12), (12, 13), (13, 14)):
        logits, cache = step(params, cache, tokens[:, begin:end])
        found.append(logits)
    tolerance = 0.05 if name == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=tolerance, rtol=tolerance)
    assert cache[0].length == 14


def test_a_place_that_is_written_again_is_as_if_it_were_new():
    config, model, params = make("plain")
    start, read = reader(config)
    tokens = np.array([[1, 2, 3, 4]])
    _, cache = read(params, start(1, 8), np.array([[1, 2, 6, 6]]))
    cache = tuple(past._replace(length=past.length - 2) for past in cache)
    logits, _ = read(params, cache, tokens[:, 2:])
    np.testing.assert_allclose(logits, model.apply(params, tokens)[:, 2:], rtol=1e-5, atol=1e-5)


def test_what_cannot_read_on_is_refused():
    with pytest.raises(UserError, match="cannot read on"):
        reader(TransformerConfig(vocab_size=7, causal=False))
    with pytest.raises(UserError, match="positions are learned for 16"):
        reader(make("gpt2")[0]).start(1, 17)
