"""A row of a finished run, rebuilt from its directory alone, and what it is used for."""

import json
import shlex
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import adapt_languages, harness
from metaopt.comparison import Comparison
from metaopt.errors import Diverged, UserError
from metaopt.evaluate import make_curves
from metaopt.files import read_json_lines
from metaopt.inner_loop import adapt
from metaopt.load import load
from metaopt.types import Batch

SIZES = "--preset smoke --vocab-size 4 --num-support 2 --num-query 2 --length 6 --seeds 0 1 "
SIZES += "--inner.num-steps 2 --comparison.max-inner-steps 2 --comparison.eval-every 2 "
SIZES += "--rows 'random init' Meta-SGD"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run, and the results of each row and seed as they were in it."""
    results, run = {}, Comparison.run

    def kept(self, row, *args, **kwargs):
        result = results[row.name, self.config.seed] = run(self, row, *args, **kwargs)
        return result

    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", kept)
        args = [*shlex.split(SIZES), "--root", str(root)]
        harness.main("adapt_languages", adapt_languages.run, adapt_languages.presets, "", args)
    (directory,) = root.glob("adapt_languages/*")
    return directory, results


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_is_loaded_as_it_was_trained(finished, seed):
    directory, results = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    found, expected = load(directory, "Meta-SGD", seed), results["Meta-SGD", seed]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    jax.tree.map(np.testing.assert_array_equal, found.meta_params, expected.meta_params)
    rate = expected.hparams["inner_learning_rate"]
    assert found.hparams["inner_learning_rate"] == rate and found.inner.num_steps == 2


def test_the_best_row_is_loaded_if_none_is_named(finished, tmp_path):
    directory, _ = finished
    assert load(directory).row == "Meta-SGD"  # the only one that is trained
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rows": ["MAML", "Meta-SGD"]}))
    assert load(copy).row == "Meta-SGD"
    records = [r for r in read_json_lines(copy / "results.jsonl") if r["row"] == "Meta-SGD"]
    other = [r | {"row": "MAML", "value": (r["value"] or 0) - 0.1} for r in records]

    def keep(found):
        (copy / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))

    keep(records + other)
    with pytest.raises(UserError, match="copied with its checkpoints"):
        load(copy)  # of MAML, which was not trained
    for ambiguous in ([], records + [r | {"row": "MAML"} for r in records]):
        keep(ambiguous)
        with pytest.raises(UserError, match="which row is best: name one of MAML, Meta-SGD"):
            load(copy)


def test_a_row_without_training_is_what_it_was_at_the_start(finished):
    directory, results = finished
    for seed in (0, 1):
        found, expected = load(directory, "random init", seed), results["random init", seed]
        jax.tree.map(np.testing.assert_array_equal, found.meta_params, expected.meta_params)
        assert found.hparams == expected.hparams


def test_what_is_loaded_gives_the_losses_of_the_table(finished):
    directory, results = finished
    found, expected = load(directory, "Meta-SGD"), results["Meta-SGD", 0]
    curves = make_curves(found.learner, found.loss_fn, found.inner, 2, jax.devices()[:1])
    family = adapt_languages.make_family(found.config)
    key = jax.random.split(jax.random.key(1234))[1]  # of the test episodes
    losses = curves(found.meta_params, found.hparams, family.test.sample(key, 16))
    np.testing.assert_allclose(losses[:, 2], expected.curves[:, 2], rtol=1e-5)


def test_what_cannot_be_loaded_is_said(finished, tmp_path):
    directory, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    for row, seed, message in [
        ("FOMAML", None, r"no row 'FOMAML'; there are random init, Meta-SGD"),
        ("Meta-SGD", 7, "the seeds 0, 1, not 7"),
    ]:
        with pytest.raises(UserError, match=message):
            load(copy, row, seed)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(UserError, match="in the model and learner of the config"):
        load(copy, "Meta-SGD")
    (copy / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the config of a run of adapt_languages"):
        load(copy, "Meta-SGD")
    (copy / "finished").unlink()
    with pytest.raises(UserError, match="not the directory of a finished run"):
        load(copy, "Meta-SGD")
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="not the directory of a run"):
        load(copy, "Meta-SGD")
    with pytest.raises(UserError, match="there is no run"):
        load(copy / "absent", "Meta-SGD")


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(finished, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(finished[0], directory)
    arrays = [p for p in directory.glob("seed-0/checkpoints/meta-sgd/*/state/**/*") if p.is_file()]
    for path in arrays:
        path.write_bytes(b"damaged")
    before = sorted(directory.rglob("*"))
    with pytest.raises(UserError, match=r"is damaged .* put back a good copy"):
        load(directory, "Meta-SGD")
    assert sorted(directory.rglob("*")) == before


SHORT = "abcdaabbaddcab"  # as many sequences of 7 as a step takes
LONG = "abcd" * 30 + "aabb" * 30


def test_a_short_text_is_adapted_to_as_an_episode_of_training_is(finished):
    found = load(finished[0], "Meta-SGD")
    cells = found.tokens(SHORT).reshape(2, 7)
    optimizer = found.learner.inner_opt(found.meta_params, found.hparams)
    support = Batch(jnp.asarray(cells[:, :-1]), jnp.asarray(cells[:, 1:]))
    expected = adapt(found.loss_fn, optimizer, found.start, support, found.inner).params
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.adapt(SHORT), expected
    )


def test_a_long_text_is_read_once_in_steps_taken_by_hand(finished):
    found = load(finished[0], "Meta-SGD")
    count = 240 // 7
    assert found.steps_of(LONG) == count // 2
    support = found.supports(LONG, count // 2, seed=3)
    read = np.concatenate([support.inputs, support.targets[:, -1:]], axis=1)
    cells = found.tokens(LONG)[: count * 7].reshape(count, 7)
    np.testing.assert_array_equal(np.sort(read, axis=0), np.sort(cells, axis=0))
    assert (read != cells).any()
    rate = jnp.float32(0.7)
    hparams = dict(found.hparams) | {"inner_learning_rate": rate}
    optimizer = found.learner.inner_opt(found.meta_params, hparams)
    params = found.start
    state, step = optimizer.init(params), jax.jit(jax.grad(found.loss_fn))
    for k in range(count // 2):
        batch = Batch(*(x[2 * k : 2 * k + 2] for x in support))
        updates, state = optimizer.update(step(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    adapted = found.adapt(LONG, learning_rate=0.7, seed=3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), adapted, params)


def test_numbers_of_steps_and_sequences_are_those_asked_for(finished):
    found = load(finished[0], "Meta-SGD")
    assert found.steps_of(SHORT) == found.inner.num_steps == 2
    again = found.supports(LONG, 20, sequences=20)  # of 34: those left over wait for a new order
    assert again.inputs.shape == (400, 6)
    wrongs: list[dict[str, Any]] = [
        dict(num_steps=0),
        dict(sequences=0),
        dict(seed=-1),
        dict(learning_rate=-1),
    ]
    for wrong in wrongs:
        with pytest.raises(UserError, match=next(iter(wrong))):
            found.adapt(LONG, **wrong)
    with pytest.raises(UserError, match=r"13 tokens is too short.* 2 sequences of 7, .* 14 tokens"):
        found.adapt(SHORT[:13])
    broken = found._replace(loss_fn=lambda params, _: jnp.nan * params["head"]["table"].sum())
    with pytest.raises(Diverged, match="lower the rate"):
        broken.adapt(SHORT)


def test_a_score_is_the_loss_by_hand(finished):
    found = load(finished[0], "Meta-SGD")
    params, text = found.adapt(LONG), SHORT + "\n"  # 13 tokens to predict: 6, 6 and 1
    tokens = jnp.asarray(found.tokens(text))
    losses = [
        float(found.loss_fn(params, Batch(tokens[None, i:j], tokens[None, i + 1 : j + 1])))
        for i, j in ((0, 6), (6, 12), (12, 13))
    ]
    score = found.score(params, text)
    np.testing.assert_allclose(score.mean, np.dot(losses, [6, 6, 1]) / 13, rtol=1e-5)
    assert score.num_tokens == 13 and score.unit == "nats/token" and 0 < score.ci95 < np.inf
    assert "nats/token over 13 tokens" in str(score) and "±" not in str(found.score(params, "ab"))
    assert found.score(params, tokens) == score
    with pytest.raises(UserError, match="nothing to predict"):
        found.score(params, "a")


def test_text_is_generated_alike_under_a_seed(finished):
    found = load(finished[0], "Meta-SGD")
    made = [found.generate(found.start, "abc", 30, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert all(len(text) == 33 and text.startswith("abc") for text in made)
    assert found.generate(found.start, length=3)[0] == "a"
    for prompt in ("abz", b"abz", [0, 4], [0.5]):
        with pytest.raises(UserError):
            found.generate(found.start, prompt)  # type: ignore[arg-type]


def test_adapted_parameters_are_kept_for_the_row_they_are_of(finished, tmp_path):
    directory, path = finished[0], tmp_path / "adapted.npz"
    found = load(directory, "Meta-SGD")
    adapted = found.adapt(LONG)
    found.save(adapted, path)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    read = load(copy, "Meta-SGD").read(path)
    jax.tree.map(np.testing.assert_array_equal, read, adapted)
    before = path.read_bytes()
    with pytest.raises(UserError, match="there already"):
        found.save(found.start, path)
    assert path.read_bytes() == before
    for other in (load(directory, "random init"), load(directory, "Meta-SGD", 1)):
        with pytest.raises(UserError, match="another run or row"):
            other.read(path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "words.npz", about="words")
    (tmp_path / "damaged.npz").write_bytes(before[:-100])
    for name in ("other", "words", "damaged", "absent"):
        with pytest.raises(UserError, match=name):
            found.read(tmp_path / f"{name}.npz")
