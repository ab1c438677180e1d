import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

from metaopt import learners, measure, meta_gradients
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.self_improvement.improving import improving_train
from metaopt.self_improvement.loop import LoopConfig
from metaopt.tasks.fresh import fresh_tasks
from metaopt.training.types import Trained
from metaopt.types import Batch, Model, TaskFamily, TaskSplit

CONFIG = FitConfig(
    num_steps=8, tasks_per_step=4, num_devices=2, log_every=1, checkpoint_every=3, valid_episodes=4
)
MODEL = Model(lambda key: quadratic.PARAMS, lambda params, inputs: inputs @ params["head"])


def draw(key, scale=1.0):
    inputs, targets = jax.random.normal(key, (14, 3)), jax.random.normal(key, (14,))
    return Batch(inputs, scale * targets)


FAMILY = fresh_tasks("regression", draw, num_support=8)
OTHER = fresh_tasks("regression", functools.partial(draw, scale=2.0), num_support=8)
PROBLEM = Problem(FAMILY, MODEL, quadratic.loss)


def run(directory=None, problem=PROBLEM, learner=None, *args, changes=None, **options):
    config = dataclasses.replace(CONFIG, **(changes or {}))
    options = {"inner": InnerLoop(num_steps=2), "outer": OuterConfig(learning_rate=0.05)} | options
    learner = learner or learners.maml()
    return fit(problem, learner, *args, config=config, directory=directory, **options)


def captured(**options):
    """The training that a call of `fit` would run."""
    found = []

    def take(training, config, directory):
        del config, directory
        found.append(training)
        return Trained(training.state)

    run(train_fn=take, **options)
    return found[0]


def as_bytes(fitted):
    state = fitted.state._replace(key=jax.random.key_data(fitted.state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_close(fitted, other):
    assert int(fitted.state.step) == int(other.state.step)
    for a, b in zip(*(jax.tree.leaves(f.meta_params) for f in (fitted, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training on two devices that was never stopped, and its directory."""
    directory = tmp_path_factory.mktemp("straight")
    return run(directory), directory


def test_a_learner_is_trained_by_one_call(straight):
    fitted, directory = straight
    assert int(fitted.state.step) == 8 and fitted.from_checkpoint is None and fitted.seconds > 0
    start = {"params": quadratic.PARAMS}
    moved = jax.tree.map(lambda a, b: a - b, fitted.meta_params, start)
    assert float(optax.global_norm(moved)) > 0.1
    assert fitted.hparams["inner_learning_rate"] == np.float32(0.1)
    assert [line["step"] for line in read_json_lines(directory / "metrics.jsonl")] == [*range(1, 9)]


def test_a_training_that_is_resumed_or_split_is_bitwise_the_straight_one(straight, tmp_path):
    half = run(tmp_path, changes={"num_steps": 4})
    resumed = run(tmp_path)
    second = run(tmp_path, name="second phase", state=half.state)
    assert as_bytes(resumed) == as_bytes(second) == as_bytes(straight[0])
    assert resumed.from_checkpoint is None


def test_schedule_free_trains_and_resumes_and_its_average_is_what_is_judged(tmp_path):
    outer = OuterConfig(optimizer="schedule_free", learning_rate=0.05)
    options = {"outer": outer, "changes": {"eval_every": 4}}
    fitted = run(tmp_path / "straight", **options)
    run(tmp_path / "resumed", outer=outer, changes={"num_steps": 4, "eval_every": 4})
    assert as_bytes(run(tmp_path / "resumed", **options)) == as_bytes(fitted)
    training = captured(**options)
    z = fitted.state.opt_state.z
    assert np.abs(z["params"]["head"] - fitted.meta_params["params"]["head"]).max() > 1e-3
    found = training.evaluate(fitted.state)
    assert found.mean() < training.evaluate(training.state).mean()
    junk = fitted.state.opt_state._replace(z=jax.tree.map(lambda x: x + 1.0, z))
    np.testing.assert_array_equal(training.evaluate(fitted.state._replace(opt_state=junk)), found)
    (*_, last) = read_json_lines(tmp_path / "straight" / "metrics.jsonl")
    np.testing.assert_allclose(last["valid_loss"], found.mean(), rtol=1e-6)


def test_a_result_from_a_checkpoint_is_said_to_be_one(straight, capsys):
    fitted, directory = straight
    lines = (directory / "metrics.jsonl").read_text()
    again = run(directory)
    assert again.from_checkpoint == 8 and as_bytes(again) == as_bytes(fitted)
    assert "fit: taken from the checkpoint of step 8\n" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_text() == lines


def test_what_changes_only_how_it_is_computed_may_change(straight, capsys):
    fitted, directory = straight
    changes = {"num_devices": 1, "tasks_at_a_time": 1, "steps_per_call": 4, "checkpoint_every": 50}
    inner = InnerLoop(num_steps=2, kept_states=2, kept_on="host")
    again = run(directory, changes=changes, inner=inner)
    assert as_bytes(again) == as_bytes(fitted) and again.from_checkpoint == 8
    assert "2 cpu devices and resumes on 1 cpu device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"problem": PROBLEM._replace(family=OTHER)}, "first tasks"),
        ({"params": {"head": quadratic.PARAMS["head"] + 1}}, "initial state"),
        ({"key": jax.random.key(7)}, "random key"),
        (
            {"problem": PROBLEM._replace(loss_fn=lambda p, b: 2 * quadratic.loss(p, b))},
            "loss, learner or estimator",
        ),
        (
            {"problem": PROBLEM._replace(outer_loss=lambda p, b: 2 * quadratic.loss(p, b))},
            "loss, learner or estimator",
        ),
        ({"learner": learners.maml(optax.adagrad)}, "loss, learner or estimator"),
        ({"learner": learners.meta_sgd()}, "hold another state"),
        ({"inner": InnerLoop(num_steps=3)}, r"inner\.num_steps: 2 saved, 3 now"),
        ({"inner": InnerLoop(num_steps=2, kept_dtype="bfloat16")}, r"kept_dtype: null saved"),
        ({"outer": OuterConfig()}, r"outer\.learning_rate: 0\.05 saved, 0\.001 now"),
        ({"hparams": {"inner_learning_rate": 0.2}}, r"hparams\.inner_learning_rate: 0\.1"),
        ({"changes": {"tasks_per_step": 2}}, "tasks_per_step: 4 saved, 2 now"),
        ({"changes": {"num_steps": 4}}, "of step 8, past the end"),
    ],
)
def test_a_directory_of_another_training_is_refused(straight, change, differs):
    with pytest.raises(UserError, match=differs) as caught:
        run(straight[1], **change)
    assert "\n" not in str(caught.value) and str(straight[1]) in str(caught.value)


def test_other_validation_tasks_are_noticed(tmp_path):
    run(tmp_path, changes={"num_steps": 1, "eval_every": 1})
    for change in ({"eval_seed": 5}, {"valid_episodes": 6}):
        with pytest.raises(UserError, match="what differs: validation tasks"):
            run(tmp_path, changes={"num_steps": 1, "eval_every": 1} | change)
    family = FAMILY._replace(valid=OTHER.valid)
    with pytest.raises(UserError, match="what differs: validation tasks"):
        run(tmp_path, PROBLEM._replace(family=family), changes={"num_steps": 1, "eval_every": 1})


def test_without_a_directory_nothing_is_written_and_one_device_is_two(
    straight, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert_close(run(changes={"num_devices": 1}), straight[0])
    assert not list(tmp_path.iterdir())
    assert "fit: 8/8  loss" in capsys.readouterr().err


def test_several_steps_in_a_call_are_the_single_ones(straight, tmp_path):
    several = run(tmp_path, changes={"steps_per_call": 3, "eval_every": 5})
    assert_close(several, run(changes={"eval_every": 6}))  # calls end at 3, 6 and 8
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [3, 6, 6, 8]
    assert_close(run(changes={"steps_per_call": 3}), straight[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_best_evaluated_state_is_the_result(tmp_path, in_memory):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan")}
    options = {"changes": {"eval_every": 2}, "evaluate": lambda s: losses[int(s.step)]}
    fitted = run(None if in_memory else tmp_path, **options)
    assert int(fitted.state.step) == 4
    if not in_memory:
        assert run(tmp_path, **options).from_checkpoint == 4


def test_what_is_run_is_counted_from_the_tasks_and_drawn_by_the_step():
    training = captured(
        step_key=lambda key, step: jax.random.fold_in(key, 5 + step), changes={"seed": 3}
    )
    assert training.tokens_per_task == 8 + 6 and training.tasks_per_step == 4
    _, key = jax.random.split(jax.random.key(3))
    expected = FAMILY.train.sample(jax.random.fold_in(key, 7), 4)
    drawn = training.sample(2)
    assert drawn.support.inputs.shape == (2, 2, 8, 3)
    np.testing.assert_array_equal(drawn.support.inputs.reshape(4, 8, 3), expected.support.inputs)


def test_an_outer_loss_judges_in_training_and_validation():
    def twice(params, batch):
        return 2 * quadratic.loss(params, batch)

    valid = FAMILY.valid.sample(jax.random.key(0), 4)
    one, two = (
        captured(problem=problem, valid=valid, changes={"num_devices": 1})
        for problem in (PROBLEM, PROBLEM._replace(outer_loss=twice))
    )
    assert one.evaluate and two.evaluate
    np.testing.assert_allclose(two.evaluate(two.state), 2 * one.evaluate(one.state), rtol=1e-6)
    losses = [t.step_fn(t.state, t.sample(0))[1]["loss"] for t in (one, two)]
    np.testing.assert_allclose(2 * losses[0], losses[1], rtol=1e-6)


def test_the_closed_loop_is_a_train_function(straight, tmp_path):
    loop = LoopConfig(phases=(), shares=(), margins=(), assess_every=0.5)
    train_fn = functools.partial(improving_train, loop=loop)
    looped = run(tmp_path, train_fn=train_fn)
    np.testing.assert_array_equal(looped.meta_params["params"]["head"], straight_head(straight))
    assert run(tmp_path, train_fn=train_fn).from_checkpoint == 8
    several = run(train_fn=train_fn, changes={"steps_per_call": 4})
    assert_close(several, straight[0])


def straight_head(straight):
    return straight[0].meta_params["params"]["head"]


def on_host(key, num_tasks):
    return quadratic.episodes(num_tasks, seed=int(jax.random.key_data(key)[-1]))


HOST = PROBLEM._replace(family=TaskFamily("files", *(TaskSplit(on_host),) * 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"changes": {"tasks_per_step": 3}}, "3 tasks does not divide by 2 devices"),
        ({"changes": {"tasks_per_step": 8, "tasks_at_a_time": 3}}, "4 tasks a device .* 3 at a"),
        ({"problem": HOST, "changes": {"steps_per_call": 2}}, "tasks of files are drawn on the"),
        ({"learner": learners.meta_sgd(), "estimator": meta_gradients.joint}, "alone and gives no"),
        ({"hparams": {}}, "hparams has no 'inner_learning_rate'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_run(options, words):
    def train_fn(*_):
        raise AssertionError("it was run")

    with pytest.raises(UserError, match=words) as caught:
        run(train_fn=train_fn, **options)
    assert "\n" not in str(caught.value)


def test_what_exceeds_the_memory_is_refused_before_parameters_are_made(monkeypatch):
    monkeypatch.setattr(measure, "device_bytes", lambda: 500.0)

    def init(key):
        assert isinstance(key, jax.core.Tracer), "shapes alone"
        return {"head": jnp.zeros(3) + jax.random.normal(key)}

    with pytest.raises(UserError, match="are needed to hold 4 episodes, and the device has"):
        run(problem=PROBLEM._replace(model=MODEL._replace(init=init)))
