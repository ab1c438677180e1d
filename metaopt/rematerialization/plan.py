"""Which inner states are kept for the backward pass and which computed again, planned.

Backpropagation through K steps needs the state before each of them, last first. Keeping
all takes memory that grows with K. With room for fewer, the others are computed again
from a kept one. Which to keep has a binomial optimum: C(s + r, s) steps can be reversed with
s states kept while no step is evaluated more than r times beside its reversal. So memory grows
with log K where the evaluations a step may grow with it, and with √K for one more evaluation
of each.

`plan` chooses for a budget in bytes, `plan_for` for a program and a device;
`metaopt.rematerialization.scan` carries a schedule out.

References:
  Griewank, Walther, 2000, "Algorithm 799: Revolve"; Griewank, 1992, "Achieving
  logarithmic growth of temporal and spatial complexity in reverse automatic
  differentiation".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from metaopt.errors import UserError
from metaopt.measure import compile_for, compiled_memory, device_bytes, human_bytes

FAR = 10
"""States kept in the second program that `plan_for` compiles: far enough for an exact slope."""


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


def _rounds(num_steps: int, states: int) -> int:
    """The least r with C(s + r, s) ≥ n: how often a step is evaluated at most."""
    rounds = 0
    while math.comb(states + rounds, states) < num_steps:
        rounds += 1
    return rounds


def least_steps(num_steps: int, states: int) -> int:
    """Fewest step evaluations that reach the start of each of n steps, last first.

    Mathematics: ``r n − C(s + r, s + 1)``, where s states are kept at a time, the given first one
    included, and r is the least number with ``C(s + r, s) ≥ n``.

    References:
      Griewank, Walther, 2000, "Algorithm 799: Revolve".
    """
    rounds = _rounds(num_steps, states)
    return rounds * num_steps - math.comb(states + rounds, states + 1)


def least_extra_steps(num_steps: int, kept_states: int) -> int:
    """Fewest step evaluations beside forward run and reversals, for a number of kept states.

    The forward run keeps states on its way to what follows it, which is the step after the last:
    it is part of the optimum for K + 1 steps, and takes K evaluations of it.
    """
    return least_steps(num_steps + 1, min(kept_states, num_steps)) - num_steps


def _split(num_steps: int, states: int) -> int:
    """How far from the first state the next one is kept."""
    rounds = _rounds(num_steps, states)
    left = math.comb(states + rounds - 2, states)  # least number of steps of the left part
    right = math.comb(states + rounds - 1, states - 1)  # largest of the right one
    return max(1, left, num_steps - right)


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
        # What follows the forward run is a step more.
        split = start + _split(end - start + forward, len(free) + 1)
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

    Temporary memory is a straight line in the number of kept states from two on, but for how
    the compiler happens to pack its buffers. So two programs are compiled, with 2 and with
    `FAR` states kept; one state is taken to be no dearer than two. Of a model that adapts in part
    only what adapts is such a state; give what is frozen as one of the arguments
    (`metaopt.frozen.unbound`), or each program holds it as constants.

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
    near, far = min(2, num_steps), min(FAR, num_steps)
    least, more = (
        compiled_memory(compile_for(function_of(kept), *args)).temp for kept in (near, far)
    )
    slope = max(more - least, 0) / max(far - near, 1)

    def bytes_of(kept: int) -> int:
        return least + round(max(kept - near, 0) * slope)

    return plan(num_steps, bytes_of, available)
