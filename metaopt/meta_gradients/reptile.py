"""Reptile: the difference of the start and the adapted parameters, taken as a gradient."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from metaopt.checks import check_call, check_parts, hparam
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.meta_gradients.joint import require_initialisation_only, support_and_query
from metaopt.types import Learner, LossFn, MetaGradFn


def reptile(
    learner: Learner, loss_fn: LossFn, inner: InnerLoop, *, outer_loss: LossFn | None = None
) -> MetaGradFn:
    """Moves the start towards the parameters adapted to all of the episode.

    Mathematics: ``g = (θ_0 − θ_K) / (α K)`` with θ_K from K steps on support and query
    together; for plain gradient descent this is the mean inner gradient. The published
    update ``θ ← θ + ε (θ_K − θ)`` is outer gradient descent on ``α K g``.

    Args:
      learner: must meta-learn nothing beside the initialisation. What its inner
        loop does not move (the body, for ANIL) gets a gradient of zero.
      loss_fn: the inner loss; there is no outer one.
      inner: the inner loop; with ``batching='split'`` each step sees fresh examples. Its
        ``query_loss`` is not used.
      outer_loss: must be None; there is no outer loss here.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``, where the
      metric ``loss`` is that of the adapted parameters on the query, which they have seen.

    Raises:
      UserError: the learner has meta-parameters that this gradient does not reach; an outer loss
        is given; or the rate α is 0. A rate that is traced cannot be checked: at 0 nothing moves,
        and the gradient is zero.

    References:
      Nichol et al., 2018, "On First-Order Meta-Learning Algorithms", algorithm 1.
    """
    judge = check_parts(learner, loss_fn, inner)
    require_initialisation_only(learner, outer_loss, "Reptile")

    def gradient(meta_params, hparams, episode):
        rate = hparam(hparams, "inner_learning_rate")
        start = learner.start(meta_params)
        optimizer = learner.inner_opt(meta_params, hparams)
        inner_loss = learner.inner_loss(meta_params, loss_fn)
        adapted = adapt(inner_loss, optimizer, start, support_and_query(episode), inner)
        scale = jnp.where(rate == 0, 1, rate) * inner.num_steps
        grads = jax.tree.map(lambda a, b: ((a - b) / scale).astype(a.dtype), start, adapted.params)
        loss = judge(adapted.params, episode.query)
        return {"params": grads}, {"loss": loss, "inner_losses": adapted.losses}

    gradient = compile_once(gradient)

    def estimate(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode)
        rate = hparam(hparams, "inner_learning_rate")
        if not isinstance(rate, Tracer) and rate == 0:
            raise UserError(
                "Reptile's gradient is the distance that the inner loop moves, divided by its "
                "rate, and inner_learning_rate is 0: give a rate above 0"
            )
        return gradient(meta_params, hparams, episode)

    return estimate
