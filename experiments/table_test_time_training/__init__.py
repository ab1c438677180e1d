"""Test-time training: does meta-learning help a model that learns while it reads?

A byte model with a short window reads a document chunk by chunk. Each chunk is scored, then learned
from by one step on its next-token loss; the context, keys and values of the window, is carried on.
So it is dynamic evaluation (Krause et al., 2018), and if its start is meta-learned for the score of
whole documents, through all updates and the context, end-to-end test-time training (Tandon et al.,
2025, arXiv:2512.23675). Whether that meta-learning helps is in dispute: here all rows have the same
model, the same number of counted operations, pretraining included, and as many rates to choose
from. The row of full attention has a window as long as a training document. Switching languages
have an exact limit, and so has recall, where what was read once is to be known long after. Of a
model that was trained elsewhere an adapter learns; its rows that are trained at all have spent the
same number of operations on that.

What a row gains is told apart. The *context gain* is what carrying the context gains a model that
does not learn; the *adaptation gain* is what learning adds to that. Both are paired over documents.

    python -m experiments.table_test_time_training                     # without books
    python -m experiments.table_test_time_training --books data/books
    python -m experiments.table_test_time_training --parts pretrained --pretrained.model PATH
    python -m experiments.table_test_time_training --preset smoke
    python -m experiments.table_test_time_training --preset gpu --parts memory   # is not run
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import harness
from experiments.table_test_time_training import documents, memory, reading
from experiments.table_test_time_training.config import Config, presets
from experiments.table_test_time_training.documents import Source
from experiments.table_test_time_training.pretrained import PretrainedStarts
from experiments.table_test_time_training.rows import (
    ALONE,
    DYNAMIC,
    FEW,
    FULL,
    OF_PRETRAINED,
    ROWS,
    SCALED,
    STATIC,
    USUAL,
    WINDOW,
    Row,
    Settings,
    Starts,
)
from metaopt import models
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.fit import check_devices
from metaopt.losses import NATS_TO_BITS, next_token
from metaopt.measure import interleaved
from metaopt.pretrained import open_pretrained
from metaopt.reporting import plots
from metaopt.self_improvement.improving import RATES_ALONE
from metaopt.statistics import Interval, interval
from metaopt.types import MetaParams

__all__ = ["Config", "presets", "run"]

TABLE = "test_time_training"
SPANS = (0, 1, 2, 4, 8, 16)
"""Positions in a document that are reported apart, in windows."""
AGO = (0, 1, 4, 16)
"""How long ago something was read that is to be recalled, in windows."""
FAR = 64
"""Windows after which the time of a token is compared with that in the first one."""


def run(config: Config) -> None:
    """Trains the rows of each source, reads its documents, and writes tables and figures."""
    train_fn = harness.begin(config, RATES_ALONE)
    given = {"books": config.books, "pretrained": config.pretrained.model}
    parts = [x for x in config.parts if given.get(x, "") is not None]
    base = "code" if config.books is None else "books"
    chosen = [row.name for row in harness.select(ROWS, config.rows)]
    own = ("scale", "memory", "pretrained")
    if not parts:
        raise UserError(
            "books needs --books FOLDER, and pretrained --pretrained.model PATH: no other part is "
            "chosen"
        )
    if parts == ["scale"] and len(config.widths) < 2:
        raise UserError("scale compares widths: give two of them, or the part that it goes on from")
    sources = [documents.find(name, config) for name in parts if name not in own]
    if "scale" in parts:
        sources += [documents.find(base, config, width) for width in config.widths]
    found = None
    if "pretrained" in parts:
        assert config.pretrained.model is not None
        found = open_pretrained(Path(config.pretrained.model).expanduser())
        sources.append(documents.of_pretrained(config, found))
    others = {source.name: [row.name for row in _rows_of(source)] for source in sources}
    sources = [x for x in sources if set(others[x.name]) & set(chosen)]
    if others and not sources:
        names = "; ".join(f"{name} has {', '.join(rows)}" for name, rows in others.items())
        raise UserError(f"none of these rows is of a part that is chosen: {names}")
    for source in sources:
        _check(source)
    table = harness.TableRun(
        "table_test_time_training",
        config,
        presets,
        table=TABLE,
        unit="bits/byte",
        seeds=[config.seed],
        data="-".join(dict.fromkeys(source.digest for source in sources)),
    )
    for source in sources:
        args = config, source, table.directory, train_fn, reading.tuned
        if source.name == "pretrained":
            assert found is not None
            starts = PretrainedStarts(*args, found)
        else:
            starts = Starts(*args)
        _add_rows(table, source, starts, [x for x in _rows_of(source) if x.name in chosen])
    if "memory" in parts:
        memory.add_rows(table, config.sizes, config.updates)
    _add_scale(table, [x for x in sources if x.name.partition(",")[0] == base])
    table.finish(_notes(table, sources))


def _check(source: Source) -> None:
    sizes = source.sizes
    check_devices(0, sizes.tasks_per_step, sizes.tasks_at_a_time)
    if source.name == "pretrained":  # whose model is in memory
        return
    chunks = feasible.tokens(sizes.num_chunks // 2, sizes.chunk)
    model = models.transformer(sizes.transformer(source.vocab_size, sizes.window))
    feasible.check([], model.init, next_token(model), chunks, chunks, sizes.tasks_per_step)


def _rows_of(source: Source) -> tuple[Row, ...]:
    rows = {"books": ROWS, "code": FEW, "switching": FEW, "recall": (*FEW, FULL)}
    rows |= {"pretrained": OF_PRETRAINED}
    return rows.get(source.name, SCALED)


def _table(source: Source) -> str:
    return f"{TABLE}/{source.name}"


def _kept(row: Row, source: Source) -> str:
    """The name of what is kept of a row."""
    return f"{source.name} {row.name}"


def _add_rows(table: harness.TableRun, source: Source, starts: Starts, rows: Sequence[Row]) -> None:
    """Trains, tunes and reads the rows of a source."""
    compared = USUAL if source.name == "pretrained" else (STATIC, WINDOW)
    first = dict.fromkeys((*compared, *rows))  # others are compared with these
    for row in table.pending(first, table=_table(source)):
        meta_params = starts.trained(row.start)
        settings = reading.tuned(starts, row, meta_params)
        found = reading.read(starts, row, meta_params, source.test, [settings])[0]
        kept: dict[str, np.ndarray] = {"nats": found.nats}
        # The start of the others as it is, read without learning, is the row that all are beside.
        is_of_it = row.start == ("usual" if source.name == "pretrained" else "joint")
        if row.rule in ("fast", "SGD") and not is_of_it:
            still = reading.read(starts, row._replace(rule="still"), meta_params, source.test)[0]
            kept["still"] = still.nats
        table.keep(_kept(row, source), **kept)
        if found.hits is not None:
            _add_hits(table, source, row, found.hits)
        _add_cells(table, source, row, found, kept, settings)
        if source.name != "pretrained":  # where a window takes a minute
            _add_times(table, source, starts, row, meta_params)
    drawn = [row for row in rows if row.rule != "isolated"]
    _draw(table, source, drawn)


def _bits(table: harness.TableRun, source: Source, row: Row) -> np.ndarray:
    """Bits a token of the documents ``[D]``."""
    return source.bits(table.kept(_kept(row, source))["nats"])


def _add_cells(
    table: harness.TableRun,
    source: Source,
    row: Row,
    found: reading.Reading,
    kept: dict[str, np.ndarray],
    settings: Settings,
) -> None:
    unit = f"bits/{source.unit}"
    common = {"table": _table(source), "unit": unit, "learning_rate": settings.rate}
    common |= {"decay": settings.decay, "over": "95 % intervals over documents"}

    def add(column: str, values: np.ndarray, **more: Any) -> None:
        table.add(row.name, column, interval(values), **common | more)

    bits = source.bits(found.nats)
    add(unit, bits)
    static, carried = STATIC, WINDOW  # or their like of a model that was trained elsewhere
    if row.rule != "isolated":
        is_own = row.start in ALONE or row.name == carried.name
        own = bits if is_own else _bits(table, source, carried)
        add("context gain", _bits(table, source, static) - own, better="higher")
    still = source.bits(kept["still"]) if "still" in kept else None
    if row.name not in (static.name, carried.name) and row.start not in ALONE:
        before = _bits(table, source, carried)
        if source.name == "pretrained" and still is not None:  # no training came before this one
            add("training gain", before - still, better="higher")
            before = still
        add("adaptation gain", before - bits, better="higher")
    if still is not None:
        add("not adapting", still, limit=True)
    of = {} if source.per_byte is None else {"unit": "bits/token"}
    if row.rule not in ("isolated", "still"):
        add("forgetting", (found.after - found.before) * NATS_TO_BITS, **of)
    if source.limit is not None:
        add("gap to Bayes", bits - source.bits(source.limit))
    for begin, end in zip(SPANS, (*SPANS[1:], None), strict=True):
        first, last = (x and x * source.sizes.window // source.sizes.chunk for x in (begin, end))
        part = found.nats[:, first:last]
        if part.size:
            column = f"{begin} to {end}" if end else f"from {begin} on"
            place = f"{_table(source)} by position"
            add(column, part.mean(axis=1) * NATS_TO_BITS, table=place, **of)


def _add_hits(table: harness.TableRun, source: Source, row: Row, hits: np.ndarray) -> None:
    """How often what was read so long ago is recalled, over documents."""
    assert source.distances is not None
    columns = {f"{a} to {b} windows": (a, b) for a, b in itertools.pairwise(AGO)}
    columns |= {f"from {AGO[-1]} windows on": (AGO[-1], 1e9), "never read": (1e9, np.inf)}
    for column, (above, most) in columns.items():
        counted = (source.distances > above) & (source.distances <= most)
        with np.errstate(invalid="ignore"):
            share = (hits & counted).sum(axis=(1, 2)) / counted.sum(axis=(1, 2))
        if not np.isnan(share).all():
            more: dict[str, Any] = {"table": f"{_table(source)} by distance", "unit": "share"}
            found = interval(share[~np.isnan(share)])
            table.add(row.name, column, found, **more, better="higher")


def _add_scale(table: harness.TableRun, sources: Sequence[Source]) -> None:
    """The adaptation gain of the rows that were read at several widths, by the model's size."""
    points: dict[str, list[tuple[float, float]]] = {}
    sized = sorted(((_millions(source), source) for source in sources), key=lambda x: x[0])
    for size, source in sized:
        for row in SCALED if len(sources) > 1 else ():
            if not table.has(row.name, table=_table(source)):
                continue
            gain = interval(_bits(table, source, WINDOW) - _bits(table, source, row))
            more: dict[str, Any] = {"table": f"{TABLE}/scale", "unit": "bits/byte"}
            table.add(row.name, f"{size:.2g} M", gain, **more, better="higher")
            points.setdefault(row.name, []).append((size, gain.mean))
    if points:
        plots.trajectories(
            table.directory / "scale.png",
            {name: np.array(found) for name, found in points.items()},
            x_label="parameters, millions",
            y_label="adaptation gain, bits a byte",
            title="What learning while reading gains, by the size of the model",
            x_ticks=[float(f"{size:.2g}") for size, _ in sized],
        )


def _millions(source: Source) -> float:
    """Parameters of the model of a source, in millions."""
    model = models.transformer(source.sizes.transformer(source.vocab_size, source.sizes.window))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) / 1e6


def _add_times(
    table: harness.TableRun, source: Source, starts: Starts, row: Row, meta_params: MetaParams
) -> None:
    """The time of a token far into a document in parts of that in its first window."""
    steps = reading.steps_at(starts, row, meta_params, (1, FAR))
    found = interleaved(steps, rounds=30)
    near, far = (np.array(found[name].samples) for name in ("1", str(FAR)))
    ratio = float(np.median(far) / np.median(near))
    over = "time of a token after 64 windows, of that in the first: medians of 30 chunks in turns"
    more = {"table": _table(source), "limit": True, "over": over}
    cell = Interval(ratio, float("nan"), len(near))
    table.add(row.name, f"time at {FAR}x", cell, unit="of that at 1x", **more)


def _draw(table: harness.TableRun, source: Source, rows: Sequence[Row]) -> None:
    """Bits a token by position, what a model that does not learn loses less or more."""
    points, size = {}, source.test.inputs[0].size
    for row in rows:
        nats = table.kept(_kept(row, source))["nats"].mean(axis=0)
        edges = np.unique(np.geomspace(1, len(nats), 12).astype(int))
        means = [nats[a:b].mean() for a, b in zip([0, *edges[:-1]], edges, strict=True)]
        x = edges * source.sizes.chunk / source.sizes.window
        points[row.name] = np.stack([x, np.array(means) * NATS_TO_BITS], axis=1)
    plots.trajectories(
        table.directory / f"{source.name}.png",
        points,
        x_label="position, windows",
        y_label=f"bits a {source.unit if source.per_byte is None else 'token'}",
        title=f"Reading {source.name}",
        x_ticks=[x for x in (1, 4, 16, 64, 256, 1024) if x * source.sizes.window <= size],
    )


def _notes(table: harness.TableRun, sources: Sequence[Source]) -> list[str]:
    """What each row gains on tuned dynamic evaluation, paired over documents."""
    lines = []
    for source in sources:
        if not table.has(DYNAMIC.name, table=_table(source)):
            continue
        for row in _rows_of(source):
            has = table.has(row.name, table=_table(source))
            if row.rule in ("isolated", "still", "SGD") or not has:
                continue
            gain = interval(_bits(table, source, DYNAMIC) - _bits(table, source, row))
            lines.append(
                f"{source.name}, {row.name}: {gain.mean:+.4f} ± {gain.ci95:.4f} bits below SGD "
                "dynamic evaluation"
            )
    return lines
