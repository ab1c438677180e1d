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
    of_stream = [r for r in found if r["table"] != "pretrained/forgetting"]
    assert {r["n"] for r in of_stream if r["column"] == "play"} == {
        len(segments(directory, rows[0]))
    }
    model = open_pretrained(tmp_path / "model")
    tokens = model.codec.encode(TEXT[300:500].encode())
    whole = 8 * ((len(tokens) - 1) // 8) + 1
    assert read["static 8"] == pytest.approx(score(model, tokens[:whole], 8).mean, rel=1e-5)
    kept = [json.dumps(segments(directory, row)) for row in rows]
    assert len(set(kept)) == 1  # the bytes of the segments are the same
    assert "What adapting gains at equal context" in (directory / "table.md").read_text()


def test_what_general_text_loses_is_judged_apart_from_what_gives_the_scale(flags, tmp_path):
    general = "now is the winter of our discontent made glorious summer; " * 12
    (tmp_path / "general.txt").write_text(general)
    plain, decayed = "adapting all, Adam, 8", "adapting all, Adam with decay, 8"
    by_rms = "adapting low rank, RMS with decay, 8"
    sizes = ["--general", str(tmp_path / "general.txt"), "--rate", "0.01", "--decay", "0.2"]
    main(*flags, *sizes, "--rows", plain, decayed, by_rms)
    (directory,) = tmp_path.glob("runs/table_pretrained/*")
    records = read_json_lines(directory / "results.jsonl")
    lost = {r["row"]: r["value"] for r in records if r["table"] == "pretrained/forgetting"}
    assert set(lost) == {plain, decayed, by_rms}
    assert abs(lost[decayed]) < abs(lost[plain])
    model = open_pretrained(tmp_path / "model")
    tokens = model.codec.encode(general[:200].encode())
    with np.load(directory / "rows" / f"{harness.slug('as it is, general text')}.npz") as kept:
        judged = score(model, tokens[len(tokens) // 2 :], 8)
        assert kept["num_tokens"].sum() == judged.num_tokens
        assert kept["nats"].sum() / np.log(2) / kept["num_bytes"].sum() == pytest.approx(
            judged.mean, rel=1e-5
        )
    cells = {(r["row"], r["column"]) for r in records}
    assert {(plain, "GiB"), (plain, "seconds a token")} <= cells


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
        (["--general", "nowhere.txt"], "nowhere.txt"),
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
