"""Whether what a config asks for can be computed, found from shapes: nothing is compiled."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import measure
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.tasks.markov import MarkovConfig, bytes_to_draw
from metaopt.types import Array, Batch, Episode, Estimator, Key, Learner, LossFn, Params

Trained = tuple[Learner, Estimator | None, InnerLoop]
STATES = 4  # trees as large as the parameters that a step has: those, a gradient, two moments


def tokens(number: int, length: int) -> Batch:
    """The shapes of a batch of sequences, int32 ``[number, length]``."""
    shape: Any = jax.ShapeDtypeStruct((number, length), jnp.int32)
    return Batch(shape, shape)


def check(
    rows: Iterable[Trained],
    init: Callable[[Key], Params],
    loss_fn: LossFn,
    support: Batch,
    query: Batch,
    num_episodes: int,
) -> None:
    """Traces what is to be trained, and compares the least memory that it needs with the device's.

    Args:
      rows: learners with their estimators, None for what is not trained, and inner loops.
      init: initialisation of the model.
      loss_fn: its loss.
      support: the shapes of the support of one episode.
      query: the shapes of the query of one episode.
      num_episodes: the largest number of episodes that is held at a time.

    Raises:
      UserError: a row cannot run, such as Reptile with ``batching='split'`` whose steps do not
        divide what it steps on, support and query; or its parameters, the episodes or the
        largest array of one evaluation of the loss alone exceed the memory of the device.
    """
    params = jax.eval_shape(lambda: init(jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    check_bytes(STATES * _bytes(params), f"to train {count:,} parameters", "make the model smaller")
    size = num_bytes(num_episodes, support, query)
    check_bytes(size, f"to hold {num_episodes:,} episodes", "lower their number or size")
    _check_rows(rows, params, *(jax.tree.leaves(x)[0].shape[0] for x in (support, query)))
    program = jax.make_jaxpr(loss_fn)(params, max(support, query, key=_bytes)).jaxpr
    made = (variable.aval for e in measure.equations(program) for variable in e.outvars)
    largest = max(map(_bytes, made), default=0)
    check_bytes(largest, "for one array of the loss", "lower the sizes of model and episode")


def _check_rows(rows: Iterable[Trained], params: Params, num_support: int, num_query: int) -> None:
    """Traces the estimators, with a loss that takes no time to trace."""
    support, query = (
        Batch(jax.ShapeDtypeStruct((n, 1), jnp.float32), None)  # type: ignore[arg-type]
        for n in (num_support, num_query)
    )
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    task: Any = jax.ShapeDtypeStruct((), jnp.int32)
    episode, key = Episode(support, query, task), jax.eval_shape(lambda: jax.random.key(0))
    for learner, estimator, inner in rows:
        hparams = {"inner_learning_rate": scalar}
        if inner.query_loss == "annealed":
            hparams["query_annealing"] = scalar
        if estimator is None:
            continue
        meta_params = jax.eval_shape(learner.init, params)
        try:
            estimate = estimator(learner, _mean_of_all, inner)
            jax.eval_shape(estimate, meta_params, hparams, episode, key)
        except UserError as error:  # support and query are one for some of them
            raise UserError(f"{getattr(estimator, '__name__', 'estimator')}: {error}") from None


def check_languages(config: MarkovConfig, num_tasks: int) -> None:
    """Raises UserError if the tables of ``num_tasks`` languages exceed the memory of the device."""
    needed = bytes_to_draw(config, num_tasks)
    remedy = "lower their number, the vocabulary or the order"
    check_bytes(needed, f"to draw {num_tasks:,} languages at once", remedy)


def check_bytes(needed: float, what: str, remedy: str) -> None:
    """Raises UserError if something takes more than the memory of the device."""
    there = measure.device_bytes()
    if needed > there:
        raise UserError(
            f"{measure.human_bytes(needed)} are needed {what}, and the device has "
            f"{measure.human_bytes(there)}: {remedy}"
        )


def num_bytes(number: int, *parts: Batch) -> int:
    """Bytes of ``number`` copies of these batches."""
    return number * _bytes(parts)


def _mean_of_all(params: Params, batch: Batch) -> Array:
    return sum(jnp.mean(x) for x in jax.tree.leaves((params, batch)))  # type: ignore


def _bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
