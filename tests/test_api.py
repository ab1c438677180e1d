"""The public names: lazy, complete, documented, and never hidden by modules of the same name."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt

PACKAGES = ["learners", "meta_gradients", "models", "optimizers", "tasks"]
EXPORTS = [(metaopt, name) for name in metaopt.__all__] + [
    (module, name)
    for module in map(importlib.import_module, (f"metaopt.{name}" for name in PACKAGES))
    for name in module.__all__
]


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()


def test_the_package_alone_imports_neither_jax_nor_anything_else_that_is_slow():
    code = (
        "import sys, time; began = time.perf_counter(); import metaopt; "
        "seconds = time.perf_counter() - began; "
        "print(*{'jax', 'flax', 'optax', 'numpy', 'scipy'} & set(sys.modules), seconds)"
    )
    found = run(code).split()
    assert len(found) == 1
    print(f"import metaopt: {float(found[0]):.3f} s")


def test_dir_lists_the_public_names_and_no_other():
    assert dir(metaopt) == sorted(metaopt.__all__)
    for name in metaopt.__all__:
        assert name == "__version__" or name in (metaopt.__doc__ or ""), f"document {name}"
    with pytest.raises(AttributeError, match="InnerLoop"):
        metaopt.InnerLop  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(("module", "name"), EXPORTS, ids=lambda x: getattr(x, "__name__", x))
def test_every_public_name_is_there_and_documented(module, name):
    value = getattr(module, name)
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value):
        text = inspect.getdoc(value) or ""
        # NamedTuples and dataclasses have a signature for a docstring where they have none.
        assert len(text.split()) > 3 and not text.startswith(f"{name}("), f"document {name}"


def test_type_checkers_see_the_names_that_are_imported_late():
    tree = ast.parse(Path(metaopt.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name for node in imports for alias in node.names}
    assert seen == set(metaopt.__all__) - {"__version__"}
    assert (Path(metaopt.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", ["fit", "evaluate"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(name):
    module = importlib.import_module(f"metaopt.{name}")
    assert isinstance(module, types.ModuleType)
    assert getattr(metaopt, name) is getattr(module, name)
    assert run(f"import metaopt.{name}, metaopt; print(callable(metaopt.{name}))") == "True"


def test_a_notebook_trains_and_judges_through_public_names_alone():
    problem_of = metaopt.tasks.linear(metaopt.tasks.LinearConfig(dim=2, num_support=4, num_query=4))
    model = metaopt.as_model(
        (lambda key: {"head": jnp.zeros((2, 1))}, lambda params, x: x @ params["head"])
    )
    problem = metaopt.Problem(problem_of, model, metaopt.losses.regression(model))
    learner = metaopt.learners.meta_sgd(optax.sgd)
    inner = metaopt.InnerLoop(num_steps=2)
    fitted = metaopt.fit(
        problem,
        learner,
        metaopt.meta_gradients.first_order,
        inner=inner,
        outer=metaopt.OuterConfig(rates_learning_rate=0.02),
        config=metaopt.FitConfig(num_steps=30, tasks_per_step=16, num_devices=1),
    )
    found = [
        metaopt.evaluate(
            problem,
            learner,
            meta_params,
            {"inner_learning_rate": 0.1},
            inner=inner,
            num_steps=3,
            num_episodes=12,
            num_devices=1,
        )
        for meta_params in (learner.init(model.init(jax.random.key(0))), fitted.meta_params)
    ]
    before, after = found
    assert after.losses.shape == (12, 4) and len(after.intervals) == 4
    np.testing.assert_allclose(after.losses.mean(0), [i.mean for i in after.intervals], rtol=1e-6)
    assert after.intervals[2].mean < before.intervals[2].mean
    assert 0 < after.intervals[2].ci95 < np.inf
    with pytest.raises(metaopt.UserError, match="split"):
        metaopt.evaluate(problem, learner, {}, {}, split="train")  # type: ignore[arg-type]
