"""Inner optimisers × learners on domains of text: the loss after K steps, all tuned alike.

Finn et al., 2017 (MAML, FOMAML) and Li et al., 2017 (Meta-SGD) step by gradient descent in the
inner loop. Here momentum, Nesterov's momentum, Adagrad, RMSprop, Adam (Kingma and Ba, 2015), LARS
(You et al., 2017) and Lion (Chen et al., 2023) replace it, and the outer loop learns
through them.

All cells start from one joint pretraining, and see the same tasks in the same order for the
same number of meta-steps; the joint column continues it for as many. Each optimiser
trains at the rate that is best after K steps on the validation domains before the meta-steps,
and is evaluated on the test domains at the rate that is best after them. Both are chosen from the
same grid, which is extended if the best is at an end; a Meta-SGD keeps the rates it
learned. The settings beside the rate are fixed in `metaopt.optimizers.inner`.

    python -m experiments.table_inner_optimizers              # Python's own sources
    python -m experiments.table_inner_optimizers --tasks text --folder data/text_domains
    python -m experiments.table_inner_optimizers --preset smoke      # tiny: a minute or two

Expect about half an hour on two cores, and intervals over ten test domains that are wider than
the differences between optimisers. Paired with GD, MAML gains 0.09 ± 0.11 bits a byte from
Adagrad in the inner loop and loses 0.050 ± 0.037 by momentum; Meta-SGD gains 0.095 ± 0.090 from
Adam. `curves.png` shows MAML. A dash diverged or was not run.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments import harness
from metaopt import languages, learners, losses, meta_gradients
from metaopt.comparison import Comparison, ComparisonConfig, Row
from metaopt.errors import Diverged, UserError
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.losses import NATS_TO_BITS
from metaopt.optimizers.inner import INNER_OPTIMIZERS, OptimizerName
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Count, Heads, Layers, Length, Seed, Several, Width
from metaopt.reporting import plots
from metaopt.statistics import interval
from metaopt.types import Estimator, Params

BASELINE = "GD"
UNIT = "bits/byte"
LearnerName = Literal["joint", "fomaml", "maml", "meta_sgd"]
OPTIMIZERS: dict[OptimizerName, str] = {
    "sgd": "GD",
    "momentum": "momentum",
    "nesterov": "Nesterov",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "lars": "LARS",
    "lion": "Lion",
    "lamb": "LAMB",
}
"""Names in the tables."""
LEARNERS: dict[LearnerName, tuple[str, Estimator]] = {
    "joint": ("joint pretraining", meta_gradients.joint),
    "fomaml": ("FOMAML", meta_gradients.first_order),
    "maml": ("MAML", meta_gradients.reverse),
    "meta_sgd": ("Meta-SGD", meta_gradients.reverse),
}
"""Names in the tables, and what the learners are trained by."""
# A scan: compiling as many unrolled programs takes longer than unrolling saves.
INNER = InnerLoop(query_loss="mean", unroll=False)
OUTER = OuterConfig(learning_rate=2e-3, rates_learning_rate=0.03, warmup_steps=20)
COMPARISON = ComparisonConfig(
    tasks_per_step=4,
    tasks_at_a_time=1,
    pretrain_steps=2000,
    meta_steps=150,
    inner_rates=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
    checkpoint_every=500,
    valid_episodes=40,
    test_episodes=600,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.ImprovedConfig):
    """Inner optimisers compared, for several learners.

    Attributes:
      tasks: stdlib (the source of Python's library), text (with --folder) or tfds:NAME.
      folder: Folder of text, one file a domain.
      optimizers: Optimisers, one a row; the others are compared with sgd if it comes before them.
      learners: Learners, one a column.
      width: Width of the transformer.
      num_layers: Number of layers of the transformer.
      num_heads: Number of heads of the transformer.
      num_support: S, sequences to adapt on.
      num_query: Q, query sequences, on which the loss is measured.
      length: L, bytes in a sequence.
      num_valid_domains: Number of domains held out for choosing rates.
      num_test_domains: Number of domains held out for the table.
      split_seed: Seed of the choice of held-out domains.
      inner: Inner loop; the table is the loss after its number of steps.
      outer: Outer optimiser, of the joint pretraining too.
      comparison: Length of training, its sizes and the evaluation.
    """

    tasks: str = "stdlib"
    folder: str | None = None
    optimizers: Annotated[tuple[OptimizerName, ...], Several(different=True)] = tuple(
        name for name in OPTIMIZERS if name != "lamb"
    )
    learners: Annotated[tuple[LearnerName, ...], Several(different=True)] = tuple(LEARNERS)
    width: Width = 32
    num_layers: Layers = 2
    num_heads: Heads = 2
    num_support: Count = 4
    num_query: Count = 4
    length: Length = 64
    num_valid_domains: Count = 8
    num_test_domains: Count = 10
    split_seed: Seed = 0
    inner: InnerLoop = INNER
    outer: OuterConfig = OUTER
    comparison: ComparisonConfig = COMPARISON


def presets(preset: Literal["smoke", "cpu", "gpu"] = "cpu") -> Config:
    """The defaults; gpu has a larger model, ten times the meta-steps and meta-batches of 32."""
    config = Config(preset=preset)
    if preset == "smoke":
        sizes = {"pretrain_steps": 4, "meta_steps": 4, "valid_episodes": 4, "test_episodes": 12}
        comparison = dataclasses.replace(COMPARISON, inner_rates=(0.01, 0.1), **sizes)
        return dataclasses.replace(
            config,
            optimizers=("sgd", "lars"),
            learners=("joint", "maml"),
            width=8,
            num_layers=1,
            length=16,
            num_valid_domains=2,
            num_test_domains=3,
            comparison=comparison,
        )
    if preset == "gpu":
        sizes = {"tasks_per_step": 32, "tasks_at_a_time": 4, "valid_episodes": 80}
        sizes |= {"pretrain_steps": 20_000, "meta_steps": 1500}
        return dataclasses.replace(
            config,
            optimizers=tuple(OPTIMIZERS),
            width=512,
            num_layers=6,
            num_heads=8,
            num_support=8,
            num_query=8,
            length=256,
            inner=dataclasses.replace(INNER, remat=True),
            comparison=dataclasses.replace(COMPARISON, **sizes),
        )
    return config


class Cell(NamedTuple):
    """A cell of the table.

    Attributes:
      row: Name of the inner optimiser.
      column: Name of the learner, with the number of inner steps.
      trained: What is trained for the cell.
    """

    row: str
    column: str
    trained: Row


def make_cells(config: Config) -> list[Cell]:
    """The cells of the table, row by row.

    Joint training takes no inner step, so that it is the same for all optimisers: its name, which
    its checkpoint goes by, does not tell them apart, and it is trained once. Only if the best
    checkpoint is chosen by evaluations, which take inner steps, does each optimiser have its own.
    """
    steps, cells = config.inner.num_steps, []
    for optimizer_name, learner_name in itertools.product(config.optimizers, config.learners):
        optimizer, row = INNER_OPTIMIZERS[optimizer_name], OPTIMIZERS[optimizer_name]
        name, estimator = LEARNERS[learner_name]
        learner = learners.maml(optimizer)
        if learner_name == "meta_sgd":
            learner = learners.meta_sgd(optimizer, num_steps=steps)
        shared = learner_name == "joint" and not config.comparison.eval_every
        trained = Row(name if shared else f"{name}, {row}", learner, estimator, optimizer)
        cells.append(Cell(row, f"{name}, {harness.step_column(steps)}", trained))
    return cells


def language_config(config: Config) -> languages.LanguageConfig:
    """The text and the transformer of a config."""
    known = {field.name for field in dataclasses.fields(languages.LanguageConfig)}
    shared = known & {field.name for field in dataclasses.fields(config)}
    return languages.LanguageConfig(
        model="transformer",
        compute_dtype="bfloat16" if config.preset == "gpu" else "float32",
        **{name: getattr(config, name) for name in shared},
    )


def make_problem(config: Config, cells: Sequence[Cell]) -> Problem:
    """The text domains and the transformer of a config.

    Raises:
      UserError: the tasks are no text, or a size does not fit.
    """
    if languages.is_markov(config.tasks):
        raise UserError("the table is of text: --tasks stdlib, text or tfds:NAME")
    language = language_config(config)
    model = languages.make_model(language)
    # What can be wrong is the same for all optimisers, and each takes a second to trace.
    rows = [cell.trained for cell in cells if cell.row == cells[0].row]
    languages.check(language, config.comparison, rows, model)
    return Problem(languages.make_family(language), model, losses.next_token(model))


def run(config: Config, problem: Problem | None = None) -> None:
    """Trains and evaluates all cells, and writes the tables.

    Args:
      config: Config of the run.
      problem: Tasks, model and loss in place of those of the config.
    """
    train_fn, cells = harness.begin(config), make_cells(config)
    problem = problem or make_problem(config, cells)
    comparison = Comparison(problem, config.inner, config.outer, config.comparison, train_fn)
    loss, gain = f"inner_optimizers/{config.tasks}", f"inner_optimizers_against_gd/{config.tasks}"
    table = harness.TableRun(
        "table_inner_optimizers",
        config,
        presets,
        table=loss,
        unit=UNIT,
        seeds=[config.comparison.seed],
        episodes=config.comparison.test_episodes,
        data=languages.digest(language_config(config)),
    )
    start = comparison.pretrain(table.directory)
    for cell in table.pending(cells, lambda cell: cell.row, lambda cell: cell.column):
        add_cell(table, gain, comparison, cell, start)
    drawn = [cell for cell in cells if cell.column.startswith("MAML")]
    draw(table, drawn or [cell for cell in cells if cell.column == cells[-1].column], comparison)
    table.finish(titles={loss: "", gain: "What each gains on GD, paired episode by episode"})


def add_cell(
    table: harness.TableRun, gain: str, comparison: Comparison, cell: Cell, start: Params
) -> None:
    """Trains and evaluates a cell; adds its loss, and its gain on GD to the table ``gain``.

    If training diverges, the losses are NaN, which is a dash, and the record says why.
    """
    groups, steps = np.asarray(comparison.test.task), comparison.inner.num_steps
    fields: dict[str, Any]
    try:
        result = comparison.run(cell.trained, start, table.directory, one_rate=True)
    except Diverged as error:
        nats = np.full((len(groups), comparison.config.max_inner_steps + 1), np.nan)
        fields = {"diverged": str(error)}
    else:
        nats, fields = result.curves, {"inner_learning_rate": float(result.rates[steps])}
    table.keep(f"{cell.column}, {cell.row}", nats=nats)
    found = interval(nats[:, steps] * NATS_TO_BITS, groups)
    table.add(cell.row, cell.column, found, **fields)
    if cell.row != BASELINE and table.has(BASELINE, cell.column):
        gained = table.kept(f"{cell.column}, {BASELINE}")["nats"][:, steps] - nats[:, steps]
        found = interval(gained * NATS_TO_BITS, groups)
        table.add(cell.row, cell.column, found, table=gain, better="higher", **fields)


def draw(table: harness.TableRun, cells: Sequence[Cell], comparison: Comparison) -> None:
    """Draws the curves of a column, and the gains on GD if it has a GD."""
    groups = np.asarray(comparison.test.task)
    kept = {cell.row: table.kept(f"{cell.column}, {cell.row}")["nats"] for cell in cells}
    bits = {row: nats * NATS_TO_BITS for row, nats in kept.items()}
    others = [row for row in bits if BASELINE in bits and row != BASELINE]
    plots.adaptation_curves(
        table.directory / "curves.png",
        {row: harness.curve(values, groups) for row, values in bits.items()},
        {row: harness.curve(bits[BASELINE] - bits[row], groups) for row in others},
        {},
        title="Held-out domains",
        baseline=BASELINE,
        unit=UNIT,
        trained_steps=comparison.inner.num_steps,
    )


if __name__ == "__main__":
    harness.main("table_inner_optimizers", run, presets, __doc__)
