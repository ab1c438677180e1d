"""A user's own model: what `as_model` takes and refuses, and the page that shows how."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic
from flax import nnx

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import anil, meta_sgd
from metaopt.losses import regression
from metaopt.meta_gradients import first_order
from metaopt.models import as_model
from metaopt.pytrees import entries
from metaopt.types import Batch, Model

KEY = jax.random.key(0)
EXAMPLE = jnp.zeros((1, 3))
PAGE = Path(__file__).parents[2] / "docs" / "own_model.md"


def episode():
    def columns(batch):
        return Batch(batch.inputs, batch.targets[:, None])

    found = quadratic.episode()
    return found._replace(support=columns(found.support), query=columns(found.query))


def meta_gradient(learner, loss_fn, params, of=None):
    estimate = first_order(learner, loss_fn, InnerLoop(num_steps=1))
    hparams = {"inner_learning_rate": 0.1}
    run = jax.jit(estimate, compiler_options={"xla_backend_optimization_level": 0})
    return run(learner.init(params), hparams, of or episode(), KEY)[0]["params"]


def snippets():
    blocks = re.findall(r"(<!-- not run.*?-->\n)?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [code for not_run, code in blocks if not not_run]


def test_the_snippets_of_the_page_run_and_their_models_learn():
    plain, linen, nnx, statistics, dropout = snippets()
    names = {}
    for code in (plain, linen, nnx, statistics):
        exec(code, names)
        model = names["model"]
        params, loss_fn = model.init(KEY), regression(model)
        grads = meta_gradient(meta_sgd(), loss_fn, params)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))
        if model.head:
            anil(model).init(params)  # which refuses a head that is not there
    exec(dropout, names)

    def keyed(batch):
        return names["Keyed"](*batch, jax.random.split(KEY, len(batch.inputs)))

    found = episode()
    found = found._replace(support=keyed(found.support), query=keyed(found.query))
    grads = meta_gradient(meta_sgd(), names["keyed_loss"], names["model"].init(KEY), found)
    assert np.isfinite(np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])).all()


class Net(nn.Module):
    """A hidden layer with something between it and a last layer of some name."""

    between: str = ""
    last: str = "head"

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(2, name="hidden")(x)
        if self.between == "statistics":
            x = nn.BatchNorm(use_running_average=not train)(x)
        if self.between == "dropout":
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(1, name=self.last)(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pytree:
    """Like an Equinox module: called on one example, with leaves that are no parameters."""

    body: Any
    head: Any
    activation: Any = jnp.tanh
    count: Any = 3
    rate: Any = 0.5

    def __call__(self, x, scale=1.0):
        assert x.ndim == 1
        return scale * self.rate * self.activation(self.body @ x) @ self.head


class WithState(nnx.Module):
    """Batch norm and dropout, which change what is no parameter in training."""

    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x)))


BODY, HEAD = jnp.ones((2, 3)), jnp.ones((2, 1))
PYTREE = Pytree(BODY, HEAD)
PAIR = (lambda key, x: {"head": jnp.ones((x.shape[-1], 1))}, lambda params, x: x @ params["head"])
MODULES = {
    "linen": (Net(), {"example": EXAMPLE}, {"hidden", "head"}),
    "nnx": (WithState(nnx.Rngs(0)), {"example": EXAMPLE}, {"norm", "head"}),
    "pytree": (PYTREE, {"scale": 2.0}, {"body", "head"}),
    "pair": (PAIR, {"example": EXAMPLE}, {"head"}),
    "model": (Model(lambda key: {"head": jnp.ones((3, 1))}, PAIR[1]), {}, {"head"}),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("make", [lambda model: meta_sgd(), anil])
def test_what_a_user_has_becomes_a_model_that_every_learner_takes(name, make):
    module, options, layers = MODULES[name]
    if isinstance(module, WithState):
        module.eval()
    model = as_model(module, **options)
    params = model.init(KEY)
    assert set(entries(params)) == layers and model.head == ("head",)
    assert model.apply(params, jnp.ones((5, 3))).shape == (5, 1)
    grads = meta_gradient(make(model), regression(model), params)
    chex.assert_trees_all_equal_shapes(grads, params)
    chex.assert_tree_all_finite(grads)
    assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))


def test_a_callable_pytree_is_the_function_that_it_is():
    x = jnp.arange(6.0).reshape(2, 3) / 6
    model = as_model(PYTREE)
    expected = jnp.stack([PYTREE(x[0]), PYTREE(x[1])])
    np.testing.assert_allclose(model.apply(model.init(KEY), x), expected, rtol=1e-6)
    assert len(jax.tree.leaves(model.init(KEY))) == 2


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Net("statistics"), {}, ["batch_stats", "docs/own_model.md"]),
        (Net("statistics"), {"train": False}, ["batch_stats", "docs/own_model.md"]),
        (Net("dropout"), {}, ["dropout", "docs/own_model.md"]),
        (Nothing(), {}, ["no parameters"]),
        (Net(), {"head": ("output",)}, ["output", "hidden", "head"]),
        (Net(), {"example": None}, ["example"]),
        (WithState(nnx.Rngs(0)), {}, ["norm/mean", "drop/rngs/count", ".eval()"]),
        (nnx.Dropout(0.5), {}, ["no parameters"]),
        (PYTREE, {"head": "output"}, ["output", "body, head"]),
        (Net, {}, ["type", "docs/own_model.md"]),
        (jnp.tanh, {}, ["docs/own_model.md"]),
        ({"head": jnp.ones(3)}, {}, ["dict", "docs/own_model.md"]),
    ],
)
def test_what_a_model_has_no_place_for_is_refused_in_one_line(module, options, words):
    with pytest.raises(UserError) as refused:
        as_model(module, **{"example": EXAMPLE} | options)
    assert all(word in str(refused.value) for word in words)
    assert "\n" not in str(refused.value)


def test_dropout_can_be_left_out_and_a_head_is_found_or_named():
    assert as_model(Net("dropout"), EXAMPLE, train=False).head == ("head",)
    assert as_model(Net(last="output"), EXAMPLE, head=("output",)).head == ("output",)
    without = as_model(Net(last="output"), EXAMPLE)
    assert without.head == ()
    with pytest.raises(UserError, match="head"):
        anil(without)
