"""Losses: a model made into ``(params, batch) -> float32 scalar``.

Each is the mean over everything in the batch. Low-precision outputs are
accumulated in float32; float64 stays float64.
"""

import math

import jax.numpy as jnp
import optax

from metaopt.types import Array, Batch, LossFn, Model, Params

NATS_TO_BITS = 1 / math.log(2)
"""Multiplies a loss in nats to give it in bits; nats a byte become bits a byte."""


def next_token(model: Model) -> LossFn:
    """Mean cross-entropy of the next token, in nats a token.

    Args:
      model: int32 ``[S, L]`` to logits ``[S, L, V]``.

    Returns:
      A loss of a batch of int32 ``inputs`` and ``targets``, both ``[S, L]``. It
      raises ValueError, when traced, if they differ in shape or are no integers.
    """

    def loss(params: Params, batch: Batch) -> Array:
        _require_integers("inputs", batch.inputs)
        _require_shape("targets", batch.targets, batch.inputs.shape)
        return _cross_entropy(model.apply(params, batch.inputs), batch.targets)

    return loss


def regression(model: Model) -> LossFn:
    """Mean squared error, in squared units of the targets (no factor 1/2).

    Args:
      model: float32 ``[S, D_in]`` to predictions ``[S, D_out]``.

    Returns:
      A loss of a batch of ``inputs [S, D_in]`` and ``targets [S, D_out]``. It raises
      ValueError, when traced, if predictions and targets differ in shape.
    """

    def loss(params: Params, batch: Batch) -> Array:
        predictions = _at_least_float32(model.apply(params, batch.inputs))
        _require_shape("targets", batch.targets, predictions.shape)
        return jnp.mean((predictions - batch.targets) ** 2)

    return loss


def classification(model: Model) -> LossFn:
    """Mean cross-entropy of the class, in nats an example.

    Args:
      model: inputs ``[S, ...]`` to logits ``[S, V]``.

    Returns:
      A loss of a batch of inputs and int32 ``targets [S]``. It raises ValueError,
      when traced, if the targets are not integers or not of that shape.
    """

    def loss(params: Params, batch: Batch) -> Array:
        return _cross_entropy(model.apply(params, batch.inputs), batch.targets)

    return loss


def accuracy(model: Model) -> LossFn:
    """Share of the examples (or tokens) whose largest logit is the target's, in [0, 1].

    Its signature is a loss's, but it is flat almost everywhere: for evaluation only.

    Args:
      model: inputs ``[S, ...]`` to logits ``[S, ..., V]``.

    Returns:
      A function of params and a batch with int32 ``targets [S, ...]``. It raises
      ValueError, when traced, if the targets are not integers or not of that shape.
    """

    def share_correct(params: Params, batch: Batch) -> Array:
        logits = model.apply(params, batch.inputs)
        _require_labels(batch.targets, logits)
        return jnp.mean(logits.argmax(-1) == batch.targets, dtype=jnp.float32)

    return share_correct


def _cross_entropy(logits: Array, labels: Array) -> Array:
    _require_labels(labels, logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(_at_least_float32(logits), labels)
    return losses.mean()


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _require_labels(labels: Array, logits: Array) -> None:
    _require_integers("targets", labels)
    _require_shape("targets", labels, logits.shape[:-1])


def _require_integers(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, but their dtype is {x.dtype}")


def _require_shape(name: str, x: Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have the shape {expected}, but have {x.shape}")
