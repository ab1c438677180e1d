"""What holds for every language model: how far each output reaches, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import TransformerConfig, bigram, recurrent, transformer

L = 7
SMALL = TransformerConfig(vocab_size=L, width=8, num_heads=2)


def reach(model, lookup):
    """``[L, L]``: whether logits t depend on input u, by d logits[t] / d its row of the lookup.

    The inputs are all different, so that a row of the lookup is a position.
    """
    params = model.init(jax.random.key(0))
    if "table" in params["head"]:
        params = {"head": {"table": params["head"]["table"] + 1.0}}
    top, leaf = lookup
    weights_LxV = jax.random.normal(jax.random.key(1), (L, L))

    def outputs(rows):
        logits = model.apply({**params, top: {**params[top], leaf: rows}}, jnp.arange(L)[None])
        return jnp.sum(logits[0] * weights_LxV, axis=-1)

    jacobian_LxVxD = jax.jit(jax.jacrev(outputs))(params[top][leaf])
    return np.abs(np.asarray(jacobian_LxVxD)).max(axis=-1) > 0


def band(width):
    distance = np.arange(L)[:, None] - np.arange(L)[None, :]
    return (distance >= 0) & (distance < width)


EMBEDDING = ("embed", "embedding")


@pytest.mark.parametrize(
    "make, lookup, expected",
    [
        (lambda: bigram(L), ("head", "table"), band(1)),
        (lambda: recurrent(L, 4, "rnn"), EMBEDDING, band(L)),
        (lambda: recurrent(L, 4, "gru", num_layers=2), EMBEDDING, band(L)),
        (lambda: recurrent(L, 4, "lstm"), EMBEDDING, band(L)),
        (lambda: transformer(SMALL), EMBEDDING, band(L)),
        (
            lambda: transformer(replace(SMALL, num_layers=1, window=3)),
            EMBEDDING,
            band(3),
        ),
        (
            lambda: transformer(replace(SMALL, num_layers=2, window=3)),
            EMBEDDING,
            band(5),
        ),
    ],
    ids=["bigram", "rnn", "gru", "lstm", "transformer", "window", "two windows"],
)
def test_each_output_depends_on_just_the_inputs_in_reach(make, lookup, expected):
    np.testing.assert_array_equal(reach(make(), lookup), expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bigram(1), "vocab_size is 1"),
        (lambda: recurrent(1, 4), "vocab_size is 1"),
        (lambda: recurrent(8, 0), "width is 0"),
        (lambda: recurrent(8, 4, "elman"), "choose one of rnn, gru, lstm"),
        (lambda: transformer(TransformerConfig(vocab_size=1)), "vocab_size is 1"),
        (lambda: transformer(TransformerConfig(vocab_size=8, num_layers=0)), "num_layers is 0"),
        (lambda: transformer(TransformerConfig(vocab_size=8, window=0)), "window is 0"),
        (lambda: transformer(TransformerConfig(vocab_size=8, width=6)), "not divisible"),
        (lambda: transformer(TransformerConfig(vocab_size=8, width=12)), "odd size, 3"),
        (lambda: transformer(TransformerConfig(vocab_size=8, activation="relu")), "activation"),
        (lambda: transformer(TransformerConfig(vocab_size=8, compute_dtype="half")), "'half'"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
