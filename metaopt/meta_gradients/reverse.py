"""Reverse mode: the exact meta-gradient, by backpropagation through the inner loop."""

import jax
import jax.numpy as jnp

from metaopt.checks import check_call, check_parts, hparam
from metaopt.eager import compile_once
from metaopt.inner_loop import InnerLoop, adapt, query_weights
from metaopt.types import InnerGradFn, Learner, LossFn, MetaGradFn


def reverse(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    outer_loss: LossFn | None = None,
    grad_fn: InnerGradFn = jax.value_and_grad,
) -> MetaGradFn:
    """The exact gradient of the query loss after adaptation.

    Mathematics: with ``θ_{k+1} = θ_k − α ∇L_S(θ_k)``,
    ``d L_Q(θ_K) / d θ_0 = ∏_k (I − α ∇²L_S(θ_k)) ∇L_Q(θ_K)``; what else is
    meta-learned gets its exact gradient in the same pass. With
    ``inner.query_loss='mean'`` it is the gradient of ``1/K Σ_k L_Q(θ_k)``, k = 1..K, and with
    ``'annealed'`` of ``Σ_k w_k L_Q(θ_k)`` with the weights of `metaopt.inner_loop.query_weights`
    at ``hparams['query_annealing']``.

    Args:
      learner: what is meta-learned.
      loss_fn: what the inner loop descends, as the learner changes it.
      inner: the inner loop.
      outer_loss: what the adapted parameters are judged by; None for ``loss_fn``.
      grad_fn: the inner-gradient function; another one makes another estimator.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``; the key is
      not used.

    Raises:
      UserError: the learner is no `Learner` or the loss no function; and when called, what
        `metaopt.checks.check_call` refuses, or ``'annealed'`` has no scalar in the hparams.

    References:
      Finn et al., 2017, "Model-Agnostic Meta-Learning", algorithm 1; Antoniou et al.,
      2019, "How to train your MAML" (the multi-step loss).
    """
    judge = check_parts(learner, loss_fn, inner, outer_loss)

    def objective(meta_params, hparams, episode):
        def query_loss(params, _=None):
            return judge(params, episode.query)

        adapted = adapt(
            learner.inner_loss(meta_params, loss_fn),
            learner.inner_opt(meta_params, hparams),
            learner.start(meta_params),
            episode.support,
            inner,
            grad_fn=grad_fn,
            probe=query_loss if inner.query_loss != "last" else None,
        )
        last = query_loss(adapted.params)
        metrics = {"loss": last, "inner_losses": adapted.losses}
        if inner.query_loss == "last":
            return last, metrics
        # The first probe is from before any step, which is no loss of adaptation.
        losses = jnp.append(adapted.probes[1:], last)
        if inner.query_loss == "mean":
            return losses.mean(), metrics
        weights = query_weights(inner.num_steps, hparam(hparams, "query_annealing"))
        return weights @ losses, metrics

    gradient = compile_once(jax.grad(objective, has_aux=True))

    def estimate(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode)
        return gradient(meta_params, hparams, episode)

    return estimate
