"""Which inner states are kept for the backward pass and which computed again, planned.

Backpropagation through K steps needs the state before each of them, last first. Keeping
all takes memory that grows with K. With room for fewer, the others are computed again
from a kept one; which to keep is a dynamic program whose optimum is binomial: C(s + r, s)
steps can be reversed with s states kept while no step is evaluated more than r times, so
that memory grows with log K, where evaluations a step are let grow with it, or with √K
for one more evaluation of each.

`plan` chooses for a budget in bytes, `plan_for` for a program and a device;
`metaopt.rematerialization.scan` carries a schedule out.

References:
  Griewank, Walther, 2000, "Algorithm 799: Revolve"; Griewank, 1992, "Achieving
  logarithmic growth of temporal and spatial complexity in reverse automatic
  differentiation".
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt.errors import UserError
from metaopt.measure import compile_for, compiled_memory, device_bytes, human_bytes


class Leg(NamedTuple):
    """A number of steps from a kept state: position ``start`` in slot ``source``.

    ``target`` is the slot in which the state that is reached is kept; None where its
    step is reversed instead. Slot 0 holds the state before the first step.
    """

    source: int
    start: int
    num_steps: int
    target: int | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A plan in detail.

    Attributes:
      kept: the positions whose states the forward run keeps, in the order of slots 1, 2, ...
      legs: what the backward run does, in order.
    """

    kept: tuple[int, ...]
    legs: tuple[Leg, ...]

    @property
    def num_slots(self) -> int:
        """States kept at a time beside the first."""
        return max([len(self.kept), *(leg.target for leg in self.legs if leg.target)])

    @property
    def extra_steps(self) -> int:
        """Step evaluations beside the forward run and the reversals."""
        return sum(leg.num_steps for leg in self.legs)


@functools.cache
def _costs(num_steps: int, free: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least step evaluations to reverse n steps, by n up to ``num_steps``.

    The state before the first of them is kept and ``free`` slots are free.

    Returns:
      ``(again, first, splits)``: the evaluations where states must be reached again;
      those where the forward run has kept them on its way; and the ``[2, n]`` positions
      of the next state to keep, for the one and for the other.
    """
    n = np.arange(num_steps + 1)
    again = n * (n - 1) // 2
    first, splits = again.copy(), np.zeros((2, num_steps + 1), int)
    if free:
        right_again, right_first, _ = _costs(num_steps, free - 1)
        for size in range(2, num_steps + 1):
            m = np.arange(1, size)
            of_again = m + right_again[size - m] + again[m]
            # The left part is always reversed from its start, with all slots free again.
            splits[0, size] = m[of_again.argmin()]
            again[size] = of_again.min()
        for size in range(2, num_steps + 1):
            m = np.arange(1, size)
            of_first = right_first[size - m] + again[m]
            splits[1, size] = m[of_first.argmin()]
            first[size] = of_first.min()
    return again, first, splits


def least_extra_steps(num_steps: int, kept_states: int) -> int:
    """Fewest step evaluations beside forward run and reversals, for a number of kept states."""
    return int(_costs(num_steps, min(kept_states, num_steps) - 1)[1][num_steps])


@functools.cache
def schedule(num_steps: int, kept_states: int) -> Schedule:
    """The optimal schedule with ``kept_states`` states at a time, the first included.

    Raises:
      UserError: no state may be kept, or there are no steps.
    """
    if num_steps < 1 or kept_states < 1:
        raise UserError(
            f"{num_steps} steps with {kept_states} states kept: both must be at least 1 "
            "(the state before the first step is always kept)"
        )
    kept: list[int] = []
    legs: list[Leg] = []
    # (first position, one past the last, slot of the first, free slots, on the forward run?)
    to_do = [(0, num_steps, 0, tuple(range(1, min(kept_states, num_steps))), True)]
    while to_do:
        start, end, slot, free, forward = to_do.pop()
        if end - start == 1 or not free:
            legs += [Leg(slot, start, k - start, None) for k in reversed(range(start, end))]
            continue
        split = start + int(_costs(num_steps, len(free))[2][int(forward), end - start])
        if forward:
            kept.append(split)
        else:
            legs.append(Leg(slot, start, split - start, free[0]))
        to_do.append((start, split, slot, free, False))
        to_do.append((split, end, free[0], free[1:], forward))
    return Schedule(tuple(kept), tuple(legs))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many inner states are kept, and what that costs.

    Attributes:
      num_steps: K.
      kept_states: states kept at a time, the first included.
      predicted_bytes: of temporary memory of the compiled program.
    """

    num_steps: int
    kept_states: int
    predicted_bytes: int

    @property
    def extra_steps(self) -> int:
        """Step evaluations beside the forward run and the reversals."""
        return least_extra_steps(self.num_steps, self.kept_states)

    def describe(self) -> str:
        """The plan in a line."""
        return (
            f"{self.kept_states} of {self.num_steps} inner states kept: "
            f"{human_bytes(self.predicted_bytes)} predicted, {self.extra_steps} extra step "
            f"evaluations ({self.extra_steps / self.num_steps:.2f} a step)"
        )


def plan(num_steps: int, bytes_of: Callable[[int], int], budget: float) -> Plan:
    """The plan with the fewest step evaluations within a memory budget.

    Args:
      num_steps: K.
      bytes_of: temporary memory by the number of kept states, which it grows with.
      budget: bytes.

    Raises:
      UserError: not even one state fits; the message gives the least budget that does.
    """
    if budget < bytes_of(1):
        raise UserError(
            f"{num_steps} inner steps do not fit a budget of {human_bytes(int(budget))}: with one "
            f"state kept they take {human_bytes(bytes_of(1))}, which is the least budget; "
            "smaller batches, or a model that recomputes its layers, take less"
        )
    fitting = [kept for kept in range(1, num_steps + 1) if bytes_of(kept) <= budget]
    # No state more than the fewest evaluations take.
    kept = min(fitting, key=lambda kept: (least_extra_steps(num_steps, kept), kept))
    return Plan(num_steps, kept, bytes_of(kept))


def plan_for(
    function_of: Callable[[int], Callable], num_steps: int, args: Sequence[Any], budget: float
) -> Plan:
    """The plan for a program, from what the compiler says of it; nothing is run.

    Temporary memory is a straight line in the number of kept states from three on, where
    the compiler has loops over slots to deal with. So the programs with two, three
    and four states kept are compiled; one state is taken to be no dearer than two.

    Args:
      function_of: ``kept_states -> function``, such as
        ``lambda k: mixed_mode(learner, loss_fn, replace(inner, kept_states=k))``.
      num_steps: K.
      args: of the function; arrays or `jax.ShapeDtypeStruct`s.
      budget: bytes; up to 1, a fraction of the device's memory.

    Raises:
      UserError: not even one state fits; the message gives the least budget that does.
    """
    available = budget * device_bytes() if budget <= 1 else budget
    two, three, four = (
        compiled_memory(compile_for(function_of(min(kept, num_steps)), *args)).temp
        for kept in (2, 3, 4)
    )

    def bytes_of(kept: int) -> int:
        return two if kept <= 2 else three + (kept - 3) * max(four - three, 0)

    return plan(num_steps, bytes_of, available)
