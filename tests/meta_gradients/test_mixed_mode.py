import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.inner_loop import InnerLoop
from metaopt.learners import meta_sgd
from metaopt.losses import next_token
from metaopt.meta_gradients import mixed_mode, reverse
from metaopt.meta_gradients.mixed_mode import forward_over_reverse
from metaopt.models import TransformerConfig, transformer
from metaopt.types import Batch, Episode

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time


@pytest.mark.slow
def test_mixed_mode_equals_reverse_on_a_scanned_transformer_under_adam():
    config = TransformerConfig(vocab_size=4, width=4, num_layers=1, num_heads=1)
    model, learner = transformer(config), meta_sgd(optax.adam, num_steps=2)
    sequences = np.random.default_rng(0).integers(0, 4, (5, 6)).astype(np.int32)
    batch = Batch(sequences[:, :-1], sequences[:, 1:])
    support, query = jax.tree.map(lambda x: x[:2], batch), jax.tree.map(lambda x: x[2:], batch)
    meta_params = jax.tree.map(np.float64, learner.init(jax.jit(model.init)(KEY)))
    inner = InnerLoop(num_steps=2, unroll=False, remat=True, query_loss="mean")
    with jax.enable_x64(True):
        found, expected = (
            jax.jit(estimator(learner, next_token(model), inner), compiler_options=QUICKLY)(
                meta_params,
                {"inner_learning_rate": 0.1},
                Episode(support, query, np.int32(0)),
                KEY,
            )
            for estimator in (mixed_mode, reverse)
        )
        assert jax.tree.leaves(found)[0].dtype == jnp.float64
        chex.assert_trees_all_close(found[0], expected[0], rtol=1e-9, atol=1e-13)


def test_all_that_the_loss_sees_gets_its_cotangent():
    def total(value_and_grad, params, inputs, weights):
        def loss(params, batch):  # closes over `weights`, as a learned loss does
            return jnp.mean(weights * jnp.tanh(batch.inputs @ params["w"]) ** 2)

        batch = Batch(inputs, jnp.arange(3))
        value, grads = value_and_grad(loss)(params, batch)
        return 0.7 * value + jnp.vdot(jnp.array([1.0, -2.0]), grads["w"])

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=2))}
    arguments = params, jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.uniform(size=3))
    expected = jax.grad(total, argnums=(1, 2, 3))(jax.value_and_grad, *arguments)
    found = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)(
        forward_over_reverse, *arguments
    )
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-7)
