import dataclasses
import time
import types

import numpy as np
import pytest

from experiments.table_self_improvement import recovery, run, tuning
from experiments.table_self_improvement.config import Config, Faults, LanguageModel, Mnist, presets
from experiments.table_self_improvement.domains import NUM_SEEDS, gain, parts_of
from experiments.table_self_improvement.mnist import SHOWN, mnist_row
from experiments.table_self_improvement.rows import baselines, make_rows
from experiments.table_self_improvement.study import Study, in_turns, ratio
from experiments.table_self_improvement.workloads import (
    Problem,
    Text,
    bigram_table,
    language_model,
    mnist,
)
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.self_improvement.loop import Ledger
from metaopt.self_improvement.workload import Workload
from metaopt.tasks.sources.text import array_domain
from metaopt.types import MetaState

SMOKE = presets("smoke")
PARTS = ("train", "test")
ROWS = [
    "learning rate too small",
    "learning rate too large",
    "weight decay",
    "small batch",
    "all at once",
    "maml rates",
    "mnist",
    "resources",
    "memory of the first run",
]


def test_the_rows_are_those_of_the_table(tmp_path):
    rows = make_rows(Study(SMOKE, tmp_path))
    assert list(rows)[: len(ROWS)] == ROWS
    kinds = ("NaN batch", "rate times 1000", "slow", "idle", "starved", "memory", "plateau")
    assert [name for name in rows if name.startswith("fault: ")] == [f"fault: {k}" for k in kinds]


def test_the_ratio_of_means_has_the_interval_of_the_difference():
    reference = np.array([1.0, 2.0, 3.0])
    found = ratio(1.1 * reference, reference)
    assert found.mean == pytest.approx(1.1)
    assert found.ci95 == pytest.approx(4.302653 * 0.1 / np.sqrt(3) / 2.0, rel=1e-5)
    assert ratio(reference + 0.2, reference).ci95 == pytest.approx(0.0, abs=1e-12)


def test_times_are_beside_those_of_the_plain_runs_around_them():
    def run_of(seconds):
        return types.SimpleNamespace(ledger=Ledger(seconds=seconds))

    plain, improved, names = iter([1.0, 3.0, 5.0]), iter([4.0, 2.0]), []
    first, times = in_turns(
        2,
        lambda: run_of(next(plain)),
        lambda again: names.append(again) or run_of(next(improved)),
    )
    assert first.ledger.seconds == 4.0 and names == ["", " 1"]
    assert times.mean == pytest.approx((4.0 / 2.0 + 2.0 / 4.0) / 2) and times.n == 2


def test_what_is_trained_on_and_what_is_held_out_do_not_meet(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * 2000)
    text = Text(str(tmp_path), length=8, seed=0)
    place = {}  # a domain of 2000 is cut at 1800
    text.domains = [array_domain(name, np.arange(2000)) for name in "ab"]
    for part in ((0.0, 0.9), (0.9, 0.95), (0.95, 1.0)):
        batch = text.draw(part, 1, 400)
        assert batch.inputs.shape == (400, 8)
        np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
        place[part] = (int(batch.inputs.min()), int(batch.targets.max()))
    (_, a), (b, c), (d, e) = place.values()
    assert a < 1800 <= b and c < 1900 <= d and e < 2000


def test_unequal_parts_are_by_size_or_by_rank(tmp_path):
    for name, size in (("a", 2000), ("b", 6000)):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * size)
    text = Text(str(tmp_path), length=8, seed=0)
    np.testing.assert_allclose(parts_of(text, 0, zipf=False), [0.25, 0.75])
    np.testing.assert_allclose(sorted(parts_of(text, 0, zipf=True)), [1 / 3, 2 / 3])
    drawn = text.draw((0.0, 0.9), 1, 400, np.array([0.25, 0.75])).inputs[:, 0]
    assert np.mean(drawn == ord("a")) == pytest.approx(0.25, abs=0.1)
    each = text.of_each((0.9, 0.95), 1, 3)
    assert each.inputs[:, 0].tolist() == [ord("a")] * 3 + [ord("b")] * 3


def test_a_gain_is_in_per_cent_of_the_loss_without_the_loop():
    found = gain(np.array([0.9, 1.8, 2.7]), np.array([1.0, 2.0, 3.0]))
    assert found.mean == pytest.approx(10.0) and found.ci95 > 0


def test_domains_with_unequal_parts_run_with_and_without_the_loop(tmp_path):
    """Through the whole experiment."""
    run(dataclasses.replace(SMOKE, rows=("data shares",), root=str(tmp_path)))
    (place,) = (tmp_path / "table_self_improvement").iterdir()
    cells = {x["column"]: x for x in read_json_lines(place / "results.jsonl")}
    assert list(cells) == ["weakest quarter", "all domains", "time ratio"]
    weak, whole = cells["weakest quarter"], cells["all domains"]
    assert weak["better"] == whole["better"] == "higher" and np.isfinite(whole["value"])
    assert len(weak["runs"]) == len(weak["seeds"]) == len(weak["of_weakest"]) == NUM_SEEDS
    found = sum(len(each["weakest"]) for each in weak["runs"])
    assert weak["episodes"] == found * SMOKE.domains.num_test


def test_short_domains_and_absent_images_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 300)
    with pytest.raises(UserError, match="too short for sequences of 32"):
        Text(str(tmp_path), length=32, seed=0)
    with pytest.raises(UserError, match="give --mnist"):
        mnist(SMOKE, "fixed")
    with pytest.raises(UserError, match="no row 'nonsense'"):
        run(dataclasses.replace(SMOKE, rows=("nonsense",), root=str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lm": LanguageModel(optimizers=("muon",))}, "must have adam"),
        ({"population": 0}, "population"),
        ({"resources_rounds": 0}, "resources_rounds"),
    ],
)
def test_configs_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Config(**wrong)


def test_rungs_are_whole_steps_up_to_all_of_a_run():
    workload = language_model(SMOKE).workload
    found = tuning.rungs_of(workload, {"batch_size": 16})
    assert found == [64, 208, 640]
    assert tuning.rungs_of(workload, {"batch_size": 400})[-1] == 400


def searched_by_hyperband(seed):
    """What Hyperband finds on a loss that falls from step to step, and all that it evaluated."""
    seen = []

    def evaluate(state):
        seen.append((state.meta_params["rate"], state.step))
        return np.array([np.log(state.meta_params["rate"]) ** 2 + 1 / state.step])

    workload = Workload(
        name="no training at all",
        task={},
        start=lambda settings: MetaState(0, settings, (), {}, None),  # type: ignore[arg-type]
        step=lambda settings: lambda state, batch: (state._replace(step=state.step + 1), {}),
        sample=lambda settings, position: None,  # type: ignore[arg-type,return-value]
        examples_per_step=lambda settings: 1,
        evaluate=evaluate,
        num_examples=240,
        tokens_per_example=1,
        space={},
    )
    problem = Problem(workload, {}, evaluate, None)  # type: ignore[arg-type]
    found = tuning.searched(
        problem,
        lambda trial: {"rate": trial.suggest_float("rate", 1e-3, 10.0, log=True)},
        1.0,
        num_parts=20,
        prune=True,
        seed=seed,
    )
    return found, seen


def test_the_same_seed_is_the_same_search():
    """Hyperband draws the bracket of a trial by a hash of the name of its study."""
    found, seen = searched_by_hyperband(0)
    assert searched_by_hyperband(0) == (found, seen)
    assert len({rate for rate, _ in seen}) > 20 > len([1 for _, step in seen if step == 12])
    assert searched_by_hyperband(1) != (found, seen)


def test_a_batch_of_nan_is_noticed_and_left_out(tmp_path):
    """Through the whole experiment: tuning, the undisturbed run, the fault and the report."""
    config = dataclasses.replace(SMOKE, rows=("fault: NaN batch",), root=str(tmp_path))
    run(config)
    (place,) = (tmp_path / "table_self_improvement").iterdir()
    cells = {line["column"]: line for line in read_json_lines(place / "results.jsonl")}
    assert 0 <= cells["steps to the alarm"]["value"] <= 2
    assert cells["ratio to undisturbed"]["value"] == pytest.approx(1.0, abs=0.05)
    (decision,) = cells["ratio to undisturbed"]["decisions"]
    assert decision["verdict"] == "rolled back" and "left out" in decision["reason"]
    assert (place / "finished").exists() and (place / "table.md").exists()


def test_a_bad_start_is_that_of_the_tuned_settings(tmp_path, monkeypatch):
    started = []
    study = Study(SMOKE, tmp_path)
    monkeypatch.setattr(study, "lm", lambda: (None, {"outer_learning_rate": 3.0}, None))

    def improved(problem, settings, name):
        started.append((settings, name))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "improved", improved)
    timed = types.SimpleNamespace(ledger=Ledger(seconds=1.0))
    monkeypatch.setattr(tuning, "plain", lambda *args, **options: timed)
    with pytest.raises(KeyboardInterrupt):
        next(make_rows(study)["learning rate too small"]())
    ((settings, name),) = started
    assert settings == {"outer_learning_rate": pytest.approx(0.1)}
    assert name == "improved learning rate too small"


def test_configs_that_contradict_themselves_are_refused():
    with pytest.raises(UserError, match="num_trials is 0"):
        Config(num_trials=0)
    with pytest.raises(UserError, match="batches"):
        Config(lm=LanguageModel(batches=()))


def test_a_hypergradient_run_learns():
    problem = language_model(SMOKE)
    settings = problem.settings | {"outer_learning_rate": 1e-3}
    before = problem.test(problem.workload.start(settings)).mean()
    state = tuning.by_hypergradient(problem, settings)
    assert problem.test(state).mean() < before


def test_schedule_free_is_a_whole_run_without_a_schedule(tmp_path, monkeypatch):
    plain, seen = tuning.plain, []

    def noted(problem, settings, place, **changes):
        seen.append((problem, settings))
        return plain(problem, settings, place, **changes)

    monkeypatch.setattr(tuning, "plain", noted)
    others = baselines(Study(dataclasses.replace(SMOKE, num_trials=1), tmp_path))
    for name, rate in (("default rate", 1e-3), ("rate 0.0025", 2.5e-3)):
        (_, tuned), cell = seen[-1], others[f"Schedule-Free AdamW, {name}"]()
        problem, settings = seen[-1]
        changes = {"optimizer": "schedule_free", "outer_learning_rate": rate}
        assert settings == {**tuned, **changes}
        assert {problem.workload.schedule(done) for done in (0.0, 0.5, 1.0)} == {1.0}
        assert cell.column == "ratio to tuned" and cell.found.mean == pytest.approx(1.0, abs=0.3)


def test_the_row_mnist_compares_a_seed_with_its_own_tuned_run(tmp_path):
    rng = np.random.default_rng(0)
    images = {f"x_{part}": rng.integers(0, 255, (1100, 28, 28), np.uint8) for part in PARTS}
    labels = {f"y_{part}": rng.integers(0, 10, 1100) for part in PARTS}
    np.savez(tmp_path / "mnist.npz", **images, **labels)
    sizes = Mnist(
        path=str(tmp_path / "mnist.npz"),
        filters=1,
        num_train=64,
        batch_size=16,
        num_epochs=2,
        num_seeds=1,
        rates=(0.1,),
    )
    study = Study(dataclasses.replace(SMOKE, mnist=sizes, seed=5), tmp_path)
    found = {cell.column: cell for cell in mnist_row(study)}
    assert list(found) == ["ratio to tuned", "untreated ratio"]
    more = found["ratio to tuned"].more
    tuned = [max(pair) for pair in zip(more["best_fixed"], more["best_cosine"], strict=True)]
    assert more["seeds"] == [5] and found["ratio to tuned"].found.n == 1
    least = np.mean([a / t for a, t in zip(more["accuracies"], tuned, strict=True)])
    assert found["ratio to tuned"].found.mean >= least - 1e-12
    for place in SHOWN:
        (*_, last) = read_json_lines(tmp_path / place / "metrics.jsonl")
        assert 0 <= last["scores"]["test_accuracy"] <= 1
    improved = read_json_lines(tmp_path / "improved mnist" / "metrics.jsonl")
    assert improved[-1]["scores"]["test_accuracy"] == more["accuracies"][0]


def test_what_a_fault_costs_is_measured_before_and_after_its_response(tmp_path):
    """A step takes 25 ms; from the 20th on a batch takes 180 ms, far longer on any machine."""
    faults = Faults(length=8, batch_size=8, num_steps=80)
    study = Study(dataclasses.replace(SMOKE, faults=faults), tmp_path)
    problem = bigram_table(study.config, 8, 8, 80)
    reference = recovery.Reference(problem, {}, {}, 0.06, 0.0)

    def inject(found, at):
        fault = recovery.starved(found, at)

        def step_of(settings):
            def step(state, batch):
                time.sleep(0.025)
                return problem.workload.step(settings)(state, batch)

            return step

        return fault._replace(workload=fault.workload._replace(step=step_of))

    found = {x.column: x for x in recovery.row(study, "fault: x", lambda: reference, inject)}
    assert 0 <= found["steps to the alarm"].found.mean <= 10
    times = found["recovered"].more["step_seconds"]
    assert times["before"] < times["lost"] > times["after"]
    assert 0 < found["recovered"].found.mean <= 100
    assert {d["kind"] for d in found["recovered"].more["decisions"]} == {"response"}


def test_short_runs_with_faults_have_a_dash(tmp_path):
    """The whole of it, in runs that end before any alarm."""
    rows = tuple(f"fault: {kind}" for kind in ("slow", "memory", "plateau"))
    run(dataclasses.replace(SMOKE, rows=rows, root=str(tmp_path)))
    (place,) = (tmp_path / "table_self_improvement").iterdir()
    cells = {(x["row"], x["column"]): x for x in read_json_lines(place / "results.jsonl")}
    assert {row for row, _ in cells} == set(rows)
    assert all(cells[row, "recovered"]["value"] is None for row in ("fault: slow", rows[2]))
