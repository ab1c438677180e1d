"""Is our pretraining good? A published small configuration, and what makes ours better.

Every gain of these tables is one over tuned joint pretraining, so that must be well done. nanoGPT's
README has a configuration for a laptop without a GPU: Shakespeare by characters, 4 layers, 4 heads,
width 128, context 64, batches of 12, 2000 steps of AdamW, no dropout; it reaches a validation loss
of 1.88 nats a character, estimated on random windows. Here the loss is on the whole validation
part, the last tenth of the text, in windows of 64 that do not overlap, every character predicted
once from those before it in its window.

Rows take one thing away from ours: rotary positions (learned ones in their place, as in GPT-2),
the cosine to zero (to a tenth of the rate, as nanoGPT's, or none), weight decay. Then smaller
models, for the loss against the number of parameters.

Beside the next character, the missing one: the same network sees all of a window, in which 15 % of
the characters are missing, and fills the gaps (Devlin et al., 2019). What it loses on them stands
beside what the next-character model loses on the same characters, which it sees from the left
alone. It is no probability of the text.

    python -m experiments.table_pretraining                # under half an hour on two cores
    python -m experiments.table_pretraining --preset smoke
    python -m experiments.table_pretraining --file FILE    # any text

Without ``--file`` it is ``data/tinyshakespeare.txt``, or if that is not there the text of Python's
own help, for which no number is published.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from metaopt import learners, losses, meta_gradients, models
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import local_path, read_text
from metaopt.fit import FitConfig, Problem, fit
from metaopt.models import TransformerConfig
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import Count, Heads, Layers, Length, Seed, Steps, Width
from metaopt.reporting import plots
from metaopt.reporting.results import Published
from metaopt.self_improvement.improving import RATES_ALONE
from metaopt.statistics import interval
from metaopt.tasks.fresh import fresh_tasks
from metaopt.tasks.missing import choose, hide, missing_tokens
from metaopt.tasks.sources.text import python_help
from metaopt.training.types import TrainFn
from metaopt.types import Array, Batch, Key, MetaParams, TaskFamily

SHAKESPEARE = Path("data/tinyshakespeare.txt")
PUBLISHED = Published(1.88, source="nanoGPT, README, shakespeare_char on a CPU")
OURS, MISSING = "ours", "missing characters"
COLUMN, OF_MISSING, PARAMETERS = "validation loss", "loss on missing", "parameters"
RATE = 0.15  # of missing characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Pretraining at a published small configuration.

    Attributes:
      file: Text; ``data/tinyshakespeare.txt`` if it is there, or the text of Python's help.
      seed: Seed of the initialisation and the batches.
      width: Width of the transformer.
      num_layers: Number of its layers.
      num_heads: Number of its heads.
      length: L, characters in a window.
      batch: Windows in a step, an even number.
      steps: Number of steps.
      widths: Widths of the smaller models.
      outer: The optimiser.
    """

    file: str | None = None
    seed: Seed = 0
    width: Width = 128
    num_layers: Layers = 4
    num_heads: Heads = 4
    length: Length = 64
    batch: Count = 12
    steps: Steps = 2000
    widths: tuple[Width, ...] = (16, 32, 48, 80)
    outer: OuterConfig = OuterConfig(  # noqa: RUF009
        learning_rate=1e-3, weight_decay=0.1, warmup_steps=100
    )

    def __post_init__(self):
        super().__post_init__()
        if self.batch % 2:
            raise UserError(f"batch is {self.batch}: give an even number, of which half is a task")


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        small = {"width": 16, "num_layers": 1, "num_heads": 2, "length": 16, "batch": 4, "steps": 4}
        return dataclasses.replace(config, **small, widths=(8,))
    if preset == "gpu":  # nanoGPT's configuration for a GPU, without its dropout
        large = {"width": 384, "num_layers": 6, "num_heads": 6, "length": 256, "batch": 64}
        return dataclasses.replace(config, **large, steps=5000, widths=(48, 96, 192, 288))
    return config


@dataclasses.dataclass(frozen=True)
class PretrainingRow:
    """One training.

    Attributes:
      name: Name in the table.
      model: Its transformer.
      outer: Its optimiser.
      fills_gaps: Trained on missing characters, and not on the next one.
    """

    name: str
    model: TransformerConfig
    outer: OuterConfig
    fills_gaps: bool = False


def make_rows(config: Config, vocab_size: int) -> list[PretrainingRow]:
    """The rows that the config asks for.

    Raises:
      UserError: there is no row of a name, or a model cannot be built.
    """
    model = TransformerConfig(
        vocab_size=vocab_size,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )
    outer = config.outer.ending_at(config.steps)
    learned = dataclasses.replace(model, positions="learned", max_length=config.length)
    to_tenth = dataclasses.replace(outer, final_fraction=0.1)
    rows = [
        PretrainingRow(OURS, model, outer),
        PretrainingRow("learned positions", learned, outer),
        PretrainingRow("cosine to a tenth", model, to_tenth),
        PretrainingRow("constant rate", model, dataclasses.replace(outer, final_fraction=1.0)),
        PretrainingRow("no weight decay", model, dataclasses.replace(outer, weight_decay=0.0)),
        PretrainingRow("learned positions, cosine to a tenth", learned, to_tenth),
        PretrainingRow(
            MISSING,
            dataclasses.replace(model, vocab_size=vocab_size + 1, causal=False),
            outer,
            fills_gaps=True,
        ),
    ]
    for width in config.widths:
        heads = max(h for h in range(1, config.num_heads + 1) if width % (2 * h) == 0)
        smaller = dataclasses.replace(model, width=width, num_heads=heads)
        rows.append(PretrainingRow(f"width {width}", smaller, outer))
    return harness.select(rows, config.rows)


def read_characters(config: Config) -> tuple[np.ndarray, int, bool]:
    """The text as numbers of its characters ``[n]``, how many there are, and if it is Shakespeare.

    Raises:
      UserError: the file is missing or no UTF-8, or too short.
    """
    is_there = config.file is not None or SHAKESPEARE.is_file()
    if is_there:
        path = local_path(config.file or SHAKESPEARE)
        text, is_shakespeare = read_text(path), path.name == SHAKESPEARE.name
    else:
        text, is_shakespeare = python_help(), False
        log(f"note: {SHAKESPEARE} is not there: the text is that of Python's help")
    symbols = {character: i for i, character in enumerate(sorted(set(text)))}
    if len(text) < 40 * (config.length + 1) or len(symbols) < 2:
        raise UserError(
            f"the text has {len(text)} characters, {len(symbols)} different ones: give one of "
            f"{40 * (config.length + 1)} at least"
        )
    return np.array([symbols[c] for c in text], np.int32), len(symbols), is_shakespeare


def make_family(config: Config, train: np.ndarray, valid: np.ndarray) -> TaskFamily:
    """Random windows: an episode is half a batch, all of it trained on by joint pretraining."""
    size, width = config.batch // 2, config.length + 1

    def draw(key: Key, text: Array) -> Batch:
        starts = jax.random.randint(key, (size,), 0, len(text) - width + 1)
        windows = jax.vmap(lambda start: jax.lax.dynamic_slice(text, (start,), (width,)))(starts)
        return Batch(windows[:, :-1], windows[:, 1:])

    data = [jnp.asarray(part) for part in (train, valid, valid)]
    return fresh_tasks("windows", draw, max(1, size // 2), data)


class Windows(NamedTuple):
    """The validation part in windows that do not overlap.

    Attributes:
      tokens: Characters, int32 ``[windows, L]``.
      following: The character after each, of the same shape.
      missing: Which characters are missing where gaps are filled; never the first of a window,
        before which there is none. bool, of the same shape.
    """

    tokens: Array
    following: Array
    missing: Array

    @classmethod
    def of(cls, valid: np.ndarray, length: int) -> "Windows":
        """The windows of a validation part ``[n]``."""
        count = (len(valid) - 1) // length
        tokens = jnp.asarray(valid[: count * length]).reshape(count, length)
        following = jnp.asarray(valid[1 : count * length + 1]).reshape(count, length)
        after_first = choose(jax.random.key(0), (count, length - 1), RATE)
        return cls(tokens, following, jnp.pad(after_first, ((0, 0), (1, 0))))

    def next_characters(self) -> Batch:
        """All characters that follow."""
        return Batch(self.tokens, self.following)

    def next_missing(self) -> Batch:
        """The missing characters alone, each to be told from those before it."""
        is_next = jnp.pad(self.missing[:, 1:], ((0, 0), (0, 1)))
        return Batch(self.tokens, jnp.where(is_next, self.following, losses.IGNORED))

    def gaps(self, vocab_size: int) -> Batch:
        """The missing characters, to be told from all that is left."""
        return hide(self.tokens, self.missing, vocab_size)


def losses_of(problem: Problem, meta_params: MetaParams, windows: Batch) -> np.ndarray:
    """The loss of each window, nats a character ``[windows]``."""

    @jax.jit
    @jax.vmap
    def losses_of(inputs: Array, targets: Array) -> Array:
        return problem.loss_fn(meta_params["params"], Batch(inputs[None], targets[None]))

    parts = range(0, len(windows.inputs), 256)
    found = [losses_of(windows.inputs[i : i + 256], windows.targets[i : i + 256]) for i in parts]
    return np.concatenate([np.asarray(x, np.float64) for x in found])


def train_row(
    config: Config, row: PretrainingRow, family: TaskFamily, directory: Path, train_fn: TrainFn
) -> tuple[Problem, MetaParams]:
    """A row's problem and what it learned."""
    model = models.transformer(row.model)
    problem = Problem(family, model, losses.next_token(model))
    devices = 2 if len(jax.devices()) % 2 == 0 else 1  # each takes half of a batch
    fitted = fit(
        problem,
        learners.maml(),
        meta_gradients.joint,
        outer=row.outer,
        config=FitConfig(
            seed=config.seed,
            num_steps=config.steps,
            tasks_per_step=2,
            num_devices=devices,
            log_every=max(1, config.steps // 50),
            checkpoint_every=max(1, config.steps // 4),
        ),
        directory=directory,
        name=row.name,
        train_fn=train_fn,
    )
    return problem, fitted.meta_params


def run(config: Config) -> None:
    """Trains the rows, and writes the table and the figure."""
    train_fn = harness.begin(config, RATES_ALONE)  # what rows differ in is their schedule
    characters, vocab_size, is_shakespeare = read_characters(config)
    train, valid = np.split(characters, [len(characters) * 9 // 10])
    rows, family_of_next = make_rows(config, vocab_size), make_family(config, train, valid)
    missing = missing_tokens(family_of_next, vocab_size, RATE)
    table = harness.TableRun(
        "table_pretraining",
        config,
        presets,
        table="pretraining",
        unit="nats a character",
        rows=[row.name for row in rows],
        seeds=[config.seed],
        data=hashlib.sha256(characters.tobytes()).hexdigest()[:16],
    )
    is_as_published = is_shakespeare and config.preset == "cpu"
    windows = Windows.of(valid, config.length)
    over = f"95 % intervals over {len(windows.tokens)} windows of {config.length} characters"
    for row in table.pending(rows):
        family = missing if row.fills_gaps else family_of_next
        problem, meta_params = train_row(config, row, family, table.directory, train_fn)
        judged = functools.partial(losses_of, problem, meta_params)
        number = float(sum(x.size for x in jax.tree.leaves(meta_params)))
        if row.fills_gaps:
            found = judged(windows.gaps(vocab_size))
            table.add(row.name, OF_MISSING, interval(found), over=over)
        else:
            found = judged(windows.next_characters())
            published = PUBLISHED if is_as_published and row.name == OURS else None
            table.add(row.name, COLUMN, interval(found), published=published, over=over)
            if row.name != OURS and table.has(OURS):
                apart = found - table.kept(OURS)["losses"]
                table.add(row.name, "minus ours", interval(apart), over=over)
        if row.name == OURS:
            at_gaps = interval(judged(windows.next_missing()))
            table.add(row.name, OF_MISSING, at_gaps, over=over)
        table.keep(row.name, losses=found)
        size = interval(np.array([number]))
        table.add(row.name, PARAMETERS, size, unit="", over=over, limit=True)  # none is the best
    table.finish(draw(table, rows))


def draw(table: harness.TableRun, rows: Sequence[PretrainingRow]) -> list[str]:
    """Draws the loss against the number of parameters; the line of the fitted exponent."""
    values = {(r["row"], r["column"]): r["value"] for r in table.records}
    names = [row.name for row in rows if row.name == OURS or row.name.startswith("width ")]
    points = np.array([(values[name, PARAMETERS], values[name, COLUMN]) for name in names])
    if len(points) < 3:
        return []
    points = points[np.argsort(points[:, 0])]
    slope, offset = np.polyfit(np.log(points[:, 0]), np.log(points[:, 1]), 1)
    fitted = np.exp(offset + slope * np.log(points[:, 0]))
    plots.trajectories(
        table.directory / "curves.png",
        {COLUMN: points},
        dashed={COLUMN: np.stack([points[:, 0], fitted], axis=1)},
        x_label="parameters",
        y_label="validation loss, nats a character",
        title=f"Loss falls as parameters^{slope:.3f} (dashed)",
        y_scale="log",
        x_ticks=points[:, 0].tolist(),
    )
    error = np.abs(fitted / points[:, 1] - 1).max()
    return [
        f"loss ∝ parameters^{slope:.3f} over {len(points)} sizes, at equal steps; the fit is "
        f"within {100 * error:.1f} % of them"
    ]


if __name__ == "__main__":
    harness.main("table_pretraining", run, presets, __doc__)
