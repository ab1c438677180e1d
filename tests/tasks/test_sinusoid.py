import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.sinusoid import SinusoidConfig, evaluation_episodes, sinusoid


def sample(config, num_tasks):
    episodes = sinusoid(config).train.sample(jax.random.key(0), num_tasks)
    return [np.asarray(x, np.float64)[..., 0] for x in episodes.query]


def fit(x, y, frequency):
    """Coefficients of sin and cos for each task, and the largest residual of each."""
    basis = np.stack([np.sin(frequency * x), np.cos(frequency * x)], axis=-1)
    coefficients = (np.linalg.pinv(basis) @ y[..., None])[..., 0]
    residual = np.abs((basis @ coefficients[..., None])[..., 0] - y).max(-1)
    return coefficients, residual


def test_tasks_of_finn():
    x, y = sample(SinusoidConfig(num_query=12), 1000)
    assert x.min() < -4.9 and x.max() > 4.9 and np.abs(x).max() <= 5
    (sine, cosine), residual = fit(x, y, 1.0)[0].T, fit(x, y, 1.0)[1]
    assert residual.max() < 1e-4
    amplitude, phase = np.hypot(sine, cosine), np.arctan2(-cosine, sine)
    for value, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, np.pi)):
        assert value.min() > low - 1e-4 and value.max() < high + 1e-4
        quarters = np.quantile(value, [0.25, 0.5, 0.75])
        np.testing.assert_allclose((quarters - low) / (high - low), [0.25, 0.5, 0.75], atol=0.06)


def test_tasks_of_li():
    x, y = sample(SinusoidConfig(num_query=12, vary_frequency=True), 100)
    grid = np.linspace(0.79, 1.21, 421)
    coefficients, residuals = zip(*(fit(x, y, f) for f in grid), strict=True)
    best = np.argmin(residuals, axis=0)
    assert np.min(residuals, axis=0).max() < 0.05
    assert grid[best].min() < 0.82 and grid[best].max() > 1.18
    assert grid[best].min() >= 0.799 and grid[best].max() <= 1.201
    cosine = np.stack(coefficients)[best, np.arange(100), 1]
    assert cosine.min() > -0.05  # A sin(phase), for a phase in [0, pi] that is added


def test_episodes_are_pure_in_the_key_and_differ_between_splits():
    family = sinusoid(SinusoidConfig(num_support=3))
    key = jax.random.key(0)
    episodes = family.train.sample(key, 2)
    assert episodes.support.inputs.shape == (2, 3, 1)
    jax.tree.map(np.testing.assert_array_equal, episodes, family.train.sample(key, 2))
    others = (family.valid.sample(key, 2), family.train.sample(jax.random.key(1), 2))
    for other in others:
        assert (other.support.inputs != episodes.support.inputs).all()


@pytest.mark.parametrize("field", ["num_support", "num_query"])
def test_bad_configs(field):
    with pytest.raises(UserError, match=field):
        SinusoidConfig(**{field: 0})  # type: ignore[arg-type]


def test_evaluation_meets_each_curve_through_several_supports():
    def draw(num_support):
        config = SinusoidConfig(num_support=num_support, num_query=21, vary_frequency=True)
        return evaluation_episodes(config, jax.random.key(3), num_curves=4, supports_per_curve=3)

    episodes, fewer = draw(200), draw(2)
    np.testing.assert_array_equal(episodes.task, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    np.testing.assert_allclose(episodes.query.inputs[5, :, 0], np.linspace(-5, 5, 21), atol=1e-6)
    curves = np.asarray(episodes.query.targets)[..., 0]
    np.testing.assert_array_equal(curves, np.repeat(curves[::3], 3, axis=0))
    np.testing.assert_array_equal(curves, fewer.query.targets[..., 0])
    assert np.unique(curves[::3], axis=0).shape == (4, 21)
    support = np.asarray(episodes.support.inputs)[..., 0]
    assert np.unique(support, axis=0).shape == (12, 200)
    assert -5 <= support.min() < -4.9 and 4.9 < support.max() <= 5
    for i in range(12):  # the support is of the curve that the query shows
        order = np.argsort(support[i])
        between = np.interp(
            np.linspace(-5, 5, 21)[1:-1],
            support[i][order],
            np.asarray(episodes.support.targets)[i, order, 0],
        )
        np.testing.assert_allclose(between, curves[i, 1:-1], atol=0.3)


@pytest.mark.parametrize("field", ["num_curves", "supports_per_curve"])
def test_bad_sizes_of_the_evaluation(field):
    sizes = {"num_curves": 1, "supports_per_curve": 1} | {field: 0}
    with pytest.raises(UserError, match=field):
        evaluation_episodes(SinusoidConfig(), jax.random.key(0), **sizes)
