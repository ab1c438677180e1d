"""MAML: the initialisation alone is meta-learned."""

from collections.abc import Callable

import optax

from metaopt.checks import check_factory, check_parameters, hparam
from metaopt.types import Learner

InnerOptimizer = Callable[..., optax.GradientTransformation]
"""``learning_rate -> optax.GradientTransformation``, such as `optax.sgd`."""


def maml(inner_optimizer: InnerOptimizer = optax.sgd) -> Learner:
    """The initialisation: ``min_θ Σ_T L_T(θ − α ∇L_T(θ))`` with a fixed rate α.

    Args:
      inner_optimizer: ``learning_rate -> optax.GradientTransformation``; α is
        ``hparams['inner_learning_rate']``, a scalar that may change between steps.

    Returns:
      A learner whose meta-parameters are ``{'params': params}``.

    Raises:
      UserError: an optimiser is given in place of a function that makes one; or, from
        ``learner.init``, a leaf of the parameters is not floating-point.

    References:
      Finn et al., 2017, "Model-Agnostic Meta-Learning", section 2.2 and algorithm 1.
    """
    check_factory(inner_optimizer)
    return Learner(
        init=lambda params: {"params": check_parameters(params)},
        start=lambda meta_params: meta_params["params"],
        inner_opt=lambda _, hparams: inner_optimizer(hparam(hparams, "inner_learning_rate")),
    )
