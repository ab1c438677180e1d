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

    python -m experiments.table_omniglot --source FOLDER      # of npz files; 45 minutes on
                                                              # two cores, 5-way 1-shot
    python -m experiments.table_omniglot                      # TensorFlow Datasets' omniglot
    python -m experiments.table_omniglot --preset gpu         # four settings, the papers' length
    python -m experiments.table_omniglot --preset smoke       # two tiny rows, to see that it works

Expect Meta-SGD (98.8 %), MAML and MAML++ at the top and ANIL, Reptile, FOMAML and iMAML (96.0 %)
below them in 5-way 1-shot after the 4000 meta-steps of preset cpu, non-transductive 3 to 5 points
less.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_omniglot.protocol import (
    PRESETS,
    Config,
    FewShot,
    OmniglotRow,
    make_rows,
    presets,
    published,
)
from metaopt import losses, models, parallel
from metaopt.diagnostics import feasible
from metaopt.evaluate import MeasureFn, make_curves
from metaopt.fit import FitConfig, Problem, check_devices, fit
from metaopt.pytrees import digest_of
from metaopt.reporting import plots, tables
from metaopt.statistics import interval
from metaopt.tasks.images import ImagesConfig, images
from metaopt.training.types import TrainFn
from metaopt.types import Array, Batch, Episode, MetaParams, Model, Params, TaskFamily

UNIT = "% accuracy"
MODES = ("", ", non-transductive")
"""What follows the name of a column, in the order of `accuracies`."""
Network = Callable[..., Model]
"""A model as `metaopt.models.conv` makes it, from the same arguments."""


class Column(NamedTuple):
    """What all rows of a column share.

    Attributes:
      few_shot: Number of characters and of drawings of each.
      model: The network.
      by_support: The same network with batch norm by the statistics of the support, which comes
        first in its batch.
      family: ``(support, query) drawings of a character -> TaskFamily``.
    """

    few_shot: FewShot
    model: Model
    by_support: Model
    family: Callable[[int, int], TaskFamily]


class Cell(NamedTuple):
    """A row in a column; each is trained and tested apart."""

    column: Column
    row: OmniglotRow

    @property
    def name(self) -> str:
        """Name of its training, with signs in words, since names of files have none."""
        return f"{self.row.name.replace('+', ' plus')}, {self.column.few_shot.column}"


def make_column(config: Config, few_shot: FewShot, network: Network = models.conv) -> Column:
    """The network and the tasks of a column; drawings are read when they are asked for."""

    base = ImagesConfig(
        source=config.source,
        ways=few_shot.ways,
        image_size=config.image_size,
        num_train_characters=config.num_train_characters,
        num_valid_characters=config.num_valid_characters,
    )

    @functools.cache
    def family(shots: int, query_shots: int) -> TaskFamily:
        return images(dataclasses.replace(base, shots=shots, query_shots=query_shots))

    shape = (config.image_size, config.image_size, 1)
    made = functools.partial(network, shape, few_shot.ways, config.filters)
    return Column(few_shot, made(), made(num_reference=few_shot.ways * few_shot.shots), family)


def make_test(config: Config, column: Column) -> Episode:
    """The episodes that are reported, ``[E, ...]``."""
    shots = column.few_shot.shots
    test = column.family(shots, shots).test
    return test.sample(jax.random.key(config.eval_seed), config.test_episodes)


def accuracies(column: Column) -> MeasureFn:
    """``(params, episode) -> [2]``: transductive, and by the statistics of the support."""

    def measure(params: Params, episode: Episode) -> Array:
        support = episode.support.inputs

        def after_support(params: Params, inputs: Array) -> Array:
            both = jnp.concatenate([support, inputs])
            return column.by_support.apply(params, both)[support.shape[0] :]

        by_support = column.by_support._replace(apply=after_support)
        found = [losses.accuracy(m)(params, episode.query) for m in (column.model, by_support)]
        return jnp.stack(found)

    return measure


def check(config: Config, cell: Cell) -> None:
    """Raises UserError if a cell cannot be computed."""
    (few_shot, model, _, _), row = cell
    support, query, tested = (
        drawings(config, few_shot.ways * number) for number in (*row.drawings, few_shot.shots)
    )
    loss_fn, trained = losses.classification(model), (row.learner, row.estimator, row.inner)
    check_devices(config.num_devices, row.tasks_per_step, config.tasks_at_a_time)
    feasible.check([trained], model.init, loss_fn, support, query, row.tasks_per_step)
    feasible.check([], model.init, loss_fn, tested, tested, config.test_episodes)


def drawings(config: Config, number: int) -> Batch:
    """The shapes of a number of drawings and their labels."""
    shape = (number, config.image_size, config.image_size, 1)
    inputs: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    targets: Any = jax.ShapeDtypeStruct((number,), jnp.int32)
    return Batch(inputs, targets)


def train_cell(
    config: Config, cell: Cell, seed: int, directory: Path, train_fn: TrainFn
) -> MetaParams:
    """What the row has learned from a seed; a training that was stopped resumes."""
    (_, model, _, family), row = cell
    problem = Problem(family(*row.drawings), model, losses.classification(model))
    state, phases = None, row.phases(config.meta_steps)
    for number, (estimator, until) in enumerate(phases, start=1):
        phase = f", phase {number}" if len(phases) > 1 else ""
        state = fit(
            problem,
            row.learner,
            estimator,
            inner=row.inner,
            outer=row.outer,
            config=FitConfig(
                seed=seed,
                num_steps=until,
                tasks_per_step=row.tasks_per_step,
                annealing_steps=row.annealing_steps,
                num_devices=config.num_devices,
                tasks_at_a_time=config.tasks_at_a_time,
                log_every=max(1, config.meta_steps // 100),
                checkpoint_every=config.checkpoint_every,
                keep_last=1,
            ),
            directory=directory,
            # Each starts from the end of the one before, and has checkpoints of its own.
            name=f"{cell.name}, seed {seed}{phase}",
            state=state,
            hparams=None if state else row.hparams,
            train_fn=train_fn,
        ).state
    assert state is not None
    return state.meta_params


def judge(config: Config, cell: Cell, meta_params: MetaParams, test: Episode) -> np.ndarray:
    """Per cent correct after 0, 1, 2 ... inner steps, ``[E, steps + 1, 2]``, see `accuracies`."""
    (_, model, _, _), row = cell
    curves = make_curves(
        row.judged or row.learner,
        losses.classification(model),
        row.inner,
        max(config.max_inner_steps, row.tested),
        parallel.default_devices(config.num_devices),
        20,
        measure=accuracies(cell.column),
    )
    return 100 * curves(meta_params, row.hparams, test)


def notes(config: Config, records: Sequence[tables.Record]) -> list[str]:
    """One line a cell, and one on what is shorter than published."""
    lines = [
        f"{r['row']}, {r['column']}: {r['protocol']}"
        + (f"; {tables.cell_text(r)} beside {r['paper']:g} of {r['source']}" if r["paper"] else "")
        for r in records
        if not r["column"].endswith(MODES[1])
    ]
    full = PRESETS["gpu"]
    if (config.meta_steps, config.filters) != (full.meta_steps, full.filters):
        lines.append(
            f"The papers train for 50 000 to 100 000 meta-steps (MAML: {full.meta_steps}) at a "
            f"constant outer rate of {full.outer.learning_rate:g} (MAML++ with a cosine, Reptile "
            "with a step of 1 that falls to 0), with "
            f"{full.filters} filters and as many query as support drawings; preset gpu is that "
            "protocol."
        )
    lines.append(
        "Transductive: batch norm by the statistics of the query batch, as published. "
        "Non-transductive: the same adapted parameters, by the statistics of the support."
    )
    return lines


def run(config: Config, network: Network = models.conv) -> None:
    """Trains and tests the rows in every column, and writes the table."""
    train_fn = harness.begin(config)
    columns = [make_column(config, FewShot.parse(name), network) for name in config.settings]
    cells = [
        Cell(column, row)
        for column in columns
        for row in make_rows(config, column.few_shot, column.model)
    ]
    for cell in cells:  # all that can be wrong, before anything is written
        check(config, cell)
    for cell in cells:
        cell.column.family(*cell.row.drawings)
    tests = {column.few_shot: make_test(config, column) for column in columns}
    table = harness.TableRun(
        "table_omniglot",
        config,
        presets,
        table="omniglot",
        unit=UNIT,
        seeds=config.seeds,
        episodes=config.test_episodes,
        data=digest_of(list(tests.values())),
    )
    episodes = np.arange(config.test_episodes)
    for cell in table.pending(
        cells, lambda cell: cell.row.name, lambda cell: cell.column.few_shot.column
    ):
        few_shot, row = cell.column.few_shot, cell.row
        learned = [train_cell(config, cell, s, table.directory, train_fn) for s in config.seeds]
        percent = np.stack([judge(config, cell, each, tests[few_shot]) for each in learned])
        table.keep(cell.name, percent=percent.mean(axis=0))
        at_test = percent[:, :, row.tested]
        for mode, suffix in enumerate(MODES):
            table.add(
                row.name,
                few_shot.column + suffix,
                interval(at_test[..., mode].mean(axis=0), episodes),
                published=None if suffix else published(row.name, few_shot),
                better="higher",
                per_seed=at_test[..., mode].mean(axis=1).tolist(),
                protocol=row.protocol(config),
            )
    panels = {column.few_shot.column: {} for column in columns}
    for cell in cells:
        percent = table.kept(cell.name)["percent"][:, : config.max_inner_steps + 1, 0]
        panels[cell.column.few_shot.column][cell.row.name] = harness.curve(percent, episodes)
    figure = table.directory / "curves.png"
    plots.panels(figure, panels, x_label="inner steps", y_label=f"{UNIT}, transductive")
    table.finish(notes(config, table.records))
