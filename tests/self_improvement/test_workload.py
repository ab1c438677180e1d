import functools
import math

import jax
import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import optax
import pytest
from noisy_quadratic import RATE, SETTINGS, as_bytes, workload

from metaopt import parallel
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import joint, reverse
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.workload import (
    SCHEDULE_LEVELS,
    Choice,
    Scale,
    after_steps,
    begin,
    changed,
    copied,
    known_settings,
    scalars_read,
    steps,
    with_scalars,
)
from metaopt.types import Batch, Episode


def test_a_scale_stays_within_its_bounds_and_on_its_grid():
    scale = Scale(low=0.1, high=10.0)
    assert scale.scaled(1.0, 8.0) == 8.0 and scale.scaled(8.0, 8.0) == 10.0
    assert scale.scaled(1.0, 1 / 64) == 0.1
    batch = Scale(low=1, high=30, integer=True, multiple=4)
    assert [batch.scaled(value, 1.0) for value in (1, 5, 7, 29, 99)] == [4, 4, 8, 28, 28]
    assert isinstance(batch.scaled(8, math.sqrt(2)), int)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.0, "high": 1.0},
        {"low": 2.0, "high": 1.0},
        {"low": 1.0, "high": math.inf},
        {"low": 1.0, "high": 2.0, "factor": 1.0},
        {"low": 5, "high": 7, "integer": True, "multiple": 4},
    ],
)
def test_a_scale_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        Scale(**wrong)


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(UserError):
        Choice(values=())


@pytest.mark.parametrize(
    ("axis", "settings", "message"),
    [
        (RATE, {}, "no value to start from"),
        (RATE, {"x": 0.0}, "must be a number from"),
        (RATE, {"x": math.nan}, "must be a number from"),
        (RATE, {"x": 1e9}, "must be a number from"),
        (RATE, {"x": "fast"}, "must be a number from"),
        (Scale(low=1, high=2, coupled={"y": 0.5}), {"x": 1}, "coupled to 'y'"),
        (Choice(values=("a", "b")), {"x": "c"}, "choose one of"),
    ],
)
def test_settings_that_cannot_be_changed_are_refused(axis, settings, message):
    with pytest.raises(UserError, match=message):
        begin(workload(space={"x": axis}), settings)


def test_of_settings_from_elsewhere_only_sound_ones_are_taken():
    space = {"rate": RATE, "batch": Scale(low=1, high=64, integer=True), "o": Choice(values=("a",))}
    found = {"rate": math.inf, "batch": 1000, "o": "z", "other": 3}
    assert known_settings(space, found) == {"batch": 64}
    assert known_settings(space, {"rate": 1e-9, "o": "a"}) == {"rate": RATE.low, "o": "a"}


def test_steps_are_those_of_a_loop_written_by_hand():
    problem, size = workload(200), SETTINGS["batch_size"]
    snapshot = begin(problem, SETTINGS)
    for step in steps(problem, snapshot, 200):  # noqa: B007
        pass
    state = quadratic.initial_state()
    for position in range(0, 200, size):
        level = math.ceil(quadratic.cosine(position / 200) * SCHEDULE_LEVELS) / SCHEDULE_LEVELS
        rate = np.float32(SETTINGS["outer_learning_rate"] * level)
        hparams = {"outer_learning_rate": jnp.float32(rate), "weight_decay": jnp.float32(0)}
        batch = quadratic.sample(SETTINGS, position)
        state, _ = quadratic.step(state._replace(hparams=hparams), batch)
    assert as_bytes(state) == as_bytes(step.snapshot.state)
    assert step.snapshot.examples == 200 and step.position == 196


def test_annealing_takes_the_rate_to_zero_and_does_not_compile_again():
    problem = workload(10**6)  # so long that its own schedule stands still
    snapshot = begin(problem, SETTINGS)
    compiled = quadratic.step._cache_size()
    rates = [
        float(step.snapshot.state.hparams["outer_learning_rate"])
        for step in steps(problem, snapshot, 40, anneal=True)
    ]
    expected = SETTINGS["outer_learning_rate"] * np.arange(10, 0, -1) / 10
    assert np.allclose(rates, expected, atol=0.5 / SCHEDULE_LEVELS)
    assert quadratic.step._cache_size() <= max(1, compiled)


def test_what_is_left_out_is_gone_past_whatever_the_batch():
    problem = workload(64)

    def positions(size):
        snapshot = begin(problem, SETTINGS | {"batch_size": size})
        snapshot = snapshot._replace(left_out=frozenset({(8, 12)}))
        return [step.position for step in steps(problem, snapshot, 64)]

    assert positions(4) == [p for p in range(0, 64, 4) if p != 8]
    assert positions(16) == [16, 32, 48]
    assert positions(6) == [0, 12, *range(18, 64, 6)]


def test_examples_after_steps_stay_on_the_grid_of_the_batch():
    assert [after_steps(10, end, 4) for end in (5, 10, 11, 14, 15)] == [10, 10, 14, 14, 18]


def test_scalars_are_set_by_name_and_scheduled_rates_times_the_level():
    state = with_scalars(
        quadratic.initial_state(),
        {"outer_learning_rate": 2.0, "weight_decay": 3.0, "batch_size": 7},
        0.5,
    )
    assert {k: float(v) for k, v in state.hparams.items()} == {
        "outer_learning_rate": 1.0,
        "weight_decay": 3.0,
    }


def test_a_copy_outlives_the_donation_of_the_original():
    problem = workload(40)
    snapshot = begin(problem, SETTINGS)
    copy, before = copied(snapshot), as_bytes(snapshot.state)
    list(steps(problem, snapshot, 40))
    assert as_bytes(copy.state) == before
    moved = changed(problem, copy, {"outer_learning_rate": 2.0})
    assert moved.settings["outer_learning_rate"] == 2.0 and copy.settings == SETTINGS


OUTER = {"clip_norm", "outer_learning_rate", "weight_decay"}
BATCH = Batch(np.ones((2, 2, 4, 3), np.float32), np.ones((2, 2, 4), np.float32))  # type: ignore[arg-type]
EPISODES = Episode(BATCH, BATCH, np.zeros((2, 2), np.int32))  # type: ignore[arg-type]


def loss_fn(params, batch):
    return jnp.mean((batch.inputs @ params["head"] - batch.targets) ** 2)


def start_state(**scalars):
    hparams = OuterConfig().hparams() | {"inner_learning_rate": jnp.float32(0.1)} | scalars
    outer = outer_optimizer(OuterConfig())
    return init_state(jax.random.key(0), {"head": jnp.zeros(3)}, maml(), outer, hparams)


def on_metrics_alone(step):
    """What a metric reads decides nothing."""

    def shown(state, episodes):
        after, metrics = step(state, episodes)
        return after, metrics | {"shown": metrics["loss"] * state.hparams["own"]}

    return shown


def by_what_it_becomes(step):
    """A scalar that only changes another one, which is read in the next step."""

    def schedule(state, episodes):
        after, metrics = step(state, episodes)
        h = after.hparams
        rate = h["outer_learning_rate"] * h["own"]
        return after._replace(hparams={**h, "outer_learning_rate": rate}), metrics

    return schedule


def several(step):
    """In one call, as of small models."""

    def call(state, episodes):
        state, metrics = jax.lax.scan(lambda s, _: step(s, episodes), state, length=3)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    return jax.jit(call)


INNER = functools.partial(reverse, maml(), loss_fn)


@pytest.mark.parametrize(
    ("estimate", "around", "read"),
    [
        (joint(maml(), loss_fn), None, OUTER),
        (INNER(InnerLoop(num_steps=1)), None, OUTER | {"inner_learning_rate"}),
        (joint(maml(), loss_fn), on_metrics_alone, OUTER),
        (joint(maml(), loss_fn), by_what_it_becomes, OUTER | {"own"}),
        (INNER(InnerLoop(num_steps=1)), several, OUTER | {"inner_learning_rate"}),
        (
            INNER(InnerLoop(num_steps=2, query_loss="annealed")),
            lambda step: jax.jit(step),
            OUTER | {"inner_learning_rate", "query_annealing"},
        ),
    ],
)
def test_a_scalar_is_read_where_the_next_parameters_depend_on_it(estimate, around, read):
    step = make_meta_step(
        estimate, outer_optimizer(OuterConfig()), axis_name=None if around else parallel.AXIS
    )
    episodes = jax.tree.map(lambda x: x[0], EPISODES) if around else EPISODES
    step = around(step) if around else parallel.parallel_step(step, parallel.default_devices(2))
    state = start_state(own=jnp.float32(2.0), query_annealing=jnp.float32(0.5))
    assert scalars_read(step, state, episodes) == read
    assert optax.tree_utils.tree_sum(state.meta_params) == 0  # it was not run
