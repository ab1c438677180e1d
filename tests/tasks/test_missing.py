import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.losses import IGNORED, next_token
from metaopt.models import TransformerConfig, transformer
from metaopt.tasks import MarkovConfig, markov, missing_tokens

FAMILY = markov(MarkovConfig(vocab_size=5, num_support=3, num_query=2, length=20))


def test_the_same_number_is_missing_in_each_sequence_and_the_targets_are_what_was_there():
    plain = FAMILY.train.sample(jax.random.key(3), 4)
    found = missing_tokens(FAMILY, 5, 0.15).train.sample(jax.random.key(3), 4)
    np.testing.assert_array_equal(found.task, plain.task)
    for batch, was in zip(found[:2], plain[:2], strict=True):
        missing = np.asarray(batch.inputs == 5)
        assert (missing.sum(axis=-1) == 3).all()
        np.testing.assert_array_equal(batch.targets, np.where(missing, was.inputs, IGNORED))
        np.testing.assert_array_equal(np.where(missing, was.inputs, batch.inputs), was.inputs)
    places = np.concatenate([np.asarray(b.inputs == 5).reshape(-1, 20) for b in found[:2]])
    assert len(np.unique(places, axis=0)) > 15  # chosen anew for each


def test_one_is_missing_at_least_and_numbers_are_checked():
    batch = missing_tokens(FAMILY, 5, 1e-3).test.sample(jax.random.key(0), 1).query
    assert (np.asarray(batch.inputs == 5).sum(axis=-1) == 1).all()
    with pytest.raises(UserError, match="rate"):
        missing_tokens(FAMILY, 5, 0.0)


def test_a_model_that_sees_both_sides_learns_from_the_right():
    config = TransformerConfig(vocab_size=6, width=8, num_layers=1, num_heads=2, causal=False)
    model = transformer(config)
    params, tokens = model.init(jax.random.key(0)), jnp.array([[1, 5, 2, 3]])
    changed = tokens.at[0, 3].set(4)
    both = model.apply(params, tokens), model.apply(params, changed)
    assert np.abs(both[0][0, 1] - both[1][0, 1]).max() > 1e-3
    batch = missing_tokens(FAMILY, 5).train.sample(jax.random.key(0), 1)
    loss, grads = jax.value_and_grad(next_token(model))(
        params, jax.tree.map(lambda x: x[0], batch.support)
    )
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_seeing_all_is_not_for_windows_or_blocks():
    with pytest.raises(UserError, match="causal=False"):
        TransformerConfig(vocab_size=6, causal=False, window=3)
