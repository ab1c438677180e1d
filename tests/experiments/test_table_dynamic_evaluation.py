import functools
import json
import shlex

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments import harness
from experiments import table_dynamic_evaluation as experiment
from experiments.table_dynamic_evaluation.config import Config, presets
from experiments.table_dynamic_evaluation.data import find_text, statistics_segments, stretches
from experiments.table_dynamic_evaluation.walks import RuleHparams, Tuned, choose_length, tune
from metaopt import models
from metaopt.errors import UserError
from metaopt.files import read_json_lines, write_json_lines
from metaopt.inner_loop import InnerLoop

ROWS = ("static", "SGD dynamic evaluation", "RMS dynamic evaluation")
META = "meta-learned initialisation, "


def write_text(path, size, seed):
    """Text of one letter after another in a fixed order, with a few mistakes."""
    rng = np.random.default_rng(seed)
    letters = rng.permutation(np.arange(97, 107, dtype=np.uint8))
    text = np.where(rng.random(size) < 0.1, rng.choice(letters, size), np.resize(letters, size))
    path.write_bytes(text.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training text in books/, a stream that is a folder, and one that is a file."""
    root = tmp_path_factory.mktemp("text")
    for name in ("books", "wiki"):
        (root / name).mkdir()
    for i, name in enumerate(("a.txt", "b.txt", "left_out.txt")):
        write_text(root / "books" / name, 300, i)
    write_text(root / "wiki" / "valid.txt", 120, 7)
    write_text(root / "wiki" / "test.txt", 400, 7)
    write_text(root / "play.txt", 600, 8)
    return root


def arguments(folder, root):
    sizes = (
        "--context 8 --segment-lengths 6 --inner.num-steps 3 --tasks-per-step 4 --block 5 "
        "--pretrain-steps 3 --meta-steps 2 --statistics-segments 4 --sgd-rates 1 4 "
        "--rms-rates 0.0005 0.002 --valid-bytes 100 --test-bytes 300 --exclude left_out.txt"
    )
    text = f"--train {folder}/books --streams {folder}/wiki {folder}/play.txt"
    return shlex.split(f"--preset smoke {sizes} {text} --root {root}")


def main(args):
    """Runs the table with a model that compiles in no time."""
    run = functools.partial(experiment.run, model=models.bigram(256))
    harness.main("table_dynamic_evaluation", run, presets, "", list(args))


def parse(args):
    return harness.parse("table_dynamic_evaluation", presets, "", args)


@pytest.fixture(scope="module")
def config(folder):
    return parse(arguments(folder, "runs"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run, and its command line."""
    root = tmp_path_factory.mktemp("runs")
    args = arguments(folder, root)
    main(args)
    (directory,) = root.glob("table_dynamic_evaluation/*")
    return directory, args


def cells(directory, table="dynamic_evaluation"):
    """The records of a table by row and column."""
    records = read_json_lines(directory / "results.jsonl")
    return {(r["row"], r["column"]): r for r in records if r["table"] == table}


def test_every_row_has_a_score_on_every_stream(finished, folder):
    directory, args = finished
    records = cells(directory)
    for row in ROWS:
        for stream in ("wiki", "play"):
            plain, meta = records[row, stream], records[META + row, stream]
            gain = records[META + row, f"gain, {stream}"]
            np.testing.assert_allclose(gain["value"], plain["value"] - meta["value"], atol=1e-9)
            assert 0 < plain["value"] < 10 and plain["unit"] == "bits/byte"
            assert plain["episodes"] % 5 == 0 and plain["n"] == plain["episodes"] // 5
            assert f"{plain['n']} blocks of 5 consecutive segments" in plain["over"]
    static = records["static", "play"]
    assert static["learning_rate"] == static["decay"] == 0
    for rule in ROWS[1:]:
        assert records[rule, "play"]["value"] < static["value"] - 0.5
    sgd = records["SGD dynamic evaluation", "play"]
    assert sgd["learning_rate"] > 0 and sgd["segment_length"] == 6
    saved = json.loads((directory / "config.json").read_text())
    assert saved["block"] == 5 and "root" not in saved
    assert parse(shlex.split(sgd["command"])[3:]) == parse(args)
    assert imread(directory / "curves.png").std() > 0.01


def test_published_reductions_stand_beside_ours(finished):
    directory, _ = finished
    records = cells(directory, "dynamic_evaluation/published")
    ours = {row: r for (row, _), r in records.items() if r["paper"] is None}
    assert len(ours) == 8 and len(records) == 8 + len(experiment.PUBLISHED)
    scores = cells(directory)
    for row, record in ours.items():
        stream, name = row.removeprefix("ours, ").split(", ", 1)[1].split(": ", 1)
        row_name = name + " dynamic evaluation"
        meta = META if name.startswith(META) else ""
        static, found = scores[meta + "static", stream]["value"], scores[row_name, stream]["value"]
        np.testing.assert_allclose(record["value"], 100 * (1 - found / static), rtol=1e-9)
    published = records["mLSTM, enwik8 (bytes of Wikipedia)", "reduction, %"]
    assert published["value"] is None and published["paper"] == 12.9
    assert "1709.07432" in published["source"]
    assert "– (paper 12.9)" in (directory / "table.md").read_text()


def test_reductions_are_of_cross_entropies():
    np.testing.assert_allclose(experiment.reduction(1.25, 1.0), 20)
    np.testing.assert_allclose(experiment.reduction(np.e**4, np.e**3, perplexity=True), 25)


def test_a_run_that_lost_its_end_is_taken_up_and_gives_the_same_numbers(finished):
    directory, args = finished
    before = cells(directory)
    records = read_json_lines(directory / "results.jsonl")
    write_json_lines(directory / "results.jsonl", [r for r in records if r["row"] == ROWS[0]])
    (directory / "finished").unlink()
    main(args)
    after = cells(directory)
    assert list(directory.parent.iterdir()) == [directory]
    assert {k: (r["value"], r["ci95"]) for k, r in before.items()} == {
        k: (r["value"], r["ci95"]) for k, r in after.items()
    }


def test_both_trainings_read_as_many_windows_from_the_same_places(config):
    train, key = find_text(config).train, jax.random.key(5)
    assert [domain.name for domain in train] == ["a.txt", "b.txt"]
    plain, stream = (
        stretches(config, train, length, context).train.sample(key, 4)
        for length, context in ((14, 0), (6, 8))
    )
    assert plain.support.inputs.shape == (4, 1, 14) and plain.query.targets.shape == (4, 2, 14)
    assert stream.support.inputs.shape == (4, 1, 14) and stream.query.targets.shape == (4, 2, 6)
    np.testing.assert_array_equal(plain.task, stream.task)
    np.testing.assert_array_equal(plain.support.inputs[:, 0], stream.support.inputs[:, 0])
    assert (plain.query.inputs[:, 0, 0] == plain.support.targets[:, 0, -1]).all()
    np.testing.assert_array_equal(stream.query.inputs[:, 1, :8], stream.query.inputs[:, 0, 6:])
    assert statistics_segments(config, train, 6).targets.shape == (4, 6)


def test_text_of_the_test_is_not_tuned_on(config, folder):
    wiki, play = find_text(config).streams
    assert (wiki.name, play.name) == ("wiki", "play")
    text = (folder / "play.txt").read_bytes()
    assert play.valid.tobytes() == text[:100] and play.test.tobytes() == text[-300:]
    assert wiki.test.tobytes() == (folder / "wiki" / "test.txt").read_bytes()[:300]


def test_without_any_text_there_is_the_standard_library():
    text = find_text(presets("smoke"))
    names = [stream.name for stream in text.streams]
    assert len(names) == 2 and not set(names) & {domain.name for domain in text.train}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--streams {0}/none.txt", "there is no stream"),
        ("--streams {0}/books", "valid.txt is not a file"),
        ("--test-bytes 5000", "wiki/test.txt has 400 bytes and 5000 are needed"),
        ("--streams {0}/play.txt {0}/play.txt", "one name"),
        ("--inner.num-steps 40", "561 bytes a file, and a.txt"),
        ("--train {0}/none", "no folder"),
        ("--test-bytes 38", "no block"),
    ],
)
def test_text_that_will_not_do(folder, tmp_path, args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(folder, tmp_path), *shlex.split(args.format(folder))])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_steps": 0}, "meta_steps"),
        ({"inner": InnerLoop(num_steps=1)}, "inner.num_steps"),
        ({"inner": InnerLoop(query_loss="annealed")}, "query_loss"),
        ({"segment_lengths": ()}, "segment_lengths"),
        ({"context": -1}, "context"),
        ({"sgd_rates": (0.0,)}, "sgd_rates"),
        ({"decays": (0.0, 2.0)}, "decays"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"train": ("data/books",)}, "--streams"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_the_segment_length_is_the_best_of_plain_sgd():
    def tuned(length):
        hparams = [RuleHparams(0.01 * length, 0.0), RuleHparams(0.04 * length, 0.0)]
        return Tuned(hparams, np.array([1.0, abs(length - 20)]))

    length, rate = choose_length((6, 18, 40), tuned)
    assert length == 18
    np.testing.assert_allclose(rate, 0.36)  # the geometric mean


def test_a_row_alone_has_its_scores_and_no_differences(folder, tmp_path):
    row = META + "SGD dynamic evaluation"
    main([*arguments(folder, tmp_path), "--rows", row])
    (directory,) = tmp_path.glob("table_dynamic_evaluation/*")
    assert list(cells(directory)) == [(row, "wiki"), (row, "play")]
    assert len(cells(directory, "dynamic_evaluation/published")) == len(experiment.PUBLISHED)


def test_tuning_goes_on_beyond_an_outermost_rate():
    tried = []

    def scores(settings):
        tried.extend(settings)
        far = [abs(np.log(s.rate / 16)) + s.decay for s in settings]
        near = [np.nan if s.rate > 1 else abs(np.log(s.rate / 0.9)) - s.decay for s in settings]
        return np.array([far, near])

    best, found = tune(scores, (1.0, 2.0), (0.0, 0.5))
    assert best == [RuleHparams(16.0, 0.0), RuleHparams(1.0, 0.5)]
    np.testing.assert_allclose(found, [0, abs(np.log(1 / 0.9)) - 0.5], atol=1e-12)
    assert len(tried) == len(set(tried)) and {s.rate for s in tried} == {0.5, 1, 2, 4, 8, 16, 32}
    assert tune(scores, (1.0,), (0.0,))[0] == [RuleHparams(1.0, 0.0)] * 2
