import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import losses
from metaopt.errors import UserError
from metaopt.types import Batch, Model

PARAMS_ARE_OUTPUTS = Model(init=lambda key: jnp.zeros(()), apply=lambda params, inputs: params)

LOGITS = jax.random.normal(jax.random.key(0), (3, 4, 5))
INPUTS = jnp.zeros((3, 4), jnp.int32)
TARGETS = jax.random.randint(jax.random.key(1), (3, 4), 0, 5)


def test_uniform_logits_cost_log_v():
    loss = losses.next_token(PARAMS_ARE_OUTPUTS)(jnp.ones((3, 4, 5)), Batch(INPUTS, TARGETS))
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    np.testing.assert_allclose(loss * losses.NATS_TO_BITS, np.log2(5), rtol=1e-6)


def test_the_gradient_of_the_cross_entropy_is_probabilities_minus_one_hot():
    gradient = jax.grad(losses.next_token(PARAMS_ARE_OUTPUTS))(LOGITS, Batch(INPUTS, TARGETS))
    expected = (jax.nn.softmax(LOGITS) - jax.nn.one_hot(TARGETS, 5)) / TARGETS.size
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_bfloat16_logits_are_accumulated_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    batch = Batch(INPUTS, TARGETS)
    loss = losses.next_token(PARAMS_ARE_OUTPUTS)(logits, batch)
    expected = losses.next_token(PARAMS_ARE_OUTPUTS)(logits.astype(jnp.float32), batch)
    assert loss.dtype == jnp.float32
    assert loss == expected


def test_classification_is_next_token_of_one_token():
    batch = Batch(INPUTS, TARGETS)
    by_class = losses.classification(PARAMS_ARE_OUTPUTS)(
        LOGITS[:, 0], Batch(jnp.zeros((3, 8, 8, 1)), TARGETS[:, 0])
    )
    by_token = losses.next_token(PARAMS_ARE_OUTPUTS)(
        LOGITS[:, :1], jax.tree.map(lambda x: x[:, :1], batch)
    )
    np.testing.assert_allclose(by_class, by_token, rtol=1e-6)


def test_accuracy_counts_the_largest_logits():
    logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0], [0.0, 9.0]])
    batch = Batch(jnp.zeros((4, 1)), jnp.array([0, 1, 1, 1]))
    assert losses.accuracy(PARAMS_ARE_OUTPUTS)(logits, batch) == 0.75


def test_regression_is_the_mean_squared_error():
    batch = Batch(jnp.zeros((2, 1)), jnp.array([[1.0], [2.0]]))
    loss = losses.regression(PARAMS_ARE_OUTPUTS)(jnp.array([[0.0], [5.0]]), batch)
    assert loss == (1 + 9) / 2


@pytest.mark.parametrize(
    ("make", "outputs", "batch", "message"),
    [
        (losses.next_token, LOGITS, Batch(INPUTS, TARGETS[:, 1:]), "targets must have the shape"),
        (losses.next_token, LOGITS, Batch(INPUTS * 1.0, TARGETS), "inputs must be integers"),
        (losses.next_token, LOGITS, Batch(INPUTS, TARGETS * 1.0), "targets must be integers"),
        (losses.classification, LOGITS, Batch(INPUTS, TARGETS[:, :1]), "targets must have"),
        (losses.accuracy, LOGITS, Batch(INPUTS, TARGETS * 1.0), "targets must be integers"),
        (losses.regression, LOGITS, Batch(INPUTS, LOGITS[0]), "targets must have the shape"),
    ],
)
def test_wrong_batches_raise_when_traced(make, outputs, batch, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make(PARAMS_ARE_OUTPUTS), outputs, batch)
