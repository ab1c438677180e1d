"""Truncated back-propagation: a long inner run, differentiated window by window."""

import jax

from metaopt.checks import check_call, check_parts
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.windows import (
    Windows,
    check_window,
    mean_over_windows,
    run_window,
    start_run,
)
from metaopt.types import InnerGradFn, Learner, LossFn, MetaGradFn


def truncated(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    window: int | None = None,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> MetaGradFn:
    """The gradient of each window's loss through the W steps of that window alone.

    Mathematics: with the inner state ``s_j`` where window j starts held constant, and
    ``L_j(s, m)`` the query loss at the end of a window that starts from s with the
    meta-parameters m (with ``inner.query_loss='mean'``, the mean over its steps),
    ``g = W / K Σ_j ∂L_j(s_j, m) / ∂m``. Memory is that of W steps, not of K. What is left out
    is the effect of one window on the next: the estimate is biased, towards what pays off
    within W steps. The initialisation is in the first window only and has its gradient from
    there. With W = K this is `reverse`.

    Args:
      learner: one that learns more than the initialisation, unless W = K.
      inner: the inner loop, of K steps.
      window: W, a divisor of K; None for K.
      loss_fn, outer_loss, grad_fn: as for `reverse`.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``; the key is
      not used, and the metric ``loss`` is the query loss after all K steps.

    Raises:
      UserError: W does not divide K, or W < K and the learner has the initialisation alone.

    References:
      Shaban et al., 2019, "Truncated Back-propagation for Bilevel Optimization";
      Wu et al., 2018, "Understanding Short-Horizon Bias in Stochastic Meta-Optimization".
    """
    windows = truncated_windows(
        learner, loss_fn, inner, window=window, outer_loss=outer_loss, grad_fn=grad_fn
    )
    return mean_over_windows(windows, inner, check_window(inner, window))


def truncated_windows(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    window: int | None = None,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> Windows:
    """`truncated` one window at a time; arguments and errors are its own.

    The carry is an `InnerRun`. No gradient goes through it.

    References:
      Metz et al., 2019, "Understanding and Correcting Pathologies in the Training of
      Learned Optimizers" (outer updates within an inner run).
    """
    outer_loss = check_parts(learner, loss_fn, inner, outer_loss)
    window = check_window(inner, window)
    if window < inner.num_steps and not learner.learned:
        raise UserError(
            f"truncated with windows of {window} of {inner.num_steps} inner steps sees the "
            "initialisation in the first window only, and this learner has nothing else to "
            "learn: use the estimator reverse, or a learner with rates such as meta_sgd"
        )
    loss_of_window = run_window(
        learner, loss_fn, inner, window, outer_loss=outer_loss, grad_fn=grad_fn
    )

    def init(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode)
        return start_run(learner, meta_params, hparams)

    def step(meta_params, hparams, episode, run):
        run = jax.lax.stop_gradient(run)
        grads, (metrics, run) = jax.grad(loss_of_window, has_aux=True)(
            meta_params, hparams, episode, run
        )
        return grads, metrics, run

    return Windows(init, step)
