"""Dynamic evaluation of a byte-level language model, with and without a meta-learned start.

Krause et al., 2018 (arXiv:1709.07432) and 2019 (arXiv:1904.08378): a stream of text is scored
segment by segment, and the model takes one step on each after scoring it, by gradient descent
or by their RMS rule with a decay towards the parameters before the stream. Here the same small
transformer over bytes is walked along streams unlike its training text, static and by either
rule, from two initialisations: plainly trained, and trained for the score of dynamic evaluation
itself, by backpropagation through short walks (MAML, Finn et al., 2017). Both have read as many
windows of text. Rates and decays are tuned on other text of the stream, alike for all rows.

The published models are hundreds to thousands of times larger, were trained to the end, and met
test text of the kind that they were trained on. Ours have 0.13 million parameters and minutes of
training, on novels and other domains but no part of WikiText-2 or Shakespeare: expect a larger
reduction than the published ones, and no comparison but of the order of the rows. Below the table
stand the published reductions of the cross-entropy beside ours.

Expect RMS below SGD below static. The meta-learned start gains little: it was trained for SGD and
gains 0.006 and 0.013 bits under it; under RMS it gains nothing on WikiText-2 and loses 0.033 on
Shakespeare, and without adapting it is better on the one and worse on the other. A score is the
mean over a part of the stream (128 KiB of each on cpu), from its first byte that has a whole
context before it.

    python -m experiments.table_dynamic_evaluation     # Python's own library: no data is needed
    python -m experiments.table_dynamic_evaluation --train data/books data/text_domains \
        --streams data/wikitext2 data/tinyshakespeare.txt     # about twelve minutes on two cores
    python -m experiments.table_dynamic_evaluation --preset smoke
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from experiments import harness
from experiments.table_dynamic_evaluation.config import Config, presets
from experiments.table_dynamic_evaluation.data import find_text, stretches
from experiments.table_dynamic_evaluation.walks import STATIC, RuleHparams, Walks, choose_length
from metaopt import learners, losses, meta_gradients, models
from metaopt.diagnostics import feasible
from metaopt.fit import FitConfig, Fitted, Problem, check_devices, fit
from metaopt.losses import NATS_TO_BITS
from metaopt.reporting import plots
from metaopt.reporting.results import Published
from metaopt.statistics import Interval, interval
from metaopt.streams.dynamic_evaluation import segment_loss
from metaopt.types import Estimator, Model, Params

UNIT, PER_CENT = "bits/byte", "% of the static loss"
PUBLISHED_TABLE, COLUMN = "dynamic_evaluation/published", "reduction, %"
KRAUSE_2018 = "Krause et al., 2018, arXiv:1709.07432"
KRAUSE_2019 = "Krause et al., 2019, arXiv:1904.08378"
PUBLISHED = {
    "Transformer-XL, 277 M, enwik8 (bytes of Wikipedia)": (0.993, 0.940, False, KRAUSE_2019),
    "Transformer-XL, 277 M, text8 (characters)": (1.085, 1.038, False, KRAUSE_2019),
    "Transformer-XL, 257 M, WikiText-103 (words)": (18.3, 16.4, True, KRAUSE_2019),
    "mLSTM, enwik8 (bytes of Wikipedia)": (1.24, 1.08, False, KRAUSE_2018),
    "mLSTM, text8 (characters)": (1.27, 1.19, False, KRAUSE_2018),
    "AWD-LSTM, WikiText-2 (words)": (65.8, 44.3, True, KRAUSE_2018),
    "AWD-LSTM, Penn Treebank (words)": (57.3, 51.1, True, KRAUSE_2018),
}
"""Static and dynamic score by the RMS rule: bits a symbol, or perplexities."""


def reduction(static: float, dynamic: float, *, perplexity: bool = False) -> float:
    """The reduction of a cross-entropy against static evaluation, in per cent.

    Perplexities are turned into cross-entropies first, ``log p``.
    """
    if perplexity:
        static, dynamic = np.log(static), np.log(dynamic)
    return float(100 * (1 - dynamic / static))


class StreamRow(NamedTuple):
    """An initialisation, and the rule by which it walks along the streams."""

    meta_learned: bool
    rule: Literal["static", "SGD", "RMS"]

    @property
    def label(self) -> str:
        """Initialisation and rule in words."""
        return f"{'meta-learned initialisation, ' if self.meta_learned else ''}{self.rule}"

    @property
    def name(self) -> str:
        """Name in the table."""
        return self.label if self.rule == "static" else f"{self.label} dynamic evaluation"


ROWS = [StreamRow(meta, rule) for meta in (False, True) for rule in ("static", "SGD", "RMS")]


def check(config: Config, model: Model) -> None:
    """Raises UserError if the config does not fit the devices and their memory."""
    check_devices(0, config.tasks_per_step, config.tasks_at_a_time)
    window, nothing = feasible.tokens(1, config.window), feasible.tokens(0, 1)
    most = max(config.tasks_per_step * config.inner.num_steps, config.statistics_segments)
    feasible.check([], model.init, losses.next_token(model), window, nothing, most)


def train(
    config: Config,
    fit_in_run: Callable[..., Fitted],
    name: str,
    problem: Problem,
    start: Params | None = None,
    estimator: Estimator = meta_gradients.joint,
    rate: float = 0.0,
) -> Params:
    """The parameters after a training from ``start``, or the first one from random parameters.

    All but the first read the same places of the text, and step at ``rate`` on their walks.
    """
    first = start is None
    num_steps = config.pretrain_steps if first else config.meta_steps
    _, data_key = jax.random.split(jax.random.key(config.seed))
    state = fit_in_run(
        problem,
        learners.maml(),
        estimator,
        inner=config.inner,
        outer=(config.pretrain if first else config.outer).ending_at(num_steps),
        config=FitConfig(
            seed=config.seed,
            num_steps=num_steps,
            tasks_per_step=config.tasks_per_step,
            tasks_at_a_time=config.tasks_at_a_time,
            log_every=max(1, num_steps // 100),
        ),
        name=name,
        params=start,
        hparams={"inner_learning_rate": jnp.float32(rate)},
        key=jax.random.fold_in(data_key, 0 if first else 1),
    ).state
    return jax.device_get(state.meta_params["params"])


def add_cells(
    table: harness.TableRun,
    config: Config,
    row: StreamRow,
    streams: Sequence[str],
    walked: np.ndarray,
    hparams: Sequence[RuleHparams],
    length: int,
    size: str,
) -> None:
    """Adds the scores of a row, and its differences, block by block, from other rows.

    The rows that it is compared with are the plainly trained one of the same rule, and the static
    one of the same start; without them there are no such cells.

    Args:
      table: Run of the table.
      config: Its config.
      row: Row to add.
      streams: Names of the streams.
      walked: Nats a byte, ``[streams, N]``.
      hparams: Rate and decay for each stream.
      length: Segment length, in bytes.
      size: Size of the model in words.
    """
    groups = np.arange(walked.shape[1]) // config.block
    over = (
        f"95 % intervals over {groups[-1] + 1} blocks of {config.block} consecutive segments of "
        f"{length} bytes"
    )
    plain, static = row._replace(meta_learned=False).name, row._replace(rule="static").name

    def add(i: int, name: str, column: str, values: np.ndarray, **more: Any) -> None:
        more |= {"learning_rate": float(hparams[i].rate), "decay": float(hparams[i].decay)}
        more |= {"segment_length": length, "episodes": len(values), "over": over}
        table.add(name, column, interval(values, groups), **more)

    for i, stream in enumerate(streams):
        bits = walked[i] * NATS_TO_BITS
        add(i, row.name, stream, bits)
        if row.meta_learned and table.has(plain):
            gain = table.kept(plain)["nats"][i] * NATS_TO_BITS - bits
            add(i, row.name, f"gain, {stream}", gain, better="higher")
        if row.rule != "static" and table.has(static):
            nats = table.kept(static)["nats"][i]
            gain, name = 100 * (nats - walked[i]) / nats.mean(), f"ours, {size}, {stream}"
            more = {"table": PUBLISHED_TABLE, "unit": PER_CENT, "better": "higher"}
            add(i, f"{name}: {row.label}", COLUMN, gain, **more)


def add_published(table: harness.TableRun) -> None:
    """Adds the rows that were not run here: a dash, and the published number."""
    for name, (static, dynamic, perplexity, source) in PUBLISHED.items():
        paper = Published(round(reduction(static, dynamic, perplexity=perplexity), 1), source)
        table.add(
            name,
            COLUMN,
            Interval(float("nan"), float("nan"), 0),
            table=PUBLISHED_TABLE,
            unit=PER_CENT,
            published=paper,
            published_scores=[static, dynamic],
        )


def draw(
    table: harness.TableRun, rows: Sequence[StreamRow], streams: Sequence[str], length: int
) -> None:
    """Bits a byte along the streams, a moving mean over a twentieth of each."""
    curves = {stream: {} for stream in streams}
    for row in rows:
        for stream, nats in zip(streams, table.kept(row.name)["nats"], strict=True):
            width = max(1, len(nats) // 20)
            mean = ndimage.uniform_filter1d(nats * NATS_TO_BITS, width, mode="nearest")
            curves[stream][row.name] = plots.Curve(mean, np.zeros_like(mean))
    path, spacing = table.directory / "curves.png", length / 1024
    plots.panels(path, curves, x_label="KiB of the stream", y_label=UNIT, spacing=spacing)


def run(config: Config, model: Model | None = None) -> None:
    """Trains both initialisations, walks along the streams, and writes tables and figure.

    The model over bytes is a transformer if none is given.
    """
    train_fn = harness.begin(config)
    model = model or models.transformer(config.transformer())
    rows = harness.select(ROWS, config.rows)
    check(config, model)
    text = find_text(config)
    table = harness.TableRun(
        "table_dynamic_evaluation",
        config,
        presets,
        table="dynamic_evaluation",
        unit=UNIT,
        seeds=(config.seed,),
        data=text.digest,
    )
    fit_in_run = functools.partial(fit, directory=table.directory, train_fn=train_fn)
    windows = stretches(config, text.train, config.window, 0)
    plain = Problem(windows, model, losses.next_token(model))
    params = train(config, fit_in_run, "pretraining", plain)
    walks, streams = Walks(config, text, model), [stream.name for stream in text.streams]
    tune_sgd = functools.partial(walks.tune, "SGD", params, decays=(0.0,))
    length, rate = choose_length(config.segment_lengths, tune_sgd)
    segments = stretches(config, text.train, length, config.context)
    walked = Problem(segments, model, segment_loss(model))
    size = f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2g} M"

    @functools.cache
    def start(meta_learned: bool) -> Params:
        if meta_learned:
            return train(
                config, fit_in_run, "meta-learned", walked, params, meta_gradients.streaming, rate
            )
        return train(config, fit_in_run, "plain", plain, params)

    for row in table.pending(rows):
        if row.rule == "static":
            rule, hparams = "SGD", [STATIC] * len(streams)
        else:
            rule = row.rule
            hparams = walks.tune(rule, start(row.meta_learned), length, config.decays).hparams
        found = walks.test(rule, start(row.meta_learned), length, hparams)
        table.keep(row.name, nats=found)
        add_cells(table, config, row, streams, found, hparams, length, size)
    add_published(table)
    draw(table, rows, streams, length)
    table.finish()
