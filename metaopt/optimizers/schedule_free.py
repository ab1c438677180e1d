"""Schedule-Free training: gradients at one point, steps of another, the average is the result."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.errors import UserError
from metaopt.types import Array, PyTree

RatesOf = Callable[[Array, PyTree], PyTree]
"""``(step, params) -> rates``: scalars, one for each part of the parameters (a prefix of them)."""


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`; the parameters that it goes with are x, the average.

    Attributes:
      count: int32 scalar, steps done.
      beta: float scalar, the share of x in the point of the gradients.
      z: what the base optimiser steps, of the shapes and dtypes of the parameters.
      weight_sum: float scalars, the sums of the weights so far, one for each rate.
      base_state: state of the base optimiser.
    """

    count: Array
    beta: Array
    z: PyTree
    weight_sum: PyTree
    base_state: optax.OptState


def schedule_free(
    base: optax.GradientTransformation, rates_of: RatesOf, beta: float = 0.9
) -> optax.GradientTransformation:
    """Lets a base optimiser step z, and gives the updates of x, the weighted average of all z.

    At step t, with the rate γ_t and the base optimiser's update u_t of gradients at y_t::

        y_t = (1 - β) z_t + β x_t
        z_{t+1} = z_t + u_t
        x_{t+1} = (1 - c) x_t + c z_{t+1},   c = γ_t² / Σ_{i ≤ t} γ_i²

    The parameters are x, which is what is judged and saved. In `optax.contrib.schedule_free`
    they are y. So whoever computes the gradients takes them at `gradient_point`, as
    `metaopt.outer_step.make_meta_step` does. The base optimiser sees y as its parameters, so
    weight decay is at y. It should have no momentum of its own: β takes its place. While a
    rate is 0, its part of x stays.

    Args:
      base: optimiser with its rate, a warm-up among it, but no decay of the rate.
      rates_of: ``(step, params) -> rates`` of this step, from 0; the squares are the weights.
      beta: β, from 0 (gradients at z) to 1 (gradients at x).

    References:
      Defazio et al., 2024, "The Road Less Scheduled", Algorithm 1.
    """

    def init(params: PyTree) -> ScheduleFreeState:
        count = jnp.zeros((), jnp.int32)
        return ScheduleFreeState(
            count=count,
            beta=jnp.asarray(beta, jnp.result_type(float)),
            z=jax.tree.map(jnp.copy, params),  # a step may donate both
            weight_sum=jax.tree.map(
                lambda rate: jnp.zeros((), jnp.result_type(rate)), rates_of(count, params)
            ),
            base_state=base.init(params),
        )

    def update(
        updates: PyTree, state: ScheduleFreeState, params: PyTree | None = None
    ) -> tuple[PyTree, ScheduleFreeState]:
        if params is None:
            raise UserError("schedule_free needs the parameters: update(gradients, state, params)")
        point = gradient_point(state, params)
        steps, base_state = base.update(updates, state.base_state, point)
        z = optax.apply_updates(state.z, steps)
        weights = jax.tree.map(jnp.square, rates_of(state.count, params))
        sums = jax.tree.map(lambda s, w: (s + w).astype(s.dtype), state.weight_sum, weights)
        # Before the first weight above 0 the sum is 0, and x stays.
        shares = jax.tree.map(lambda w, s: w / jnp.where(s > 0, s, 1), weights, sums)

        def moved(share: Array, x: PyTree, z: PyTree) -> PyTree:
            return jax.tree.map(lambda x, z: (share * (z - x)).astype(x.dtype), x, z)

        found = jax.tree.map(moved, shares, params, z)
        count = state.count + 1
        return found, ScheduleFreeState(count, state.beta, z, sums, base_state)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def gradient_point(opt_state: optax.OptState, params: PyTree) -> PyTree:
    """Where the gradients of the next step are taken: y, or the parameters themselves.

    Args:
      opt_state: state of any optimiser.
      params: its parameters, x.

    Returns:
      ``(1 - β) z + β x`` if there is a `ScheduleFreeState` in the state; else ``params``, the same
      object.

    Raises:
      UserError: there are several such states.
    """
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(leaf)]
    if not found:
        return params
    if len(found) > 1:
        raise UserError(f"{len(found)} states of schedule_free in one optimiser: wrap the whole")
    beta, z = found[0].beta, found[0].z
    return jax.tree.map(lambda x, z: (x + (1 - beta) * (z - x)).astype(x.dtype), params, z)


def at_average(opt_state: optax.OptState, params: PyTree) -> optax.OptState:
    """The state of an optimiser with z := x, so that gradients and losses are those at x.

    It is for a loss at x, and for a new optimiser that starts from parameters that are trained
    already. A state without a `ScheduleFreeState` stays as it is.

    Args:
      opt_state: state of any optimiser.
      params: its parameters, x; z is a copy of them.
    """

    def averaged(leaf):
        return leaf._replace(z=jax.tree.map(jnp.copy, params)) if _is_ours(leaf) else leaf

    return jax.tree.map(averaged, opt_state, is_leaf=_is_ours)


def _is_ours(leaf: object) -> bool:
    return isinstance(leaf, ScheduleFreeState)
