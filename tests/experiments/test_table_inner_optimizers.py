import json
import shlex

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import adapt_languages, table_inner_optimizers
from metaopt import models
from metaopt.cli import command_line
from metaopt.comparison import RowResult
from metaopt.files import read_json_lines
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.training.recorder import Diverged

SIZES = (
    "--preset smoke --tasks text --num-support 2 --num-query 2 --length 8 --width 4 "
    "--optimizers sgd lion --learners joint maml --inner.num-steps 2 --comparison.num-devices 2 "
    "--comparison.max-inner-steps 3 --comparison.inner-rates 1 20"
)
JOINT, MAML = "joint pretraining, 2 steps", "MAML, 2 steps"


def main(*args, run=table_inner_optimizers.run):
    module, config_type = table_inner_optimizers, table_inner_optimizers.Config
    preset, chosen_by = module.preset, module.CHOSEN_BY
    command_line.main("table_inner_optimizers", run, config_type, preset, chosen_by, "", list(args))


def parse(*args):
    configs = []
    main(*args, run=configs.append)
    return configs[0]


def run_in(root, args):
    """The directory of the one run in ``root``."""
    main(*args, "--root", str(root))
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


@pytest.fixture(scope="module", autouse=True)
def bigram():
    """A model that compiles in no time."""
    with pytest.MonkeyPatch.context() as patch:
        make_model = adapt_languages.make_model
        patch.setattr(adapt_languages, "make_model", lambda _: models.bigram(256))
        yield make_model


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), arguments)


def test_the_model_is_a_transformer(bigram, arguments, monkeypatch):
    monkeypatch.setattr(adapt_languages, "make_model", bigram)
    model = table_inner_optimizers.make_problem(parse(*arguments)).model
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert {"embed", "layer_0", "head"} < set(params) and params["head"]["kernel"].shape == (4, 256)


def test_a_run_leaves_config_records_tables_and_a_figure(finished, arguments):
    config = parse(*arguments, "--root", str(finished.parents[1]))
    assert json.loads((finished / "config.json").read_text()) == command_line.as_saved(config)
    records = cells(finished)
    assert list(records) == [
        *(("inner_optimizers", row, column) for row in ("GD", "Lion") for column in (JOINT, MAML)),
        *(("inner_optimizers_against_gd", "Lion", column) for column in (JOINT, MAML)),
    ]
    for record in records.values():
        assert record["unit"] == "bits/byte" and record["n"] == 3 and record["episodes"] == 12
        assert record["inner_learning_rate"] > 0
        assert parse(*shlex.split(record["command"])[3:]) == config
    text = (finished / "table.md").read_text()
    assert text.count("| Lion |") == 2 and "What each gains on GD" in text
    assert (finished / "table.tex").read_text().count(r"\begin{tabular}") == 2
    assert imread(finished / "curves.png").std() > 0.01


def test_gains_are_differences_to_gd(finished):
    records = cells(finished)
    for column in (JOINT, MAML):
        gd, lion = (records["inner_optimizers", row, column] for row in ("GD", "Lion"))
        gain = records["inner_optimizers_against_gd", "Lion", column]
        assert gain["value"] == pytest.approx(gd["value"] - lion["value"], abs=1e-9)
        assert gain["value"] != 0 and gain["better"] == "higher"


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


class Untrained:
    """A comparison whose rows need no training; that of MAML through Lion diverges.

    Adam is 0.1 nats better than GD on every episode.
    """

    def __init__(self, *_):
        self.inner = parse(*shlex.split(SIZES)).inner
        self.config = parse(*shlex.split(SIZES)).comparison
        self.test = type("Test", (), {"task": np.arange(12) % 3})

    def pretrain(self, directory):
        return {}

    def run(self, row, start, directory, *, one_rate):
        if row.name == "MAML, Lion":
            raise Diverged("the loss is not finite at step 2")
        assert one_rate
        curves = np.arange(12.0)[:, None] * np.array([1.0, 0.9, 0.8, 0.7])
        curves -= 0.1 * (row.inner_optimizer is INNER_OPTIMIZERS["adam"])
        return RowResult(row, {}, {}, curves, np.full(4, 0.1), 1.0)


def test_what_diverges_is_a_dash_and_the_rest_goes_on(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(table_inner_optimizers, "Comparison", Untrained)
    extended = [*arguments, "--optimizers", "sgd", "lion", "adam"]
    directory = run_in(tmp_path, extended)
    records = cells(directory)
    diverged = records["inner_optimizers", "Lion", MAML]
    assert diverged["value"] is None and "not finite at step 2" in diverged["diverged"]
    assert ("inner_optimizers_against_gd", "Lion", MAML) not in records
    loss, gain = (records[f"inner_optimizers{x}", "Adam", MAML] for x in ("", "_against_gd"))
    assert loss["value"] == pytest.approx((0.8 * np.arange(12).mean() - 0.1) / np.log(2))
    assert gain["value"] == pytest.approx(0.1 / np.log(2)) and gain["ci95"] < 1e-9 < loss["ci95"]
    (line,) = [x for x in (directory / "table.md").read_text().splitlines() if "| Lion | " in x][:1]
    assert line.endswith("– |")


WRONG = [
    ("--preset huge", "unknown preset 'huge': choose smoke, cpu or gpu"),
    ("--tasks markov", "the table is of text"),
    ("--tasks novels", "unknown tasks 'novels'"),
    ("--tasks text", "needs --folder"),
    ("--optimizers sgd adam sgd", "must be different"),
    ("--inner.batching split", "4 support examples cannot be split into 5"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_before_a_run_is_opened(line, words, monkeypatch, capsys):
    def too_late(*args, **kwargs):
        raise AssertionError("not refused")

    monkeypatch.setattr(table_inner_optimizers, "open_run", too_late)
    with pytest.raises(SystemExit) as stop:
        main(*shlex.split(line))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
