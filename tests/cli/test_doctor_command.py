import sys

import jax
import numpy as np
import pytest
import quadratic

from metaopt.cli import command_line, doctor
from metaopt.diagnostics.doctor import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import reverse

SMALL = doctor.Config(
    model="bigram",
    learner="maml",
    inner_optimizer="sgd",
    inner_learning_rate=1.0,
    vocab_size=4,
    length=6,
    inner=InnerLoop(num_steps=2, unroll=False),
    directions=2,
    rounds=2,
)


def main(args):
    command_line.main("doctor", doctor.run, doctor.Config, lambda _: SMALL, (), "", args)


def test_the_command_examines_in_both_dtypes(capsys):
    main(["--estimator", "first_order"])
    shown = capsys.readouterr().out
    assert "first_order against reverse" in shown and "float64" in shown and "float32" in shown
    assert "first_order differs from reverse" in shown
    assert "reverse agrees with finite differences along 2 directions" in shown
    assert "time of first_order" in shown


def my_problem():
    return Problem(
        maml(),
        quadratic.loss,
        quadratic.PARAMS,
        quadratic.episode(),
        {"inner_learning_rate": 0.1},
    )


def no_problem():
    return 3


def my_estimator(learner, loss_fn, inner, *, scale: float = 1.0):
    estimate = reverse(learner, loss_fn, inner)

    def scaled(*arguments):
        grads, metrics = estimate(*arguments)
        return jax.tree.map(lambda g: scale * g, grads), metrics

    return scaled


def of_one_argument(learner):
    return learner


def test_an_estimator_of_ones_own(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_my_own", sys.modules[__name__])
    args = ["--estimator", "of_my_own:my_estimator", "--problem", "of_my_own:my_problem"]
    main([*args, "--rounds", "0"])
    assert "my_estimator agrees with reverse" in capsys.readouterr().out
    main([*args, "--rounds", "0", "--options", "scale=2"])
    assert "my_estimator differs from reverse" in capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["--problem", "of_my_own:my_problem"]])
def test_an_annealed_query_loss_is_examined(args, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_my_own", sys.modules[__name__])
    main(["--inner.query-loss", "annealed", "--rounds", "0", *args])
    shown = capsys.readouterr().out
    assert "mixed_mode agrees with finite differences" in shown and "disagrees" not in shown


def test_a_problem_of_ones_own(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_my_own", sys.modules[__name__])
    main(["--problem", "of_my_own:my_problem", "--estimator", "reptile", "--rounds", "0"])
    assert "reptile disagrees with finite differences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--problem", "nothing"], "module:function"),
        (["--problem", "no_such_module:problem"], "no_such_module"),
        (["--problem", "of_my_own:missing"], "missing"),
        (["--problem", "of_my_own:no_problem"], "metaopt.diagnostics.doctor.Problem"),
        (["--inner-optimizer", "nonsense"], "nonsense"),
        (["--inner-optimizer", "chain"], "chain"),
        (["--estimator", "truncated", "--options", "window"], "name=value"),
        (["--options", "no_such_option=1"], "no_such_option"),
        (["--estimator", "truncated", "--options", "window=two"], "window"),
        (["--estimator", "truncated", "--options", "window=1.5"], "window"),
        (["--estimator", "truncated", "--options", "grad_fn=None"], "grad_fn"),
        (["--estimator", "implicit", "--options", "solver=lu"], "solver"),
        (["--estimator", "evolution", "--options", "reuse_noise=2"], "reuse_noise"),
        (["--estimator", "nonsense"], "module:function"),
        (["--estimator", "no_such_module:estimator"], "no_such_module"),
        (["--estimator", "of_my_own:missing"], "missing"),
        (["--estimator", "of_my_own:of_one_argument"], "3 arguments"),
        (["--estimator", "of_my_own:my_estimator", "--options", "scale=no"], "scale"),
        (["--problem", ":my_problem"], "module:function"),
        (["--problem", "..of_my_own:my_problem"], "module:function"),
        (["--problem", "of_my_own:of_one_argument"], "0 arguments"),
        (["--learner", "meta_sgd", "--estimator", "reptile"], "log_rates"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "of_my_own", sys.modules[__name__])
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_module_that_misses_another_one_says_so(tmp_path, monkeypatch):
    (tmp_path / "misses_another.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        doctor.load_problem("misses_another:problem")


@pytest.mark.parametrize(
    ("model", "learner"),
    [("mlp", "anil"), ("gru", "meta_sgd"), ("transformer", "per_layer_per_step")],
)
def test_models_and_learners_fit_one_another(model, learner):
    config = doctor.Config(model=model, learner=learner, width=4, num_support=2, length=5)
    problem = doctor.make_problem(config)
    loss = jax.eval_shape(problem.loss_fn, problem.params, problem.episode.query)
    assert loss.shape == () and np.ndim(problem.hparams["inner_learning_rate"]) == 0
    assert problem.learner.start(problem.learner.init(problem.params)) is problem.params


def test_options_are_bound_to_the_estimator():
    config = doctor.Config(estimator="truncated", options=("window=2",))
    bound = doctor.make_estimator(config)
    assert bound.func.__name__ == "truncated" and bound.keywords == {"window": 2}
