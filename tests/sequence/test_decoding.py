import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import TransformerConfig, transformer
from metaopt.sequence import decoding
from metaopt.sequence.decoding import generate
from metaopt.types import Model

V = 5
BIGRAM = Model(init=lambda key: jnp.zeros((V, V)), apply=lambda table, tokens: table[tokens])
CYCLE = 3 * jnp.roll(jnp.eye(V), 1, axis=1)
"""After token i the likeliest is i + 1."""

SUM = Model(
    init=lambda key: jnp.zeros(()),
    apply=lambda scale, tokens: scale * jax.nn.one_hot(jnp.cumsum(tokens, axis=1) % V, V),
)
"""The likeliest token is the sum of all tokens so far: every position matters."""


def test_greedy_follows_the_likeliest_transition():
    tokens = generate(BIGRAM, CYCLE, jnp.array([0, 3]), 6, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(tokens, [0, 3, 4, 0, 1, 2, 3, 4])
    assert tokens.dtype == jnp.int32


def test_every_token_is_read_from_all_before_it():
    tokens = generate(SUM, jnp.ones(()), jnp.array([1, 2, 4]), 5, jax.random.key(0), temperature=0)
    tokens = np.asarray(tokens)
    np.testing.assert_array_equal(tokens[:3], [1, 2, 4])
    for t in range(3, 8):
        assert tokens[t] == tokens[:t].sum() % V


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_window_hides_the_tokens_before_it(window):
    prompt, key = jnp.array([1, 2, 4]), jax.random.key(0)
    tokens = np.asarray(generate(SUM, jnp.ones(()), prompt, 5, key, 0, window=window))
    for t in range(3, 8):
        assert tokens[t] == tokens[max(0, t - window) : t].sum() % V


def test_the_key_alone_decides_the_tokens():
    prompt = jnp.array([2])
    once, again, other = (
        generate(BIGRAM, jnp.zeros((V, V)), prompt, 40, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_tokens_are_drawn_from_the_tempered_distribution():
    logits, temperature = jnp.array([0.0, 1.0, 2.0, 0.5, -1.0]), 2.0
    tokens = generate(
        BIGRAM,
        jnp.tile(logits, (V, 1)),
        jnp.array([0]),
        3000,
        jax.random.key(0),
        temperature=temperature,
    )
    frequencies = np.bincount(tokens[1:], minlength=V) / 3000
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits / temperature), atol=0.03)


def test_a_low_temperature_is_nearly_greedy():
    cold, greedy = (
        generate(BIGRAM, CYCLE, jnp.array([0, 3]), 6, jax.random.key(0), temperature=t)
        for t in (1e-3, 0)
    )
    np.testing.assert_array_equal(cold, greedy)


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "temperature", "message"),
    [
        ([], 1, 1.0, "empty"),
        ([[1, 2]], 1, 1.0, "vector of integers"),
        ([1.0], 1, 1.0, "vector of integers"),
        ([1, V], 1, 1.0, "tokens must be from 0 to 4"),
        ([-1], 1, 1.0, "tokens must be from 0 to 4"),
        ([1], -1, 1.0, "num_tokens"),
        ([1], 1, -0.5, "temperature"),
        ([1], 1, float("nan"), "temperature"),
    ],
)
def test_bad_requests(prompt, num_tokens, temperature, message):
    with pytest.raises(UserError, match=message):
        generate(BIGRAM, CYCLE, np.array(prompt), num_tokens, jax.random.key(0), temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_stream_draws_what_generation_draws(temperature, positions, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 4)
    config = TransformerConfig(
        vocab_size=7, width=8, num_layers=1, num_heads=2, positions=positions, max_length=15
    )
    model = transformer(config)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    prompt, key = np.array([1, 2, 3, 4, 5, 6]), jax.random.key(1)
    expected = decoding.generate(model, params, prompt, 9, key, temperature)
    found = list(decoding.stream(config, params, prompt, 9, key, temperature))
    assert [*prompt, *found] == expected.tolist()
    assert list(decoding.stream(config, params, prompt, 0, key)) == []
    if positions == "learned":
        with pytest.raises(UserError, match="positions are learned for 15"):
            next(decoding.stream(config, params, prompt, 10, key))
