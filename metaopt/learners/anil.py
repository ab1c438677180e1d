"""ANIL: the body is learned in the outer loop only; the inner loop adapts the head."""

import optax

from metaopt.errors import UserError
from metaopt.learners.maml import InnerOptimizer, maml
from metaopt.optimizers.part import on_part
from metaopt.pytrees import take
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
      UserError: the model is none, or has no head of its own, as with a tied one; or, from
        ``learner.init`` and at the first inner step, the parameters have no entry of that name.

    References:
      Raghu et al., 2020, "Rapid Learning or Feature Reuse?", section 4.
    """
    if not isinstance(model, Model):
        raise UserError(
            f"anil takes a metaopt.Model, which names its head, not an object of type "
            f"{type(model).__name__}: metaopt.as_model makes one"
        )
    if not model.head:
        raise UserError(
            "ANIL adapts the head alone, and this model has none of its own (a tied head is the "
            "embedding): untie it, name it in Model(init, apply, head=...), or use another learner"
        )

    plain = maml(inner_optimizer)

    def init(params: Params):
        take(params, model.head)  # raises where the head is not there
        return plain.init(params)

    def inner_opt(meta_params, hparams):
        rule = on_part(plain.inner_opt(meta_params, hparams), lambda path: path[0] in model.head)
        return rule._replace(init=lambda params: rule.init(take(params, model.head)))

    return plain._replace(init=init, inner_opt=inner_opt, adapted=model.head)
