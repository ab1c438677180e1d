"""Implicit: the meta-gradient at the solution of a regularised inner problem (iMAML)."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.checks import check_call, check_learner, check_parts, forward_mode, hparam
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.pytrees import entry, fill, take
from metaopt.ranges import NotNegative, Positive, Steps, check_value
from metaopt.types import (
    Array,
    Episode,
    Learner,
    LossFn,
    MetaGradFn,
    MetaParams,
    Params,
    unchanged_loss,
)

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
    damping: float = 0.0,
    outer_loss: LossFn | None = None,
) -> MetaGradFn:
    """The gradient of the outer loss at the solution of the inner problem.

    Mathematics: the inner problem is ``φ* = argmin_φ L_S(φ, η) + λ/2 ‖φ − θ‖²``, with the start θ
    and whatever else is learned, η, which the learner's inner loss may read. By the implicit
    function theorem, with ``A w = ∇L_Q(φ*)`` and ``A = I + ∇²L_S(φ*) / λ``,
    ``d L_Q(φ*) / dθ = w`` and ``d L_Q(φ*) / dη = −∂_η ⟨∇_φ L_S(φ*, η), w⟩ / λ``. The K steps of the
    inner loop take the place of φ*: they are not differentiated, so memory does not grow
    with K, and the gradient is as exact as they are near to it. If the inner loop moves the entries
    h alone and keeps the others b (ANIL), the system is that of h, and b gets
    ``∇_b L_Q − ∇²_bh L_S w / λ``.

    With ``λ = 0`` the solution does not depend on the start, and only η gets a gradient. The system
    is then ``α ∇²L_S w = ∇L_Q`` with the inner rate α, and α takes the place of 1 / λ above.

    The system is solved from ``w = ∇L_Q``, first order's answer, which is the limit of a
    large λ. ``neumann`` iterates ``w ← ∇L_Q + w − A w`` and converges if ``λ > ‖∇²L_S‖``, or for
    λ = 0 if gradient descent at the rate α does. ``cg`` (conjugate gradients) needs ``A`` positive
    definite, that is, λ above minus the lowest curvature of L_S; it stops at a direction of
    negative curvature. The metric ``residual`` shows either failure. ``damping`` δ puts
    ``A = I + ∇²L_S(φ*) / (λ + δ)`` in its place (and δ beside λ in all that is divided by it): an
    answer between the exact one and first order's, which a few steps can find where the curvature
    of L_S is far above λ.

    The models that it trains are to be adapted by the same inner problem: see `proximal`.

    Args:
      learner: one whose meta-parameters are the start or read by the inner loss. Its inner rate α
        must suit the term that is added: ``α (λ + ‖∇²L_S‖) < 2`` for gradient descent.
      loss_fn, outer_loss: as for `reverse`.
      inner: the inner loop, with ``batching='same'`` and ``query_loss='last'``.
      regularization: λ.
      solver: solver of the linear system.
      num_solver_steps: steps of the solver, each one product with the Hessian.

    Returns:
      ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``; the key is not
      used. The metrics have ``residual`` beside the usual ones, ``‖A w − ∇L_Q‖ / ‖∇L_Q‖``.

    Raises:
      UserError: the solution does not depend on some of the meta-parameters, such as rates;
        the inner loop has no one problem or no one solution; an option is out of its range; or
        the loss has a `jax.custom_vjp` whose own rule has no forward derivative.

    References:
      Rajeswaran et al., 2019, "Meta-Learning with Implicit Gradients"; Lorraine et al.,
      2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation" (Neumann, λ = 0).
    """
    judge = check_parts(learner, loss_fn, inner, outer_loss)
    _check_options(learner, inner, regularization, solver, num_solver_steps, damping)
    solve = {"cg": conjugate_gradients, "neumann": neumann_series}[solver]
    regularized = proximal(learner, regularization) if regularization else learner

    def gradient(meta_params, hparams, episode):
        start, to_meta_params = jax.vjp(learner.start, meta_params)
        adapted = adapt(
            learner.inner_loss(meta_params, loss_fn),
            regularized.inner_opt(meta_params, hparams),
            start,
            episode.support,
            inner,
        )
        loss, outer = jax.value_and_grad(judge)(adapted.params, episode.query)

        def inner_gradient(params, meta_params):
            return jax.grad(learner.inner_loss(meta_params, loss_fn))(params, episode.support)

        _, hessian_product = jax.linearize(lambda p: inner_gradient(p, meta_params), adapted.params)
        hessian_product = forward_mode("implicit", hessian_product)
        scale = regularization + damping or 1 / hparam(hparams, "inner_learning_rate")

        target, unravel = ravel_pytree(take(outer, learner.adapted))
        zeros = jax.tree.map(jnp.zeros_like, outer)

        def product(w: Array) -> tuple[Array, Params]:
            """``A w``, and ``∇² L_S w / scale`` of all entries."""
            image = hessian_product(fill(zeros, unravel(w)))
            scaled = jax.tree.map(lambda h: (h / scale).astype(h.dtype), image)
            product = ravel_pytree(take(scaled, learner.adapted))[0]
            return w + product if regularization else product, scaled

        w = solve(lambda w: product(w)[0], target, num_solver_steps)
        image, scaled = product(w)
        of_adapted = unravel(w if regularization else jnp.zeros_like(w))
        (grads,) = to_meta_params(fill(jax.tree.map(jnp.subtract, outer, scaled), of_adapted))
        if learner.inner_loss is not unchanged_loss:
            _require_reached(learner, loss_fn, meta_params, adapted.params, episode)
            _, cross = jax.vjp(lambda m: inner_gradient(adapted.params, m), meta_params)
            (through_loss,) = cross(fill(zeros, unravel(w)))
            grads = jax.tree.map(lambda g, c: g - (c / scale).astype(g.dtype), grads, through_loss)
        off, whole = jnp.linalg.norm(image - target), jnp.linalg.norm(target)
        residual = jnp.where(whole > 0, off / jnp.where(whole > 0, whole, 1), 0)
        return grads, {"loss": loss, "inner_losses": adapted.losses, "residual": residual}

    gradient = compile_once(gradient)

    def estimate(meta_params, hparams, episode, key):
        del key
        check_call(learner, meta_params, hparams, episode)
        return gradient(meta_params, hparams, episode)

    return estimate


def _require_reached(
    learner: Learner, loss_fn: LossFn, meta_params: MetaParams, params: Params, episode: Episode
) -> None:
    """Raises UserError if neither the start nor the inner loss reads one of the meta-parameters."""

    def read(meta_params):
        inner_loss = learner.inner_loss(meta_params, loss_fn)
        return learner.start(meta_params), inner_loss(params, episode.support)

    program = jax.make_jaxpr(read)(meta_params).jaxpr
    used = {id(v) for e in program.eqns for v in e.invars} | {id(v) for v in program.outvars}
    paths = [entry(path) for path, _ in jax.tree.leaves_with_path(meta_params)]
    _refuse(
        sorted({path for path, v in zip(paths, program.invars, strict=True) if id(v) not in used})
    )


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"implicit gives no gradient for {', '.join(names)}: the solution of the "
            "inner problem does not depend on them; use the learner maml or anil, or the "
            "estimator reverse"
        )


def proximal(learner: Learner, regularization: float) -> Learner:
    """The learner with ``λ/2 ‖φ − θ‖²`` added to the loss that its inner loop steps on.

    Any estimator takes the result; `implicit` adds the term by itself. Give the result to the
    evaluation too, or it would adapt without the term that training had. θ is where the inner loop
    started; support losses are reported without the term.

    Args:
      learner: any.
      regularization: λ.

    Raises:
      UserError: λ is not a positive number, or the learner is none.
    """
    check_learner(learner)
    check_value("regularization", regularization, Positive)

    def inner_opt(meta_params, hparams):
        return optax.chain(proximal_term(regularization), learner.inner_opt(meta_params, hparams))

    return learner._replace(inner_opt=inner_opt)


def proximal_term(strength: float) -> optax.GradientTransformation:
    """Adds ``strength (φ − θ)`` to the gradients, where θ are the parameters given to ``init``."""

    def update(updates, state, params=None):
        updates = jax.tree.map(lambda g, p, s: g + strength * (p - s), updates, params, state)
        return updates, state

    return optax.GradientTransformation(lambda params: params, update)


def conjugate_gradients(matrix: Matrix, target: Array, num_steps: int) -> Array:
    """``w`` with ``A w ≈ target`` for symmetric positive definite A, started at the target.

    Stops if the residual is down to rounding, or if a direction is not of positive
    curvature, along which the quadratic has no minimum; w is what it was before that step.

    Args:
      matrix: ``w -> A w``, both ``[n]``.
      target: vector ``[n]``.
      num_steps: largest number of steps, each one product with A.

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


def _check_options(
    learner: Learner,
    inner: InnerLoop,
    regularization: float,
    solver: str,
    num_steps: int,
    damping: float,
) -> None:
    if learner.inner_loss is unchanged_loss:
        _refuse(learner.learned)
        if not regularization:
            raise UserError(
                "with regularization=0 the solution of the inner problem does not depend on the "
                "start, which is all that this learner learns: give a number above 0"
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
    check_value("solver", solver, Solver)
    check_value("num_solver_steps", num_steps, Steps)
    check_value("regularization", regularization, NotNegative)
    check_value("damping", damping, NotNegative)
    if damping and not regularization:
        raise UserError("damping is added to the regularization, and that is 0: leave damping at 0")
