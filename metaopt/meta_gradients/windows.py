"""A long inner run in windows of W steps: what truncated and evolution share.

The run of K steps is cut into K / W windows. The inner state goes from window to window,
every window has a loss of its own, and what the outer loop descends is their mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt, check_split
from metaopt.types import (
    Array,
    Batch,
    Episode,
    Hparams,
    InnerGradFn,
    Key,
    Learner,
    LossFn,
    MetaGradFn,
    MetaParams,
    Metrics,
    Params,
)


class Windows(NamedTuple):
    """An estimator one window at a time, for outer updates while an inner run goes on.

    Attributes:
      init: ``(meta_params, hparams, episode, key) -> carry``; nothing run yet.
      step: ``(meta_params, hparams, episode, carry) -> (grads, metrics, carry)``; the next
        W inner steps, by the meta-parameters given now. The metrics are ``loss``, the
        query loss where the window ends, and ``inner_losses`` ``[W]``.

    The carry is a pytree of arrays. Its ``step`` counts the inner steps of the run so far
    and is 0 again after K of them: the next window starts a new run, from the
    meta-parameters and the episode that it is given.
    """

    init: Callable[[MetaParams, Hparams, Episode, Key], Any]
    step: Callable[[MetaParams, Hparams, Episode, Any], tuple[MetaParams, Metrics, Any]]


class InnerRun(NamedTuple):
    """The state of an inner run.

    Attributes:
      params: parameters so far.
      opt_state: state of the inner optimiser.
      step: int32 scalar, inner steps so far; 0 once there are K of them.
    """

    params: Params
    opt_state: optax.OptState
    step: Array


def check_window(inner: InnerLoop, window: int | None) -> int:
    """W, which is K for None.

    Raises:
      UserError: W does not divide K, or the weights of the query losses are annealed, which is
        over a whole run and not within a window.
    """
    if inner.query_loss == "annealed":
        raise UserError(
            "query_loss='annealed' weighs the steps of a whole inner run, which windows cut: use "
            "query_loss='mean' or 'last' here, or the estimator reverse"
        )
    window = inner.num_steps if window is None else window
    if window < 1 or inner.num_steps % window:
        raise UserError(
            f"{inner.num_steps} inner steps cannot be cut into windows of {window}; "
            "make the window a divisor of the inner steps"
        )
    return window


def start_run(learner: Learner, meta_params: MetaParams, hparams: Hparams) -> InnerRun:
    """The inner run before its first step."""
    start = learner.start(meta_params)
    opt_state = learner.inner_opt(meta_params, hparams).init(start)
    return InnerRun(start, opt_state, jnp.zeros((), jnp.int32))


def run_window(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    window: int,
    *,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> Callable[[MetaParams, Hparams, Episode, InnerRun], tuple[Array, tuple[Metrics, InnerRun]]]:
    """The next W steps of a run of K, as a function of the meta-parameters.

    Returns:
      ``(meta_params, hparams, episode, run) -> (loss of the window, (metrics, run))``, as
      `unroll_window`, except that the run starts again, from the meta-parameters, if its step
      is 0, as it is after K steps, and that each window takes its part of the support.
    """
    steps = unroll_window(learner, loss_fn, inner, window, outer_loss=outer_loss, grad_fn=grad_fn)

    def in_window(meta_params, hparams, episode, run):
        first = start_run(learner, meta_params, hparams)
        run = jax.tree.map(lambda a, b: jnp.where(run.step == 0, a, b), first, run)
        support = _support_of(episode, inner, window, run.step)
        loss, (metrics, run) = steps(meta_params, hparams, episode._replace(support=support), run)
        return loss, (metrics, run._replace(step=run.step % inner.num_steps))

    return in_window


def unroll_window(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    window: int,
    *,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> Callable[[MetaParams, Hparams, Episode, InnerRun], tuple[Array, tuple[Metrics, InnerRun]]]:
    """W more steps of a run of any length, as a function of the meta-parameters.

    Args:
      learner: how to step, and on what; its start is not read.
      loss_fn: what the steps descend, as the learner changes it.
      inner: how to step; its number of steps is not read.
      window: W.
      outer_loss: what the query is judged by; None for ``loss_fn``.
      grad_fn: the inner-gradient function.

    Returns:
      ``(meta_params, hparams, episode, run) -> (loss of the window, (metrics, run))``,
      differentiable. The loss of the window is the query loss after its last step, or with
      ``inner.query_loss='mean'`` the mean of the query loss after each of its steps.
    """

    judge = loss_fn if outer_loss is None else outer_loss

    def steps(meta_params, hparams, episode, run):
        def query_loss(params, _=None):
            return judge(params, episode.query)

        adapted = adapt(
            learner.inner_loss(meta_params, loss_fn),
            learner.inner_opt(meta_params, hparams),
            run.params,
            episode.support,
            inner,
            num_steps=window,
            opt_state=run.opt_state,
            grad_fn=grad_fn,
            probe=query_loss if inner.query_loss == "mean" else None,
        )
        last = loss = query_loss(adapted.params)
        if inner.query_loss == "mean":
            # The first probe is from before the window, and the last loss from after it.
            loss = (adapted.probes[1:].sum() + last) / window
        run = InnerRun(adapted.params, adapted.opt_state, run.step + window)
        return loss, ({"loss": last, "inner_losses": adapted.losses}, run)

    return steps


def _support_of(episode: Episode, inner: InnerLoop, window: int, step: Array) -> Batch:
    """What the window that begins at ``step`` adapts on."""
    if inner.batching == "same":
        return episode.support
    num_support = jax.tree.leaves(episode.support)[0].shape[0]
    check_split(num_support, inner.num_steps)
    size = num_support // inner.num_steps
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, step * size, window * size), episode.support
    )


def mean_over_windows(windows: Windows, inner: InnerLoop, window: int) -> MetaGradFn:
    """The estimator of a whole run: the mean of the gradients of its K / W windows.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``, where the metric
      ``loss`` is that of the last window.
    """
    num_windows = inner.num_steps // window

    def gradient(meta_params, hparams, episode, run):
        def next_window(carry, _):
            total, run = carry
            grads, metrics, run = windows.step(meta_params, hparams, episode, run)
            return (jax.tree.map(jnp.add, total, grads), run), metrics

        start = (jax.tree.map(jnp.zeros_like, meta_params), run)
        (total, _), metrics = jax.lax.scan(
            next_window, start, length=num_windows, unroll=inner.unroll
        )
        return jax.tree.map(lambda g: g / num_windows, total), {
            "loss": metrics["loss"][-1],
            "inner_losses": metrics["inner_losses"].reshape(inner.num_steps),
        }

    gradient = compile_once(gradient)

    def estimate(meta_params, hparams, episode, key):
        run = windows.init(meta_params, hparams, episode, key)
        return gradient(meta_params, hparams, episode, run)

    return estimate
