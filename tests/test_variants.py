"""What `fit` says a training could be changed in, and what such changes give."""

import jax
import numpy as np
import optax
import pytest
from test_fit import captured

from metaopt import meta_gradients
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.optimizers.schedule_free import ScheduleFreeState

OUTER = OuterConfig(learning_rate=0.05, warmup_steps=2).ending_at(8)


@pytest.fixture(scope="module")
def training():
    return captured(outer=OUTER)


def copied(state):
    return jax.tree.map(jax.numpy.copy, state)


def schedule_of(state):
    """The updates done by the schedule of an optimiser, or of that of a state."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    parts = jax.tree.leaves(getattr(state, "opt_state", state), is_leaf=is_schedule)
    (found,) = [part for part in parts if is_schedule(part)]
    return int(found.count)


def head(state):
    return np.asarray(state.meta_params["params"]["head"])


def test_what_could_change_is_what_the_training_allows(training):
    usual = {"optimizer": "adam", "tasks_per_step": 4, "tasks_at_a_time": 0, "remat": False}
    assert training.variants.settings == usual and training.variants.multiple == 2
    several = captured(changes={"steps_per_call": 4}).variants
    assert "tasks_per_step" not in several.settings
    annealed = captured(inner=InnerLoop(num_steps=2, query_loss="annealed")).variants
    assert "tasks_per_step" not in annealed.settings
    planned = captured(inner=InnerLoop(num_steps=2, kept_states=1)).variants
    assert "remat" not in planned.settings


@pytest.mark.parametrize("settings", [{"tasks_at_a_time": 1}, {"remat": True}])
def test_another_way_to_compute_gives_the_same_step(training, settings):
    variant = training.variants.make({**training.variants.settings, **settings})
    for position, step in ((0, 0), (12, 3)):
        same, batch = variant.sample(position), training.sample(step)
        assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(batch)))
    ours, _ = variant.step_fn(copied(training.state), variant.sample(0))
    plain, _ = training.step_fn(copied(training.state), training.sample(0))
    np.testing.assert_allclose(head(ours), head(plain), rtol=1e-5)


def test_another_optimiser_begins_anew_where_the_schedule_is(training):
    state = copied(training.state)
    for step in range(3):
        state, _ = training.step_fn(state, training.sample(step))
    variant = training.variants.make({**training.variants.settings, "optimizer": "sgd"})
    state = copied(variant.carry(state, 12, True))
    assert schedule_of(state) == 3
    before, scale = head(state), 0.05 * 0.5 * (1 + np.cos(np.pi / 6))  # a sixth of the cosine
    after, metrics = variant.step_fn(state, variant.sample(12))
    norm = float(metrics["grad_norm"])
    moved = np.linalg.norm(head(after) - before)
    assert moved == pytest.approx(scale * min(norm, 1.0), rel=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_schedule_free_goes_on_from_any_point_and_its_state_can_be_donated(num_devices):
    training = captured(outer=OUTER, changes={"num_devices": num_devices})
    chosen = {**training.variants.settings, "optimizer": "schedule_free"}
    variant = training.variants.make(chosen)
    state = variant.carry(copied(training.state), 12, True)
    average = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, ScheduleFreeState))[
        0
    ]
    assert int(average.count) == schedule_of(average.base_state) == 3
    bigger = training.variants.make(chosen | {"tasks_per_step": 8})
    state, _ = variant.step_fn(state, variant.sample(12))
    state = bigger.carry(state, 16, False)
    for position in (16, 24):
        state, metrics = bigger.step_fn(state, bigger.sample(position))
    assert np.isfinite(metrics["loss"]) and np.abs(head(state) - head(training.state)).max() > 0


def test_more_tasks_a_step_are_fewer_steps_on_the_same_schedule(training):
    variant = training.variants.make({**training.variants.settings, "tasks_per_step": 8})
    assert variant.sample(0).task.shape == (2, 4)
    others = [np.asarray(variant.sample(i).support.inputs) for i in (0, 8, 16)]
    plain = [np.asarray(training.sample(i).support.inputs) for i in range(8)]
    distinct = {x.tobytes() for x in others}
    assert len(distinct) == 3 and not distinct & {x.tobytes() for x in plain}
    state = copied(training.state)
    for step in range(4):
        state, _ = training.step_fn(state, training.sample(step))
    moments = [np.asarray(x) for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
    state = copied(variant.carry(state, 16, False))
    assert schedule_of(state) == 2  # of 4
    kept = [np.asarray(x) for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
    assert all(map(np.array_equal, moments, kept))
    for position in (16, 24):
        state, metrics = variant.step_fn(state, variant.sample(position))
    assert schedule_of(state) == 4 and np.isfinite(metrics["loss"])
    state, metrics = variant.step_fn(state, variant.sample(32))
    assert float(metrics["update_norm"]) == 0.0  # past the end of the cosine


def test_settings_that_do_not_fit_are_refused(training):
    for wrong, words in (
        ({"tasks_per_step": 5}, "does not divide"),
        ({"tasks_at_a_time": 3}, "3 at"),
    ):
        with pytest.raises(UserError, match=words):
            training.variants.make({**training.variants.settings, **wrong})


def test_a_step_without_an_inner_loop_is_the_same_program_with_and_without_remat():
    training = captured(estimator=meta_gradients.joint)
    programs = set()
    for remat in (False, True):
        variant = training.variants.make({**training.variants.settings, "remat": remat})
        programs.add(variant.step_fn.lower(training.state, training.sample(0)).as_text())
    assert len(programs) == 1
