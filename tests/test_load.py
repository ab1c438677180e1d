"""A row of a finished run, rebuilt from its directory alone."""

import json
import shlex
import shutil

import jax
import numpy as np
import pytest

from experiments import adapt_languages, harness
from metaopt.comparison import Comparison
from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.load import load

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
        ("random init", None, "it was not trained"),
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
