"""First order: the meta-gradient with the inner gradients held constant (FOMAML)."""

import jax

from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.reverse import reverse
from metaopt.types import Learner, LossFn, MetaGradFn


def first_order(learner: Learner, loss_fn: LossFn, inner: InnerLoop) -> MetaGradFn:
    """The meta-gradient without second derivatives.

    Mathematics: ``∇²L_S`` is taken as zero, so that for the initialisation
    ``d L_Q(θ_K) / d θ_0 ≈ ∇L_Q(θ_K)``. Learned rates still get a gradient, since the
    update is a product of the rate and the (constant) inner gradient; it is exact
    for the rates of the last step, which no inner gradient comes after.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``.

    References:
      Finn et al., 2017, "Model-Agnostic Meta-Learning", section 5.2;
      Nichol et al., 2018, "On First-Order Meta-Learning Algorithms".
    """
    return reverse(learner, loss_fn, inner, grad_fn=constant_gradient)


def constant_gradient(loss_fn: LossFn):
    """`jax.value_and_grad` behind a stop-gradient."""

    def value_and_grad(params, batch):
        return jax.lax.stop_gradient(jax.value_and_grad(loss_fn)(params, batch))

    return value_and_grad
