"""Load balancing: episodes of unequal length spread over devices by their cost.

All devices wait for the slowest, so a step takes the largest sum of costs on a device.
`linear_partition` keeps the episodes in order, `longest_first` does not; `lay_out` lays
out a meta-batch accordingly. With `mean_over_real` and `cropped` neither its padding nor the
padding of a short episode is computed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.types import Array, PyTree

Groups = list[np.ndarray]
"""N int arrays: the items of each device. Every item is in one of them."""


def linear_partition(costs: Sequence[float] | np.ndarray, num_groups: int) -> Groups:
    """Contiguous groups whose largest sum is the least possible.

    Dynamic programming over the number of groups: with c the sums of the first costs,
    ``best_k(j) = min_i max(best_{k-1}(i), c(j) - c(i))``. The first term grows with i and the
    second falls, so the minimum is where they cross, which bisection finds for all j
    together: O(N n log n).

    Args:
      costs: ``[n]``, none negative; in any unit.
      num_groups: N; if N > n some groups are empty.

    Raises:
      UserError: a cost is negative or not finite, or there is no group.
    """
    costs = _checked(costs, num_groups)
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    best, splits = sums, []
    for _ in range(num_groups - 1):
        crossing = np.searchsorted(best + sums, sums)
        before = np.maximum(crossing - 1, 0)
        at_crossing = np.maximum(best[crossing], sums - sums[crossing])
        at_before = np.maximum(best[before], sums - sums[before])
        splits.append(np.where(at_before < at_crossing, before, crossing))
        best = np.minimum(at_before, at_crossing)
    ends = [len(costs)]
    for split in reversed(splits):
        ends.append(int(split[ends[-1]]))
    return np.split(np.arange(len(costs)), ends[:0:-1])


def longest_first(costs: Sequence[float] | np.ndarray, num_groups: int) -> Groups:
    """Groups in any order: each item, the costliest first, to the group with the least so far.

    The largest sum is at most ``4/3 - 1/(3N)`` of the least possible (Graham, 1969,
    "Bounds on multiprocessing timing anomalies"). Arguments and errors are those of
    `linear_partition`; the items of a group are in ascending order.
    """
    costs = _checked(costs, num_groups)
    sums = np.zeros(num_groups)
    group_of = np.zeros(len(costs), int)
    for item in np.argsort(-costs, kind="stable"):
        group_of[item] = np.argmin(sums)
        sums[group_of[item]] += costs[item]
    return [np.flatnonzero(group_of == group) for group in range(num_groups)]


def imbalance(costs: Sequence[float] | np.ndarray, groups: Groups) -> float:
    """The largest sum of a group over the mean of all; 1 is even, N is all on one device."""
    sums = [float(np.sum(np.asarray(costs, float)[group])) for group in groups]
    return max(sums) / np.mean(sums).item() if any(sums) else 1.0


class Layout(NamedTuple):
    """A meta-batch laid out over N devices, each with room for M tasks.

    Attributes:
      tasks: leaves ``[N, M, ...]``; places left over hold copies of the first task.
      weights: float32 ``[N, M]``: 1 for a task, 0 for such a copy.
      order: int ``[N, M]``, index of the task in the meta-batch.
      before: imbalance with equally many tasks a device, in the given order.
      after: imbalance as laid out here.
    """

    tasks: PyTree
    weights: np.ndarray
    order: np.ndarray
    before: float
    after: float


def lay_out(
    tasks: PyTree,
    costs: Sequence[float] | np.ndarray,
    num_devices: int,
    assign: Callable[[np.ndarray, int], Groups] = linear_partition,
) -> Layout:
    """Lays tasks out over devices by their costs.

    Args:
      tasks: leaves ``[T, ...]``; T need not divide by the devices.
      costs: ``[T]``: lengths in tokens, or measured seconds.
      num_devices: N.
      assign: `linear_partition` or `longest_first`.

    Raises:
      UserError: there are not as many costs as tasks, or see `linear_partition`.
    """
    costs = _checked(costs, num_devices)
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    if len(costs) != num_tasks:
        raise UserError(f"{num_tasks} tasks have {len(costs)} costs: give each task one")
    groups = assign(costs, num_devices)
    room = max(map(len, groups))
    order = np.stack([np.pad(group, (0, room - len(group))) for group in groups])
    weights = np.stack([np.arange(room) < len(group) for group in groups]).astype(np.float32)
    in_order = np.array_split(np.arange(num_tasks), num_devices)
    return Layout(
        tasks=jax.tree.map(lambda x: x[order], tasks),
        weights=weights,
        order=order,
        before=imbalance(costs, in_order),
        after=imbalance(costs, groups),
    )


def mean_over_real(
    function: Callable, tasks: tuple, weights: Array, *, axis_name: str | None = None
) -> PyTree:
    """The mean of ``function(*task)`` over tasks of weight 1; the others are not computed.

    They are taken one by one in a scan, where `jax.lax.cond` runs one branch only (under
    vmap it would run both).

    Args:
      function: one task to a pytree of arrays of an inexact dtype.
      tasks: a tuple of pytrees with leading axis ``[M]``, as on one device of a `Layout`.
      weights: ``[M]``, 1 or 0.
      axis_name: the pmap axis; the mean is over all devices' tasks.
    """

    def add(total, item):
        task, weight = item
        return jax.lax.cond(
            weight > 0,
            lambda: jax.tree.map(jnp.add, total, function(*task)),
            lambda: total,
        ), None

    first = jax.tree.map(lambda x: x[0], tasks)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
    total, _ = jax.lax.scan(add, zeros, (tasks, weights))
    count = jnp.sum(weights)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return jax.tree.map(lambda x: x / count, total)


def cropped(
    function: Callable, crop: Callable[[PyTree, int], PyTree], sizes: Sequence[int]
) -> Callable:
    """Runs a task at the smallest of a few sizes that its length fits: ``(task, length) -> out``.

    One program has a branch for each size, and a scan runs the one needed: the cost of a task
    grows with its length though all are stored in one rectangular array.

    Args:
      function: a cropped task to a pytree whose shapes do not depend on the size.
      crop: ``(task, size) -> task``, the first ``size`` tokens; the function must mask those
        past the length.
      sizes: ascending; a length above the last takes the last.
    """
    branches = [lambda task, size=size: function(crop(task, size)) for size in sizes]

    def run(task: PyTree, length: Array) -> PyTree:
        size = jnp.searchsorted(jnp.asarray(sizes), length)
        return jax.lax.switch(size, branches, task)

    return run


def _checked(costs: Sequence[float] | np.ndarray, num_groups: int) -> np.ndarray:
    costs = np.asarray(costs, float)
    if num_groups < 1:
        raise UserError(f"{num_groups} devices cannot share work: give at least 1")
    if costs.ndim != 1 or not np.all(np.isfinite(costs) & (costs >= 0)):
        raise UserError("costs must be a list of finite numbers from 0 on")
    return costs
