"""Implicit: the meta-gradient at the solution of a regularised inner problem (iMAML)."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.checks import check_call, check_parts, forward_mode
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.pytrees import fill, take
from metaopt.types import Array, Learner, LossFn, MetaGradFn, Params

Solver = Literal["cg", "neumann"]
Matrix = Callable[[Array], Array]


def implicit(
    learner: Learner,
    loss_fn: LossFn,
    inner: InnerLoop,
    *,
    regularization: float = 1.0,
    solver: Solver = "cg",
    num_solver_steps: int = 10,
) -> MetaGradFn:
    """The gradient of the query loss at the solution of the inner problem.

    Mathematics: the inner problem is ``φ* = argmin_φ L_S(φ) + λ/2 ‖φ − θ‖²``, and by the
    implicit function theorem ``d L_Q(φ*) / dθ = w`` with
    ``A w = ∇L_Q(φ*)``, ``A = I + ∇²L_S(φ*) / λ``. The K steps of the inner loop stand for φ*:
    the way to it is not differentiated, so memory does not grow with K, and the gradient
    is as good as they are near to it. Where the inner loop moves the entries h alone and
    keeps the others b (ANIL), the system is that of h, and b gets
    ``∇_b L_Q − ∇²_bh L_S w / λ``.

    The system is solved from ``w = ∇L_Q``, first order's answer, which is the limit of a
    large λ. ``neumann`` iterates ``w ← ∇L_Q − ∇²L_S w / λ`` and converges where
    ``λ > ‖∇²L_S‖``. ``cg`` (conjugate gradients) needs ``A`` positive definite, that is, λ
    above minus the lowest curvature of L_S; it stops at a direction of negative curvature
    with what it has. The metric ``residual`` shows either failure.

    The models that it trains are to be adapted by the same inner problem: see `proximal`.

    Args:
      learner: must meta-learn nothing beside the initialisation. Its inner rate α must
        suit the term that is added: ``α (λ + ‖∇²L_S‖) < 2`` for gradient descent.
      loss_fn: the inner and the outer loss.
      inner: the inner loop, with ``batching='same'`` and ``query_loss='last'``.
      regularization: λ.
      solver: of the linear system.
      num_solver_steps: of the solver, each one product with the Hessian.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``; the key is not
      used. The metrics have ``residual`` beside the usual ones, ``‖A w − ∇L_Q‖ / ‖∇L_Q‖``.

    Raises:
      UserError: the learner has other meta-parameters, of which the solution does not depend;
        the inner loop has no one problem or no one solution; an option is out of its range; or
        the loss has a `jax.custom_vjp` whose own rule has no forward derivative.

    References:
      Rajeswaran et al., 2019, "Meta-Learning with Implicit Gradients"; Lorraine et al.,
      2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation" (Neumann).
    """
    check_parts(learner, loss_fn)
    _check_options(learner, inner, regularization, solver, num_solver_steps)
    solve = {"cg": conjugate_gradients, "neumann": neumann_series}[solver]
    regularized = proximal(learner, regularization)

    def gradient(meta_params, hparams, episode):
        start, to_meta_params = jax.vjp(learner.start, meta_params)
        optimizer = regularized.inner_opt(meta_params, hparams)
        adapted = adapt(loss_fn, optimizer, start, episode.support, inner)
        loss, outer = jax.value_and_grad(loss_fn)(adapted.params, episode.query)
        inner_gradient = jax.grad(lambda params: loss_fn(params, episode.support))
        _, hessian_product = jax.linearize(inner_gradient, adapted.params)
        hessian_product = forward_mode("implicit", hessian_product)

        target, unravel = ravel_pytree(take(outer, learner.adapted))
        zeros = jax.tree.map(jnp.zeros_like, outer)

        def product(w: Array) -> tuple[Array, Params]:
            """``A w``, and ``∇² L_S w / λ`` of all entries."""
            image = hessian_product(fill(zeros, unravel(w)))
            scaled = jax.tree.map(lambda h: h / regularization, image)
            return w + ravel_pytree(take(scaled, learner.adapted))[0], scaled

        w = solve(lambda w: product(w)[0], target, num_solver_steps)
        image, scaled = product(w)
        (grads,) = to_meta_params(fill(jax.tree.map(jnp.subtract, outer, scaled), unravel(w)))
        return grads, {
            "loss": loss,
            "inner_losses": adapted.losses,
            "residual": _ratio(jnp.linalg.norm(image - target), jnp.linalg.norm(target)),
        }

    gradient = compile_once(gradient)

    def estimate(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, episode)
        return gradient(meta_params, hparams, episode)

    return estimate


def proximal(learner: Learner, regularization: float) -> Learner:
    """The learner with ``λ/2 ‖φ − θ‖²`` added to the loss that its inner loop steps on.

    Any estimator takes the result; `implicit` adds the term by itself. Evaluation is to be
    given the result, or it would adapt without the term that training had. The term draws
    to where the loop began; support losses are reported without it.

    Args:
      learner: any.
      regularization: λ.

    Raises:
      UserError: λ is not a positive number.
    """
    if not 0 < regularization < math.inf:
        raise UserError(f"regularization is {regularization}; it must be a number above 0")

    def inner_opt(meta_params, hparams):
        return optax.chain(draw_to_start(regularization), learner.inner_opt(meta_params, hparams))

    return learner._replace(inner_opt=inner_opt)


def draw_to_start(strength: float) -> optax.GradientTransformation:
    """Adds ``strength (φ − θ)`` to the gradients, with θ the parameters at `init`."""

    def update(updates, state, params=None):
        updates = jax.tree.map(lambda g, p, s: g + strength * (p - s), updates, params, state)
        return updates, state

    return optax.GradientTransformation(lambda params: params, update)


def conjugate_gradients(matrix: Matrix, target: Array, num_steps: int) -> Array:
    """``w`` with ``A w ≈ target`` for symmetric positive definite A, started at the target.

    Stops where the residual is down to rounding, or where a direction is not of positive
    curvature, along which the quadratic has no minimum; w is what it was before that step.

    Args:
      matrix: ``w -> A w``, both ``[n]``.
      target: ``[n]``.
      num_steps: the most steps to take, each one product with A.

    References:
      Hestenes and Stiefel, 1952, "Methods of Conjugate Gradients for Solving Linear Systems".
    """
    nothing = (jnp.finfo(target.dtype).eps ** 2) * jnp.vdot(target, target)

    def step(carry, _):
        w, residual, direction, going = carry
        image = matrix(direction)
        square, curvature = jnp.vdot(residual, residual), jnp.vdot(direction, image)
        going = going & (square > nothing) & (curvature > 0)
        length = jnp.where(going, square / curvature, 0)
        w, residual = w + length * direction, residual - length * image
        turn = jnp.where(going, jnp.vdot(residual, residual) / square, 0)
        return (w, residual, residual + turn * direction, going), None

    residual = target - matrix(target)
    start = (target, residual, residual, jnp.array(True))
    (w, *_), _ = jax.lax.scan(step, start, length=num_steps)
    return w


def neumann_series(matrix: Matrix, target: Array, num_steps: int) -> Array:
    """``w = Σ_j (I − A)^j target``, j from 0 to the number of steps; see `conjugate_gradients`."""

    def step(w, _):
        return target + w - matrix(w), None

    return jax.lax.scan(step, target, length=num_steps)[0]


def _ratio(part: Array, whole: Array) -> Array:
    """``part / whole``, and 0 where the whole is."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _check_options(
    learner: Learner, inner: InnerLoop, regularization: float, solver: str, num_steps: int
) -> None:
    if learner.learned:
        raise UserError(
            f"implicit gives no gradient for {', '.join(learner.learned)}: the solution of the "
            "inner problem does not depend on them; use the learner maml or anil, or the "
            "estimator reverse"
        )
    if inner.batching != "same":
        raise UserError(
            f"implicit needs one inner problem, and batching={inner.batching!r} makes one a "
            "step: use batching='same'"
        )
    if inner.query_loss != "last":
        raise UserError(
            "implicit judges the solution of the inner problem, not the steps to it: "
            f"use query_loss='last', not {inner.query_loss!r}"
        )
    if solver not in ("cg", "neumann"):
        raise UserError(f"solver is {solver!r}: choose 'cg' or 'neumann'")
    if num_steps < 1:
        raise UserError(f"num_solver_steps is {num_steps}; 1 is the least")
    proximal(learner, regularization)
