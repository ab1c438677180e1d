"""A reader against a plain loop; put away and taken up; and how a text is divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.errors import UserError
from metaopt.models import AdapterConfig, TransformerConfig, transformer, with_window
from metaopt.streams.reader import Reader, ReaderConfig

CONFIG = TransformerConfig(vocab_size=11, width=8, num_heads=2, num_layers=1)
PARAMS = transformer(CONFIG).init(jax.random.key(0))
HOW = ReaderConfig(
    adapter=AdapterConfig(kind="all"), optimizer="sgd", learning_rate=0.3, chunk=4, window=6
)
READER = Reader(CONFIG, PARAMS, HOW)
TOKENS = np.tile(np.random.default_rng(0).integers(0, 11, 7), 5)[:30]


def test_it_reads_and_learns_as_a_plain_loop_does():
    model = with_window(dataclasses.replace(CONFIG, window=6))
    params, context, wanted = PARAMS, model.start(1), [np.nan]

    @jax.jit
    def loss(params, context, chunk):
        logits, after = model.read(params, context, chunk[None, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits[0], chunk[1:])
        return each.mean(), (each, after)

    for i in range(0, 28, 4):
        chunk = jnp.asarray(TOKENS[i : i + 5])
        (_, (each, context)), grads = jax.value_and_grad(loss, has_aux=True)(params, context, chunk)
        wanted += (-each).tolist()
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    state, found = READER.read(READER.start(), TOKENS[:29])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.fast, params
    )
    still = Reader(CONFIG, PARAMS, dataclasses.replace(HOW, optimizer="none"))
    nats = [-still.read(still.start(), TOKENS)[1][1:].mean(), -found[1:].mean()]
    assert nats[1] < nats[0]  # the text repeats itself


def test_what_it_gives_does_not_depend_on_the_calls_and_survives_a_file(tmp_path):
    end, whole = READER.read(READER.start(), TOKENS)
    state, parts = READER.start(), []
    for i, part in enumerate(np.split(TOKENS, (1, 3, 9, 10, 17))):
        state, found = READER.read(state, part)
        parts.append(found)
        path = tmp_path / f"{i}.npz"
        READER.save(state, path)
        state = Reader(CONFIG, PARAMS, HOW).load(path)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    jax.tree.map(np.testing.assert_array_equal, state, end)
    assert READER.read(state, [])[1].shape == (0,)


def test_its_state_is_as_large_after_a_long_text():
    sizes = [
        sum(np.size(x) for x in jax.tree.leaves(READER.read(READER.start(), TOKENS[:n])[0]))
        for n in (2, 30)
    ]
    assert sizes[0] == sizes[1]


def test_it_goes_on_with_what_it_read_and_learns_nothing_from_that():
    before, _ = READER.read(READER.start(), TOKENS)
    new = [*READER.generate(before, [3], 5, jax.random.key(0), temperature=0.0)]
    model, context = with_window(READER.config), before.context
    read = [*TOKENS[28:], 3]  # of the chunk that is not full, and the prompt
    for token in new:
        logits, context = model.read(before.fast, context, np.array([read], np.int32))
        assert token == logits[0, -1].argmax()
        read = [token]
    after, _ = READER.read(READER.start(), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    drawn = [[*READER.generate(before, [], 8, jax.random.key(k))] for k in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_cannot_be_read_or_taken_up_is_refused(tmp_path):
    with pytest.raises(UserError, match="vector of integers"):
        READER.read(READER.start(), np.zeros(3))
    with pytest.raises(UserError, match="the tokens"):
        READER.read(READER.start(), [11])
    with pytest.raises(UserError, match="nothing was read"):
        READER.generate(READER.start(), [], 1, jax.random.key(0))
    with pytest.raises(UserError, match="rotary positions"):
        Reader(dataclasses.replace(CONFIG, positions="learned"), PARAMS, HOW)
    READER.save(READER.start(), tmp_path / "state.npz")
    with pytest.raises(UserError, match="is there already"):
        READER.save(READER.start(), tmp_path / "state.npz")
    other = Reader(CONFIG, jax.tree.map(lambda x: x + 1, PARAMS), HOW)
    with pytest.raises(UserError, match="another model"):
        other.load(tmp_path / "state.npz")
    turned = dataclasses.replace(CONFIG, rope_base=500.0)
    with pytest.raises(UserError, match="another config"):
        Reader(turned, PARAMS, HOW).load(tmp_path / "state.npz")
    with pytest.raises(UserError, match="another config"):
        Reader(CONFIG, PARAMS, dataclasses.replace(HOW, chunk=8)).load(tmp_path / "state.npz")
