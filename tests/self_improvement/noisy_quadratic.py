"""A quadratic with noise as a workload: a step takes microseconds, and its answers are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.self_improvement.builders import cosine
from metaopt.self_improvement.workload import Scale, Workload
from metaopt.types import MetaState

CURVATURE = np.linspace(0.2, 1.0, 6).astype(np.float32)
OPTIMUM = np.array([1.0, -2.0, 0.5, 2.0, -1.0, 3.0], np.float32)
START = np.zeros(6, np.float32)
NOISE = 0.5
RATE = Scale(low=1e-5, high=1e3)
SPACE = {"outer_learning_rate": RATE}
SETTINGS = {"outer_learning_rate": 0.5, "weight_decay": 0.0, "batch_size": 4}


def draw(seed: int, number: int) -> np.ndarray:
    noise = np.random.default_rng((7, seed)).normal(size=(number, 6))
    return (OPTIMUM + NOISE * noise).astype(np.float32)


def losses(params, examples):
    """Of each example, ``[S]``; its gradient is ``h (p − x)``."""
    return 0.5 * (params[None] - examples) ** 2 @ CURVATURE


def update(state: MetaState, examples):
    params, h = state.meta_params["params"], state.hparams
    loss, grad = jax.value_and_grad(lambda p: losses(p, examples).mean())(params)
    moved = params - h["outer_learning_rate"] * (grad + h["weight_decay"] * params)
    metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grad), "inner_losses": jnp.zeros(0)}
    return state._replace(step=state.step + 1, meta_params={"params": moved}), metrics


step = jax.jit(update, donate_argnums=0)
HELD_OUT = draw(10**6, 64)
_evaluate = jax.jit(lambda params: losses(params, HELD_OUT))
LEAST = float(_evaluate(jnp.asarray(OPTIMUM)).mean())
"""About the lowest held-out loss that there is."""


def initial_state(settings=None) -> MetaState:
    del settings
    hparams = {"outer_learning_rate": jnp.float32(0), "weight_decay": jnp.float32(0)}
    return MetaState(jnp.int32(0), {"params": jnp.asarray(START)}, (), hparams, jax.random.key(0))


def evaluate(state: MetaState) -> np.ndarray:
    return np.asarray(_evaluate(state.meta_params["params"]))


def sample(settings, position, *, bad=frozenset()):
    size = settings["batch_size"]
    examples = draw(position, size)
    broken = any(position <= example < position + size for example in bad)
    return np.full_like(examples, np.nan) if broken else examples


def workload(num_examples=2000, bad=frozenset(), space=SPACE, **changes) -> Workload:
    """Batches that hold a ``bad`` example are not numbers."""
    return Workload(
        name="quadratic",
        task={"kind": "quadratic", "dimensions": 6},
        start=initial_state,
        step=lambda settings: step,
        sample=functools.partial(sample, bad=bad),
        examples_per_step=lambda settings: settings["batch_size"],
        evaluate=evaluate,
        num_examples=num_examples,
        tokens_per_example=2,
        space=space,
        schedule=cosine,
    )._replace(**changes)


def as_bytes(state: MetaState) -> list[bytes]:
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def loss_of(state: MetaState) -> float:
    return float(evaluate(state).mean())
