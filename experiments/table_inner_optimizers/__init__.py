"""Inner optimisers × learners on domains of text: the loss after K steps, all tuned alike.

Finn et al., 2017 (MAML, FOMAML) and Li et al., 2017 (Meta-SGD) step by gradient descent in the
inner loop. Here momentum, Nesterov's, Adagrad, RMSprop, Adam (Kingma and Ba, 2015), LARS
(You et al., 2017) and Lion (Chen et al., 2023) take its place, and the outer loop learns
through them.

All cells start from one joint pretraining, and see the same tasks in the same order for the
same number of meta-steps; the joint column goes on with it for as many. Each optimiser
trains at the rate that is best after K steps on the validation domains from where the meta-steps
start, and is judged on the test domains at the rate that is best after them, chosen from the
same grid, which goes on beyond its ends where the best is there; a Meta-SGD keeps the rates it
learned. The settings beside the rate stand fixed in `metaopt.optimizers.inner`.

    python -m experiments.table_inner_optimizers              # Python's own sources
    python -m experiments.table_inner_optimizers --tasks text --folder data/text_domains
    python -m experiments.table_inner_optimizers --preset smoke
"""

import dataclasses
import itertools

from experiments import adapt_languages
from experiments.table_inner_optimizers.config import CHOSEN_BY, Config, LearnerName, preset
from experiments.table_inner_optimizers.report import COLUMNS, ROWS, Report
from metaopt import learners, losses, meta_gradients, parallel
from metaopt.cli import command_line
from metaopt.comparison import Comparison, Problem, Row
from metaopt.errors import UserError
from metaopt.optimizers.inner import INNER_OPTIMIZERS, OptimizerName
from metaopt.self_improvement.drop_in import trainer
from metaopt.training.recorder import Diverged
from metaopt.training.runs import open_run

ESTIMATORS = {
    "joint": meta_gradients.joint,
    "fomaml": meta_gradients.first_order,
    "maml": meta_gradients.reverse,
    "meta_sgd": meta_gradients.reverse,
}


def make_problem(config: Config) -> Problem:
    """The text domains and the transformer of a config, as `adapt_languages` makes them.

    Raises:
      UserError: the tasks are no text, or a size does not fit.
    """
    if config.tasks == "markov":
        raise UserError("the table is of text: --tasks stdlib, text or tfds:NAME")
    known = {field.name for field in dataclasses.fields(adapt_languages.Config)}
    shared = {f.name for f in dataclasses.fields(config)} & known
    languages = adapt_languages.Config(
        model="transformer",
        compute_dtype="bfloat16" if config.preset == "gpu" else "float32",
        **{name: getattr(config, name) for name in shared},
    )
    model = adapt_languages.make_model(languages)
    cells = itertools.product(config.optimizers, config.learners)
    rows = [make_row(config, optimizer, learner) for optimizer, learner in cells]
    adapt_languages.check(languages, rows, model)
    family = adapt_languages.make_family(languages)
    return Problem(family, model, losses.next_token(model))


def make_row(config: Config, optimizer: OptimizerName, learner: LearnerName) -> Row:
    """What is trained for a cell.

    Joint training takes no inner step, so that it is the same for all optimisers: its name, which
    its checkpoint goes by, does not tell them apart, and it is trained once. Only where the best
    checkpoint is chosen by evaluations, which take inner steps, has each optimiser its own.
    """
    inner_optimizer = INNER_OPTIMIZERS[optimizer]
    shared = learner == "joint" and not config.comparison.eval_every
    name = COLUMNS[learner] if shared else f"{COLUMNS[learner]}, {ROWS[optimizer]}"
    if learner == "meta_sgd":
        learned = learners.meta_sgd(inner_optimizer, num_steps=config.inner.num_steps)
    else:
        learned = learners.maml(inner_optimizer)
    return Row(name, learned, ESTIMATORS[learner], inner_optimizer)


def run(config: Config) -> None:
    """Trains and evaluates all cells, and writes the tables."""
    parallel.set_up_backend()
    comparison = Comparison(
        make_problem(config), config.inner, config.outer, config.comparison, trainer(config.improve)
    )
    place = open_run(
        config.root,
        "table_inner_optimizers",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    command = command_line.command("table_inner_optimizers", config, preset, CHOSEN_BY)
    report = Report(place, config, comparison, command)
    start = comparison.pretrain(place.directory)
    for optimizer in config.optimizers:
        for learner in config.learners:
            row = make_row(config, optimizer, learner)
            try:
                result = comparison.run(row, start, place.directory, one_rate=True)
            except Diverged as error:
                report.add_diverged(optimizer, learner, str(error))
            else:
                report.add(optimizer, learner, result)
    report.finish()
