"""Few-shot regression of sinusoids: MAML and Meta-SGD as published, better learners beside them.

`--protocol li` makes table 1 of Li et al., 2017 (Meta-SGD, arXiv:1707.09835), meta-training
with 5 shots: `y = A sin(ωx + b)`, A in [0.1, 5], ω in [0.8, 1.2], b in [0, π], x in [-5, 5];
an MLP of 2 x 40 ReLU; one inner step; 60 000 meta-steps of 4 tasks with 10 query examples.
MAML steps at 0.01; Meta-SGD's rates, of either sign, start at one number between 0.005 and
0.1. The outer optimiser of both is Finn et al.'s: Adam at 0.001, no clipping. The test has 1000
curves with 10 supports each (the paper: 100 with 100), and judges by the mean squared error at
100 evenly spaced x. Published: MAML 1.13 / 0.85 / 0.71 and Meta-SGD 0.90 / 0.63 / 0.50 for
5 / 10 / 20 shots; expect about 1.16 / 0.86 / 0.69 and 0.86 / 0.59 / 0.45. The full text was
not at hand: query examples, meta-batch, first weights and the outer optimiser are those of the
MAML code as far as they are known, and a difference there is one in the protocol.

`--protocol finn` draws curves over inner steps, as figure 3 of Finn et al., 2017 (MAML): ω = 1,
10 shots, 70 000 meta-steps of 25 tasks, one inner step at 0.001, the default of the released
code. At the paper's 0.01 the first steps are better (0.53 and 0.41) and later ones diverge on
some of the curves.

    python -m experiments.table_sinusoid                     # about ten minutes on two cores
    python -m experiments.table_sinusoid --protocol finn     # about six
    python -m experiments.table_sinusoid --preset smoke      # tiny, to see that all works
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.table_sinusoid.config import CHOSEN_BY, Config, preset
from experiments.table_sinusoid.report import Report
from experiments.table_sinusoid.rows import Row, inner_hparams, make_rows
from metaopt import evaluate, losses, meta_gradients, models, parallel
from metaopt.cli import command_line
from metaopt.diagnostics import feasible
from metaopt.optimizers.outer import outer_optimizer
from metaopt.outer_step import MetaStep, init_state, make_meta_step
from metaopt.self_improvement.drop_in import reported_losses, trainer
from metaopt.tasks.sinusoid import SinusoidConfig, evaluation_episodes, sinusoid
from metaopt.training.fingerprint import of_step
from metaopt.training.loop import StepFn, TrainConfig, Training
from metaopt.training.runs import open_run
from metaopt.types import Batch, Episode, Key, LossFn, MetaParams, Model, Params

HELD_OUT_BATCHES = 64
RATES_TRIED = (0.001, 0.003, 0.01, 0.03)  # for the row that is not trained to adapt


class Problem(NamedTuple):
    """What all rows share: the model, its loss and the test by the number of shots."""

    model: Model
    loss_fn: LossFn
    tests: dict[int, Episode]


def make_problem(config: Config) -> Problem:
    """The regression model of Finn et al., 2017, and the test of the config."""
    model = models.mlp(1, 1)
    return Problem(model, losses.regression(model), make_tests(config, config.eval_seed))


def initial_params(model: Model, row: Row, key: Key) -> Params:
    """The model's initialisation, or truncated normal weights with biases of zero."""
    params = model.init(key)
    if row.weight_std is None:
        return params
    leaves, treedef = jax.tree.flatten(params)
    draw = jax.nn.initializers.truncated_normal(row.weight_std)
    drawn = [
        draw(key, x.shape, x.dtype) if x.ndim > 1 else jnp.zeros_like(x)
        for key, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def many_steps(step: MetaStep, sample: Callable[[Key], Episode], number: int) -> StepFn:
    """``number`` meta-steps in one compiled call, which is one step of `metaopt.training.loop`.

    Steps of so small a model take less time than a call from the host. Tasks are drawn in
    the call too.

    Returns:
      ``(state, key) -> (state, metrics)``: metrics are means over the meta-steps, and
      ``state.step`` counts calls. The state is donated.
    """

    def call(state, key):
        def body(state, key):
            return step(state, sample(key))

        calls = state.step
        state = state._replace(step=calls * number)
        state, metrics = jax.lax.scan(body, state, jax.random.split(key, number))
        return state._replace(step=calls + 1), jax.tree.map(lambda x: x.mean(0), metrics)

    return jax.jit(call, donate_argnums=0)


def train_row(config: Config, problem: Problem, row: Row, seed: int, directory: Path) -> MetaParams:
    """What the row has learned with a seed; goes on from its latest checkpoint."""
    init_key, data_key = jax.random.split(jax.random.key(seed))
    learner, outer_opt = row.learner(seed), outer_optimizer(row.outer)
    sizes = {name: getattr(config, name) for name in ("num_support", "num_query")}
    family = sinusoid(SinusoidConfig(**sizes, vary_frequency=config.protocol == "li"))
    hparams = row.outer.hparams() | inner_hparams(config, row, seed)
    start = initial_params(problem.model, row, init_key)
    state = init_state(data_key, start, learner, outer_opt, hparams)
    step = make_meta_step(row.estimator(learner, problem.loss_fn, row.inner), outer_opt)
    num_calls = config.meta_steps // config.steps_per_call

    def sample(key: Key) -> Episode:
        return family.train.sample(key, config.tasks_per_step)

    held_out = jax.random.split(jax.random.fold_in(data_key, num_calls), HELD_OUT_BATCHES)
    step_fn = many_steps(step, sample, config.steps_per_call)
    fixed = command_line.as_saved(config) | {"rows": row.name, "seeds": seed}
    training = Training(
        name=f"{row.name}, seed {seed}",
        state=state,
        step_fn=step_fn,
        sample=lambda call: jax.random.fold_in(data_key, call),
        tasks_per_step=config.tasks_per_step * config.steps_per_call,
        tokens_per_task=config.num_support + config.num_query,
        fingerprint=of_step(fixed, step_fn, state, jax.random.fold_in(data_key, 0)),
        # For the closed loop: the loss of a call is of what it trains on the way.
        evaluate=reported_losses(
            many_steps(step, sample, 1),
            lambda i: held_out[i],  # type: ignore[arg-type]
            len(held_out),
        ),
    )
    length = TrainConfig(num_steps=num_calls, log_every=1, checkpoint_every=20, keep_last=1)
    return trainer(config.improve)(training, length, directory).state.meta_params


def make_tests(config: Config, eval_seed: int) -> dict[int, Episode]:
    """The episodes of a test by the number of shots, all of the same curves."""

    def episodes(shots: int) -> Episode:
        sinusoids = SinusoidConfig(
            num_support=shots,
            num_query=config.test_points,
            vary_frequency=config.protocol == "li",
        )
        return evaluation_episodes(
            sinusoids,
            jax.random.key(eval_seed),
            num_curves=config.test_curves,
            supports_per_curve=config.supports_per_curve,
        )

    return {shots: episodes(shots) for shots in config.test_shots}


def losses_of_row(
    config: Config, problem: Problem, row: Row, seed: int, meta_params: MetaParams
) -> dict[int, np.ndarray]:
    """Losses after 0, 1, 2 ... inner steps, ``[E, steps + 1]``, by the number of shots.

    The row that is not trained to adapt has its rate tuned, for every number of steps, on
    other curves.
    """
    num_steps = config.max_inner_steps if config.protocol == "finn" else row.inner.num_steps
    devices = parallel.default_devices()
    learner = row.learner(seed)
    curves = evaluate.make_curves(learner, problem.loss_fn, row.inner, num_steps, devices, 500)
    if row.estimator is meta_gradients.joint:
        ((shots, test),) = problem.tests.items()
        valid = make_tests(config, config.eval_seed + 1)[shots]
        tuned = evaluate.tuned_curves(curves, meta_params, {}, RATES_TRIED, valid, test)
        return {shots: tuned.losses}
    hparams = inner_hparams(config, row, seed)
    return {shots: curves(meta_params, hparams, test) for shots, test in problem.tests.items()}


def check(config: Config, rows: Sequence[Row]) -> None:
    """Raises UserError where what the config asks for cannot be computed."""
    model = models.mlp(1, 1)
    points: Any = jax.ShapeDtypeStruct((config.num_query, 1), jnp.float32)
    shots: Any = jax.ShapeDtypeStruct((config.num_support, 1), jnp.float32)
    feasible.check(
        [(row.learner(config.seeds[0]), row.estimator, row.inner) for row in rows],
        model.init,
        losses.regression(model),
        Batch(shots, shots),
        Batch(points, points),
        config.tasks_per_step,
    )
    tested = config.test_curves * config.supports_per_curve
    size = 8 * tested * (sum(config.test_shots) + len(config.test_shots) * config.test_points)
    feasible.check_bytes(size, f"to hold {tested:,} tests", "lower their number or size")


def run(config: Config) -> None:
    """Trains and tests the rows with every seed, and writes the table."""
    parallel.set_up_backend()
    trainer(config.improve)  # or its memory is found wrong when rows are trained
    rows = make_rows(config)
    check(config, rows)
    place = open_run(
        config.root,
        "table_sinusoid",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    command = command_line.command("table_sinusoid", config, preset, CHOSEN_BY)
    report = Report(place, config, command)
    problem = make_problem(config)
    for row in rows:
        began = time.monotonic()
        found = []
        for seed in config.seeds:
            meta_params = train_row(config, problem, row, seed, place.directory)
            found.append(losses_of_row(config, problem, row, seed, meta_params))
        report.add(row.name, row.inner.num_steps, found, time.monotonic() - began)
    report.finish()
