"""Reading a text with a pretrained model, segment by segment: as it is, or adapting on the way."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.errors import Diverged, UserError
from metaopt.frozen import FrozenLoss
from metaopt.losses import NATS_TO_BITS
from metaopt.measure import compiled_memory
from metaopt.models import TransformerConfig, transformer, with_cache
from metaopt.models.adapters import AdapterConfig, split
from metaopt.models.stateful import Cache
from metaopt.pretrained.model import Pretrained
from metaopt.ranges import Checked, CountOr0, Length, Rate, Seed, Share, check_value
from metaopt.statistics import Score, t_interval
from metaopt.streams.dynamic_evaluation import (
    cut_segments,
    mean_squared_gradients,
    rms_with_prior,
    rule_with_prior,
    segment_loss,
)
from metaopt.types import Array, Batch, Params


class Segments(NamedTuple):
    """The losses of the segments of a text.

    Attributes:
      nats: sum over the tokens of each, float64 ``[n]``.
      num_tokens: number of tokens predicted in each, int ``[n]``.
      num_bytes: bytes that they stand for, int ``[n]``.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray


def score(
    found: Pretrained,
    tokens: np.ndarray,
    length: int = 256,
    context: int = 0,
    update: Callable[[int], None] = lambda done: None,
) -> Score:
    """The loss of a model on a text, in bits a byte.

    Args:
      found: the model.
      tokens: the text, integers ``[n]``, two at least. All but the first are predicted once.
      length: tokens of a segment. Without context the first of each is predicted from one token.
      context: tokens that are read before each segment and not counted again, a multiple of
        ``length``; fewer where the text begins.
      update: called with the number of segments that are done.

    Raises:
      UserError: the text is too short, or a number is out of range.
    """
    return score_of(segment_losses(found, tokens, length, context, update))


def gain(before: Segments, after: Segments) -> Score:
    """How many bits a byte the same segments lose less, with its paired interval over them."""
    return score_of(before._replace(nats=before.nats - after.nats))


def score_of(segments: Segments) -> Score:
    """The mean of segments, in bits a byte, with its interval over them."""
    bits = segments.nats * NATS_TO_BITS
    mean = bits.sum() / segments.num_bytes.sum()
    # Of a ratio: the interval of what is left of each segment, in bytes of a mean segment.
    left = (bits - mean * segments.num_bytes) / segments.num_bytes.mean()
    ci95 = t_interval(left).ci95 if len(left) > 1 else float("nan")
    return Score(float(mean), ci95, "bits/byte", int(segments.num_tokens.sum()))


def segment_losses(
    found: Pretrained,
    tokens: np.ndarray,
    length: int,
    context: int,
    update: Callable[[int], None] = lambda done: None,
) -> Segments:
    """The losses of all segments; see `score`."""
    check_value("length", length, Length)
    check_value("context", context, CountOr0)
    if context % length:
        raise UserError(f"context {context} is no multiple of length {length}: give one that is")
    if len(tokens) < 2:
        raise UserError(f"a text of {len(tokens)} tokens holds nothing to predict: give 2")
    num_tokens = len(tokens) - 1
    count = -(-num_tokens // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: len(tokens)] = tokens
    blocks, config = padded[:-1].reshape(count, 1, length), found.config
    following = padded[1:].reshape(count, length)
    model, nats = with_cache(config, context + length), np.zeros(count)
    counted = np.minimum(length, num_tokens - length * np.arange(count))
    for i in range(count):
        cache = model.start(1)
        for block in blocks[max(0, i - context // length) : i]:
            cache = _read(config, found.params, cache, block)
        nats[i] = float(_loss(config, found.params, cache, blocks[i], following[i], counted[i]))
        update(i + 1)
    parts = np.split(np.asarray(tokens[1:]), np.cumsum(counted)[:-1])
    return Segments(nats, counted, np.array([len(found.codec.decode(part)) for part in parts]))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(config: TransformerConfig, params: Params, cache: Cache, tokens: Array) -> Cache:
    return with_cache(config, cache[0].keys.shape[2]).read(params, cache, tokens)[1]


@functools.partial(jax.jit, static_argnames=("config",))
def _loss(
    config: TransformerConfig,
    params: Params,
    cache: Cache,
    tokens: Array,
    following: Array,
    counted: Array,
) -> Array:
    """The sum of the losses of the first tokens of a segment, nats."""
    model = with_cache(config, cache[0].keys.shape[2])
    logits = model.read(params, cache, tokens)[0][0]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    return jnp.where(jnp.arange(len(each)) < counted, each, 0).sum()


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Checked):
    """How a model adapts while it reads.

    Attributes:
      adapter: what of it adapts.
      optimizer: how it steps, once on each segment after scoring it; ``'rms'`` takes the scale of
        the steps from general text, see `metaopt.streams.dynamic_evaluation.rms_with_prior`;
        ``'none'`` scores alone.
      learning_rate: its learning rate.
      decay: share of the way back to the start that each step goes as well; of ``'rms'`` that of a
        parameter with the mean scale.
      length: tokens of a segment.
      context: tokens that are read before each segment and not scored again.
      seed: seed of the start of products of low rank.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: Literal["adam", "sgd", "rms", "none"] = "adam"
    learning_rate: Rate = 1e-3
    decay: Share = 0.0
    length: Length = 256
    context: CountOr0 = 0
    seed: Seed = 0


class Read(NamedTuple):
    """What came of adapting along a text.

    Attributes:
      segments: the losses, each from before the step on its segment.
      fast: what has adapted.
      frozen: the other parameters; ``merge(frozen, fast)`` are all.
    """

    segments: Segments
    fast: Params
    frozen: Params


def read_along(
    found: Pretrained,
    tokens: np.ndarray,
    config: ReadingConfig,
    update: Callable[..., None] = lambda done, **numbers: None,
    general: np.ndarray | None = None,
) -> Read:
    """Scores each whole segment of a text, then takes one step on it: dynamic evaluation.

    Every token is predicted by a model that has not seen it. What is left over at the end and makes
    no whole segment is not read.

    Args:
      found: the model, which is not changed.
      tokens: the text, integers ``[n]``.
      config: what adapts, and how.
      update: called with the number of segments done and their mean loss, ``nats``.
      general: text like that of the model's training, integers ``[m]``, for the optimizer
        ``'rms'``.

    Raises:
      UserError: a text has no whole segment or is not there, or the model no such parameters.
      Diverged: a loss is NaN or infinite.

    References:
      Krause et al., 2018, "Dynamic Evaluation of Neural Sequence Models", arXiv:1709.07432.
    """
    cut = cut_segments(tokens, config.length, config.context)
    fast, frozen = split(config.adapter, found.params, jax.random.key(config.seed))
    scale = None
    if config.optimizer == "rms":
        if general is None:
            raise UserError("the optimizer rms takes its scale from general text: give one")
        segments = cut_segments(general, config.length)
        scale = _mean_squares(found.config, fast, frozen, segments)
    anchor = fast if config.decay or scale is not None else None
    fast, nats = jax.tree.map(jnp.copy, fast), np.zeros(len(cut.targets))  # the copy is donated
    shared = _Shared(frozen, anchor, scale)
    opt_state = _optimizer(config, shared).init(fast)
    for i in range(len(nats)):
        segment = Batch(cut.inputs[i : i + 1], cut.targets[i : i + 1])
        fast, opt_state, loss = _step(found.config, config, fast, opt_state, shared, segment)
        nats[i] = float(loss)  # numpy's own conversion would hide an interrupt
        if not np.isfinite(nats[i]):
            hint = "lower the learning rate" if i else "the model has no finite loss on this text"
            raise Diverged(f"the loss of segment {i + 1} is {nats[i]}: {hint}")
        update(i + 1, nats=nats[: i + 1].mean())
    num_bytes = np.array([len(found.codec.decode(targets)) for targets in cut.targets])
    counted = np.full(len(nats), config.length)
    return Read(Segments(nats * config.length, counted, num_bytes), fast, frozen)


def step_bytes(found: Pretrained, config: ReadingConfig) -> int:
    """The bytes that a step of `read_along` takes, as the compiler plans it: the model with them.

    Nothing is run.
    """
    key = jax.random.key(config.seed)
    fast, frozen = jax.eval_shape(lambda p: split(config.adapter, p, key), found.params)
    anchor = fast if config.decay or config.optimizer == "rms" else None
    shared = _Shared(frozen, anchor, fast if config.optimizer == "rms" else None)
    opt_state = jax.eval_shape(lambda f, s: _optimizer(config, s).init(f), fast, shared)
    inputs, targets = (
        cast(Array, jax.ShapeDtypeStruct((1, size), jnp.int32))
        for size in (config.context + config.length, config.length)
    )
    step = _step.lower(found.config, config, fast, opt_state, shared, Batch(inputs, targets))
    needed = compiled_memory(step.compile())
    return needed.temp + needed.arguments


class _Shared(NamedTuple):
    """What all steps of a reading are given.

    Attributes:
      frozen: the parameters that do not adapt.
      anchor: the start of those that do, if steps go back to it.
      scale: mean squared gradients of general text, if steps are in that scale.
    """

    frozen: Params
    anchor: Params | None
    scale: Params | None


def _optimizer(config: ReadingConfig, shared: _Shared) -> optax.GradientTransformation:
    if shared.scale is not None:
        assert shared.anchor is not None
        return rms_with_prior(shared.anchor, config.learning_rate, config.decay, shared.scale)
    return rule_with_prior(config.optimizer, config.learning_rate, shared.anchor, config.decay)


@functools.partial(jax.jit, static_argnames=("model",))
def _mean_squares(
    model: TransformerConfig, fast: Params, frozen: Params, segments: Batch
) -> Params:
    loss_fn = FrozenLoss(segment_loss(transformer(model)), frozen)
    return mean_squared_gradients(loss_fn, fast, segments)


@functools.partial(
    jax.jit, static_argnames=("model", "config"), donate_argnames=("fast", "opt_state")
)
def _step(
    model: TransformerConfig,
    config: ReadingConfig,
    fast: Params,
    opt_state: optax.OptState,
    shared: _Shared,
    segment: Batch,
) -> tuple[Params, optax.OptState, Array]:
    """The loss on a segment, and a step on it; what is shared is no constant of the program."""
    loss_fn = FrozenLoss(segment_loss(transformer(model)), shared.frozen)
    if config.optimizer == "none":
        return fast, opt_state, loss_fn(fast, segment)
    loss, grads = jax.value_and_grad(loss_fn)(fast, segment)
    updates, opt_state = _optimizer(config, shared).update(grads, opt_state, fast)
    return optax.apply_updates(fast, updates), opt_state, loss
