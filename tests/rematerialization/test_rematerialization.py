import functools

import jax
import jax.numpy as jnp
import pytest

from metaopt.errors import UserError
from metaopt.measure import compile_for, compiled_memory
from metaopt.rematerialization.plan import least_extra_steps, least_steps, plan, plan_for, schedule
from metaopt.rematerialization.scan import planned_scan


@functools.cache
def tried(num_steps, states):
    """Fewest evaluations to reach every step's start, over all places of the next kept state."""
    if states == 1 or num_steps == 1:
        return num_steps * (num_steps - 1) // 2
    return min(m + tried(num_steps - m, states - 1) + tried(m, states) for m in range(1, num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 5, 8, 21, 40])
@pytest.mark.parametrize("states", [1, 2, 3, 5, 41])
def test_the_binomial_cost_is_the_least_of_all(num_steps, states):
    assert least_steps(num_steps, states) == tried(num_steps, states)


@functools.cache
def cheapest(num_steps, kept):
    """All schedules tried: which state the forward run keeps next."""
    if kept == 1 or num_steps == 1:
        return num_steps * (num_steps - 1) // 2
    return min(cheapest(num_steps - m, kept - 1) + tried(m, kept) for m in range(1, num_steps))


@pytest.mark.parametrize(("num_steps", "kept"), [(5, 2), (8, 2), (8, 3), (9, 4), (40, 5)])
def test_the_forward_run_keeps_what_is_best_kept(num_steps, kept):
    assert least_extra_steps(num_steps, kept) == cheapest(num_steps, kept)
    assert schedule(num_steps, kept).extra_steps == cheapest(num_steps, kept)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("kept", [1, 2, 3, 6, 40])
def test_a_schedule_reverses_every_step_from_states_that_it_has(num_steps, kept):
    found = schedule(num_steps, kept)
    slots = {0: 0} | {slot: position for slot, position in enumerate(found.kept, start=1)}
    reversed_steps = []
    for leg in found.legs:
        assert slots[leg.source] == leg.start
        reached = leg.start + leg.num_steps
        if leg.target is None:
            reversed_steps.append(reached)
        else:
            assert 0 < leg.target < kept
            slots[leg.target] = reached
    assert reversed_steps == list(range(num_steps))[::-1]
    assert found.extra_steps == least_extra_steps(num_steps, kept)
    assert found.num_slots < max(kept, 1) or num_steps == 1


def test_evaluations_fall_with_states_and_vanish_when_all_are_kept():
    costs = [least_extra_steps(32, kept) for kept in range(1, 33)]
    assert costs == sorted(costs, reverse=True) and costs[0] == 496 and costs[-1] == 0
    # Twice √K states, and no step is evaluated more than once more.
    assert least_extra_steps(100, 20) < 100


def test_a_thousand_steps_take_log_like_memory():
    """2 log₂ K states at 1.8 extra evaluations a step, and all K of them at none."""
    found = schedule(1024, 20)
    assert found.extra_steps == least_extra_steps(1024, 20) < 1.8 * 1024
    assert least_extra_steps(1024, 10) < 2.7 * 1024
    assert schedule(1024, 1024).extra_steps == 0


def test_the_plan_for_a_budget_is_the_quickest_that_fits():
    def of_budget(budget):
        return plan(8, lambda kept: 90 + 10 * kept, budget)

    assert of_budget(135).kept_states == 4 and of_budget(135).predicted_bytes == 130
    assert "4 of 8 inner states kept: 130 B predicted, 4 extra" in of_budget(135).describe()
    assert of_budget(1e9).kept_states == 8
    assert of_budget(100).extra_steps == 28
    with pytest.raises(UserError, match=r"99 B.*100 B, which is the least budget"):
        of_budget(99)


def test_no_more_states_are_kept_than_spare_evaluations():
    assert plan(1, lambda kept: kept, 100).kept_states == 1


@pytest.mark.parametrize(("num_steps", "kept"), [(0, 1), (3, 0)])
def test_no_steps_and_no_states_are_refused(num_steps, kept):
    with pytest.raises(UserError, match="at least 1"):
        schedule(num_steps, kept)


def test_the_plan_for_a_program_is_what_its_compilation_says():
    def function_of(kept):
        def end(x):
            state, _ = planned_scan(lambda x, _: (jnp.sin(x), None), x, length=60, kept_states=kept)
            return jnp.sum(state)

        return jax.grad(end)

    x = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    for budget, most in [(3e6, 10), (8e6, 30)]:  # between what was compiled for it, and past it
        found = plan_for(function_of, 60, (x,), budget)
        assert 2 < found.kept_states <= most
        temp = compiled_memory(compile_for(function_of(found.kept_states), x)).temp
        assert abs(found.predicted_bytes - temp) < 0.02 * temp
        assert temp <= budget
