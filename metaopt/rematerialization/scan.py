"""A scan whose backward pass recomputes states by a plan, in loops of one compiled program.

The program is as large for 1000 steps as for 3: one step forward, one to reach a state
again, one backward; the schedule is a table of integers that the loops read.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from metaopt.pytrees import partition
from metaopt.rematerialization.plan import Schedule, schedule
from metaopt.types import PyTree


def planned_scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    start: PyTree,
    xs: PyTree = None,
    *,
    length: int,
    kept_states: int,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` that is differentiated with few of its states kept, by the optimal plan.

    Values and derivatives are those of `jax.lax.scan`; what ``step`` closes over gets its
    cotangent too. In reverse mode only (no `jax.jvp`), and once.

    Args:
      step: ``(state, x) -> (state, y)``.
      start: the state before the first step.
      xs: leaves ``[K, ...]``, or None.
      length: K.
      kept_states: how many states are kept at a time, the first included; K keeps all.

    Returns:
      The last state, and every ``y`` stacked to ``[K, ...]``.

    Raises:
      UserError: no state may be kept, or there are no steps.
    """
    plan = schedule(length, kept_states)
    jaxpr = jax.make_jaxpr(step)(start, _at(xs, 0))
    step_shape = jax.eval_shape(step, start, _at(xs, 0))

    def pure_step(consts, state, x):
        leaves = jaxpr_as_fun(jaxpr.replace(consts=consts))(*jax.tree.leaves((state, x)))
        return jax.tree.unflatten(jax.tree.structure(step_shape), leaves)

    @jax.custom_vjp
    def run(consts, start, xs):
        return jax.lax.scan(functools.partial(pure_step, consts), start, xs, length=length)

    def forward(consts, start, xs):
        end, ys, slots = _forward(pure_step, plan, length, consts, start, xs)
        return (end, ys), (consts, start, xs, slots)

    def backward(residuals, cotangents):
        return _backward(pure_step, plan, length, *residuals, *cotangents)

    run.defvjp(forward, backward)
    return run(jaxpr.consts, start, xs)


def _forward(step, plan: Schedule, length: int, consts, start, xs):
    """The steps, keeping the states of the plan in slots, ``[slots, ...]`` a leaf."""
    # Before step k the state goes to the slot of the next position to be kept, and is
    # overwritten until that position is reached; past the last one nothing is written.
    targets = np.searchsorted(plan.kept, np.arange(length))
    targets[targets == len(plan.kept)] = -1
    slots = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (plan.num_slots, *jnp.shape(leaf))), start
    )

    def body(carry, k_and_target):
        (state, slots), (k, target) = carry, k_and_target
        slots = _write(slots, target, state)
        state, y = step(consts, state, _at(xs, k))
        return (state, slots), y

    (end, slots), ys = jax.lax.scan(body, (start, slots), (jnp.arange(length), targets))
    return end, ys, slots


def _backward(step, plan: Schedule, length: int, consts, start, xs, slots, end_bar, ys_bar):
    """Reverses the steps, last first, each from a state that the legs before it reach."""
    table = [(g.source - 1, g.start, g.num_steps, (g.target or 0) - 1) for g in plan.legs]
    sources, starts, counts, targets = jnp.array(table, jnp.int32).T
    last_legs = np.flatnonzero([leg.target is None for leg in plan.legs])  # of each reversal
    first_legs = np.concatenate([[0], last_legs[:-1] + 1])

    def go(i, carry):
        slots = carry[1]
        state = _read(slots, sources[i], start)
        state = jax.lax.fori_loop(
            starts[i],
            starts[i] + counts[i],
            lambda k, state: step(consts, state, _at(xs, k))[0],
            state,
        )
        return state, _write(slots, targets[i], state)

    smooth_consts, with_consts = partition(consts)
    smooth_ys_bar, _ = partition(ys_bar)

    def reverse(carry, now):
        (slots, state_bar, consts_bar), (k, first_leg, last_leg) = carry, now
        state, slots = jax.lax.fori_loop(first_leg, last_leg + 1, go, (start, slots))
        smooth_state, with_state = partition(state)
        smooth_x, with_x = partition(_at(xs, k))

        def smooth_step(consts, state, x):
            state, y = step(with_consts(consts), with_state(state), with_x(x))
            return partition(state)[0], partition(y)[0]

        _, pull = jax.vjp(smooth_step, smooth_consts, smooth_state, smooth_x)
        more, state_bar, x_bar = pull((state_bar, _at(smooth_ys_bar, k)))
        consts_bar = jax.tree.map(jnp.add, consts_bar, more)
        return (slots, state_bar, consts_bar), x_bar

    carry = (slots, partition(end_bar)[0], [jnp.zeros_like(leaf) for leaf in smooth_consts])
    order = (jnp.arange(length)[::-1], first_legs, last_legs)
    (_, start_bar, consts_bar), xs_bar = jax.lax.scan(reverse, carry, order)
    xs_bar = [leaf[::-1] for leaf in xs_bar]
    return (
        with_consts(consts_bar, cotangent=True),
        partition(start)[1](start_bar, cotangent=True),
        partition(xs)[1](xs_bar, cotangent=True),
    )


def _at(tree, k):
    """The k-th entry of every leaf."""
    return jax.tree.map(lambda x: x[k], tree)


def _read(slots, source, start):
    """The state in a slot; the start for a source of -1."""

    def read(slot, leaf):
        return jnp.where(source < 0, leaf, slot[source]) if slot.shape[0] else leaf

    return jax.tree.map(read, slots, start)


def _write(slots, target, state):
    """The slots with the state in one of them; as they were for a target of -1."""

    def write(slot, leaf):
        kept = slot.shape[0] > 0
        return slot.at[target].set(jnp.where(target < 0, slot[target], leaf)) if kept else slot

    return jax.tree.map(write, slots, state)
