"""Least squares: its loss is a quadratic in the parameters, so the inner loop has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.types import Batch, Episode

START = np.array([0.5, -1.0, 2.0], np.float32)
PARAMS = {"head": jnp.asarray(START)}


def loss(params, batch):
    return 0.5 * jnp.mean((batch.inputs @ params["head"] - batch.targets) ** 2)


def episodes(num_tasks, num_support=8, num_query=6, seed=0):
    rng = np.random.default_rng(seed)

    def batch(size):
        inputs = rng.normal(size=(num_tasks, size, 3))
        return Batch(inputs.astype(np.float32), rng.normal(size=(num_tasks, size)).astype("f4"))

    return Episode(batch(num_support), batch(num_query), np.arange(num_tasks, dtype=np.int32))


def episode(**sizes):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), episodes(1, **sizes))


def hessian(batch):
    return np.asarray(batch.inputs.T @ batch.inputs, np.float64) / len(batch.inputs)


def gradient(w, batch):
    return np.asarray(batch.inputs, np.float64).T @ residual(w, batch) / len(batch.inputs)


def residual(w, batch):
    return np.asarray(batch.inputs, np.float64) @ w - batch.targets


def value(w, batch):
    return 0.5 * np.mean(residual(w, batch) ** 2)


def minimum(batch):
    return np.linalg.lstsq(np.asarray(batch.inputs), np.asarray(batch.targets), rcond=None)[0]


def contraction(batch, rate, num_steps):
    """``(I - rate A)^K``: what K steps leave of the distance to the minimum."""
    return np.linalg.matrix_power(np.eye(3) - rate * hessian(batch), num_steps)


def descend(w, batch, rates):
    """Gradient descent by hand, a rate a step: all of ``θ_0 ... θ_K``."""
    path = [np.asarray(w, np.float64)]
    for rate in rates:
        path.append(path[-1] - rate * gradient(path[-1], batch))
    return np.stack(path)
