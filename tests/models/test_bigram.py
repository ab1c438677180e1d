"""Tables of n-grams have a closed form: uniform at the start, empirical frequencies at the best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import bigram, ngram
from metaopt.tasks.markov import MarkovConfig, number_ngrams

V = 5
TOKENS = jax.random.randint(jax.random.key(0), (3, 200), 0, V)


def loss(params):
    log_probs = jax.nn.log_softmax(bigram(V).apply(params, TOKENS[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1))


def test_starts_uniform():
    params = bigram(V).init(jax.random.key(0))
    np.testing.assert_allclose(loss(params), np.log(V), rtol=1e-6)


def test_is_best_at_the_log_of_the_empirical_frequencies():
    counts = np.zeros((V, V))
    np.add.at(counts, (np.ravel(TOKENS[:, :-1]), np.ravel(TOKENS[:, 1:])), 1)
    frequencies = counts / counts.sum(axis=1, keepdims=True)
    params = {"head": {"table": jnp.asarray(np.log(frequencies), jnp.float32)}}
    value, grad = jax.value_and_grad(loss)(params)
    entropy = -np.sum(counts / counts.sum() * np.log(frequencies))
    np.testing.assert_allclose(value, entropy, rtol=1e-5)
    np.testing.assert_allclose(grad["head"]["table"], 0, atol=1e-6)


def test_order_one_is_the_bigram_table():
    params = {"head": {"table": jax.random.normal(jax.random.key(1), (V, V))}}
    expected = params["head"]["table"][TOKENS]
    np.testing.assert_array_equal(bigram(V).apply(params, TOKENS), expected)


@pytest.mark.parametrize("order", [2, 3])
def test_a_row_for_each_context_in_the_order_of_the_languages(order):
    model = ngram(V, order)
    assert model.init(jax.random.key(0))["head"]["table"].shape == (V**order, V)
    table = jax.random.normal(jax.random.key(1), (V**order, V))
    logits = model.apply({"head": {"table": table}}, TOKENS)
    np.testing.assert_array_equal(logits[:, : order - 1], 0)  # no whole context: uniform
    contexts = number_ngrams(MarkovConfig(vocab_size=V, order=order), TOKENS, order)
    np.testing.assert_array_equal(logits[:, order - 1 :], table[contexts])
    short = model.apply({"head": {"table": table}}, TOKENS[:, : order - 1])
    np.testing.assert_array_equal(short, np.zeros((3, order - 1, V)))


def test_an_order_below_one_is_refused():
    with pytest.raises(UserError, match="order is 0"):
        ngram(V, 0)
