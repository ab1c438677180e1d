"""What `improving_train` changes beside scalars: batch, optimiser, how a step is computed."""

import dataclasses
import functools
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy_quadratic import as_bytes

from metaopt import learners, meta_gradients
from metaopt.files import read_json_lines
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.self_improvement.improving import RATES_ALONE, Searched, _Varied, improving_train
from metaopt.self_improvement.loop import Ledger, LoopConfig, Outcome
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import Snapshot, with_scalars
from metaopt.signals import Interrupted
from metaopt.tasks.fresh import fresh_tasks
from metaopt.training.loop import Trained, train
from metaopt.types import Batch, Model

WEIGHTS = np.array([1.0, -2.0, 0.5], np.float32)
MODEL = Model(lambda key: {"head": jnp.zeros(3)}, lambda params, x: x @ params["head"])
CONFIG = FitConfig(num_steps=60, tasks_per_step=4, num_devices=1)
LOOP = LoopConfig(
    phases=(0.0,),
    shares=(20.0,),
    assess_every=0.25,
    assessment_share=1.0,
    trials=TrialConfig(examples=0.1, least_steps=2),
    max_responses=0,
    options_share=0.5,
)


def draw(key):
    inputs = jax.random.normal(key, (14, 3))
    return Batch(inputs, inputs @ WEIGHTS + 0.1 * jax.random.normal(key, (14,)))


def loss(params, batch):
    return 0.5 * jnp.mean((batch.inputs @ params["head"] - batch.targets) ** 2)


PROBLEM = Problem(fresh_tasks("regression", draw, num_support=8), MODEL, loss)


def improved(directory, searched, *, loop=LOOP, problem=PROBLEM, **options):
    train_fn = functools.partial(improving_train, searched=searched, loop=loop)
    return fitted(directory, train_fn=train_fn, problem=problem, **options)


def fitted(directory, problem=PROBLEM, estimator=meta_gradients.joint, **options):
    outer = OuterConfig(optimizer="sgd", learning_rate=0.01, warmup_steps=3).ending_at(60)
    options = {"outer": outer, "config": CONFIG, "inner": InnerLoop(num_steps=1)} | options
    return fit(problem, learners.maml(), estimator, directory=directory, **options)


def decided(directory):
    return read_json_lines(directory / "decisions.jsonl")


def tried(directory):
    return {trial["setting"] for d in decided(directory) for trial in d["trials"]}


OPTIMIZERS = Searched(scalars=(), optimizers=("lion", "momentum"), most_batch=1.0, options=False)


def test_another_optimiser_is_tried_and_the_state_given_back_is_of_the_first(tmp_path):
    plain = fitted(tmp_path / "plain")
    found = improved(tmp_path / "found", OPTIMIZERS)
    assert "optimizer" in tried(tmp_path / "found")
    assert any("optimizer" in d["changes"] for d in decided(tmp_path / "found"))
    distance = [np.linalg.norm(f.meta_params["params"]["head"] - WEIGHTS) for f in (plain, found)]
    assert distance[1] < 0.5 * distance[0]
    assert jax.tree.structure(found.state) == jax.tree.structure(plain.state)
    longer = dataclasses.replace(CONFIG, num_steps=70)
    more = fitted(tmp_path / "more", state=found.state, config=longer)
    assert int(more.state.step) == 70


@pytest.mark.parametrize("at", [5, 30])
def test_a_run_that_changes_its_optimiser_is_resumed_bitwise(tmp_path, at):
    left = [at]

    def stopping(training, config, directory, **options):
        def sample(i):
            if [i] == left:
                left.clear()
                signal.raise_signal(signal.SIGTERM)
            return training.sample(i)

        return improving_train(
            training._replace(sample=sample), config, directory, searched=OPTIMIZERS, loop=LOOP
        )

    straight = improved(tmp_path / "straight", OPTIMIZERS)
    with pytest.raises(Interrupted):
        fitted(tmp_path / "cut", train_fn=stopping)
    resumed = improved(tmp_path / "cut", OPTIMIZERS)
    assert as_bytes(resumed.state) == as_bytes(straight.state)


def test_another_batch_is_tried_and_the_tasks_of_the_run_stay_as_many(tmp_path):
    searched = Searched(scalars=(), optimizers=(), options=False)
    found = improved(tmp_path, searched)
    assert tried(tmp_path) == {"tasks_per_step"}
    final = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    each = 14  # targets of a task
    assert 240 * each <= final["tokens"] < (240 + 32) * each
    assert int(found.state.step) == 60  # whatever the clock said of the batch


def test_what_is_given_back_is_at_the_step_of_as_many_tasks_with_the_last_rates():
    def back(training, config, directory):
        initial = jax.tree.map(jnp.copy, training.state)
        varied = _Varied(training, initial, Searched())
        settings = {k: float(v) for k, v in training.state.hparams.items()} | varied.settings
        settings |= {"tasks_per_step": 16, "optimizer": "adam", "outer_learning_rate": 0.5}
        first = Snapshot(training.state, varied.settings, 0)
        state = varied.carry(first, settings)
        state = varied.step(settings)(state, varied.sample(settings, 0))[0]
        state = with_scalars(state._replace(step=jnp.int32(15)), settings)
        end = Snapshot(state, settings, 240)
        outcome = Outcome(end, [], [], Ledger(), [])
        return Trained(varied.returned(outcome, config.num_steps))

    found = fitted(None, train_fn=back)
    assert int(found.state.step) == 60
    assert float(found.hparams["outer_learning_rate"]) == 0.5
    longer = dataclasses.replace(CONFIG, num_steps=62)
    assert int(fitted(None, state=found.state, config=longer).state.step) == 62


def test_a_run_killed_after_its_batch_changed_is_resumed(tmp_path):
    searched = Searched(scalars=(), optimizers=(), options=True)
    left = [40]

    def dying(training, config, directory, **options):
        def sample(i):
            if [i] == left and decided(directory):
                left.clear()
                raise MemoryError
            return training.sample(i)

        variants = training.variants

        def make(settings):
            made = variants.make(settings)

            def sampled(done):
                if left and len(decided(directory)) > 1:
                    left.clear()
                    raise MemoryError
                return made.sample(done)

            return made._replace(sample=sampled)

        changed = training._replace(sample=sample, variants=variants._replace(make=make))
        return improving_train(changed, config, directory, searched=searched, loop=LOOP)

    with pytest.raises(MemoryError):
        fitted(tmp_path, train_fn=dying)
    found = improved(tmp_path, searched)
    assert int(found.state.step) == 60


def test_how_a_step_is_computed_is_chosen_once_its_time_is_known(tmp_path):
    searched = dataclasses.replace(RATES_ALONE, scalars=(), options=True)
    loop = dataclasses.replace(LOOP, options_share=0.999)
    how = {"loop": loop, "estimator": meta_gradients.reverse}
    slow = PROBLEM._replace(family=slowly(PROBLEM.family))
    plain = fitted(tmp_path / "plain", estimator=meta_gradients.reverse)
    found = improved(tmp_path / "found", searched, problem=slow, **how)
    decisions = decided(tmp_path / "found")
    assert [d["kind"] for d in decisions] == ["execution options"]
    assert decisions[0]["examples"] == 60 and len(decisions[0]["timings"]) == 4
    ends = (f.meta_params["params"]["head"] for f in (found, plain))
    np.testing.assert_allclose(*ends, rtol=1e-4)


def slowly(family):
    """The tasks, drawn on the host as slowly as if a step took long."""

    def sample(key, number):
        time.sleep(0.1)
        return family.train.sample(key, number)

    return family._replace(train=family.train._replace(sample=sample))


def test_nothing_that_is_searched_changes_a_report(tmp_path):
    plain = fitted(tmp_path / "plain", train_fn=train)
    loop = dataclasses.replace(LOOP, report_only=True)
    told = improved(tmp_path / "told", Searched(), loop=loop)
    assert as_bytes(told.state) == as_bytes(plain.state)
    assert decided(tmp_path / "told")
