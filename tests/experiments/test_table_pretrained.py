import json

import jax
import numpy as np
import pytest

from experiments import harness
from experiments import table_pretrained as table
from metaopt.files import read_json_lines
from metaopt.models import TransformerConfig, transformer
from metaopt.pretrained import open_pretrained, score
from metaopt.pretrained.huggingface import write_folder
from metaopt.tasks.tokenizers import train_bpe

TEXT = "to be or not to be, that is the question, whether it is nobler; " * 12


def main(*args):
    harness.main("table_pretrained", table.run, table.presets, "", args)


@pytest.fixture
def flags(tmp_path):
    """A small random Llama and a text."""
    config = TransformerConfig(
        vocab_size=290, width=8, num_layers=2, num_heads=2, mlp_width=12, activation="swiglu"
    )
    params = transformer(config).init(jax.random.key(0))
    write_folder(tmp_path / "model", config, params, train_bpe([TEXT], 270))
    (tmp_path / "play.txt").write_text(TEXT)
    where = ["--root", str(tmp_path / "runs"), "--model", str(tmp_path / "model")]
    return ["--preset", "smoke", *where, "--streams", str(tmp_path / "play.txt")]


def test_all_rows_score_the_same_tokens_and_gains_are_at_equal_context(flags, tmp_path):
    rows = ["static 8", "static 16", "adapting all, Adam, 8", "adapting norms, Adam, 16"]
    main(*flags, "--rows", *rows, "--rate", "0.01")
    (directory,) = tmp_path.glob("runs/table_pretrained/*")
    found = read_json_lines(directory / "results.jsonl")
    cells = {(r["table"], r["row"], r["column"]): r["value"] for r in found}
    read = {row: cells["pretrained/reading", row, "play"] for row in rows}
    gains = {r["row"]: r["value"] for r in found if r["table"] == "pretrained/gain"}
    assert gains == {
        rows[2]: pytest.approx(read[rows[0]] - read[rows[2]], abs=1e-6),
        rows[3]: pytest.approx(read[rows[1]] - read[rows[3]], abs=1e-6),
    }
    assert gains[rows[2]] > 0.1
    assert {r["n"] for r in found if r["column"] == "play"} == {len(segments(directory, rows[0]))}
    model = open_pretrained(tmp_path / "model")
    tokens = model.codec.encode(TEXT[300:500].encode())
    whole = 8 * ((len(tokens) - 1) // 8) + 1
    assert read["static 8"] == pytest.approx(score(model, tokens[:whole], 8).mean, rel=1e-5)
    kept = [json.dumps(segments(directory, row)) for row in rows]
    assert len(set(kept)) == 1  # the bytes of the segments are the same
    assert "What adapting gains at equal context" in (directory / "table.md").read_text()


def segments(directory, row):
    with np.load(directory / "rows" / f"{harness.slug(f'{row}, play')}.npz") as arrays:
        return arrays["num_bytes"].tolist()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "nowhere"], "nowhere is not there"),
        (["--rows", "theirs"], "no row 'theirs'"),
        (["--characters", "100", "--length", "64"], "tokens to read, and"),
        (["--streams", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input_is_one_line(flags, args, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(*flags, *args)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_model_that_was_not_fetched_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        main("--preset", "smoke")
