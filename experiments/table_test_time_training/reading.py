"""Reading: the protocol that all rows keep.

Documents are read in their order, each from the weights and the context of the start. Each chunk is
scored once, before anything learns from it. Rates are chosen on other documents, of as many for
each row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.table_test_time_training.rows import Row, Settings, Starts
from metaopt import models, parallel
from metaopt.console import log
from metaopt.losses import ReadingLoss
from metaopt.streams.dynamic_evaluation import (
    decay_towards,
    mean_squared_gradients,
    rms_with_prior,
    walk,
)
from metaopt.types import Batch, Hparams, MetaParams, Params, PyTree

STILL = Settings(0.0, 0.0)
SQUARES = 64
"""Documents whose gradients give the RMS rule its scale."""


class Reading(NamedTuple):
    """What came of reading documents.

    Attributes:
      nats: Losses of their chunks, each from before the step on it, ``[D, N]``.
      before: Loss on another text before anything is read.
      after: The same after each document ``[D]``.
      hits: Whether each token was held for the most probable one ``[D, N, B]``; where it counts.
    """

    nats: np.ndarray
    before: float
    after: np.ndarray
    hits: np.ndarray | None = None


def tuned(starts: Starts, row: Row, meta_params: MetaParams) -> Settings:
    """The rate and the decay with the least loss on the documents to choose on."""
    config = starts.config
    if row.rule in ("isolated", "still"):
        return STILL
    rates = config.rms_rates if row.rule == "RMS" else starts.sizes.rates
    tried = [Settings(rate, decay) for rate in rates for decay in config.decays]
    found = read(starts, row, meta_params, starts.source.valid, tried)
    means = [float(np.nan_to_num(x.nats.mean(), nan=np.inf)) for x in found]
    best = tried[int(np.argmin(means))]
    at_end = len(rates) > 1 and best.rate in (rates[0], rates[-1])
    note = ", at an end of the rates that were tried" if at_end else ""
    log(f"{row.name}: rate {best.rate:g}, decay {best.decay:g}: {min(means):.4f} nats{note}")
    return best


def read(
    starts: Starts,
    row: Row,
    meta_params: MetaParams,
    documents: Batch,
    tried: Sequence[Settings] = (STILL,),
) -> list[Reading]:
    """Readings of all documents with each of some settings."""
    source = starts.source
    number = len(documents.inputs)
    squares = _mean_squares(starts, row, meta_params) if row.rule == "RMS" else ()
    shared = meta_params, squares, source.general
    every = jax.tree.map(lambda x: np.concatenate(len(tried) * [x]), documents)
    scalars = np.repeat(np.array(tried, np.float32), number, axis=0)
    found = _reader(starts, row)(shared, (every, scalars))
    nats, before, after = (x.astype(np.float64) for x in found[:3])

    def of_setting(i: int) -> Reading:
        these = slice(i * number, (i + 1) * number)
        hits = found[3][these] if source.distances is not None else None
        return Reading(nats[these], float(before[these][0]), after[these], hits)

    return [of_setting(i) for i in range(len(tried))]


@functools.cache
def _reader(starts: Starts, row: Row) -> Callable:
    """``(shared, (documents [D, N, B], scalars [D, 2])) -> losses [D, N], before, after [D]``.

    And hits ``[D, N, B]``, of a source that says how far apart its tokens are.
    """
    loss_fn, learner = starts.loss(row.start), starts.learner(row.start)
    together = starts.source.sizes.window // starts.source.sizes.chunk

    def is_hit(params: Params, chunk: Batch, context: PyTree) -> jax.Array:
        logits, _ = loss_fn.model.read(params, context, chunk.inputs)
        return (logits.argmax(-1) == chunk.targets)[0]

    probe = is_hit if starts.source.distances is not None else None

    def isolated(params: Params, document: Batch) -> tuple[jax.Array, ...]:
        """The losses of chunks that see nothing before the window that they are in; and hits."""

        def read(window: Batch) -> tuple[jax.Array, ...]:
            walked = walk(loss_fn, optax.sgd(0.0), params, window, probe=probe)
            return (walked.losses,) if probe is None else (walked.losses, walked.probes)

        cut = jax.tree.map(lambda x: x.reshape(-1, together, x.shape[1]), document)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(read, cut))

    def on_device(shared, one):
        meta_params, squares, general = shared
        document, (rate, decay) = jax.tree.map(lambda x: x[0], one)
        params = learner.start(meta_params)
        before = loss_fn(params, general)
        if row.rule == "isolated":
            losses, *hits = isolated(params, document)
            return tuple(x[None] for x in (losses, before, before, *hits))
        scalars = {"inner_learning_rate": rate, "decay": decay}
        optimizer = _rule(starts, row, meta_params, scalars, squares)
        walked = walk(loss_fn, optimizer, params, document, probe=probe)
        hits = () if probe is None else (walked.probes,)
        found = walked.losses, before, loss_fn(walked.params, general), *hits
        return tuple(x[None] for x in found)

    return parallel.parallel_map(on_device, parallel.default_devices(), most=1)


def _rule(
    starts: Starts, row: Row, meta_params: MetaParams, scalars: Hparams, squares: Params
) -> optax.GradientTransformation:
    """How a row steps."""
    learner = starts.learner(row.start)
    params = learner.start(meta_params)
    rate, decay = scalars["inner_learning_rate"], scalars["decay"]
    rules = {
        "still": lambda: optax.sgd(0.0),
        "SGD": lambda: optax.chain(optax.sgd(rate), decay_towards(params, decay)),
        "RMS": lambda: rms_with_prior(params, rate, decay, squares),
        "fast": lambda: learner.inner_opt(meta_params, scalars),
    }
    return rules[row.rule]()


def _mean_squares(starts: Starts, row: Row, meta_params: MetaParams) -> Params:
    drawn = starts.source.train.train.sample(jax.random.key(starts.config.seed + 1), SQUARES)
    segments = jax.tree.map(lambda x: x[:, 0], drawn.support)
    squares = jax.jit(functools.partial(mean_squared_gradients, starts.loss(row.start)))
    return squares(meta_params["params"], segments)


def steps_at(
    starts: Starts, row: Row, meta_params: MetaParams, windows: Sequence[int]
) -> dict[str, Callable[[], Any]]:
    """What reads one chunk, by the number of windows that were read before it.

    For full attention it is a model of the same shape that keeps all keys and values, which grow
    with what was read, and not that of its row, whose window does not.
    """
    source, learner, full = starts.source, starts.learner(row.start), row.start == "full"
    chunk = jax.tree.map(lambda x: jnp.asarray(x[0, :1]), source.test)
    # On one device: what a training left on all of them would be sent there at some calls.
    meta_params = jax.tree.map(jnp.asarray, jax.device_get(meta_params))
    params = learner.start(meta_params)
    scalars = {"inner_learning_rate": jnp.float32(0.01), "decay": jnp.float32(0)}

    def steps(number: int) -> Callable[[], Any]:
        model = starts.reader(row.start)
        if full:
            room = number * source.sizes.window + source.sizes.chunk
            model = models.with_cache(starts.transformer("full"), room)
        loss_fn = ReadingLoss(model)
        context = jax.tree.map(jnp.copy, loss_fn.start(params))
        if full:
            context = tuple(
                past._replace(length=jnp.int32(room - source.sizes.chunk)) for past in context
            )

        @jax.jit
        def step(params, context):
            if row.rule in ("isolated", "still"):
                return loss_fn.step(params, chunk, context)
            squares = params  # of any value: the time is the same
            optimizer = _rule(starts, row, meta_params, scalars, squares)
            return walk(loss_fn, optimizer, params, chunk, context=context).params

        if not full:  # which cost what is read: as far as it is
            for _ in range(number * source.sizes.window // source.sizes.chunk - 1):
                context = read_chunk(params, context)
        return lambda: step(params, context)

    @jax.jit
    def read_chunk(params, context):
        return starts.loss(row.start).step(params, chunk, context)[1]

    return {str(number): steps(number) for number in windows}
