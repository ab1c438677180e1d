import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy_quadratic import as_bytes

from metaopt import parallel
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import joint, reverse
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.builders import (
    constant,
    cosine,
    default_settings,
    meta_training,
    plain_training,
)
from metaopt.self_improvement.improving import improving_train
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import Choice, Scale, begin, changed, steps
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.loop import Interrupted, TrainConfig, Training, train
from metaopt.types import Batch, Episode, Model

WEIGHTS = np.array([1.0, -2.0, 0.5], np.float32)
RATE = Scale(low=1e-6, high=10.0)
PLAIN = LoopConfig(phases=(), shares=(), assess_every=1.0)


def draw(position, number):
    rng = np.random.default_rng((3, position))
    inputs = rng.normal(size=(number, 3)).astype(np.float32)
    return Batch(inputs, inputs @ WEIGHTS + 0.1 * rng.normal(size=number).astype(np.float32))  # type: ignore[arg-type]


def loss_fn(params, batch):
    return 0.5 * jnp.mean((batch.inputs @ params["head"] - batch.targets) ** 2)


MODEL = Model(lambda key: {"head": jnp.zeros(3)}, lambda params, x: x @ params["head"])
SETTINGS = default_settings(
    batch_size=8, microbatch=0, outer_learning_rate=0.05, optimizer="sgd", clip_norm=1e9
)


def least_squares(num_examples=160, space=None, **options):
    return plain_training(
        "least squares",
        task={"kind": "regression"},
        model=MODEL,
        loss_fn=loss_fn,
        draw=draw,
        held_out=draw(10**6, 32),
        num_examples=num_examples,
        tokens_per_example=1,
        space=space or {"outer_learning_rate": RATE},
        **{"schedule": constant, "num_devices": 2} | options,
    )


def end_of(workload, settings):
    state = None
    for step in steps(workload, begin(workload, settings), workload.num_examples):
        state = step.snapshot.state
    return state


@pytest.mark.parametrize("how", [{}, {"microbatch": 2}, {"microbatch": 1, "tasks_at_a_time": 2}])
def test_plain_training_is_gradient_descent_on_batches_however_they_are_divided(how):
    weights = np.zeros(3)
    for position in range(0, 160, 8):
        batch = draw(position, 8)
        weights -= 0.05 * batch.inputs.T @ (batch.inputs @ weights - batch.targets) / 8
    state = end_of(least_squares(), SETTINGS | how)
    np.testing.assert_allclose(state.meta_params["params"]["head"], weights, rtol=1e-4)


def test_held_out_losses_are_those_of_the_examples_in_order():
    state = begin(least_squares(), SETTINGS).state
    held_out = draw(10**6, 32)
    expected = 0.5 * np.asarray(held_out.targets) ** 2  # at weights of zero
    np.testing.assert_allclose(least_squares().evaluate(state), expected, rtol=1e-5)
    four = least_squares(examples_at_a_time=4).evaluate(state)
    np.testing.assert_allclose(four, expected.reshape(8, 4).mean(axis=1), rtol=1e-5)
    with pytest.raises(UserError, match="do not divide"):
        least_squares(examples_at_a_time=5)


def test_batches_divide_by_devices_and_microbatches_or_are_refused():
    batch = Scale(low=1, high=64, integer=True)
    axis = least_squares(space={"batch_size": batch}).space["batch_size"]
    assert isinstance(axis, Scale) and axis.multiple == 2 and axis.scaled(9, 1.0) % 2 == 0
    sample = least_squares().sample
    for wrong in ({"batch_size": 7}, {"batch_size": 8, "microbatch": 3}):
        with pytest.raises(UserError):
            sample(SETTINGS | wrong, 0)
    assert sample(SETTINGS, 0).support.inputs.shape == (2, 1, 4, 3)


def test_scalars_share_one_compiled_step_and_other_settings_do_not():
    workload = least_squares()
    assert workload.step(SETTINGS) is workload.step(SETTINGS | {"outer_learning_rate": 3.0})
    assert workload.step(SETTINGS) is not workload.step(SETTINGS | {"optimizer": "adam"})


def test_schedules_begin_at_one():
    assert constant(0.0) == constant(1.0) == cosine(0.0) == 1.0
    assert cosine(0.5) == pytest.approx(0.5) and cosine(1.0) == pytest.approx(0.0)


def test_another_optimiser_is_taken_and_survives_a_stop(tmp_path):
    """Though it gives the state other leaves."""
    space = {"optimizer": Choice(values=("sgd", "momentum"))}
    config = LoopConfig(
        phases=(0.0,), shares=(1.0,), assess_every=1.0, trials=TrialConfig(examples=0.2)
    )
    settings = SETTINGS | {"outer_learning_rate": 0.02, "batch_size": 4}
    workload = least_squares(space=space)
    straight = run(workload, settings, directory=tmp_path / "straight", config=config)
    (decision,) = straight.decisions
    assert decision.changes["optimizer"] == ("sgd", "momentum")
    at = [30]

    def stopping(settings):
        step = workload.step(settings)

        def update(state, batch):
            if [int(state.step)] == at:
                at.clear()
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch)

        return update

    with pytest.raises(Interrupted):
        stopped = workload._replace(step=stopping)
        run(stopped, settings, directory=tmp_path / "stopped", config=config)
    resumed = run(workload, settings, directory=tmp_path / "stopped", config=config)
    assert as_bytes(resumed.snapshot.state) == as_bytes(straight.snapshot.state)
    assert resumed.snapshot.settings["optimizer"] == "momentum"


def episodes(position, num_tasks=4):
    batches = [draw(position + i, 8) for i in range(num_tasks)]
    support, query = (
        Batch(
            np.stack([b.inputs[part] for b in batches]),  # type: ignore[arg-type]
            np.stack([b.targets[part] for b in batches]),  # type: ignore[arg-type]
        )
        for part in (slice(0, 4), slice(4, 8))
    )
    return Episode(support, query, np.zeros(num_tasks, np.int32))  # type: ignore[arg-type]


def test_meta_training_reads_its_inner_rate_from_the_settings():
    learner = maml()
    workload = meta_training(
        "maml",
        task={},
        params=MODEL.init(jax.random.key(0)),
        learner=learner,
        estimate=lambda settings: reverse(learner, loss_fn, InnerLoop(num_steps=1)),
        sample=lambda settings, position: episodes(position),
        evaluate=lambda state: np.zeros(4),
        examples_per_step=lambda settings: 4,
        num_examples=40,
        tokens_per_example=8,
        space={"inner_learning_rate": RATE, "outer_learning_rate": RATE},
        num_devices=2,
    )
    settings = default_settings(inner_learning_rate=0.1, outer_learning_rate=1e-3)
    snapshot = begin(workload, settings)
    assert float(snapshot.state.hparams["inner_learning_rate"]) == np.float32(0.1)

    def loss(rate):
        state = begin(workload, settings | {"inner_learning_rate": rate}).state
        return float(workload.step(settings)(state, workload.sample(settings, 0))[1]["loss"])

    assert loss(0.1) < loss(0.05) < loss(0.01)


@pytest.mark.parametrize("space", [{"inner_learning_rate": RATE}, {"rates_learning_rate": RATE}])
def test_no_trial_is_spent_on_a_scalar_of_the_space_that_no_update_reads(tmp_path, space, capfd):
    """Nor is it moved where something else is wrong."""
    workload = least_squares(space={**space, "outer_learning_rate": RATE})
    settings = SETTINGS | {"inner_learning_rate": 0.1, "outer_learning_rate": 5.0}
    config = LoopConfig(
        phases=(0.0,), shares=(0.9,), assess_every=1.0, trials=TrialConfig(examples=0.1)
    )
    outcome = run(workload, settings, directory=tmp_path, config=config)
    (name,) = space
    told = [d.changes for d in outcome.decisions] + [
        e.settings for d in outcome.decisions for e in d.trials
    ]
    assert outcome.snapshot.settings["outer_learning_rate"] < 5.0
    assert told and not any(name in each for each in told)
    assert f"not searched, since no update reads it: {name}" in capfd.readouterr().err


@pytest.mark.parametrize("annealing_steps", [0, 4])
def test_meta_training_anneals_the_query_loss(annealing_steps):
    learner, inner = maml(), InnerLoop(num_steps=2, query_loss="annealed")
    workload = meta_training(
        "annealed",
        task={},
        params=MODEL.init(jax.random.key(0)),
        learner=learner,
        estimate=lambda settings: reverse(learner, loss_fn, inner),
        sample=lambda settings, position: episodes(position),
        evaluate=lambda state: np.zeros(4),
        examples_per_step=lambda settings: 4,
        num_examples=40,
        tokens_per_example=8,
        space={"outer_learning_rate": RATE},
        annealing_steps=annealing_steps,
        num_devices=1,
    )
    settings = default_settings(
        inner_learning_rate=0.5, outer_learning_rate=1.0, optimizer="sgd", clip_norm=1e9
    )
    snapshot = begin(workload, settings)
    batch, step = workload.sample(settings, 0), workload.step(settings)
    if not annealing_steps:
        with pytest.raises(UserError, match=r"hparams has no 'query_annealing'.*annealing_steps"):
            step(snapshot.state, batch)
        return
    ends = []
    for done in (0, annealing_steps):  # the weight of the last step goes from a half to all
        state = jax.tree.map(jnp.copy, snapshot.state)._replace(step=jnp.int32(done))
        ends.append(step(state, batch)[0].meta_params["params"]["head"])
    ours = InnerLoop(num_steps=2, query_loss="last")
    plain = make_meta_step(
        reverse(learner, loss_fn, ours), outer_optimizer(OuterConfig(optimizer="sgd"))
    )
    state = snapshot.state._replace(step=jnp.int32(annealing_steps))
    expected = jax.jit(plain)(state, episodes(0))[0].meta_params["params"]["head"]
    np.testing.assert_allclose(ends[1], expected, rtol=1e-5)
    assert not np.allclose(ends[0], ends[1], rtol=1e-3, atol=0)


def halfway(workload, settings):
    """The snapshot in the middle of a run of 160 examples."""
    snapshot = begin(workload, settings)
    for step in steps(workload, snapshot, 80):
        snapshot = step.snapshot
    return snapshot


def test_schedule_free_starts_from_the_present_parameters():
    """Its state holds parameters, and those of a new state would be the initial ones."""
    workload = least_squares()
    snapshot = halfway(workload, SETTINGS)
    other = changed(workload, snapshot, {"optimizer": "schedule_free"})
    before, opt_state = snapshot.state.meta_params["params"]["head"], other.state.opt_state
    np.testing.assert_array_equal(opt_state.z["params"]["head"], before)
    assert float(opt_state.weight_sum["params"]) == 0.0
    loss = workload.evaluate(other.state).mean()
    for step in steps(workload, other, 160):  # noqa: B007  # it donates z and x
        pass
    assert workload.evaluate(step.snapshot.state).mean() < loss


def test_what_follows_schedule_free_starts_from_its_average():
    workload = least_squares()
    snapshot = halfway(workload, SETTINGS | {"optimizer": "schedule_free"})
    other = changed(workload, snapshot, {"optimizer": "sgd"})
    assert jax.tree.structure(other.state) == jax.tree.structure(workload.start(SETTINGS))
    assert workload.evaluate(other.state).tolist() == workload.evaluate(snapshot.state).tolist()


def test_a_run_may_change_to_schedule_free_and_back(tmp_path):
    """And it is resumed from its checkpoints, which hold states of either."""
    space = {"optimizer": Choice(values=("sgd", "schedule_free"))}
    loop = LoopConfig(
        phases=(0.0, 0.4), shares=(1.0, 1.0), assess_every=0.25, trials=TrialConfig(examples=0.1)
    )
    workload = least_squares(320, space)
    outcome = run(workload, SETTINGS, directory=tmp_path, config=loop)
    tried = {e.settings["optimizer"] for d in outcome.decisions for e in d.trials if e.settings}
    assert "schedule_free" in tried and np.isfinite(outcome.curve[-1].loss.mean)
    again = run(workload, SETTINGS, directory=tmp_path, config=loop)
    assert as_bytes(again.snapshot.state) == as_bytes(outcome.snapshot.state)


compiled, traces = [], []


def drop_in(function, directory, evaluate=None, num_steps=60, **options):
    """The same call of `train` and of what takes its place."""
    devices, learner = parallel.default_devices(2), maml()
    outer = OuterConfig(learning_rate=1e-3, weight_decay=0.0)
    step = make_meta_step(joint(learner, loss_fn), outer_optimizer(outer), axis_name=parallel.AXIS)

    def counted(state, batch):
        traces.append(None)
        return step(state, batch)

    if not compiled:
        compiled.append(parallel.parallel_step(counted, devices))
    hparams = outer.hparams() | {"inner_learning_rate": 0.1}  # which joint training does not read
    state = init_state(
        jax.random.key(0), MODEL.init(jax.random.key(0)), learner, outer_optimizer(outer), hparams
    )
    training = Training(
        name="drop-in",
        state=parallel.replicate(state, devices),
        step_fn=compiled[0],
        sample=lambda i: parallel.split_over_devices(episodes(100 * i), 2),
        tasks_per_step=4,
        tokens_per_task=8,
        fingerprint=Fingerprint({"seed": 0}),
        evaluate=evaluate,
    )
    return function(training, TrainConfig(num_steps=num_steps), directory, **options).state


HELD_OUT = draw(10**6, 32)


def losses_of(state) -> np.ndarray:
    params = np.asarray(state.meta_params["params"]["head"])
    return 0.5 * (HELD_OUT.inputs @ params - HELD_OUT.targets) ** 2


def test_improving_train_is_train_where_it_may_change_nothing(tmp_path):
    plain = drop_in(train, tmp_path / "plain")
    same = drop_in(improving_train, tmp_path / "same", loop=PLAIN)
    assert as_bytes(plain) == as_bytes(same)
    assert len(traces) == 1


def mean_loss(state) -> float:
    return float(losses_of(state).mean())


@pytest.mark.parametrize("evaluate", [None, losses_of, mean_loss])
def test_improving_train_finds_a_rate_whatever_it_is_judged_by(tmp_path, evaluate):
    loop = LoopConfig(
        phases=(0.0,), shares=(1.0,), assess_every=0.5, trials=TrialConfig(examples=0.1)
    )
    plain = drop_in(train, tmp_path / "plain")
    state = drop_in(improving_train, tmp_path / "improved", evaluate, loop=loop)
    assert int(state.step) == 60
    assert losses_of(state).mean() < 0.3 * losses_of(plain).mean()
    decisions = read_json_lines(tmp_path / "improved" / "decisions.jsonl")
    assert {e["setting"] for d in decisions for e in d["trials"]} == {"outer_learning_rate"}
