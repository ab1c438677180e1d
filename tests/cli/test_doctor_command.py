import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import quadratic

from metaopt.cli import command_line, doctor
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients import reverse
from metaopt.types import Learner, Model, TaskFamily, TaskSplit

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
    """The command, on small problems by default."""
    with command_line.one_line_exits(args):
        doctor.run(command_line.parse(doctor.Config, args, "metaopt doctor", "", SMALL))


@pytest.fixture(autouse=True)
def of_my_own(monkeypatch):
    """This module under the name that a user's own might have."""
    monkeypatch.setitem(sys.modules, "of_my_own", sys.modules[__name__])


def test_the_command_examines_in_both_dtypes(capsys):
    main(["--estimator", "first_order"])
    shown = capsys.readouterr().out
    assert "first_order against reverse" in shown and "float64" in shown and "float32" in shown
    assert "first_order differs from reverse" in shown
    assert "reverse agrees with finite differences along 2 directions" in shown
    assert "time of first_order" in shown


def my_problem():
    """Least squares, whose inner loop has a closed form."""
    split = TaskSplit(lambda key, num_tasks: quadratic.episodes(num_tasks))
    model = Model(lambda key: quadratic.PARAMS, lambda params, inputs: inputs @ params["head"])
    return Problem(TaskFamily("quadratic", split, split, split), model, quadratic.loss)


def my_estimator(learner, loss_fn, inner, *, scale: float = 1.0):
    estimate = reverse(learner, loss_fn, inner)

    def scaled(*arguments):
        grads, metrics = estimate(*arguments)
        return jax.tree.map(lambda g: scale * g, grads), metrics

    return scaled


def one_step(learner, loss_fn, inner):
    """The textbook gradient of one step of MAML, which is right for one step alone."""

    def estimate(meta_params, hparams, episode, key):
        def objective(meta_params):
            optimizer, start = learner.inner_opt(meta_params, hparams), learner.start(meta_params)
            updates, _ = optimizer.update(
                jax.grad(loss_fn)(start, episode.support), optimizer.init(start), start
            )
            return loss_fn(optax.apply_updates(start, updates), episode.query)

        loss, grads = jax.value_and_grad(objective)(meta_params)
        return grads, {"loss": loss}

    return estimate


def my_optimizer(learning_rate):
    return optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(learning_rate))


def my_learner(inner_optimizer, num_steps):
    """A start, and a rate for all parameters together; the rate falls as a scalar says."""

    def inner_opt(meta_params, hparams):
        rate = jnp.exp(meta_params["log_rate"]) * hparams["inner_learning_rate"]
        return inner_optimizer(lambda step: rate * (1 - hparams["fall"] * step / num_steps))

    return Learner(
        init=lambda params: {"params": params, "log_rate": jnp.zeros((), params["head"].dtype)},
        start=lambda meta_params: meta_params["params"],
        inner_opt=inner_opt,
        learned=("log_rate",),
    )


OWN = [
    *("--problem", "of_my_own:my_problem", "--learner", "of_my_own:my_learner"),
    *("--inner-optimizer", "of_my_own:my_optimizer", "--inner-learning-rate", "0.2"),
    *("--hparams", "fall=0.5", "--rounds", "0"),
]


def test_whether_an_estimator_of_ones_own_is_right(capsys):
    """On a learner, an optimiser and a problem of one's own, as the README promises."""
    main([*OWN, "--estimator", "of_my_own:one_step", "--inner.num-steps", "1"])
    shown = capsys.readouterr().out
    assert "one_step agrees with reverse" in shown and "error of log_rate" in shown
    assert "one_step agrees with finite differences" in shown and "disagrees" not in shown
    main([*OWN, "--estimator", "of_my_own:one_step", "--inner.num-steps", "3"])
    shown = capsys.readouterr().out
    assert "one_step differs from reverse" in shown
    assert "one_step disagrees with finite differences" in shown
    assert "reverse agrees with finite differences" in shown


def outer_problem():
    """Judged by another loss than that of the inner loop."""
    return my_problem()._replace(outer_loss=lambda params, batch: jnp.sum(params["head"] ** 4))


def test_an_outer_loss_of_a_problem_of_ones_own(capsys):
    args = ["--problem", "of_my_own:outer_problem", *OWN[2:]]
    main([*args, "--estimator", "mixed_mode"])
    shown = capsys.readouterr().out
    assert "mixed_mode agrees with finite differences" in shown and "disagrees" not in shown
    with pytest.raises(SystemExit):
        main([*args, "--estimator", "of_my_own:one_step"])
    assert "of_my_own:one_step must take outer_loss by name" in capsys.readouterr().err


def test_an_option_of_an_estimator_of_ones_own(capsys):
    main([*OWN, "--estimator", "of_my_own:my_estimator"])
    assert "my_estimator agrees with reverse" in capsys.readouterr().out
    main([*OWN, "--estimator", "of_my_own:my_estimator", "--options", "scale=2"])
    assert "my_estimator differs from reverse" in capsys.readouterr().out


@pytest.mark.parametrize("args", [[], OWN])
def test_an_annealed_query_loss_is_examined(args, capsys):
    main(["--inner.query-loss", "annealed", "--rounds", "0", *args])
    shown = capsys.readouterr().out
    assert "mixed_mode agrees with finite differences" in shown and "disagrees" not in shown


def three():
    return 3


def of_one_argument(learner):
    return learner


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--problem", "nothing"], "module:function"),
        (["--problem", "no_such_module:problem"], "no_such_module"),
        (["--problem", "of_my_own:missing"], "missing"),
        (["--problem", "of_my_own:three"], "must return a metaopt.fit.Problem, not"),
        (["--problem", "of_my_own:of_one_argument"], "may take no arguments"),
        (["--learner", "nonsense"], "maml, anil, meta_sgd, per_layer_per_step, or module:function"),
        (["--learner", "of_my_own:three"], "must return a metaopt.types.Learner"),
        (["--learner", "of_my_own:of_one_argument"], "model, inner_optimizer, num_steps, by name"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--inner-optimizer", "nonsense"], "nonsense"),
        (["--inner-optimizer", "chain"], "chain"),
        (["--inner-optimizer", "of_my_own:three"], "must take (learning_rate)"),
        (["--inner-optimizer", "of_my_own:of_one_argument"], "optax.GradientTransformation"),
        (["--hparams", "fall"], "name=value"),
        (["--hparams", "fall=fast"], "finite number"),
        (["--estimator", "truncated", "--options", "window"], "name=value"),
        (["--options", "no_such_option=1"], "no_such_option"),
        (["--estimator", "truncated", "--options", "window=two"], "window"),
        (["--estimator", "truncated", "--options", "window=1.5"], "window"),
        (["--estimator", "truncated", "--options", "grad_fn=None"], "grad_fn"),
        (["--estimator", "implicit", "--options", "solver=lu"], "solver"),
        (["--estimator", "evolution", "--options", "reuse_noise=2"], "reuse_noise"),
        (["--estimator", "nonsense"], "module:function"),
        (["--estimator", "of_my_own:of_one_argument"], "must take (learner, loss_fn, inner_loop)"),
        (["--estimator", "of_my_own:my_estimator", "--options", "scale=no"], "scale"),
        (["--learner", "meta_sgd", "--estimator", "reptile"], "log_rates"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "learner"),
    [("mlp", "anil"), ("gru", "meta_sgd"), ("transformer", "per_layer_per_step")],
)
def test_models_and_learners_fit_one_another(model, learner):
    config = doctor.Config(model=model, learner=learner, width=4, num_support=2, length=5)
    problem = doctor.make_problem(config)
    found = doctor.make_learner(config, problem)
    params = problem.model.init(jax.random.key(0))
    episode = jax.tree.map(lambda x: x[0], problem.family.train.sample(jax.random.key(0), 1))
    loss = jax.eval_shape(problem.loss_fn, params, episode.query)
    assert loss.shape == () and found.start(found.init(params)) is params


def test_options_are_bound_to_the_estimator():
    config = doctor.Config(estimator="truncated", options=("window=2",))
    bound = doctor.make_estimator(config)
    assert bound.func.__name__ == "truncated" and bound.keywords == {"window": 2}
