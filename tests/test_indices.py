"""Tokens and classes of every integer dtype, and those that are none: nothing wraps around."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import losses, models
from metaopt.errors import UserError
from metaopt.indices import NO_INDEX, as_int32, as_tokens
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.sequence.decoding import generate
from metaopt.streams.dynamic_evaluation import cut_segments, segment_loss
from metaopt.tasks.markov import MarkovConfig, bayes_loss, number_ngrams
from metaopt.types import Batch, Episode, Model

V = 100  # the products of tokens with it overflow in 8 and in 16 bits
DTYPES = ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"]
SMALL = models.TransformerConfig(vocab_size=V, width=4, num_layers=1, num_heads=1)
SEQUENCE_MODELS = {
    "bigram": models.bigram(V),
    "ngram": models.ngram(V, 2),
    "rnn": models.recurrent(V, 3, "rnn"),
    "gru": models.recurrent(V, 3, "gru"),
    "lstm": models.recurrent(V, 3, "lstm"),
    "transformer": models.transformer(SMALL),
}
TOKENS = np.random.default_rng(0).integers(V, size=(2, 7))
LOSSES = {"next token": losses.next_token, "segment": segment_loss, "accuracy": losses.accuracy}


def parameters(model):
    @jax.jit  # one compilation, not one for each operation
    def draw():
        params = model.init(jax.random.key(0))
        noise = jax.random.key(1)
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape, x.dtype), params)

    return draw()


def batch(dtype=np.int32):
    tokens = TOKENS.astype(dtype)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)


@pytest.mark.parametrize("name", ["bigram", "ngram", "gru", "transformer"])
def test_every_integer_dtype_gives_the_same_loss(name):
    """And the same gradient, of the model whose products of tokens overflow."""
    dtypes = DTYPES if name == "ngram" else ["uint8"]
    with jax.enable_x64(True):
        model = SEQUENCE_MODELS[name]
        params = jax.tree.map(lambda x: x.astype(jnp.float32), parameters(model))
        loss_fn = losses.next_token(model)
        compiled = jax.jit(jax.value_and_grad(loss_fn) if name == "ngram" else loss_fn)
        expected = compiled(params, batch())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
        for dtype in dtypes:
            assert batch(dtype).inputs.dtype == dtype
            assert_close(compiled(params, batch(dtype)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_and_counts_take_every_integer_dtype(dtype):
    config = MarkovConfig(vocab_size=V, order=1, length=6, num_support=2, num_query=2)
    with jax.enable_x64(True):
        episodes = Episode(*[jax.tree.map(lambda x: x[None], batch(dtype))] * 2, jnp.zeros(1))
        of_int32 = Episode(*[jax.tree.map(lambda x: x[None], batch())] * 2, jnp.zeros(1))
        assert_close(bayes_loss(config, episodes), bayes_loss(config, of_int32))
        numbers = number_ngrams(config, jnp.asarray(TOKENS.astype(dtype)), 2)
        assert_equal(numbers, V * TOKENS[:, :-1] + TOKENS[:, 1:])
    assert_equal(cut_segments(TOKENS[0].astype(dtype), 3), cut_segments(TOKENS[0], 3))


def test_what_int32_cannot_hold_is_no_index():
    with jax.enable_x64(True):
        for dtype, value in (("uint32", 2**32 - 1), ("int64", 2**32 + 5), ("uint64", 2**64 - 1)):
            assert as_int32("x", jnp.asarray([value], dtype)) == NO_INDEX
        assert as_int32("x", jnp.asarray([-(2**40)])) == NO_INDEX
    assert as_tokens("x", jnp.asarray([-1])) == NO_INDEX


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_a_token_outside_the_vocabulary_is_nan_or_refused(name):
    model, wrong = SEQUENCE_MODELS[name], [-1, -100, V, V + 1, NO_INDEX]
    params, tokens = parameters(model), np.stack([TOKENS[0]] * (len(wrong) + 1))
    tokens[:-1, 3] = wrong
    logits = jax.jit(model.apply)(params, tokens)
    assert np.isnan(logits[:-1, 3]).all() and np.isfinite(logits[-1]).all()
    with pytest.raises(UserError, match=r"tokens must be from 0 to 99.*such as -1"):
        model.apply(params, tokens)
    with pytest.raises(UserError, match=r"the prompt's tokens must be.*such as 101"):
        generate(model, params, tokens[3], 1, jax.random.key(0))


@pytest.mark.parametrize("name", LOSSES)
def test_a_target_that_is_no_class_is_nan_or_refused(name):
    model, good = SEQUENCE_MODELS["ngram"], batch()
    params, loss_fn = parameters(model), LOSSES[name](model)
    compiled = jax.jit(jax.value_and_grad(loss_fn))
    for wrong in (-1, V, -99, NO_INDEX):
        targets = good.targets.copy()
        targets[1, 2] = wrong
        bad = good._replace(targets=targets)
        loss, grads = compiled(params, bad)
        assert np.isnan(loss)
        assert name == "accuracy" or np.isnan(grads["head"]["table"]).any()
        with pytest.raises(UserError, match=f"targets must be from 0 to 99.*such as {wrong}"):
            loss_fn(params, bad)


def test_the_inner_loop_does_not_step_on_a_target_that_is_no_class():
    model, bad = SEQUENCE_MODELS["bigram"], batch()._replace(targets=batch().targets - 50)
    with pytest.raises(UserError, match="targets must be from 0 to 99"):
        losses.next_token(model)(parameters(model), bad)
    adapted = adapt(losses.next_token(model), optax.sgd(0.1), parameters(model), bad, InnerLoop())
    assert np.isnan(adapted.losses).all()  # it is compiled, and there no value is known


def test_the_limit_is_nan_where_a_token_is_outside():
    config = MarkovConfig(vocab_size=V, length=6, num_support=2, num_query=2)
    tasks = [batch(), batch()._replace(targets=batch().targets - 100), batch()]
    both = jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)
    found = bayes_loss(config, Episode(both, both, jnp.arange(3)))
    assert np.isnan(found).tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [[0.0, 1.0, 2.0], [1, -1, 2, 3], [[1, 2, 3]], [1, 2**31, 3]])
def test_a_stream_of_anything_but_tokens_is_refused(tokens):
    with pytest.raises(UserError, match="stream"):
        cut_segments(np.asarray(tokens), 1)


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_float_tokens_are_refused_in_one_line(name):
    model = SEQUENCE_MODELS[name]
    with pytest.raises(UserError, match="tokens must be integers, but their dtype is float32"):
        jax.eval_shape(model.apply, parameters(model), jnp.zeros((1, 3)))


@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_over_the_targets_that_count(name, ignore_index):
    model, whole = SEQUENCE_MODELS["ngram"], batch()
    assert not (whole.targets == ignore_index).any()
    padded = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 3))), whole)
    padded.targets[:, -3:] = ignore_index
    compiled = jax.jit(jax.value_and_grad(LOSSES[name](model, ignore_index=ignore_index)))
    params = parameters(model)
    assert_close(compiled(params, padded), compiled(params, whole))


@pytest.mark.parametrize("name", [*LOSSES, "classification"])
def test_the_mean_of_no_target_is_zero_and_so_are_its_derivatives(name):
    model = SEQUENCE_MODELS["ngram"]
    loss_fn = {**LOSSES, "classification": losses.classification}[name](model)
    params, none = parameters(model), batch()._replace(targets=np.full((2, 6), -100))
    loss, grads = jax.value_and_grad(loss_fn)(params, none)
    curvature = jax.jvp(jax.grad(lambda p: loss_fn(p, none)), (params,), (params,))[1]
    assert loss == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((grads, curvature)))


def test_labels_of_few_bits_are_compared_as_they_are():
    logits = Model(lambda key: jnp.zeros(()), lambda params, inputs: params)
    table = jax.random.normal(jax.random.key(0), (3, 256))
    for make in (losses.classification, losses.accuracy):
        for ignore_index in (-100, None):
            loss_fn = jax.jit(make(logits, ignore_index))
            values = [
                loss_fn(table, Batch(jnp.zeros(3), jnp.array([156, 3, 9], dtype)))
                for dtype in ("uint8", "int32")
            ]
            assert np.isfinite(values[0]) and values[0] == values[1]
