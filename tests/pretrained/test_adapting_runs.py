"""Runs of adapt_languages whose model was trained elsewhere, and what is done with them."""

import re
import shlex
import shutil

import jax
import numpy as np
import pytest

from experiments import adapt_languages, harness
from metaopt import cli
from metaopt.console import printable
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.languages import LanguageConfig, digest, make_family, make_model, make_rows
from metaopt.load import load
from metaopt.losses import next_token
from metaopt.pretrained import lay_over, open_pretrained, score
from metaopt.sequence import decoding
from metaopt.types import Batch

SIZES = shlex.split(
    "--preset smoke --tasks text --model pretrained --adapter.blocks 1 --adapter.rank 2 "
    "--num-support 2 --num-query 2 --length 8 --num-valid-domains 1 --num-test-domains 2 "
    "--inner.num-steps 2 --comparison.max-inner-steps 2 --comparison.num-devices 2 "
    "--comparison.meta-steps 2 --comparison.valid-episodes 2 --comparison.test-episodes 4 "
    "--rows 'usual start' MAML"
)
TABLE = "pretrained/adaptation"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    there = tmp_path_factory.mktemp("texts")
    for i in range(5):
        words = [f"word{(i + 1) * j % 7}" for j in range(200)]
        (there / f"domain{i}.txt").write_text(" ".join(words), encoding="utf-8")
    return there


@pytest.fixture(scope="module")
def finished(shared_folder, texts, tmp_path_factory):
    """The directory of a run."""
    root = tmp_path_factory.mktemp("runs")
    given = ["--folder", texts, "--pretrained", shared_folder, "--root", root]
    args = [*SIZES, *map(str, given)]
    harness.main("adapt_languages", adapt_languages.run, adapt_languages.presets, "", args)
    (directory,) = root.glob("adapt_languages/*")
    return directory


def test_gains_are_on_the_usual_start_which_is_the_model_itself(finished, shared_folder):
    records = read_json_lines(finished / "results.jsonl")
    cells = {(r["row"], r["column"]): r for r in records if r["table"] == TABLE}
    assert ("MAML", "Δ 2 steps") in cells and ("usual start", "Δ 2 steps") not in cells
    assert {r["unit"] for r in cells.values()} == {"bits/byte"}
    assert {r["table"] for r in records} == {TABLE, f"{TABLE}/domains"}
    found, as_it_is = load(finished, "usual start"), open_pretrained(shared_folder)
    tokens = np.arange(18).reshape(2, 9)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    expected = next_token(as_it_is.model)(as_it_is.params, batch)
    np.testing.assert_allclose(found.loss_fn(found.start, batch), expected, rtol=1e-6)
    trained = load(finished, "MAML").start
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, found.start)
    assert max(jax.tree.leaves(moved)) > 0
    sizes = jax.tree.map(lambda x: x.shape, trained)
    assert set(sizes) == {"layer_1"} and sizes["layer_1"]["up"]["down"] == (8, 2)


def test_a_run_is_used_as_any_other(finished, tmp_path, capsys):
    file, adapted = tmp_path / "text.txt", tmp_path / "adapted.npz"
    file.write_text("word1 word5 " * 60, encoding="utf-8")
    cli.main(["adapt", str(finished), "--on", str(file), "--row", "MAML", "--save", str(adapted)])
    assert adapted.stat().st_size < 20_000  # and not the model
    use = [str(finished), "--row", "MAML", "--adapted", str(adapted)]
    cli.main(["score", *use, "--on", str(file)])
    cli.main(["generate", *use, "--prompt", "word", "--length", "3"])
    shown = capsys.readouterr().out
    assert "after " in shown and "bits/byte" in shown and "\nword" in shown
    found, key = load(finished, "MAML"), jax.random.key(0)
    prompt = found.tokens("word")
    again = decoding.generate(found.model, found.read(adapted), prompt, 3, key, 0.7)
    assert shown.endswith(
        printable(found.codec.show(again)) + "\n"
    )  # with and without what was read kept


def test_a_part_of_a_model_adapts_to_a_file_and_is_laid_over(shared_folder, tmp_path, capsys):
    file, path = tmp_path / "text.txt", tmp_path / "adapter.npz"
    file.write_text("word1 word5 " * 120, encoding="utf-8")
    flags = ["--model", str(shared_folder), "--on", str(file), "--length", "8"]
    cli.main(["adapt", *flags, "--kind", "norms", "--rate", "0.01", "--save", str(path)])
    printed = capsys.readouterr()
    before, after = re.findall(r"^(?:before|after .*): +(\d\.\d+)", printed.out, re.MULTILINE)
    assert float(after) < float(before) - 0.1 and "adapting: 144/144" in printed.err
    found = open_pretrained(shared_folder)
    tokens = found.codec.encode(file.read_bytes())
    assert score(lay_over(path, found), tokens, 8).mean < score(found, tokens, 8).mean - 0.1
    with pytest.raises(SystemExit) as stop:
        cli.main(["adapt", *flags, "--adapter", str(path)])
    assert stop.value.code == 2 and "leave --adapter out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tasks": "markov"}, "reads text, not markov"),
        ({"tokenizer": "bpe:300"}, "a tokenizer of its own"),
        ({"model": "transformer"}, "--pretrained is for --model pretrained"),
        ({"pretrained": "nowhere"}, "nowhere is not there"),
    ],
)
def test_what_does_not_fit_is_one_line(shared_folder, texts, change, words):
    fields = {"tasks": "text", "folder": str(texts), "model": "pretrained"}
    fields |= {"pretrained": str(shared_folder)} | change
    if change.get("tasks"):
        del fields["folder"]
    with pytest.raises(UserError, match=words):
        make_family(LanguageConfig(**fields))


def test_without_a_path_it_is_the_model_that_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    with pytest.raises(UserError, match="run metaopt model smollm2"):
        make_model(LanguageConfig(tasks="stdlib", model="pretrained"))


def test_another_model_is_other_data(shared_folder, texts, tmp_path):
    other = shutil.copytree(shared_folder, tmp_path / "other")
    weights = other / "model.safetensors"
    found = {}
    for folder in (shared_folder, other):
        fields = {"folder": str(texts), "pretrained": str(folder)}
        found[folder] = digest(LanguageConfig(tasks="text", model="pretrained", **fields))
    assert found[shared_folder] == found[other]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = LanguageConfig(
        tasks="text",
        folder=str(texts),
        model="pretrained",
        pretrained=str(other),
        compute_dtype="bfloat16",  # so that it is opened again
    )
    assert digest(changed) != found[other]


def test_a_tied_head_has_no_row_of_it(shared_folder):
    config = LanguageConfig(tasks="stdlib", model="pretrained", pretrained=str(shared_folder))
    names = [row.name for row in make_rows(config, make_model(config))]
    assert names[:2] == ["usual start", "joint pretraining"] and "ANIL" not in names
