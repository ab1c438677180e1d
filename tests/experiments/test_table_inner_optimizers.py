import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import harness, table_inner_optimizers
from metaopt import losses, models
from metaopt.comparison import Comparison
from metaopt.files import read_json_lines
from metaopt.npz import read_npz
from metaopt.statistics import interval
from metaopt.training.runs import slug
from metaopt.types import TaskSplit

SIZES = (
    "--preset smoke --tasks text --num-support 2 --num-query 2 --length 8 --width 4 "
    "--optimizers sgd lion --learners joint maml --inner.num-steps 2 --comparison.num-devices 2 "
    "--comparison.max-inner-steps 3 --comparison.inner-rates 1 20"
)
JOINT, MAML = "joint pretraining, 2 steps", "MAML, 2 steps"


def main(*args):
    table = table_inner_optimizers
    harness.main("table_inner_optimizers", table.run, table.presets, "", args)


def parse(*args):
    return harness.parse("table_inner_optimizers", table_inner_optimizers.presets, "", args)


def make_problem(config):
    return table_inner_optimizers.make_problem(config, table_inner_optimizers.make_cells(config))


def run_in(root, args, change=lambda problem: problem):
    """The directory of the one run in ``root``, of a model that compiles in no time."""
    config, model = parse(*args, "--root", str(root)), models.bigram(256)
    problem = make_problem(config)._replace(model=model, loss_fn=losses.next_token(model))
    table_inner_optimizers.run(config, change(problem))
    (directory,) = root.glob("table_inner_optimizers/*")
    return directory


def cells(directory):
    """The records of a run by table, row and column."""
    records = read_json_lines(directory / "results.jsonl")
    return {(r["table"].split("/")[0], r["row"], r["column"]): r for r in records}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A command line, for seven domains of words of their own."""
    path = tmp_path_factory.mktemp("domains")
    for i in range(7):
        rng = np.random.default_rng(i)
        words = [rng.choice(list(b"abcdefgh"), 5).tobytes()[::8] for _ in range(4)]
        (path / f"domain {i}.txt").write_bytes(b" ".join(rng.choice(words, 400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAOPT_DATA", str(tmp_path_factory.mktemp("data")))
        yield [*shlex.split(SIZES), "--folder", str(path)]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), arguments)


def test_the_model_is_a_transformer(arguments):
    model = make_problem(parse(*arguments)).model
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert {"embed", "layer_0", "head"} < set(params) and params["head"]["kernel"].shape == (4, 256)


def test_a_run_leaves_config_records_tables_and_a_figure(finished, arguments):
    config = parse(*arguments, "--root", str(finished.parents[1]))
    saved = json.loads((finished / "config.json").read_text())
    assert saved.pop("data") and saved == harness.as_saved(config)
    records = cells(finished)
    assert set(records) == {
        *(("inner_optimizers", row, column) for row in ("GD", "Lion") for column in (JOINT, MAML)),
        *(("inner_optimizers_against_gd", "Lion", column) for column in (JOINT, MAML)),
    }
    for record in records.values():
        assert record["unit"] == "bits/byte" and record["n"] == 3 and record["episodes"] == 12
        assert record["inner_learning_rate"] > 0
        assert parse(*shlex.split(record["command"])[3:]) == config
    text = (finished / "table.md").read_text()
    assert text.count("| Lion |") == 2 and "What each gains on GD" in text
    assert (finished / "table.tex").read_text().count(r"\begin{tabular}") == 2
    assert imread(finished / "curves.png").std() > 0.01


def test_gains_are_paired_differences_to_gd(finished, arguments):
    records, config = cells(finished), parse(*arguments)
    problem = make_problem(config)
    test = Comparison(problem, config.inner, config.outer, config.comparison).test
    for column in (JOINT, MAML):
        gd, lion = (records["inner_optimizers", row, column] for row in ("GD", "Lion"))
        gain = records["inner_optimizers_against_gd", "Lion", column]
        assert gain["value"] == pytest.approx(gd["value"] - lion["value"], abs=1e-9)
        assert gain["value"] != 0 and gain["better"] == "higher"
        kept = (finished / "rows" / f"{slug(f'{column}, {row}')}.npz" for row in ("GD", "Lion"))
        nats_of_gd, nats_of_lion = (read_npz(path)["nats"][:, 2] for path in kept)
        found = interval((nats_of_gd - nats_of_lion) / np.log(2), np.asarray(test.task))
        assert gain["ci95"] == pytest.approx(found.ci95)


def test_joint_training_knows_no_inner_optimizer_and_is_done_once(finished):
    lines = read_json_lines(finished / "metrics.jsonl")
    trained = [line["name"] for line in lines if line["step"] == 4]
    assert trained == ["pretraining", "joint pretraining", "MAML, GD", "MAML, Lion"]


def test_a_run_that_lost_its_end_is_taken_up_and_gives_the_same_numbers(finished, arguments):
    before = cells(finished)
    (finished / "finished").unlink()
    assert run_in(finished.parents[1], arguments) == finished
    values = {key: (r["value"], r["ci95"]) for key, r in cells(finished).items()}
    assert values == {key: (r["value"], r["ci95"]) for key, r in before.items()}


def diverging(problem):
    """The problem with losses that are NaN in training after a step as long as Lion's."""

    def sample(key, num_tasks):
        episodes = problem.family.train.sample(key, num_tasks)
        marked = jnp.zeros_like(episodes.query.inputs)  # which no text has
        return episodes._replace(query=episodes.query._replace(inputs=marked))

    def loss_fn(params, batch):
        far = jnp.abs(params["head"]["table"]).max() > 18
        return jnp.where(far & (batch.inputs[0, 0] == 0), jnp.nan, problem.loss_fn(params, batch))

    family = problem.family._replace(train=TaskSplit(sample))
    return problem._replace(family=family, loss_fn=loss_fn)


@pytest.mark.slow
def test_what_diverges_is_a_dash_and_the_rest_goes_on(arguments, tmp_path):
    optimizers = ["--optimizers", "sgd", "lion", "--learners", "maml", "joint"]
    rates = ["--comparison.inner-rates", "20", "--comparison.num-devices", "1"]
    directory = run_in(tmp_path, [*arguments, *optimizers, *rates], diverging)
    records = cells(directory)
    diverged = records["inner_optimizers", "Lion", MAML]
    assert diverged["value"] is None and "diverged at step" in diverged["diverged"]
    assert records["inner_optimizers_against_gd", "Lion", MAML]["value"] is None
    for after in ("inner_optimizers", "inner_optimizers_against_gd"):
        assert records[after, "Lion", JOINT]["value"] is not None
    (line,) = [x for x in (directory / "table.md").read_text().splitlines() if "| Lion | " in x][:1]
    assert line.startswith("| Lion | – |")


WRONG = [
    ("--preset huge", "unknown preset 'huge': choose smoke, cpu or gpu"),
    ("--tasks markov", "the table is of text"),
    ("--tasks novels", "unknown tasks 'novels'"),
    ("--tasks text", "needs --folder"),
    ("--optimizers sgd adam sgd", "must be different"),
    ("--inner.batching split", "4 support examples cannot be split into 5"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_before_a_run_is_opened(line, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(*shlex.split(line), "--root", str(tmp_path))
    *phases, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: ") and words in error
    assert all(phase.startswith(("preparing", "reading")) for phase in phases)
