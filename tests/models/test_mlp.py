"""The perceptron is the composition that its parameters name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.models import mlp


def test_equals_the_layers_written_out():
    model = mlp(2, 3, hidden=(5, 4), activation=jnp.tanh)
    params = model.init(jax.random.key(0))
    assert list(params) == ["layer_0", "layer_1", "head"] and model.head == ("head",)
    x = expected = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    for name in ("layer_0", "layer_1"):
        expected = np.tanh(expected @ params[name]["kernel"] + params[name]["bias"][None])
    expected = expected @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(model.apply(params, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_width_of_zero_is_refused():
    with pytest.raises(UserError, match="width has an entry that is 0"):
        mlp(1, 1, hidden=(40, 0))
