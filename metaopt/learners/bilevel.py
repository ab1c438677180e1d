"""Bilevel optimisation: what is learned enters the inner loss, and the start may be fixed."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from metaopt.checks import check_learner, check_parameters, scalar_loss
from metaopt.errors import UserError
from metaopt.types import Learner, LossFn, MetaParams, Params, PyTree, unchanged_loss


def learned_loss(
    learner: Learner,
    inner_loss: Callable[[MetaParams, LossFn], LossFn],
    values: Mapping[str, PyTree],
) -> Learner:
    """The learner with an inner loss that reads meta-parameters, such as a weight decay.

    Mathematics: ``min_{θ, η} L_Q(θ_K)`` with ``θ_{k+1} = θ_k − α ∇_θ L_S(θ_k, η)``. The outer loss
    does not see η: what the inner loss adds is not what the parameters are judged by.

    Args:
      learner: any.
      inner_loss: ``(meta_params, loss_fn) -> loss``: what the inner loop descends, made of the
        meta-parameters and of the loss that the estimator is given.
      values: initial values of the new meta-parameters, by name: trees of floating-point
        arrays. Learn what is positive by its logarithm.

    Returns:
      A learner with these meta-parameters beside its own.

    Raises:
      UserError: a value is no tree of floating-point arrays, or has the name of another
        meta-parameter; ``inner_loss`` is no function; or the learner is none.

    Example:
      >>> def decayed(meta_params, loss_fn):
      ...     def loss(params, batch):
      ...         penalty = optax.tree.norm(params, squared=True)
      ...         return loss_fn(params, batch) + jnp.exp(meta_params["log_decay"]) * penalty
      ...     return loss
      >>> learner = learned_loss(maml(), decayed, {"log_decay": jnp.log(1e-3)})

    References:
      Franceschi et al., 2018, "Bilevel Programming for Hyperparameter Optimization and
      Meta-Learning", eqs. (1)-(4); Maclaurin et al., 2015, "Gradient-based Hyperparameter
      Optimization through Reversible Learning".
    """
    check_learner(learner)
    if not callable(inner_loss):
        raise UserError(
            "inner_loss is a function (meta_params, loss_fn) -> loss, not an object of type "
            f"{type(inner_loss).__name__}"
        )
    if taken := {"params", *learner.learned} & set(values):
        raise UserError(
            f"{', '.join(sorted(taken))} is a meta-parameter of the learner already: give another "
            "name"
        )
    check_parameters(dict(values))

    def init(params: Params) -> MetaParams:
        return learner.init(params) | {n: jax.tree.map(jnp.array, v) for n, v in values.items()}

    return learner._replace(
        init=init,
        inner_loss=lambda meta_params, loss_fn: inner_loss(
            meta_params, scalar_loss(learner.inner_loss(meta_params, loss_fn))
        ),
        learned=(*learner.learned, *values),
    )


def fixed_start(learner: Learner, params: Params) -> Learner:
    """The learner with a start that is not learned: all else that it learns is.

    Hyperparameters of one training run are learned so: a weight decay or weights on the data by
    `learned_loss`, rates by `meta_sgd`, momentum by `metaopt.learners.training_run.tuned_learner`.

    Args:
      learner: one that learns more than its start.
      params: where every inner loop starts. ``learner.init`` does not read its argument.

    Returns:
      A learner without the meta-parameter ``'params'``.

    Raises:
      UserError: the learner has nothing else to learn, or refuses the parameters.
    """
    check_learner(learner)
    if not learner.learned:
        raise UserError(
            "with a fixed start this learner has nothing to learn: give one with more "
            "meta-parameters, such as meta_sgd() or learned_loss(maml(), inner_loss, values)"
        )
    check_parameters(params)

    def full(meta_params: MetaParams) -> MetaParams:
        return {"params": params, **meta_params}

    def init(_: Params = None) -> MetaParams:
        found = learner.init(params)
        return {name: found[name] for name in learner.learned}

    return learner._replace(
        init=init,
        start=lambda meta_params: learner.start(full(meta_params)),
        inner_opt=lambda meta_params, hparams: learner.inner_opt(full(meta_params), hparams),
        inner_loss=(
            learner.inner_loss
            if learner.inner_loss is unchanged_loss
            else lambda meta_params, loss_fn: learner.inner_loss(full(meta_params), loss_fn)
        ),
        learns_start=False,
    )
