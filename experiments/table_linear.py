"""Linear regression, the teaching case: how far is each learner from the best possible one?

Tasks are `y = w·x + noise` with `w` and `x` standard normal, and the model is linear. The best
learner is then known: ridge regression, the posterior mean of `w`. The prior of `w` is symmetric,
so the best start is zero, which MAML (Finn et al., 2017) and joint pretraining both find. Only
rates are left to learn: Meta-SGD (Li et al., 2017), with one set of them or one for each step.

    python -m experiments.table_linear                     # under two minutes on two cores
    python -m experiments.table_linear --preset smoke      # tiny, to see that all works

Expect an error of 0.0265 after 5 steps from zero, 0.025 and 0.022 with learned rates, and 0.0115 of
the closed form. Read this table to learn how one is made; `experiments.harness` does the rest.
"""

import dataclasses

import numpy as np

from experiments import harness
from metaopt import learners, losses, meta_gradients, models
from metaopt.comparison import Comparison, ComparisonConfig, Row
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.reporting import plots
from metaopt.statistics import interval
from metaopt.tasks.linear import LinearConfig, bayes_loss, linear

LIMIT = "closed form"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Linear regression: learners beside the best possible one.

    Attributes:
      tasks: Size of the tasks, and their noise.
      inner: The inner loop.
      outer: The outer optimiser.
      comparison: Length of the training, and what it is judged on.
    """

    tasks: LinearConfig = LinearConfig(dim=8, num_support=64)  # noqa: RUF009
    inner: InnerLoop = InnerLoop()  # noqa: RUF009
    outer: OuterConfig = OuterConfig(  # noqa: RUF009
        learning_rate=0.01, rates_learning_rate=0.003, warmup_steps=10
    )
    comparison: ComparisonConfig = ComparisonConfig(  # noqa: RUF009
        tasks_per_step=64,
        inner_rates=(0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
        valid_episodes=1000,
        test_episodes=4000,
    )


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config, sizes = Config(), {"smoke": (4, 8), "cpu": (2000, 4000), "gpu": (20_000, 100_000)}
    steps, episodes = sizes[preset]
    comparison = dataclasses.replace(config.comparison, meta_steps=steps, test_episodes=episodes)
    return dataclasses.replace(config, preset=preset, comparison=comparison)


def make_rows(config: Config) -> list[Row]:
    """The learners that the config asks for."""
    maml, steps = learners.maml(), config.inner.num_steps
    reverse, per_step = meta_gradients.reverse, learners.meta_sgd(num_steps=steps)
    rows = [
        Row("random init", maml, None),
        Row("joint pretraining", maml, meta_gradients.joint),
        Row("MAML", maml, reverse),
        Row("Meta-SGD", learners.meta_sgd(), reverse),
        Row("Meta-SGD, rates for each step", per_step, reverse),
    ]
    return harness.select(rows, config.rows)


def run(config: Config) -> None:
    """Trains and tests the rows, and writes the table and the figure."""
    train_fn, rows = harness.begin(config), make_rows(config)
    model = models.mlp(config.tasks.dim, 1, hidden=())
    problem = Problem(linear(config.tasks), model, losses.regression(model))
    harness.check_rows(rows, problem, config.inner, config.comparison)
    comparison = Comparison(problem, config.inner, config.outer, config.comparison, train_fn)
    table = harness.TableRun(
        "table_linear",
        config,
        presets,
        table="linear",
        unit="mean squared error",
        rows=[row.name for row in rows],
        seeds=[config.comparison.seed],
        episodes=config.comparison.test_episodes,
    )
    tasks, steps = np.asarray(comparison.test.task), config.inner.num_steps
    limit_E = np.asarray(bayes_loss(config.tasks, comparison.test), np.float64)
    train = harness.compare({"linear": comparison}, table.directory)
    for row in table.pending(rows):
        (result,) = train(row)
        table.add_steps(row.name, result.curves, tasks)
        excess_ExK = result.curves - limit_E[:, None]  # paired, task by task
        table.add(row.name, f"above the {LIMIT}", interval(excess_ExK[:, steps], tasks))
        table.keep(row.name, excess=excess_ExK)
    nothing = np.zeros(1 + config.comparison.max_inner_steps)
    table.add_steps(LIMIT, limit_E[:, None] + nothing, tasks, limit=True)
    plots.panels(
        table.directory / "curves.png",
        {"New tasks": {r.name: harness.curve(table.kept(r.name)["excess"], tasks) for r in rows}},
        x_label="inner steps",
        y_label=f"mean squared error above the {LIMIT}",
        y_scale="log",
    )
    table.finish([f"above the {LIMIT}: after {steps} inner steps, as many as in training"])


if __name__ == "__main__":
    harness.main("table_linear", run, presets, __doc__)
