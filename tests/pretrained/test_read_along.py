"""Adapting along a text, and what has adapted in a file."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from pretrained_text import TEXT

from metaopt import cli
from metaopt.errors import Diverged, UserError
from metaopt.frozen import merge
from metaopt.losses import next_token
from metaopt.models.adapters import AdapterConfig
from metaopt.pretrained import (
    ReadingConfig,
    export,
    lay_over,
    open_pretrained,
    read_along,
    save_adapter,
    score,
)
from metaopt.pretrained.reading import gain, score_of, step_bytes
from metaopt.streams.dynamic_evaluation import (
    cut_segments,
    mean_squared_gradients,
    rms_with_prior,
    walk,
)

ALL = ReadingConfig(adapter=AdapterConfig(kind="all"), length=8, learning_rate=0.01)


@pytest.fixture
def tokens(folder):
    return open_pretrained(folder).codec.encode(TEXT.encode())


@pytest.mark.parametrize(("context", "decay"), [(0, 0.0), (8, 0.3)])
def test_it_is_dynamic_evaluation(folder, tokens, context, decay):
    found = open_pretrained(folder)
    config = dataclasses.replace(ALL, context=context, decay=decay, optimizer="sgd")
    read = read_along(found, tokens, config)
    params, nats = found.params, []
    cut = cut_segments(tokens, 8, context)
    for inputs, targets in zip(cut.inputs, cut.targets, strict=True):

        def loss(params, inputs=inputs, targets=targets):
            logits = found.model.apply(params, inputs[None])[0, -8:]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return each.mean()

        value, grads = jax.value_and_grad(loss)(params)
        nats.append(8 * float(value))
        params = jax.tree.map(
            lambda p, g, start: p - 0.01 * g + decay * (start - p), params, grads, found.params
        )
    np.testing.assert_allclose(read.segments.nats, nats, rtol=1e-4)
    adapted = merge(read.frozen, read.fast)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), adapted, params
    )
    assert read.segments.num_bytes.sum() == len(found.codec.decode(cut.targets.ravel()))


def test_rms_steps_in_the_scale_of_general_text_and_goes_back(folder, tokens):
    found = open_pretrained(folder)
    config = dataclasses.replace(ALL, optimizer="rms", decay=0.3, learning_rate=0.02)
    general, loss = tokens[40:], next_token(found.model)
    read = read_along(found, tokens[:33], config, general=general)
    squares = mean_squared_gradients(loss, found.params, cut_segments(general, 8))
    rule = rms_with_prior(found.params, 0.02, 0.3, squares)
    expected = walk(loss, rule, found.params, cut_segments(tokens[:33], 8))
    np.testing.assert_allclose(read.segments.nats / 8, expected.losses, rtol=1e-3)
    without = dataclasses.replace(config, decay=0.0)
    near, far = (
        sum(
            np.abs(a - b).sum()
            for a, b in zip(*map(jax.tree.leaves, (fast, found.params)), strict=True)
        )
        for fast in (read.fast, read_along(found, tokens[:33], without, general=general).fast)
    )
    assert 0 < near < far
    with pytest.raises(UserError, match="rms takes its scale from general text"):
        read_along(found, tokens, config)


def test_the_bytes_of_a_step_are_known_before_it(folder):
    found = open_pretrained(folder)
    size = sum(x.nbytes for x in jax.tree.leaves(found.params))
    needed = {
        name: step_bytes(found, dataclasses.replace(ALL, **fields))
        for name, fields in {
            "none": {"optimizer": "none"},
            "sgd": {"optimizer": "sgd"},
            "adam": {},
            "rms": {"optimizer": "rms", "decay": 0.1},
            "norms": {"adapter": AdapterConfig(kind="norms")},
        }.items()
    }
    assert min(needed["adam"], needed["rms"]) - needed["sgd"] >= 2 * size  # two copies more
    assert size < needed["none"] < needed["norms"] < needed["adam"]


def test_without_steps_it_is_the_score_and_the_gain_is_paired(folder, tokens):
    found = open_pretrained(folder)
    still = read_along(found, tokens, dataclasses.replace(ALL, optimizer="none"))
    whole = 8 * ((len(tokens) - 1) // 8) + 1
    assert score_of(still.segments).mean == pytest.approx(score(found, tokens[:whole], 8).mean)
    read = read_along(found, tokens, ALL)
    gained = gain(still.segments, read.segments)
    means = [score_of(each.segments).mean for each in (still, read)]
    assert gained.mean == pytest.approx(means[0] - means[1], rel=1e-4) and gained.mean > 0.5
    assert read.segments.nats[0] == pytest.approx(still.segments.nats[0], rel=1e-5)
    assert 0 < gained.ci95 < score_of(still.segments).ci95 * 20
    of_walk = walk(next_token(found.model), optax.adam(0.01), found.params, cut_segments(tokens, 8))
    np.testing.assert_allclose(read.segments.nats / 8, of_walk.losses, rtol=1e-3)


@pytest.mark.parametrize("kind", ["low_rank", "norms"])
def test_what_has_adapted_is_saved_alone_and_laid_over(folder, tokens, kind, tmp_path):
    found, adapter = open_pretrained(folder), AdapterConfig(kind=kind, rank=2, matrices=("up",))
    read = read_along(found, tokens, dataclasses.replace(ALL, adapter=adapter))
    save_adapter(tmp_path / "a.npz", found, adapter, read.fast)
    laid = lay_over(tmp_path / "a.npz", found)
    expected = merge(read.frozen, read.fast)
    assert jax.tree.structure(laid.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, laid.params, expected)
    assert score(laid, tokens, 8).mean < score(found, tokens, 8).mean
    export(tmp_path / "whole", laid)
    whole = open_pretrained(tmp_path / "whole")
    assert score(whole, tokens, 8).mean == pytest.approx(score(laid, tokens, 8).mean, rel=1e-5)
    other = found._replace(params=jax.tree.map(lambda x: 2 * x, found.params))
    with pytest.raises(UserError, match="was not adapted from this model"):
        lay_over(tmp_path / "a.npz", other)


def test_a_loss_that_is_not_finite_ends_it(folder, tokens):
    found = open_pretrained(folder)
    found.params["final_norm"]["scale"] *= np.nan
    with pytest.raises(Diverged, match="of segment 1 is nan: the model has no finite loss"):
        read_along(found, tokens, ALL)


def test_the_command_reads_and_what_it_saves_is_used(folder, tmp_path, capsys):
    file, path = tmp_path / "text.txt", tmp_path / "a.npz"
    file.write_text(TEXT, encoding="utf-8")
    flags = [str(file), "--model", str(folder), "--length", "8"]
    cli.main(["read", *flags, "--rank", "2", "--learning-rate", "0.01", "--save", str(path)])
    found = open_pretrained(folder)
    tokens = found.codec.encode(TEXT.encode())
    config = dataclasses.replace(ALL, adapter=AdapterConfig(rank=2))
    printed = capsys.readouterr().out
    assert f"adapting:  {score_of(read_along(found, tokens, config).segments)}" in printed
    cli.main(["score", "--on", *flags, "--adapter", str(path)])
    assert f"adapted: {score(lay_over(path, found), tokens, 8)}" in capsys.readouterr().out
    strange = (
        TEXT.replace("\n", "\n@@@@ ~~~~ @@@@\n", 1) if "\n" in TEXT else f"{TEXT}\n@@@@ ~~~~\n"
    )
    file.write_text(strange, encoding="utf-8")
    cli.main(["read", *flags, "--surprise", "1", "--kind", "all"])
    assert "bits more than others of its length: @@@@" in capsys.readouterr().out
    for args, words in (
        (["read", *flags, "--surprise", "1", "--context", "8"], "leave out --context and --save"),
        (["read", *flags, "--save", str(path)], "is there already"),
        (["read", *flags, "--context", "9999"], "holds no segment"),
        (["read", *flags, "--optimizer", "rms"], "--general FILE is for --optimizer rms"),
        (["read", *flags, "--run", "r"], "--model PATH or --run RUN, and not both"),
        (["read", *flags, "--row", "r"], "--row and --run-seed are of a run"),
        (["score", "run", "--on", "f", "--adapter", str(path)], "give --model PATH too"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
