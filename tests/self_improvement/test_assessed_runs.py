"""What runs under the loop say of themselves: by group and class, their cost and their rank."""

import dataclasses
import json
import math

import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt import learners, losses, models, self_improvement
from metaopt.errors import UserError
from metaopt.files import read_json_lines, write_json_lines
from metaopt.fit import FitConfig, Problem, fit
from metaopt.inner_loop import InnerLoop
from metaopt.ranges import OutOfRange
from metaopt.resources import memory_use, peak_memory
from metaopt.self_improvement.assess import CostConfig
from metaopt.self_improvement.builders import plain_training
from metaopt.self_improvement.loop import LoopConfig, assessment_interval, run
from metaopt.self_improvement.memory import Memory, RunRecord
from metaopt.types import Batch, Episode, TaskFamily, TaskSplit

PLAIN = LoopConfig(phases=(), shares=(), assess_every=0.25, count_flops=False)
FAR = np.repeat([0.0, 1.0, 3.0, 0.0], 16)
GROUPS = np.repeat(["near", "middle", "far", "near too"], 16).tolist()


def evaluate(state):
    """Losses whose group decides how far they are from their least."""
    return quadratic.evaluate(state) + FAR


def predictions(state):
    """Two classes, told apart the better the longer the run is."""
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    logits = (2 * labels - 1) * (1 + float(state.step) / 50) + rng.normal(size=40)
    probability = 1 / (1 + np.exp(-logits))
    return np.stack([1 - probability, probability], axis=1), labels


PROBLEM = workload(400, evaluate=evaluate, groups=GROUPS, predictions=predictions)


def without_times(curve):
    timed = dict(seconds=0.0, per_second=None, per_cost=None, gib=None)
    return [point._replace(**timed) for point in curve]


def dies_at(number):
    """The problem, killed in the step after ``number``."""

    def step(state, batch):
        if int(state.step) == number:
            raise MemoryError
        return quadratic.step(state, batch)

    return PROBLEM._replace(step=lambda settings: step)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    return directory, run(PROBLEM, SETTINGS, directory=directory, config=PLAIN)


def test_a_run_knows_its_strengths_and_weaknesses(straight):
    last = straight[1].curve[-1]
    assert set(last.strengths) == {"near", "near too"} and last.weaknesses == ("far",)
    assert [group.group for group in last.groups] == ["near", "middle", "far", "near too"]
    assert last.groups[2].loss.mean == pytest.approx(
        quadratic.evaluate(straight[1].snapshot.state)[32:48].mean() + 3, rel=1e-6
    )
    assert all(group.improvement is not None for group in last.groups)
    first = straight[1].curve[0].classes
    assert last.classes is not None and first is not None
    assert last.classes.accuracy > first.accuracy and set(last.classes.per_class) == {"0", "1"}
    assert last.cost == last.loss.mean
    assert last.gib is not None and 0 < last.gib < 1000


@pytest.mark.parametrize("number", [20, 60, 90])
def test_a_run_that_is_killed_and_resumed_says_the_same(tmp_path, straight, number):
    with pytest.raises(MemoryError):
        run(dies_at(number), SETTINGS, directory=tmp_path, config=PLAIN)
    resumed = run(PROBLEM, SETTINGS, directory=tmp_path, config=PLAIN)
    outcome = straight[1]
    assert as_bytes(resumed.snapshot.state) == as_bytes(outcome.snapshot.state)
    assert without_times(resumed.curve) == without_times(outcome.curve)


def test_lines_of_before_there_were_groups_are_read(tmp_path, straight):
    """Then the fields that they lack are unknown; and the weights of the cost may change."""
    with pytest.raises(MemoryError):
        run(dies_at(60), SETTINGS, directory=tmp_path, config=PLAIN)
    kept = ("name", "valid_loss", "step", "tokens", "seconds", "flops", "loss", "improvement")
    kept = (*kept, "per_second", "per_flop", "per_cost")
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    write_json_lines(tmp_path / "metrics.jsonl", [{k: x[k] for k in kept} for x in lines])
    config = dataclasses.replace(PLAIN, cost=CostConfig(loss=2.0))
    resumed = run(PROBLEM, SETTINGS, directory=tmp_path, config=config)
    assert [point.cost is None for point in resumed.curve] == [True] * 3 + [False] * 2
    last = resumed.curve[-1]
    assert last.cost == 2 * last.loss.mean and last.weaknesses == ("far",)
    assert [p.loss for p in resumed.curve] == [p.loss for p in straight[1].curve]


def test_groups_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="names 3 losses, but evaluate gives 64"):
        run(PROBLEM._replace(groups=["a"] * 3), SETTINGS, directory=tmp_path, config=PLAIN)
    with pytest.raises(UserError, match="2 names for 3 held-out losses"):
        plain_training(
            "x",
            model=models.bigram(4),
            loss_fn=losses.next_token(models.bigram(4)),
            draw=lambda position, number: Batch(jnp.zeros((number, 2)), jnp.zeros((number, 2))),
            held_out=Batch(jnp.zeros((6, 2)), jnp.zeros((6, 2))),
            space={},
            examples_at_a_time=2,
            groups=["a", "b"],
        )


def test_assessments_are_as_far_apart_as_their_share_allows(tmp_path):
    """400 examples, of which 5 % may go to evaluations of 8: one every 160."""
    problem = PROBLEM._replace(evaluation_examples=8.0)
    assert assessment_interval(PLAIN, PROBLEM) == 100
    assert assessment_interval(PLAIN, problem) == 160
    outcome = run(problem, SETTINGS, directory=tmp_path / "1", config=PLAIN)
    assert [point.tokens // 2 for point in outcome.curve] == [0, 160, 320, 400]
    assert outcome.ledger.assessment_examples == 4 * 8
    dear = PROBLEM._replace(evaluation_examples=1e6)
    outcome = run(dear, SETTINGS, directory=tmp_path / "2", config=PLAIN)
    assert [point.tokens // 2 for point in outcome.curve] == [0, 400]
    with pytest.raises(OutOfRange, match="assessment_share"):
        LoopConfig(assessment_share=0.0)


def remembered(memory, name, loss, task=PROBLEM.task, tokens=800):
    curve = [(0, 9.0), (tokens, loss)]
    record = RunRecord(name=name, task=task, settings={}, loss=loss, tokens=tokens, seconds=1.0)
    memory.remember(dataclasses.replace(record, curve=curve))


def test_a_run_says_once_how_it_ranks_among_past_ones(tmp_path, capfd):
    memory = Memory(tmp_path / "memory.sqlite")
    assert memory.rank(PROBLEM.task, [(800, 1.0)]) is None
    remembered(memory, "better", 0.0)
    remembered(memory, "worse", 8.0)
    remembered(memory, "diverged", math.nan)
    remembered(memory, "shorter", 0.0, tokens=400)
    remembered(memory, "of another task", 0.0, task={"kind": "cubic", "dimensions": 6})
    remembered(memory, "nearly the same", 7.0, task=PROBLEM.task | {"dimensions": 6.1})
    outcome = run(PROBLEM, SETTINGS, directory=tmp_path / "run", config=PLAIN, memory=memory)
    assert [point.rank is None for point in outcome.curve] == [True] * 4 + [False]
    rank, loss = outcome.curve[-1].rank, outcome.curve[-1].loss.mean
    assert rank is not None and (rank.rank, rank.n, rank.loss) == (2, 4, loss)
    assert rank.to_best == pytest.approx(loss)
    assert capfd.readouterr().err.count("rank 2 of 5 runs") == 1
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["rank"]["rank"] == 2
    again = run(PROBLEM, SETTINGS, directory=tmp_path / "run", config=PLAIN, memory=memory)
    assert again.curve[-1].rank == rank and "rank" not in capfd.readouterr().err


def test_the_peak_of_memory_is_no_less_than_what_is_in_use():
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    used = memory_use()
    assert peak_memory() >= (used.device or used.host) * 0.9
    assert peak_memory([Device(3), Device(7)]) == 7


def family(names):
    """Sequences of one symbol each, the task, two episodes of each of three tasks."""

    def sample(key, number):
        tasks = np.arange(number) % 3
        tokens = jnp.asarray(np.tile(tasks[:, None, None], (1, 2, 4)), jnp.int32)
        batch = Batch(tokens, tokens)
        return Episode(batch, batch, jnp.asarray(tasks, jnp.int32))

    split = TaskSplit(sample, names)
    return TaskFamily("symbols", split, split, split)


@pytest.mark.parametrize(
    ("names", "expected"), [(("a", "b", "c"), ("a", "b", "c")), ((), ()), (("a", "b"), ())]
)
def test_the_groups_of_a_meta_training_are_the_names_of_its_tasks(tmp_path, names, expected):
    model = models.bigram(4)
    problem = Problem(family(names), model, losses.next_token(model))
    config = FitConfig(num_steps=4, tasks_per_step=8, valid_episodes=6, eval_every=4)
    seen = []

    def train(training, config, directory):
        seen.append(training)
        return self_improvement.improving_train(training, config, directory, loop=PLAIN)

    fit(
        problem,
        learners.maml(),
        inner=InnerLoop(num_steps=1),
        config=config,
        directory=tmp_path,
        name="symbols",
        train_fn=train,
    )
    assert seen[0].groups == expected
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert tuple(group["group"] for group in line["groups"]) == expected
