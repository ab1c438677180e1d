"""A scan whose backward pass recomputes states by a plan, in loops of one compiled program.

The program is as large for 1000 steps as for 3: one step forward, one to reach a state
again, one backward; the schedule is a table of integers that the loops read.

What is kept may be rounded to bfloat16, and may lie in host memory: `Store`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from metaopt.pytrees import partition
from metaopt.rematerialization.plan import Schedule, schedule
from metaopt.types import Array, PyTree

KeptDtype = Literal["bfloat16"]
KeptOn = Literal["device", "host"]


def planned_scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    start: PyTree,
    xs: PyTree = None,
    *,
    length: int,
    kept_states: int,
    kept_dtype: KeptDtype | None = None,
    kept_on: KeptOn = "device",
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` that is differentiated with few of its states kept, by the optimal plan.

    Values and derivatives are those of `jax.lax.scan`; what ``step`` closes over gets its
    cotangent too. In reverse mode only (no `jax.jvp`), and once. With ``kept_dtype`` the values
    are still exact, and the derivatives are those of the steps at rounded states.

    Args:
      step: ``(state, x) -> (state, y)``.
      start: the state before the first step.
      xs: leaves ``[K, ...]``, or None.
      length: K.
      kept_states: how many states are kept at a time, the first included; K keeps all.
      kept_dtype: dtype that wider floating-point leaves of kept states are rounded to, but for
        the first state; None keeps them as they are.
      kept_on: memory that the states but the first are kept in. On a CPU both are one.

    Returns:
      The last state, and every ``y`` stacked to ``[K, ...]``.

    Raises:
      UserError: no state may be kept, or there are no steps.
    """
    plan = schedule(length, kept_states)
    store = Store(kept_dtype, kept_on)
    jaxpr = jax.make_jaxpr(step)(start, _at(xs, 0))
    step_shape = jax.eval_shape(step, start, _at(xs, 0))

    # What the step closes over and is not traced has no cotangent, and stays in the program.
    traced = [isinstance(const, Tracer) for const in jaxpr.consts]

    def pure_step(consts, state, x):
        given = iter(consts)
        all_consts = [
            next(given) if is_traced else const
            for is_traced, const in zip(traced, jaxpr.consts, strict=True)
        ]
        leaves = jaxpr_as_fun(jaxpr.replace(consts=all_consts))(*jax.tree.leaves((state, x)))
        return jax.tree.unflatten(jax.tree.structure(step_shape), leaves)

    @jax.custom_vjp
    def run(consts, start, xs):
        return jax.lax.scan(functools.partial(pure_step, consts), start, xs, length=length)

    def forward(consts, start, xs):
        end, ys, slots = _forward(pure_step, plan, store, length, consts, start, xs)
        return (end, ys), (consts, start, xs, slots)

    def backward(residuals, cotangents):
        return _backward(pure_step, plan, store, length, *residuals, *cotangents)

    run.defvjp(forward, backward)
    return run([const for const in jaxpr.consts if isinstance(const, Tracer)], start, xs)


def _forward(step, plan: Schedule, store: "Store", length: int, consts, start, xs):
    """The steps, keeping the states of the plan."""
    targets = np.full(length, -1)
    targets[list(plan.kept)] = np.arange(len(plan.kept))
    slots = store.empty(start, plan.num_slots)

    def body(carry, k_and_target):
        (state, slots), (k, target) = carry, k_and_target
        slots = store.write(slots, target, state)
        state, y = step(consts, state, _at(xs, k))
        return (state, slots), y

    (end, slots), ys = jax.lax.scan(body, (start, slots), (jnp.arange(length), targets))
    return end, ys, slots


def _backward(
    step, plan: Schedule, store: "Store", length: int, consts, start, xs, slots, end_bar, ys_bar
):
    """Reverses the steps, last first, each from a state that the legs before it reach."""
    table = [(g.source - 1, g.start, g.num_steps, (g.target or 0) - 1) for g in plan.legs]
    sources, starts, counts, targets = jnp.array(table, jnp.int32).T
    last_legs = np.flatnonzero([leg.target is None for leg in plan.legs])  # of each reversal
    first_legs = np.concatenate([[0], last_legs[:-1] + 1])

    def go(i, carry):
        slots = carry[1]
        state = store.read(slots, sources[i], start)
        state = jax.lax.fori_loop(
            starts[i],
            starts[i] + counts[i],
            lambda k, state: step(consts, state, _at(xs, k))[0],
            state,
        )
        return state, store.write(slots, targets[i], state)

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


@dataclasses.dataclass(frozen=True)
class Store:
    """How and where states are kept: in slots, ``[slots, ...]`` a leaf.

    Attributes:
      dtype: dtype that wider floating-point leaves are rounded to; None for none.
      on: memory that the slots lie in.
    """

    dtype: KeptDtype | None
    on: KeptOn

    def empty(self, start: PyTree, num_slots: int) -> PyTree:
        """Slots for states such as ``start``."""

        def room(leaf):
            leaf = self._pack(leaf)
            if self.on == "host":
                # What a scan stacks is laid out on the host; an array that is moved there
                # would be laid out on the device first.
                return jax.lax.scan(lambda _, __: (None, leaf), None, length=num_slots)[1]
            return jnp.broadcast_to(leaf, (num_slots, *jnp.shape(leaf)))

        return jax.tree.map(room, start)

    def read(self, slots: PyTree, source: Array, start: PyTree) -> PyTree:
        """The state in a slot; the start for a source of -1."""

        def read(slot, leaf):
            if not slot.shape[0]:
                return leaf
            kept = _get(slot, jnp.maximum(source, 0))
            if self.on == "host":
                kept = jax.device_put(kept, jax.memory.Space.Device)
            return jnp.where(source < 0, leaf, kept.astype(leaf.dtype))

        return jax.tree.map(read, slots, start)

    def write(self, slots: PyTree, target: Array, state: PyTree) -> PyTree:
        """The slots with the state in one of them; as they were for a target of -1."""

        if not any(slot.shape[0] for slot in jax.tree.leaves(slots)):
            return slots

        def put(_, slots):
            return jax.tree.map(lambda slot, x: _put(slot, self._pack(x), target), slots, state)

        # A loop of one round or of none is a condition that is updated in place.
        return jax.lax.fori_loop(0, jnp.where(target < 0, 0, 1), put, slots)

    def _pack(self, leaf: Any) -> Array:
        """A leaf as it is kept."""
        wide = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 2
        leaf = leaf.astype(self.dtype) if self.dtype and wide else leaf
        return jax.device_put(leaf, jax.memory.Space.Host) if self.on == "host" else leaf


# JAX maps a slice at an index to a gather, and its update to a scatter. Neither can be laid out
# on the host, where slices can.


@jax.custom_batching.custom_vmap
def _get(slots: Array, source: Array) -> Array:
    """The leaf in one of the slots, ``[slots, ...]``."""
    return jax.lax.dynamic_index_in_dim(slots, source, 0, keepdims=False)


@_get.def_vmap
def _get_batch(_, in_batched, slots, source):
    axis = 1 if in_batched[0] else 0
    return jax.lax.dynamic_index_in_dim(slots, source, axis, keepdims=False), in_batched[0]


@jax.custom_batching.custom_vmap
def _put(slots: Array, leaf: Array, target: Array) -> Array:
    """The slots, ``[slots, ...]``, with a leaf in one of them."""
    return jax.lax.dynamic_update_index_in_dim(slots, leaf, target, 0)


@_put.def_vmap
def _put_batch(axis_size, in_batched, slots, leaf, target):
    slots, leaf = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip((slots, leaf), in_batched[:2], strict=True)
    )
    return jax.lax.dynamic_update_index_in_dim(slots, leaf, target, 1), True
