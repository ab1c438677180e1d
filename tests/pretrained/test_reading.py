"""The score of a text, and the commands that take a pretrained model."""

import re

import jax
import numpy as np
import pytest
from pretrained_text import TEXT

from metaopt import cli
from metaopt.errors import UserError
from metaopt.pretrained import open_pretrained, score
from metaopt.pretrained.reading import segment_losses
from metaopt.sequence.decoding import stream


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize("context", [0, 8])
def test_every_token_is_predicted_once_from_its_segment_and_the_context(folder, context):
    found, length = open_pretrained(folder), 4
    tokens = found.codec.encode(TEXT.encode())[: 2 + 5 * length]  # the last segment has one token
    segments = segment_losses(found, tokens, length, context)
    expected = []
    for begin in range(0, len(tokens) - 1, length):
        before = min(context, begin)
        following = tokens[begin + 1 : begin + length + 1]
        seen = tokens[begin - before : begin + len(following)]
        logits = found.model.apply(found.params, seen[None])[0, before:]
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        expected.append(-log_probs[np.arange(len(following)), following].sum())
    np.testing.assert_allclose(segments.nats, expected, rtol=1e-5)
    assert segments.num_tokens.tolist() == [4, 4, 4, 4, 4, 1]
    whole = found.codec.decode(tokens[1:])
    assert segments.num_bytes.sum() == len(whole)
    scored = score(found, tokens, length, context)
    assert scored.mean == pytest.approx(sum(expected) / np.log(2) / len(whole), rel=1e-5)
    assert scored.ci95 > 0 and scored.num_tokens == 21 and scored.unit == "bits/byte"


def test_what_cannot_be_scored_is_refused(folder):
    found = open_pretrained(folder)
    with pytest.raises(UserError, match="context 3 is no multiple of length 2"):
        score(found, np.arange(9), 2, 3)
    with pytest.raises(UserError, match="holds nothing to predict"):
        score(found, np.arange(1))


def test_commands_take_a_pretrained_model(folder, file, capsys):
    found = open_pretrained(folder)
    tokens = found.codec.encode(TEXT.encode())
    flags = ["--model", str(folder)]
    cli.main(["score", *flags, "--on", str(file), "--length", "8", "--context", "8"])
    printed = capsys.readouterr()
    assert str(score(found, tokens, 8, 8)) in printed.out and "parameters" in printed.err
    cli.main(["generate", *flags, "--prompt", "the\nquick", "--length", "12", "--seed", "1"])
    printed = capsys.readouterr()
    prompt = found.codec.encode(b"the\nquick")
    drawn = list(stream(found.config, found.params, prompt, 12, jax.random.key(1), 0.7))
    shown = found.codec.show([*prompt, *drawn])
    assert printed.out.count("\n") == shown.count("\n") + 1
    assert printed.out.startswith("the\nquick")
    assert re.search(r"[\d.]+ tokens/s", printed.err)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate"], "give the directory of a run, or --model PATH"),
        (["generate", "run", "--model", "m"], "give the directory of a run, or --model PATH"),
        (["generate", "--model", "m", "--row", "MAML"], "--row and --run-seed are of a run"),
        (["generate", "--model", "m", "--on", "f"], "--adapted and --on are of a run"),
        (["generate", "--model", "nowhere"], "nowhere is not there"),
        (["score", "--model", "m", "--on", "f", "--context", "9"], "--context 9 is no multiple"),
        (["score", "--model", "m", "--on", "f", "--adapted", "a"], "--adapted is of a run"),
    ],
)
def test_wrong_input_is_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
