import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.linear import LinearConfig, bayes_loss, linear, posterior_mean
from metaopt.types import Batch

CONFIG = LinearConfig(dim=3, num_support=5, num_query=7, noise=0.5)


def test_episodes_are_pure_in_the_key_and_differ_between_splits():
    family = linear(CONFIG)
    key = jax.random.key(0)
    episodes = family.train.sample(key, 2)
    assert episodes.support.inputs.shape == (2, 5, 3)
    assert episodes.query.targets.shape == (2, 7, 1)
    np.testing.assert_array_equal(episodes.task, [0, 1])
    jax.tree.map(np.testing.assert_array_equal, episodes, family.train.sample(key, 2))
    draws = [split.sample(key, 2).query.inputs for split in (family.train, family.valid)]
    draws += [family.test.sample(key, 2).query.inputs]
    draws += [family.train.sample(jax.random.key(1), 2).query.inputs]
    flat = np.stack(draws).reshape(4, -1)
    assert len(np.unique(flat[:, 0])) == 4


def test_posterior_mean_solves_the_ridge_equations():
    inputs = jax.random.normal(jax.random.key(0), (5, 3))
    targets = jax.random.normal(jax.random.key(1), (5, 1))
    weights = posterior_mean(CONFIG, Batch(inputs, targets))
    gram = np.asarray(inputs.T @ inputs) + CONFIG.noise**2 * np.eye(3)
    np.testing.assert_allclose(gram @ weights, inputs.T @ targets, atol=1e-5)


def test_bayes_loss_has_the_closed_form_expectation():
    episodes = linear(CONFIG).train.sample(jax.random.key(0), 4000)
    inputs = np.asarray(episodes.support.inputs)
    gram = inputs.transpose(0, 2, 1) @ inputs + CONFIG.noise**2 * np.eye(3)
    variance = np.linalg.inv(gram).trace(axis1=1, axis2=2)
    expected = CONFIG.noise**2 * (1 + variance)
    difference = np.asarray(bayes_loss(CONFIG, episodes)) - expected
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
    assert difference.std() / np.sqrt(len(difference)) < 0.05 * expected.mean()


def test_without_noise_enough_examples_are_fitted_exactly():
    config = LinearConfig(dim=3, num_support=6, noise=0.0)
    losses = bayes_loss(config, linear(config).train.sample(jax.random.key(0), 4))
    assert losses.shape == (4,)
    assert jnp.median(losses) < 1e-8


@pytest.mark.parametrize("bad", [{"dim": 0}, {"num_support": 0}, {"num_query": 0}, {"noise": -1.0}])
def test_bad_configs(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        LinearConfig(**bad)
