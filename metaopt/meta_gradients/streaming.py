"""Streaming: the meta-gradient of a stream's score, where each part is scored before its step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.checks import check_call, check_parts
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.frozen import reads_on
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.meta_gradients.joint import support_and_query
from metaopt.types import (
    InnerGradFn,
    Learner,
    LossFn,
    Params,
    PyTree,
    WindowGradFn,
    unchanged_loss,
)


class Carry(NamedTuple):
    """What goes from one window of a document to the next.

    Attributes:
      displacement: δ, what the steps so far have moved the parameters from their start by.
      opt_state: state of the inner optimiser.
      context: what the model keeps of the document; empty of losses that keep nothing.
    """

    displacement: Params
    opt_state: optax.OptState
    context: PyTree


def streaming(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> WindowGradFn:
    """The exact meta-gradient of the score of dynamic evaluation on a short stream.

    Its episodes are stretches of a stream, or whole documents: support and query are consecutive
    segments, N together. It descends ``1/N Σ_i L_i(θ_i)`` with ``θ_{i+1} = θ_i − α ∇L_i(θ_i)``,
    which is what dynamic evaluation is judged by (`metaopt.streams.dynamic_evaluation`), by
    backpropagation through the stream. The first term is the static loss. A
    `metaopt.losses.ReadingLoss` carries what the model keeps of the segments before, and the
    gradient goes through that too: test-time training end to end.

    A document too long for that is taken in windows, ``FitConfig(windows=W)``, one a meta-update.
    The next window begins at ``θ_0 + δ`` with what the window before has moved its start by, with
    the state of its optimiser and with its context. All three are numbers to the gradient, which
    so goes through the steps of one window, as in truncated backpropagation through time; but the
    start is that of this update, and what it gains far into a document counts. An inner optimiser
    whose state holds parameters (schedule_free, lookahead) would go back to the start as it was.

    Args:
      learner: what is meta-learned.
      loss_fn: loss of a batch of one segment, which the steps descend as the learner changes it.
      inner: how the loop is compiled and what it keeps; steps and batching follow the episode.
      outer_loss: what a segment is scored by, before the step on it; None for ``loss_fn``.
      grad_fn: the inner-gradient function; `metaopt.meta_gradients.first_order.stopped_gradients`
        leaves the curvature out.

    Returns:
      A `WindowGradFn`: ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``, and
      the same of windows, which a `Carry` joins. ``loss`` is the score and ``inner_losses`` ``[N]``
      its terms.

    Raises:
      UserError: ``inner.query_loss`` is not left at ``'last'``; or the loss is of a document that
        is read on, and the learner or an outer loss puts another in its place.

    References:
      Tandon et al., 2025, "End-to-End Test-Time Training for Long Context", arXiv:2512.23675;
      Finn et al., 2017, arXiv:1703.03400, algorithm 1; Krause et al., 2018, "Dynamic Evaluation
      of Neural Sequence Models", section 3.
    """
    judge = check_parts(learner, loss_fn, inner, outer_loss, reads=True)
    if inner.query_loss != "last":
        raise UserError(
            "a stream is judged by the mean loss of its segments, each before the step on it, and "
            f"has no query of which query_loss={inner.query_loss!r} could be: leave it at 'last'"
        )
    same = outer_loss is None and learner.inner_loss is unchanged_loss
    if reads_on(loss_fn) and not same:
        raise UserError(
            "a document that is read on is judged by the loss that is stepped on: take a learner "
            "that does not change it, and no outer_loss"
        )

    def objective(meta_params, hparams, episode, carry=None):
        start, resumed = learner.start(meta_params), {}
        if carry is not None:
            params = jax.tree.map(jnp.add, start, carry.displacement)
            resumed = {"opt_state": carry.opt_state, "context": carry.context}
        segments = support_and_query(episode)
        count = jax.tree.leaves(segments)[0].shape[0]
        adapted = adapt(
            learner.inner_loss(meta_params, loss_fn),
            learner.inner_opt(meta_params, hparams),
            start if carry is None else params,
            segments,
            dataclasses.replace(inner, num_steps=count, batching="split"),
            grad_fn=grad_fn,
            probe=None if same else judge,
            **resumed,
        )
        scores = adapted.losses if same else adapted.probes
        metrics = {"loss": scores.mean(), "inner_losses": scores}
        if carry is None:
            return scores.mean(), metrics
        moved = jax.tree.map(jnp.subtract, adapted.params, start)
        return scores.mean(), (metrics, Carry(moved, adapted.opt_state, adapted.context))

    gradient = compile_once(jax.grad(objective, has_aux=True))

    def whole(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode)
        return gradient(meta_params, hparams, episode)

    @compile_once
    def begin(meta_params, hparams):
        start = learner.start(meta_params)
        context = loss_fn.start(start) if reads_on(loss_fn) else ()
        opt_state = learner.inner_opt(meta_params, hparams).init(start)
        return Carry(jax.tree.map(jnp.zeros_like, start), opt_state, context)

    def go_on(meta_params, hparams, episode, carry):
        check_call(learner, meta_params, hparams, episode)
        grads, (metrics, carry) = gradient(meta_params, hparams, episode, carry)
        return grads, metrics, carry

    return WindowGradFn(whole, begin, go_on)
