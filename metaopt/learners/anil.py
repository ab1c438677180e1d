"""ANIL: the body is learned in the outer loop only; the inner loop adapts the head."""

import optax

from metaopt.errors import UserError
from metaopt.learners.maml import InnerOptimizer, maml
from metaopt.types import Learner, Model, Params


def anil(model: Model, inner_optimizer: InnerOptimizer = optax.sgd) -> Learner:
    """The initialisation, with inner steps on the head alone.

    The outer loop learns everything: ``θ = (body, head)`` and
    ``head_{k+1} = head_k − α ∇_head L(body, head_k)``. For a model that is all head
    (a bigram table) this is MAML.

    Args:
      model: says which entries of its parameters are the head.
      inner_optimizer: as for `maml`.

    Raises:
      UserError: the model has no head of its own, as with a tied one.

    References:
      Raghu et al., 2020, "Rapid Learning or Feature Reuse?", section 4.
    """
    if not model.head:
        raise UserError(
            "ANIL adapts the head alone, and this model has none of its own "
            "(a tied head is the embedding): untie it or use another learner"
        )

    def labels(params: Params) -> Params:
        return {name: "head" if name in model.head else "body" for name in params}

    def inner_opt(_, hparams):
        head = inner_optimizer(hparams["inner_learning_rate"])
        return optax.multi_transform({"head": head, "body": optax.set_to_zero()}, labels)

    return maml()._replace(inner_opt=inner_opt, adapted=model.head)
