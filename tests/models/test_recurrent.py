"""The Elman network against its recurrence, written out."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.models import recurrent


def test_elman_network_is_its_recurrence_from_zero():
    model = recurrent(6, 4, "rnn", num_layers=2)
    params = model.init(jax.random.key(0))
    assert set(params) == {"embed", "layer_0", "layer_1", "head"}
    tokens = np.array([3, 1, 4, 1, 5])
    x = np.asarray(params["embed"]["embedding"])[tokens]
    for name in ("layer_0", "layer_1"):
        layer, state, states = jax.tree.map(np.asarray, params[name]), np.zeros(4), []
        for x_t in x:
            inputs = x_t @ layer["i"]["kernel"] + layer["i"]["bias"]
            state = np.tanh(inputs + state @ layer["h"]["kernel"])
            states.append(state)
        x = np.stack(states)
    expected = x @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])[None]
    logits = jax.jit(model.apply)(params, jnp.asarray(tokens)[None])
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-6)
