"""Few-shot classification of Omniglot's characters: MAML, its relatives and MAML++.

The protocol is that of Finn et al., 2017 (MAML, arXiv:1703.03400): 5-way with 1 inner step at
rate 0.4, 32 tasks a meta-batch, tested with 3 steps; 20-way trained and tested with 5 steps at
rate 0.1, 16 tasks; four convolutions of 64 filters, Adam at 0.001, 60 000 meta-steps; as many
query as support drawings. Beside it the better one: MAML++ (Antoniou et al., 2019,
arXiv:1810.09502), with 5 steps and all its parts, each of which is a row of its own for --rows:
the multi-step loss, per-layer-per-step rates, per-step normalisation, annealing of the
derivative's order, and a cosine of the outer rate.

The split is by characters, 1100 for training, 100 for validation (not used) and 423 for the
test, and every character of an episode is turned by a multiple of 90 degrees, in the test too:
see `metaopt.tasks.images`. Batch norm normalises a batch by its own statistics. On the query that
is transductive: the prediction for one image uses the others, N of each N-way round, which
raises scores; published MAML numbers share it. The columns called non-transductive judge the same
adapted parameters with the statistics of the support, which training never did.

    python -m experiments.table_omniglot --source FOLDER      # of npz files; about 25 minutes on
                                                              # two cores, 5-way 1-shot
    python -m experiments.table_omniglot                      # TensorFlow Datasets' omniglot
    python -m experiments.table_omniglot --preset gpu         # four settings, the papers' length
    python -m experiments.table_omniglot --preset smoke       # two tiny rows, to see that it works
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.table_omniglot.config import CHOSEN_BY, Config, Setting, parse_setting, preset
from experiments.table_omniglot.report import Report
from experiments.table_omniglot.rows import Row, make_rows
from metaopt import evaluate, losses, meta_gradients, models, parallel
from metaopt.cli import command_line
from metaopt.diagnostics import feasible
from metaopt.optimizers.outer import outer_optimizer
from metaopt.outer_step import check_groups, init_state, make_meta_step
from metaopt.self_improvement.drop_in import trainer
from metaopt.tasks.images import ImagesConfig, images
from metaopt.training.fingerprint import of_step
from metaopt.training.loop import TrainConfig, Training
from metaopt.training.runs import open_run
from metaopt.types import (
    Array,
    Batch,
    Episode,
    Estimator,
    LossFn,
    MetaParams,
    Model,
    Params,
    TaskFamily,
)


class Problem(NamedTuple):
    """What all rows of a column share.

    Attributes:
      setting: the column.
      model: the network.
      by_support: the same network with batch norm by the statistics of the support, which
        stands first in its batch.
      loss_fn: the model's cross-entropy.
      family: ``(support, query) drawings of a character -> TaskFamily``.
    """

    setting: Setting
    model: Model
    by_support: Model
    loss_fn: LossFn
    family: Callable[[int, int], TaskFamily]


def make_problem(config: Config, setting: Setting) -> Problem:
    """The network, the tasks and the test of a column."""

    @functools.cache
    def family(shots: int, query_shots: int) -> TaskFamily:
        return images(
            ImagesConfig(
                source=config.source,
                ways=setting.ways,
                shots=shots,
                query_shots=query_shots,
                image_size=config.image_size,
                num_train_characters=config.num_train_characters,
                num_valid_characters=config.num_valid_characters,
            )
        )

    shape = (config.image_size, config.image_size, 1)
    network = functools.partial(models.conv, shape, setting.ways, config.filters)
    model, by_support = network(), network(num_reference=setting.ways * setting.shots)
    return Problem(setting, model, by_support, losses.classification(model), family)


def make_test(config: Config, problem: Problem) -> Episode:
    """The episodes that are reported."""
    shots = problem.setting.shots
    family = problem.family(shots, shots)
    return family.test.sample(jax.random.key(config.eval_seed), config.test_episodes)


def accuracies(problem: Problem) -> evaluate.MeasureFn:
    """``(params, episode) -> [2]``: transductive, and by the statistics of the support."""

    def measure(params: Params, episode: Episode) -> Array:
        support = episode.support.inputs

        def after_support(params: Params, inputs: Array) -> Array:
            both = jnp.concatenate([support, inputs])
            return problem.by_support.apply(params, both)[support.shape[0] :]

        by_support = problem.by_support._replace(apply=after_support)
        found = [losses.accuracy(m)(params, episode.query) for m in (problem.model, by_support)]
        return jnp.stack(found)

    return measure


def phases(row: Row, meta_steps: int) -> list[tuple[Estimator, int]]:
    """Estimators with the meta-step up to which each is used, in order."""
    first = [(meta_gradients.first_order, row.first_order_steps)] if row.first_order_steps else []
    return [*first, (row.estimator, meta_steps)]


def train_row(config: Config, problem: Problem, row: Row, seed: int, directory: Path) -> MetaParams:
    """What the row has learned with a seed; goes on from its latest checkpoint."""
    devices = parallel.default_devices(config.num_devices)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    learner, outer_opt = row.learner(problem.model), outer_optimizer(row.outer)
    tasks = problem.family(*row.drawings).train
    hparams = row.outer.hparams() | inner_hparams(row)
    state = init_state(data_key, problem.model.init(init_key), learner, outer_opt, hparams)
    state = parallel.replicate(state, devices)

    def sample(i: int) -> Episode:
        episodes = tasks.sample(jax.random.fold_in(data_key, i), row.tasks_per_step)
        return parallel.split_over_devices(episodes, len(devices))

    def compiled(estimator: Estimator) -> Callable:
        estimate = estimator(learner, problem.loss_fn, row.inner)
        step = make_meta_step(
            estimate,
            outer_opt,
            tasks_at_a_time=config.tasks_at_a_time,
            axis_name=parallel.AXIS,
            annealing_steps=row.annealing_steps,
        )
        return parallel.parallel_step(step, devices)

    name, several = training_name(row, problem.setting, seed), phases(row, config.meta_steps)
    for number, (estimator, until) in enumerate(several, start=1):
        step_fn = compiled(estimator)
        fixed = command_line.as_saved(config)
        fixed |= {"rows": row.name, "seeds": seed, "settings": problem.setting.column}
        training = Training(
            # Each begins where the one before has ended, and has checkpoints of its own.
            name=f"{name}, phase {number}" if len(several) > 1 else name,
            state=state,
            step_fn=step_fn,
            sample=sample,
            tasks_per_step=row.tasks_per_step,
            tokens_per_task=problem.setting.ways * sum(row.drawings),
            fingerprint=of_step(fixed, step_fn, state, sample(0)),
        )
        length = TrainConfig(
            num_steps=until,
            log_every=max(1, config.meta_steps // 100),
            checkpoint_every=config.checkpoint_every,
            keep_last=1,
        )
        state = trainer(config.improve)(training, length, directory).state
    return state.meta_params


def training_name(row: Row, setting: Setting, seed: int) -> str:
    """Of a row's checkpoints: with signs in words, since names of files have none."""
    return f"{row.name.replace('+', ' plus')}, {setting.column}, seed {seed}"


def inner_hparams(row: Row) -> dict[str, np.float32]:
    """The inner rate of a row."""
    return {"inner_learning_rate": np.float32(row.inner_rate)}


def curves_of_row(
    config: Config, problem: Problem, row: Row, meta_params: MetaParams, test: Episode
) -> np.ndarray:
    """Accuracies after 0, 1, 2 ... inner steps, ``[E, steps + 1, 2]``, see `accuracies`."""
    learner = (row.judged or row.learner)(problem.model)
    curves = evaluate.make_curves(
        learner,
        problem.loss_fn,
        row.inner,
        max(config.max_inner_steps, row.tested),
        parallel.default_devices(config.num_devices),
        20,
        measure=accuracies(problem),
    )
    return curves(meta_params, inner_hparams(row), test)


def check(config: Config, problem: Problem, rows: list[Row]) -> None:
    """Raises UserError where what the config asks for cannot be computed."""
    num_devices = len(parallel.default_devices(config.num_devices))
    ways, shots = problem.setting
    for row in rows:
        parallel.check_divides(row.tasks_per_step, num_devices)
        check_groups(row.tasks_per_step // num_devices, config.tasks_at_a_time)
        feasible.check(
            [(row.learner(problem.model), row.estimator, row.inner)],
            problem.model.init,
            problem.loss_fn,
            *(drawings(config, ways * number) for number in row.drawings),
            num_episodes=row.tasks_per_step,
        )
    size = feasible.num_bytes(2 * config.test_episodes, drawings(config, ways * shots))
    feasible.check_bytes(size, f"to hold {config.test_episodes:,} tests", "lower their number")


def drawings(config: Config, number: int) -> Batch:
    """The shapes of so many of them."""
    shape = (number, config.image_size, config.image_size, 1)
    inputs: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    targets: Any = jax.ShapeDtypeStruct((number,), jnp.int32)
    return Batch(inputs, targets)


def run(config: Config) -> None:
    """Trains and tests the rows in every setting, and writes the table."""
    parallel.set_up_backend()
    trainer(config.improve)  # or its memory is found wrong when rows are trained
    problems = [make_problem(config, parse_setting(name)) for name in config.settings]
    for problem in problems:  # all that can be wrong, before anything is written
        check(config, problem, make_rows(config, problem.setting))
    for problem in problems:
        shots = problem.setting.shots
        for sizes in ((shots, shots), *(r.drawings for r in make_rows(config, problem.setting))):
            problem.family(*sizes)
    place = open_run(
        config.root,
        "table_omniglot",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    command = command_line.command("table_omniglot", config, preset, CHOSEN_BY)
    report = Report(place, config, command)
    for problem in problems:
        test = make_test(config, problem)
        for row in make_rows(config, problem.setting):
            began = time.monotonic()
            found = []
            for seed in config.seeds:
                meta_params = train_row(config, problem, row, seed, place.directory)
                found.append(curves_of_row(config, problem, row, meta_params, test))
            report.add(problem.setting, row, np.stack(found), time.monotonic() - began)
    report.finish()
