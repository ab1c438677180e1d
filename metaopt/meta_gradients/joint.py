"""Joint pretraining: the baseline, with no inner loop in training."""

import jax
import jax.numpy as jnp

from metaopt.checks import check_call, check_parts
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.types import Batch, Episode, Learner, LossFn, MetaGradFn


def joint(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop | None = None,
    *,
    outer_loss: LossFn | None = None,
) -> MetaGradFn:
    """The gradient of the plain loss on all of the episode: ``∇ L_{S ∪ Q}(θ)``.

    It sees the very tokens that a meta-learner sees, support and query, and learns one
    model of all tasks; adaptation happens at test time only.

    Args:
      learner: must meta-learn nothing beside the initialisation.
      loss_fn: the loss.
      inner: not used, its ``query_loss`` neither; it is here so that all estimators have one
        signature.
      outer_loss: must be None; there is one loss here.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``, where the
      metric ``inner_losses`` is ``[0]``.

    Raises:
      UserError: the learner has meta-parameters that this gradient does not reach, or an
        outer loss is given.
    """
    loss_fn = check_parts(learner, loss_fn, inner or InnerLoop(), reads=True)
    require_initialisation_only(learner, outer_loss, "joint pretraining")

    def objective(meta_params, episode):
        return loss_fn(learner.start(meta_params), support_and_query(episode))

    value_and_gradient = compile_once(jax.value_and_grad(objective))

    def estimate(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode, needs_query=False)
        loss, grads = value_and_gradient(meta_params, episode)
        return grads, {"loss": loss, "inner_losses": jnp.zeros((0,), loss.dtype)}

    return estimate


def support_and_query(episode: Episode) -> Batch:
    """All examples of an episode, ``[S + Q, ...]``."""
    return jax.tree.map(lambda s, q: jnp.concatenate([s, q]), episode.support, episode.query)


def require_initialisation_only(
    learner: Learner, outer_loss: LossFn | None, estimator: str
) -> None:
    """Raises UserError for other meta-parameters than the start, and for an outer loss."""
    if learner.names != ("params",):
        raise UserError(
            f"{estimator} trains the initialisation alone and gives no gradient for "
            f"{', '.join(learner.learned)}: use the learner maml, or the estimator reverse"
        )
    if outer_loss is not None:
        raise UserError(
            f"{estimator} descends one loss and has no outer_loss: leave it out, or use an "
            "estimator that has one, such as reverse or first_order"
        )
