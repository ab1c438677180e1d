"""Mixed mode: the exact meta-gradient, with forward-over-reverse second derivatives."""

import jax
import jax.numpy as jnp

from metaopt.checks import forward_mode
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients.reverse import reverse
from metaopt.pytrees import partition
from metaopt.types import Batch, Learner, LossFn, MetaGradFn, Params


def mixed_mode(
    learner: Learner, loss_fn: LossFn, inner: InnerLoop, *, outer_loss: LossFn | None = None
) -> MetaGradFn:
    """The gradient of `reverse`, for less memory and usually less time.

    Reverse mode differentiates the backward pass of every inner gradient by another
    backward pass, and so keeps what the first one computed. What it needs of it is
    the product of the Hessian with a cotangent v, and Hessians are symmetric:
    ``v' ∂(∇L)/∂θ = ∂/∂ε ∇L(θ + ε v)``, one forward-mode derivative of the gradient,
    which keeps nothing. Arguments, metrics, inner loop and learners are those of `reverse`.

    Raises:
      UserError: as for `reverse`; or the loss has a `jax.custom_vjp` whose own rule has no
        forward derivative, as when the rule calls another one.

    References:
      Kemaev et al., 2025, "Scalable Meta-Learning via Mixed-Mode Differentiation"
      (MixFlow-MG), arXiv:2505.00793.
    """
    return reverse(learner, loss_fn, inner, outer_loss=outer_loss, grad_fn=forward_over_reverse)


def forward_over_reverse(loss_fn: LossFn, has_aux: bool = False):
    """`jax.value_and_grad` whose backward pass is a `jax.jvp` of it.

    With z all that the loss depends on (parameters, batch, and whatever it closes
    over), the cotangents ``(l, v)`` of loss and gradient give
    ``l ∇_z L + ∂/∂ε ∇_z L(θ + ε v, ...)``: exact for every part of z. What a loss gives beside
    (``has_aux``) has its cotangent pulled back by a reverse pass of its own, with that of the loss.
    """

    def value_and_grad(params: Params, batch: Batch):
        pure_loss, closed_over = jax.closure_convert(loss_fn, params, batch)
        return _value_and_grad(pure_loss, has_aux, params, batch, closed_over)

    return value_and_grad


def _value_and_grad(pure_loss, has_aux, params, batch, closed_over):
    @jax.custom_vjp
    def value_and_grad(params, others):
        return jax.value_and_grad(pure_loss, has_aux=has_aux)(params, others[0], *others[1])

    def forward(params, others):
        return value_and_grad(params, others), (params, others)

    def backward(residuals, cotangents):
        params, others = residuals
        value_bar, grad_bar = cotangents
        smooth, with_others = partition(others)

        def value(params, smooth):
            batch, closed_over = with_others(smooth)
            return pure_loss(params, batch, *closed_over)

        def gradients(params):
            found = jax.grad(value, argnums=(0, 1), has_aux=has_aux)(params, smooth)
            return found[0] if has_aux else found

        def derivative(params, grad_bar):
            return jax.jvp(gradients, (params,), (grad_bar,))

        first, second = forward_mode("mixed mode", derivative)(params, grad_bar)
        if has_aux:
            first = jax.vjp(value, params, smooth)[1](value_bar)
        else:
            first = jax.tree.map(lambda x: value_bar * x, first)
        params_bar, smooth_bar = jax.tree.map(jnp.add, first, second)
        return params_bar, with_others(smooth_bar, cotangent=True)

    value_and_grad.defvjp(forward, backward)
    return value_and_grad(params, (batch, closed_over))
