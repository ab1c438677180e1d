import jax
import numpy as np
import pytest

from experiments import harness
from experiments import table_pretraining as table
from metaopt.files import read_json_lines
from metaopt.fit import Problem
from metaopt.losses import IGNORED, next_token
from metaopt.models import bigram
from metaopt.tasks.fresh import fresh_tasks


def main(*args):
    harness.main("table_pretraining", table.run, table.presets, "", args)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, that is the question: " * 60)
    return path


def test_a_run_gives_losses_differences_and_the_exponent(tmp_path, text):
    flags = ["--preset", "smoke", "--root", str(tmp_path), "--file", str(text), "--width", "8"]
    rows = ["ours", "learned positions", "width 4", "width 12", "missing characters"]
    main(*flags, "--widths", "4", "12", "--rows", *rows)
    (directory,) = tmp_path.glob("table_pretraining/*")
    found = {(r["row"], r["column"]): r for r in read_json_lines(directory / "results.jsonl")}
    ours, learned = (found[row, "validation loss"] for row in ("ours", "learned positions"))
    assert 1 < ours["value"] < 4 and ours["paper"] is None  # it is not Shakespeare's text
    difference = found["learned positions", "minus ours"]["value"]
    assert difference == pytest.approx(learned["value"] - ours["value"])
    gaps = {row: found[row, "loss on missing"]["value"] for row in ("ours", "missing characters")}
    assert all(1 < value < 4.5 for value in gaps.values()) and gaps["ours"] != ours["value"]
    sizes = [found[row, "parameters"]["value"] for row in ("width 4", "ours", "width 12")]
    assert sizes == sorted(sizes)
    assert (directory / "curves.png").is_file()
    assert "loss ∝ parameters^" in (directory / "table.md").read_text()


def test_every_character_of_the_validation_part_is_predicted_once():
    model = bigram(5)
    problem = Problem(fresh_tasks("none", lambda key: None, 1), model, next_token(model))  # type: ignore[arg-type]
    drawn = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    params = jax.tree.map(lambda x: drawn.reshape(x.shape), model.init(jax.random.key(0)))
    valid = np.random.default_rng(1).integers(0, 5, 6 * 4 + 2).astype(np.int32)
    windows = table.Windows.of(valid, length=4)
    found = table.losses_of(problem, {"params": params}, windows.next_characters())
    log_probs = np.asarray(jax.nn.log_softmax(model.apply(params, valid[None, :-1])))[0]
    each = -np.take_along_axis(log_probs, valid[1:, None], axis=1)[:24, 0]
    np.testing.assert_allclose(found, each.reshape(6, 4).mean(axis=1), rtol=1e-5)

    at_missing = table.losses_of(problem, {"params": params}, windows.next_missing())
    assert (windows.missing.sum(axis=1) == 1).all() and not windows.missing[:, 0].any()
    np.testing.assert_allclose(at_missing, each[windows.missing.reshape(-1)[1:].nonzero()], 1e-5)
    gaps = windows.gaps(5)
    np.testing.assert_array_equal(gaps.inputs == 5, windows.missing)
    counted = gaps.targets != IGNORED
    np.testing.assert_array_equal(gaps.targets[counted], windows.tokens[windows.missing])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--file", "short.txt"], "the text has 3 characters"),
        (["--batch", "3"], "batch is 3: give an even number"),
        (["--rows", "theirs"], "no row 'theirs'"),
        (["--width", "30"], "not divisible by num_heads"),
    ],
)
def test_wrong_input_is_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(SystemExit) as stop:
        main(*flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
