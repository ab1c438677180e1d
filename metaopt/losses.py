"""Losses: a model made into ``(params, batch) -> float32 scalar``.

Each is the mean over everything in the batch. Low-precision outputs are
accumulated in float32; float64 stays float64.

Targets that are classes or tokens may be of any integer dtype. One that is `IGNORED`, such as
that of padding, is not counted: the mean is over the others, and is 0 with a gradient of 0
if there are none. (If a batch is cut up, over steps, devices or microbatches, each part
has a mean of its own.) One that is no class is an error, never another class's score: a
UserError where its value is known, and in a compiled function, where it is not, a loss and a
gradient of NaN.

Of a model that adapts in part the loss is a `metaopt.frozen.FrozenLoss` of what adapts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.frozen import is_prepared, of_what_adapts
from metaopt.indices import as_int32, as_tokens, check_range
from metaopt.types import Array, Batch, LossFn, Model, Params, PyTree, Stateful

NATS_TO_BITS = 1 / math.log(2)
"""Multiplies a loss in nats to give it in bits; nats a byte become bits a byte."""

IGNORED = -100
"""The target that is not counted, as in PyTorch."""


def next_token(model: Model, ignore_index: int | None = IGNORED) -> LossFn:
    """Mean cross-entropy of the next token, in nats a token.

    Args:
      model: int32 ``[S, L]`` to logits ``[S, L, V]``.
      ignore_index: the target that is not counted; a token of the vocabulary will do, such as
        that of padding. None counts all.

    Returns:
      A loss of a batch of integers ``inputs`` and ``targets``, both ``[S, L]``. Inputs are
      tokens everywhere, also where the target is not counted; the model gets them as int32,
      negative ones as `metaopt.indices.NO_INDEX`, for which the models here give NaN. It
      raises UserError, when traced, if they differ in shape or are no integers.
    """

    apply, trunk = model.apply, model.trunk

    def loss(params: Params, batch: Batch) -> Array:
        _require_batch(batch)
        inputs = batch.inputs
        if trunk is None or not is_prepared(inputs):
            inputs = as_tokens("inputs", inputs)
            _require_shape("targets", batch.targets, inputs.shape)
        return _cross_entropy(apply(params, inputs), batch.targets, ignore_index)

    return of_what_adapts(loss, model)


class ReadingLoss(NamedTuple):
    """The loss of a document that is read on, chunk after chunk.

    As a loss it takes all chunks of one document, ``inputs`` and ``targets [N, B]`` in their order,
    and reads them with the same parameters. The inner loop takes `step` in its place, one chunk a
    step (``batching='split'``), and carries the context.

    Attributes:
      model: what reads.
    """

    model: Stateful

    def __call__(self, params: Params, batch: Batch) -> Array:
        """The mean over chunks of their mean losses, nats a token."""
        return self.of_chunks(params, batch).mean()

    def of_chunks(self, params: Params, batch: Batch) -> Array:
        """The mean loss of each chunk ``[N]``, nats a token."""

        def read(context: PyTree, chunk: Batch) -> tuple[PyTree, Array]:
            loss, context = self.step(params, jax.tree.map(lambda x: x[None], chunk), context)
            return context, loss

        _require_batch(batch)
        return jax.lax.scan(read, self.start(params), batch)[1]

    def start(self, params: Params) -> PyTree:
        """The context before a document."""
        return self.model.start(1, jnp.result_type(*jax.tree.leaves(params)))

    def step(self, params: Params, batch: Batch, context: PyTree) -> tuple[Array, PyTree]:
        """The mean loss of one chunk, ``[1, B]``, nats a token, and the context after it."""
        inputs = as_tokens("inputs", batch.inputs)
        _require_shape("targets", batch.targets, inputs.shape)
        logits, context = self.model.read(params, context, inputs)
        return _cross_entropy(logits, batch.targets, IGNORED), context


def regression(model: Model) -> LossFn:
    """Mean squared error, in squared units of the targets (no factor 1/2).

    Args:
      model: float32 ``[S, D_in]`` to predictions ``[S, D_out]``.

    Returns:
      A loss of a batch of ``inputs [S, D_in]`` and ``targets [S, D_out]``. It raises
      UserError, when traced, if predictions and targets differ in shape.
    """

    def loss(params: Params, batch: Batch) -> Array:
        _require_batch(batch)
        predictions = _at_least_float32(apply(params, batch.inputs))
        _require_shape("targets", batch.targets, predictions.shape)
        return jnp.mean((predictions - batch.targets) ** 2)

    apply = model.apply
    return of_what_adapts(loss, model)


def classification(model: Model, ignore_index: int | None = IGNORED) -> LossFn:
    """Mean cross-entropy of the class, in nats an example.

    Args:
      model: inputs ``[S, ...]`` to logits ``[S, ..., V]``.
      ignore_index: the target that is not counted; None counts all.

    Returns:
      A loss of a batch of inputs and integer ``targets [S, ...]``. It raises UserError,
      when traced, if the targets are not integers or not of that shape.
    """

    def loss(params: Params, batch: Batch) -> Array:
        _require_batch(batch)
        return _cross_entropy(apply(params, batch.inputs), batch.targets, ignore_index)

    apply = model.apply
    return of_what_adapts(loss, model)


def accuracy(model: Model, ignore_index: int | None = IGNORED) -> LossFn:
    """Share of the examples (or tokens) whose largest logit is the target's, in [0, 1].

    Its signature is a loss's, but it is flat almost everywhere: for evaluation only. Arguments,
    batches and errors are those of `classification`.
    """

    def share_correct(params: Params, batch: Batch) -> Array:
        _require_batch(batch)
        logits = apply(params, batch.inputs)
        labels = _labels(batch.targets, logits, ignore_index)
        correct = (logits.argmax(-1) == labels).astype(jnp.float32)
        return _mean_of_counted(correct, labels, logits.shape[-1], ignore_index)

    apply = model.apply
    return of_what_adapts(share_correct, model)


def per_example(loss_fn: LossFn) -> Callable[[Params, Batch], Array]:
    """The losses of single examples, of a loss that is a mean over them.

    For weights on the data: ``weights @ per_example(loss_fn)(params, batch)``.

    Returns:
      ``(params, batch) -> [S]``, for batches whose leaves are ``[S, ...]``.
    """

    def losses(params: Params, batch: Batch) -> Array:
        examples = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(loss_fn, (None, 0))(params, examples)

    return losses


def _cross_entropy(logits: Array, targets: Array, ignore_index: int | None) -> Array:
    labels = _labels(targets, logits, ignore_index)
    losses = optax.softmax_cross_entropy_with_integer_labels(_at_least_float32(logits), labels)
    return _mean_of_counted(losses, labels, logits.shape[-1], ignore_index)


def _labels(targets: Array, logits: Array, ignore_index: int | None) -> Array:
    labels = as_int32("targets", targets)
    _require_shape("targets", labels, logits.shape[:-1])
    check_range("targets", targets, logits.shape[-1], ignore_index)
    return labels


def _mean_of_counted(
    values: Array, labels: Array, num_classes: int, ignore_index: int | None
) -> Array:
    """The mean where labels are not ignored; it and its gradient are NaN where one is no class."""
    is_class = (labels >= 0) & (labels < num_classes)
    weights = jnp.where(is_class, 1.0, jnp.nan).astype(values.dtype)
    if ignore_index is not None:
        counted = labels != ignore_index
        values, weights = jnp.where(counted, values, 0.0), jnp.where(counted, weights, 0.0)
    return values.sum() / jnp.maximum(weights.sum(), 1.0)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _require_batch(batch: Any) -> None:
    if not (hasattr(batch, "inputs") and hasattr(batch, "targets")):
        raise UserError(
            "a batch has inputs and targets, and this is an object of type "
            f"{type(batch).__name__}: give metaopt.Batch(inputs, targets)"
        )


def _require_shape(name: str, x: Array, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise UserError(f"{name} must have the shape {expected}, but have {x.shape}")
