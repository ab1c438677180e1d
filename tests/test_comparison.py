import dataclasses

import jax
import numpy as np
import optax
import pytest
import quadratic

from metaopt import learners, meta_gradients
from metaopt.comparison import Comparison, ComparisonConfig, Problem, Row, select
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.types import Model, TaskFamily, TaskSplit

CONFIG = ComparisonConfig(
    num_devices=2,
    tasks_per_step=4,
    pretrain_steps=2,
    meta_steps=3,
    max_inner_steps=3,
    inner_rates=(0.02, 0.1),
    eval_every=1,
    valid_episodes=4,
    test_episodes=6,
)
INNER = InnerLoop(num_steps=2)
ROWS = [
    Row("random init", learners.maml(), None),
    Row("joint pretraining", learners.maml(), meta_gradients.joint),
    Row("Meta-SGD", learners.meta_sgd(num_steps=2), meta_gradients.reverse),
]


class Recorded:
    """A family of least-squares tasks that notes the seeds it was asked for, by split."""

    def __init__(self):
        self.seeds = {"train": [], "valid": [], "test": []}
        self.family = TaskFamily("quadratic", *(TaskSplit(self._sampler(s)) for s in self.seeds))

    def _sampler(self, split):
        def sample(key, num_tasks):
            seed = int(jax.random.key_data(key)[-1])
            self.seeds[split].append(seed)
            return quadratic.episodes(num_tasks, seed=seed)

        return sample


def make(family, config=CONFIG, inner=INNER):
    model = Model(lambda key: quadratic.PARAMS, lambda params, inputs: inputs @ params["head"])
    problem = Problem(family, model, quadratic.loss)
    return Comparison(problem, inner, OuterConfig(learning_rate=0.05), config)


def shifted(key, num_tasks):
    return quadratic.episodes(num_tasks, seed=int(jax.random.key_data(key)[-1]) // 2)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison, its results by row, and the seeds that each training asked for."""
    recorded, directory = Recorded(), tmp_path_factory.mktemp("compared")
    comparison = make(recorded.family)
    results, seeds = {}, {}

    def noted(name, train):
        before = len(recorded.seeds["train"])
        result = train()
        seeds[name] = list(dict.fromkeys(recorded.seeds["train"][before:]))
        return result

    start = noted("pretraining", lambda: comparison.pretrain(directory))
    for row in ROWS:
        results[row.name] = noted(row.name, lambda row=row: comparison.run(row, start, directory))
    return comparison, results, seeds, recorded, directory, start


def test_all_rows_train_on_the_same_new_episodes_and_are_judged_on_the_same_ones(compared):
    _, results, seeds, recorded, *_ = compared
    assert len(seeds["pretraining"]) == 2 and len(seeds["Meta-SGD"]) == 3
    assert seeds["joint pretraining"] == seeds["Meta-SGD"] and seeds["random init"] == []
    assert len(set(seeds["pretraining"] + seeds["Meta-SGD"])) == 5
    assert len(recorded.seeds["valid"]) == len(recorded.seeds["test"]) == 1
    assert recorded.seeds["valid"] != recorded.seeds["test"]
    assert all(result.curves.shape == (6, 4) for result in results.values())


def test_an_annealed_query_loss_goes_from_the_mean_to_the_last_in_every_row(tmp_path):
    """Joint pretraining has none, and is what it is without."""

    def noting(learner, loss_fn, inner):
        estimate = meta_gradients.reverse(learner, loss_fn, inner)

        def estimator(meta_params, hparams, episode, key):
            grads, metrics = estimate(meta_params, hparams, episode, key)
            return grads, metrics | {"annealing": hparams["query_annealing"]}

        return estimator

    found = {}
    for query_loss in ("annealed", "last"):
        config = dataclasses.replace(CONFIG, pretrain_steps=0, eval_every=0)
        inner = dataclasses.replace(INNER, query_loss=query_loss)
        comparison = make(Recorded().family, config, inner)
        directory = tmp_path / query_loss
        found[query_loss] = comparison.run(ROWS[1], comparison.random_init(), directory)
        if query_loss == "annealed":
            row = Row("noting", learners.maml(), noting)
            comparison.run(row, comparison.random_init(), directory)
            records = read_json_lines(directory / "metrics.jsonl")
            noted = [record["annealing"] for record in records if "annealing" in record]
            np.testing.assert_allclose(noted, [0, 1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(found["annealed"].curves, found["last"].curves)


def after_descent(episodes, rate, num_steps):
    """The query losses after gradient descent by hand from the random initialisation."""
    losses = []
    for i in range(len(episodes.task)):
        support, query = jax.tree.map(lambda x, i=i: x[i], (episodes.support, episodes.query))
        w = quadratic.descend(quadratic.START, support, [rate] * num_steps)[-1]
        losses.append(quadratic.value(w, query))
    return np.array(losses)


def test_the_untrained_row_is_gradient_descent_from_the_random_initialisation(compared):
    comparison, results, *_ = compared
    found = results["random init"]
    for step, rate in enumerate(found.rates):
        expected = after_descent(comparison.test, rate, step)
        np.testing.assert_allclose(found.curves[:, step], expected, rtol=1e-4)


def test_training_helps_and_starts_from_what_was_pretrained(compared):
    comparison, results, *_, start = compared
    at_start, joint = comparison.random_init(), results["joint pretraining"]
    moved = [
        float(optax.global_norm(jax.tree.map(lambda a, b: a - b, x, at_start)))
        for x in (start, joint.meta_params["params"])
    ]
    assert 0 < moved[0] < moved[1]
    untrained = results["random init"].curves.mean(axis=0)
    assert (joint.curves.mean(axis=0) < untrained).all()


def test_learned_rates_are_used_as_trained_and_others_are_tuned_on_validation(compared):
    comparison, results, *_ = compared
    assert len(set(results["Meta-SGD"].rates)) == 1
    for step, chosen in enumerate(results["random init"].rates):
        best, *others = (
            after_descent(comparison.valid, rate, step).mean()
            for rate in (chosen, *CONFIG.inner_rates)
        )
        assert best <= min(others) + 1e-6
    for result in results.values():
        assert result.hparams["inner_learning_rate"] == np.float32(result.rates[2])


def test_a_row_that_is_done_is_not_trained_again(compared):
    comparison, results, _, recorded, directory, start = compared
    before = len(recorded.seeds["train"])
    again = comparison.run(ROWS[1], start, directory)
    assert len(recorded.seeds["train"]) == before + 1, "by which it is known"
    np.testing.assert_array_equal(again.curves, results["joint pretraining"].curves)


STEP = "loss, learner or estimator"


def scaled_loss(params, batch):
    return 2 * quadratic.loss(params, batch)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"family": TaskFamily("quadratic", *(TaskSplit(shifted),) * 3)}, "first tasks"),
        ({"start": {"head": quadratic.PARAMS["head"] + 1}}, "initial state"),
        ({"loss_fn": scaled_loss}, STEP),
        (
            {"row": {"learner": learners.meta_sgd(optax.adagrad, num_steps=2)}},
            STEP,
        ),
        ({"row": {"estimator": meta_gradients.first_order}}, STEP),
    ],
    ids=["family", "start", "loss", "learner", "estimator"],
)
def test_a_directory_of_another_training_is_refused(compared, other, differs):
    """Its name and its config are the same: only what it computes, or on what, is not."""
    comparison, *_, directory, start = compared
    problem = comparison.problem._replace(
        family=other.get("family", comparison.problem.family),
        loss_fn=other.get("loss_fn", quadratic.loss),
    )
    changed = Comparison(problem, INNER, comparison.outer, CONFIG)
    row = ROWS[2]._replace(**other.get("row", {}))
    with pytest.raises(UserError, match=f"another training.*{differs}.*give a new directory"):
        changed.run(row, other.get("start", start), directory)


def test_the_training_rate_is_tuned_for_each_start(compared):
    comparison, *_, start = compared
    row, elsewhere = ROWS[1], {"head": start["head"] + 100}
    fresh = Comparison(comparison.problem, INNER, comparison.outer, CONFIG)
    expected = [fresh._training_rate(row, elsewhere), fresh._training_rate(row, start)]
    assert len(fresh._tuned) == 2
    assert expected[1] == comparison._training_rate(row, start)


def test_a_row_that_spends_as_another_is_trained_for_as_many_operations(tmp_path):
    comparison = make(TaskFamily("quadratic", *[TaskSplit(shifted)] * 3))
    joint, maml = ROWS[1], Row("MAML", learners.maml(), meta_gradients.reverse)
    longer = joint._replace(name="longer", spends_as=maml)
    number = comparison.num_steps(longer)
    assert comparison.num_steps(joint) == comparison.num_steps(maml) == 3
    assert 6 < number < 60  # two steps forwards and back, and a query
    comparison.run(longer, quadratic.PARAMS, tmp_path)
    metrics = read_json_lines(tmp_path / "metrics.jsonl")
    assert max(r["step"] for r in metrics) == number
    more = maml._replace(inner=InnerLoop(num_steps=3))  # of its own
    assert comparison.num_steps(joint._replace(spends_as=more)) > number


def test_one_rate_is_the_best_after_the_trained_number_of_steps(compared):
    comparison, results, _, _, directory, start = compared
    found = comparison.run(ROWS[0], start, directory, one_rate=True)
    (rate,) = set(found.rates)
    assert rate == results["random init"].rates[2]
    assert found.hparams["inner_learning_rate"] == np.float32(rate)
    for step in range(4):
        expected = after_descent(comparison.test, rate, step)
        np.testing.assert_allclose(found.curves[:, step], expected, rtol=1e-4)
    learned = comparison.run(ROWS[2], start, directory, one_rate=True)
    np.testing.assert_array_equal(learned.curves, results["Meta-SGD"].curves)


def validated(directory):
    lines = read_json_lines(directory / "metrics.jsonl")
    return [(line["name"], line["step"]) for line in lines if "valid_loss" in line]


def test_rows_are_validated_and_pretraining_is_not(compared):
    names = ("joint pretraining", "Meta-SGD")
    assert validated(compared[4]) == [(name, step) for name in names for step in (1, 2, 3)]


def test_without_pretraining_rows_start_from_the_random_initialisation(tmp_path):
    config = dataclasses.replace(CONFIG, pretrain_steps=0, meta_steps=1)
    comparison = make(Recorded().family, config)
    start = comparison.pretrain(tmp_path)
    np.testing.assert_array_equal(start["head"], quadratic.START)
    comparison.run(ROWS[1], start, tmp_path)
    assert validated(tmp_path) == [("joint pretraining", 1)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks_per_step": 0}, "tasks_per_step is 0"),
        ({"meta_steps": 0}, "meta_steps is 0"),
        ({"test_episodes": 0}, "test_episodes is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"pretrain_steps": -1}, "pretrain_steps is -1"),
        ({"inner_rates": ()}, "inner_rates"),
        ({"inner_rates": (0.1, 0.0)}, "inner_rates"),
        ({"inner_rates": (0.1, float("nan"))}, "inner_rates"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(UserError, match=words) as caught:
        dataclasses.replace(CONFIG, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks_per_step": 3}, "3 tasks does not divide by 2 devices"),
        ({"tasks_per_step": 8, "tasks_at_a_time": 3}, "4 tasks a device .* 3 at a time"),
        ({"num_devices": 99}, "99 devices were asked for"),
        ({"max_inner_steps": 1}, "2 inner steps and evaluation only 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_episode_is_drawn(change, words):
    recorded = Recorded()
    with pytest.raises(UserError, match=words):
        make(recorded.family, dataclasses.replace(CONFIG, **change))
    assert not any(recorded.seeds.values())


def test_rows_are_selected_by_name_in_the_order_of_the_table():
    assert select(ROWS, ()) == ROWS
    assert select(ROWS, ("Meta-SGD", "random init")) == [ROWS[0], ROWS[2]]
    with pytest.raises(UserError, match="no row 'MAML'; there are random init, joint"):
        select(ROWS, ("random init", "MAML"))
