import functools
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import harness, table_omniglot
from experiments.table_omniglot.protocol import (
    ABLATIONS,
    ALL_PARTS,
    PRESETS,
    Config,
    FewShot,
    Parts,
    Reptile,
    make_rows,
    mamlpp,
    presets,
)
from metaopt import losses, meta_gradients, parallel
from metaopt.errors import UserError
from metaopt.files import read_json_lines, write_json_lines
from metaopt.inner_loop import adapt
from metaopt.optimizers.outer import outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.training.loop import train
from metaopt.training.runs import slug
from metaopt.types import Batch, Episode, Model

QUICKLY = {"xla_backend_optimization_level": 0}
SIZE, NUM_CHARACTERS, NUM_DRAWINGS = 6, 18, 20
FLAGS = shlex.split(
    f"--preset smoke --image-size {SIZE} --num-train-characters 6 --num-valid-characters 6 "
    "--filters 2 --meta-steps 10 --tasks-per-step 2 --plus-plus-tasks 2 --test-episodes 5 "
    "--num-devices 1"
)
ONE_SHOT = FewShot(5, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawings that differ from their character's pattern by noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (NUM_CHARACTERS, 1, SIZE, SIZE))
    noise = rng.integers(0, 56, (NUM_CHARACTERS, NUM_DRAWINGS, SIZE, SIZE))
    path = tmp_path_factory.mktemp("drawings")
    np.savez(
        path / f"a_{SIZE}x{SIZE}.npz",
        images=(patterns + noise).astype(np.uint8).reshape(-1, SIZE, SIZE),
        character=np.repeat(np.arange(NUM_CHARACTERS), NUM_DRAWINGS),
        character_names=np.array([f"Alphabet/character{i:02d}" for i in range(NUM_CHARACTERS)]),
    )
    return path


def linear(image_shape=(SIZE, SIZE, 1), num_classes=5, filters=2, num_reference=None):
    """What stands for `conv`, as it compiles in no time: one layer that batch norm centres."""
    del image_shape

    def init(key):
        kernels = jax.random.split(key)
        layer = {
            "kernel": 0.1 * jax.random.normal(kernels[0], (SIZE * SIZE, filters)),
            "scale": jnp.ones((filters,)),
            "bias": jnp.zeros((filters,)),
        }
        head = {"kernel": 0.1 * jax.random.normal(kernels[1], (filters, num_classes))}
        return {"layer_0": layer, "head": head}

    def apply(params, inputs):
        layer = params["layer_0"]
        hidden = inputs.reshape(inputs.shape[0], -1) @ layer["kernel"]
        hidden = hidden - hidden[:num_reference].mean(axis=0, keepdims=True)
        return (hidden * layer["scale"][None] + layer["bias"][None]) @ params["head"]["kernel"]

    return Model(init, apply)


def main(*args):
    run = functools.partial(table_omniglot.run, network=linear)
    harness.main("table_omniglot", run, presets, "", list(args))


def parse(*args):
    return harness.parse("table_omniglot", presets, "", args)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The directory of a finished run."""
    root = tmp_path_factory.mktemp("runs")
    main(*FLAGS, "--source", str(folder), "--root", str(root))
    (directory,) = root.glob("table_omniglot/*")
    return directory


def cells(directory):
    return {(r["row"], r["column"]): r for r in read_json_lines(directory / "results.jsonl")}


def keep_first_row(directory):
    """As if the run had been stopped after its first row, its trainings done."""
    records = read_json_lines(directory / "results.jsonl")
    first = [record for record in records if record["row"] == records[0]["row"]]
    write_json_lines(directory / "results.jsonl", first)


def test_records_hold_both_modes_and_the_published_number_beside_the_transductive(finished):
    records = cells(finished)
    columns = ["5-way 1-shot", "5-way 1-shot, non-transductive"]
    assert list(records) == [(row, column) for row in ("MAML", "MAML++") for column in columns]
    for record in records.values():
        assert 0 <= record["value"] <= 100 and record["n"] == record["episodes"] == 5
        # Five episodes of five query drawings: multiples of 4 %.
        np.testing.assert_allclose(record["value"] % 4, 0, atol=1e-4)
        assert record["table"] == "omniglot" and record["unit"] == "% accuracy"
    assert [record["paper"] for record in records.values()] == [98.7, None, 99.47, None]
    again = shlex.split(records["MAML", columns[0]]["command"])
    assert parse(*again[3:]).rows == ("MAML", "MAML++")
    protocols = [record["protocol"] for record in records.values()]
    assert protocols[0] == protocols[1] != protocols[2] and "2 tasks a meta-batch" in protocols[0]
    text = (finished / "table.md").read_text()
    assert f"- MAML, {columns[0]}: {protocols[0]}; " in text
    assert "98.7" in text and records["MAML", columns[0]]["source"] in text
    assert imread(finished / "curves.png").std() > 0.01


def test_a_run_that_lost_its_end_is_taken_up_and_gives_the_same_numbers(finished, folder):
    before = cells(finished)
    (finished / "finished").unlink()
    keep_first_row(finished)
    root = finished.parents[1]
    main(*FLAGS, "--source", str(folder), "--root", str(root))
    assert list(root.glob("table_omniglot/*")) == [finished]
    after = cells(finished)
    for key, record in before.items():
        assert (record["value"], record["ci95"]) == (after[key]["value"], after[key]["ci95"])
    lines = read_json_lines(finished / "metrics.jsonl")
    steps = [line["step"] for line in lines if "plus plus" in line["name"]]
    assert steps == list(range(1, 11))  # one without second derivatives, and none twice


@pytest.fixture(scope="module")
def column(folder):
    """A `Column` with the linear model, and its test."""
    config = parse(*FLAGS, "--source", str(folder), "--test-episodes", "4", "--filters", "5")
    column = table_omniglot.make_column(config, ONE_SHOT, linear)
    return column, table_omniglot.make_test(config, column)


def test_accuracy_by_the_support_does_not_see_the_other_queries(column):
    column, test = column
    # Judged one by one, the support before each, which is what non-transductive means.
    params = column.model.init(jax.random.key(1))
    measure = jax.jit(table_omniglot.accuracies(column), compiler_options=QUICKLY)
    found, one_by_one, together = [], [], []
    for i in range(4):
        episode: Episode = jax.tree.map(lambda x, i=i: x[i], test)
        found.append(measure(params, episode))
        for image, target in zip(episode.query.inputs, episode.query.targets, strict=True):
            after_support = jnp.concatenate([episode.support.inputs, image[None]])
            logits = column.by_support.apply(params, after_support)[-1]
            one_by_one.append(float(logits.argmax() == target))
        logits = column.model.apply(params, episode.query.inputs)
        together.append(float((logits.argmax(-1) == episode.query.targets).mean()))
    np.testing.assert_allclose(np.mean(found, axis=0), [np.mean(together), np.mean(one_by_one)])
    assert np.mean(together) != np.mean(one_by_one)


def test_annealing_of_the_order_goes_on_from_the_state_of_first_order(column, folder, tmp_path):
    (column, _), config = column, parse(*FLAGS, "--source", str(folder), "--meta-steps", "20")
    row = mamlpp("row", config, ONE_SHOT, Parts(order_annealing=True))
    assert row.first_order_steps == 2
    cell = table_omniglot.Cell(column, row)
    found = table_omniglot.train_cell(config, cell, 0, tmp_path, train)
    loss_fn = losses.classification(column.model)

    def by_hand(first_order_steps):
        init_key, data_key = jax.random.split(jax.random.key(0))
        outer_opt, hparams = outer_optimizer(row.outer), row.outer.hparams() | row.hparams
        params = column.model.init(init_key)
        state = init_state(data_key, params, row.learner, outer_opt, hparams)
        first, second = (
            jax.jit(make_meta_step(estimator(row.learner, loss_fn, row.inner), outer_opt))
            for estimator in (meta_gradients.first_order, meta_gradients.reverse)
        )
        for i in range(20):
            key = jax.random.fold_in(data_key, i)
            episodes = column.family(1, 3).train.sample(key, 2)
            state, _ = (first if i < first_order_steps else second)(state, episodes)
        return np.asarray(state.meta_params["params"]["layer_0"]["kernel"])

    found = np.asarray(found["params"]["layer_0"]["kernel"])
    np.testing.assert_allclose(found, by_hand(2), atol=1e-5)
    assert np.abs(found - by_hand(0)).max() > 1e-4


def test_rows_are_the_published_protocols():
    config = PRESETS["gpu"]
    few = {row.name: row for row in make_rows(config, ONE_SHOT, linear())}
    many = {row.name: row for row in make_rows(config, FewShot(20, 5), linear())}
    names = ["MAML", "FOMAML", "Reptile", "ANIL", "Meta-SGD", "iMAML", "MAML++"]
    assert list(few) == list(many) == names and config.meta_steps == 60_000
    shown = [
        (row.inner.num_steps, row.inner_rate, row.tasks_per_step, row.tested, row.drawings)
        for row in (few["MAML"], many["MAML"])
    ]
    assert shown == [(1, 0.4, 32, 3, (1, 1)), (5, 0.1, 16, 5, (5, 5))]
    assert few["MAML"].outer.decay_steps == 0 and few["MAML"].outer.learning_rate == 1e-3
    assert few["MAML++"].outer.decay_steps == 60_000
    assert few["MAML++"].outer.final_fraction == 0.01
    parallel.check_divides(few["MAML++"].tasks_per_step, 8)
    rows = [*few.values(), *(mamlpp(name, config, ONE_SHOT, p) for name, p in ABLATIONS.items())]
    column = table_omniglot.make_column(config, ONE_SHOT, linear)
    slugs = {slug(table_omniglot.Cell(column, row).name) for row in rows}
    assert len(slugs) == len(rows)


def test_reptile_is_the_published_protocol():
    config = PRESETS["gpu"]
    few, many = (
        next(row for row in make_rows(config, few_shot, linear()) if row.name == "Reptile")
        for few_shot in (ONE_SHOT, FewShot(20, 1))
    )
    shown = [(row.inner.num_steps, row.inner_rate, row.tested, row.drawings) for row in (few, many)]
    assert shown == [(5, 1e-3, 50, (9, 1)), (10, 5e-4, 50, (9, 1))]
    assert few.outer.learning_rate == few.inner_rate * few.inner.num_steps
    assert few.outer.decay_steps == config.meta_steps and few.outer.clip_norm == np.inf


@pytest.mark.parametrize("adam", [False, True])
def test_a_meta_step_of_reptile_goes_to_the_mean_of_the_adapted_parameters(adam):
    config = Config(reptile=Reptile(adam=adam, inner_rate=0.1), unroll=False)
    (row,) = (row for row in make_rows(config, ONE_SHOT, linear()) if row.name == "Reptile")
    rng, model = np.random.default_rng(0), linear()
    images = rng.normal(size=(2, 50, SIZE, SIZE, 1)).astype(np.float32)
    labels = np.tile(np.arange(5, dtype=np.int32), (2, 10))
    support, query = (Batch(images[:, s], labels[:, s]) for s in (slice(45), slice(45, 50)))
    episodes = Episode(support, query, np.zeros(2, np.int32))
    learner, loss_fn, opt = row.learner, losses.classification(model), outer_optimizer(row.outer)
    params, rates = model.init(jax.random.key(0)), row.hparams
    state = init_state(jax.random.key(1), params, learner, opt, row.outer.hparams() | rates)
    step = make_meta_step(row.estimator(learner, loss_fn, row.inner), opt)
    after, _ = jax.jit(step, compiler_options=QUICKLY)(state, episodes)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    @jax.vmap
    def adapted(images, labels):
        optimizer = learner.inner_opt({"params": params}, rates)
        return adapt(loss_fn, optimizer, params, Batch(images, labels), row.inner).params

    mean = jax.tree.map(lambda x: x.mean(axis=0), adapted(images, labels))
    assert not np.allclose(mean["layer_0"]["kernel"], params["layer_0"]["kernel"], atol=1e-2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), after.meta_params["params"], mean
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0"),
        ({"drawings": 1}, "drawings is 1"),
        ({"drawings": 9, "num_steps": 4}, "cannot be cut into 4 batches"),
    ],
)
def test_bad_protocols_of_reptile(wrong, message):
    with pytest.raises(UserError, match=message):
        Reptile(**wrong)


@pytest.mark.parametrize("name", [field for field in Parts._fields])
def test_each_part_is_a_switch_of_its_own(name):
    config = PRESETS["gpu"]

    def signs(parts):
        row = mamlpp("row", config, ONE_SHOT, parts)
        learned = row.learner.learned
        return {
            "multi_step_loss": (row.inner.query_loss, row.annealing_steps) == ("annealed", 6000),
            "per_step_rates": "log_rates" in learned,
            "per_step_normalisation": "later" in learned,
            "order_annealing": row.first_order_steps == 6000,
            "cosine": row.outer.decay_steps > 0,
        }

    assert signs(Parts(**{name: True})) == {other: other == name for other in signs(Parts())}
    assert all(signs(ALL_PARTS).values()) and not any(signs(Parts()).values())
    assert Parts(**{name: True}) in ABLATIONS.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_steps": 0}, "meta_steps"),
        ({"max_inner_steps": 3}, "from 5 to"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"settings": ()}, "settings"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_what_is_wrong_is_said_before_a_run_is_made(folder, tmp_path, capsys):
    cases = [
        (["--rows", "MALM"], "no row 'MALM'"),
        (["--plus-plus-tasks", "3", "--num-devices", "2"], "does not divide by 2 devices"),
        (["--source", str(tmp_path / "absent")], "is no folder"),
        (["--rows", "Reptile", "--reptile.drawings", "25"], "25"),
        (["--settings", "20-way-1-shot"], "20-way episode needs 20 characters"),
    ]
    for flags, message in cases:
        source = [] if "--source" in flags else ["--source", str(folder)]
        with pytest.raises(SystemExit):
            main(*FLAGS, *source, "--root", str(tmp_path), *flags)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert FewShot.parse("20-way-5-shot") == FewShot(20, 5)
