"""First order: the meta-gradient with the curvature of the inner loss left out (FOMAML)."""

import jax

from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.reverse import reverse
from metaopt.types import Batch, Learner, LossFn, MetaGradFn, Params


def first_order(
    learner: Learner, loss_fn: LossFn, inner: InnerLoop, *, outer_loss: LossFn | None = None
) -> MetaGradFn:
    """The meta-gradient without the second derivatives in the parameters.

    Mathematics: ``∇²L_S`` is taken as zero, so that for the initialisation
    ``d L_Q(θ_K) / d θ_0 ≈ ∇L_Q(θ_K)``. Learned rates still get a gradient, since the
    update is a product of the rate and the (constant) inner gradient; it is exact
    for the rates of the last step, which no inner gradient comes after. Meta-parameters λ of the
    inner loss keep their cross derivative ``∂²L_S / ∂θ∂λ`` at every step, and the steps after it
    are taken as if they moved by a constant. Arguments and metrics are those of `reverse`.

    References:
      Finn et al., 2017, "Model-Agnostic Meta-Learning", section 5.2;
      Nichol et al., 2018, "On First-Order Meta-Learning Algorithms";
      Luketina et al., 2016, "Scalable Gradient-Based Tuning of Continuous Regularization
      Hyperparameters" (the cross derivative alone).
    """
    return reverse(learner, loss_fn, inner, outer_loss=outer_loss, grad_fn=without_curvature)


def stopped_gradients(loss_fn: LossFn, has_aux: bool = False):
    """`jax.value_and_grad` whose gradient is a constant, and whose loss is none.

    For a loss that is judged where it is stepped on, such as that of `streaming`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def stopped(params: Params, batch: Batch):
        value, grads = value_and_grad(params, batch)
        return value, jax.lax.stop_gradient(grads)

    return stopped


def without_curvature(loss_fn: LossFn):
    """`jax.value_and_grad` at parameters behind a stop-gradient."""

    def value_and_grad(params: Params, batch: Batch):
        return jax.value_and_grad(loss_fn)(jax.lax.stop_gradient(params), batch)

    return value_and_grad
