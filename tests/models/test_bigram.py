"""The bigram table has a closed form: uniform at the start, empirical frequencies at the best."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.models import bigram

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
