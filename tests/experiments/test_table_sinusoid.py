import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread

from experiments import harness, table_sinusoid
from experiments.table_sinusoid import PUBLISHED, first_rate, make_rows, signed_meta_sgd
from metaopt import models
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.types import Batch

SIZES = "--preset smoke --meta-steps 4 --steps-per-call 2 --test-curves 6 --test-points 8"
LI = shlex.split(f"{SIZES} --rows Meta-SGD --seeds 0 1 --test-shots 5 10")
FINN = shlex.split(f"{SIZES} --protocol finn --rows 'joint pretraining' MAML --max-inner-steps 2")


def main(*args, run=table_sinusoid.run):
    harness.main("table_sinusoid", run, table_sinusoid.presets, "", list(args))


def parse(*args):
    configs = []
    main(*args, run=configs.append)
    return configs[0]


def run_in(root, args):
    """The directory of the one run in ``root``."""
    main(*args, "--root", str(root))
    (directory,) = root.glob("table_sinusoid/*")
    return directory


def cells(directory):
    """The numbers of a run by row and column."""
    return {(r["row"], r["column"]): r for r in read_json_lines(directory / "results.jsonl")}


@pytest.fixture(scope="module")
def li_run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), LI)


def test_records_hold_the_published_number_beside_ours(li_run):
    records = cells(li_run)
    assert list(records) == [("Meta-SGD", "5-shot"), ("Meta-SGD", "10-shot")]
    record = records["Meta-SGD", "10-shot"]
    assert (record["paper"], record["paper_ci95"]) == PUBLISHED["Meta-SGD"][10] == (0.63, 0.12)
    assert "1707.09835" in record["source"] and record["table"] == "sinusoid"
    assert record["n"] == 6 and record["episodes"] == 12 and record["seeds"] == [0, 1]
    assert len(set(record["per_seed"])) == 2
    np.testing.assert_allclose(record["value"], np.mean(record["per_seed"]), rtol=1e-9)
    assert "above the published 0.63 ± 0.12" in (li_run / "table.md").read_text()
    again = shlex.split(record["command"])
    assert parse(*again[3:]) == parse(*LI, "--root", str(li_run.parents[1]))
    saved = json.loads((li_run / "config.json").read_text())
    assert saved["meta_steps"] == 4 and "root" not in saved


def test_a_run_that_lost_its_end_is_taken_up_and_gives_the_same_numbers(li_run):
    before = cells(li_run)
    (li_run / "finished").unlink()
    assert run_in(li_run.parents[1], LI) == li_run
    after = cells(li_run)
    for key, record in before.items():
        assert record["per_seed"] == after[key]["per_seed"] and record["ci95"] == after[key]["ci95"]


def test_curves_of_finn(tmp_path):
    directory = run_in(tmp_path, FINN)
    records = cells(directory)
    columns = ["0 steps", "1 step", "2 steps"]
    assert list(records) == [(r, c) for r in ("joint pretraining", "MAML") for c in columns]
    assert {record["paper"] for record in records.values()} == {None}
    assert {record["table"] for record in records.values()} == {"sinusoid/finn"}
    for record in records.values():  # many curves are nearly flat, so the losses are skewed
        assert 0 < record["median"] < 2 * record["value"]
    assert imread(directory / "curves.png").std() > 0.01


def test_published_rates_have_either_sign():
    def loss(params, batch):
        return 0.5 * jnp.sum((params["w"] - batch.inputs[0]) ** 2)

    learner = signed_meta_sgd(0.25)
    meta_params = learner.init({"w": jnp.array([1.0, 2.0])})
    np.testing.assert_array_equal(meta_params["rates"]["w"], [0.25, 0.25])
    meta_params["rates"]["w"] = jnp.array([0.5, -2.0])
    support = Batch(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    start, optimizer = learner.start(meta_params), learner.inner_opt(meta_params, {})
    adapted = adapt(loss, optimizer, start, support, InnerLoop(num_steps=1)).params
    np.testing.assert_allclose(adapted["w"], [1 - 0.5 * 1, 2 + 2 * 2])


def test_rows_as_published():
    config = table_sinusoid.Config(seeds=(0,))
    rows = {row.name: row for row in make_rows(config)}
    for name in ("MAML", "Meta-SGD"):
        assert rows[name].weight_std == 0.01 and rows[name].inner.num_steps == 1
        assert rows[name].outer.clip_norm == float("inf") and not rows[name].outer.decay_steps
    draws = [first_rate(config, seed) for seed in range(20)]
    assert 0.005 <= min(draws) < 0.02 and 0.09 < max(draws) <= 0.1 and draws[0] == draws[0]
    rates = rows["Meta-SGD"].learner(3).init({"w": jnp.zeros(2)})["rates"]["w"]
    np.testing.assert_allclose(rates, first_rate(config, 3), rtol=1e-6)


def test_published_weights_are_narrow_and_biases_zero():
    row = make_rows(table_sinusoid.Config())[0]
    params = table_sinusoid.initial_params(models.mlp(1, 1), row, jax.random.key(0))
    kernel = np.asarray(params["layer_1"]["kernel"])
    assert 0.008 < kernel.std() < 0.0095 and np.abs(kernel).max() <= 0.02  # cut at 2 deviations
    assert float(optax.global_norm([layer["bias"] for layer in params.values()])) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_steps": 0}, "meta_steps"),
        ({"meta_steps": 10, "steps_per_call": 3}, "divisor"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"test_shots": (5, 0)}, "test_shots"),
        ({"test_points": 1}, "test_points"),
        ({"protocol": "finn"}, "one test_shots"),
        ({"first_rates": (0.2, 0.1)}, "first_rates"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        table_sinusoid.Config(**changes)


def test_bad_flags(capsys):
    for flag in ("preset", "protocol"):
        with pytest.raises(SystemExit) as stop:
            main(f"--{flag}", "other")
        assert stop.value.code == 2 and f"unknown {flag} 'other'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no row 'MALM'"):
        make_rows(table_sinusoid.Config(rows=("MALM",)))
