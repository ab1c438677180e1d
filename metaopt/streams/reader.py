"""A reader: a transformer that reads a text of any length, and learns from it on the way.

    reader = Reader(config, params, ReaderConfig(learning_rate=1e-3))
    state, log_probs = reader.read(reader.start(), tokens)      # and again, with the next tokens
    new = reader.generate(state, prompt, 50, jax.random.key(0))
    reader.save(state, "session.npz")

It is dynamic evaluation with the context carried: the keys and values of its window. Each token is
scored before anything learns from it. A chunk is learned from when it is full. Memory is constant
in the length of what is read.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.adapted_file import read_about, read_adapted, save_adapted
from metaopt.errors import Diverged, UserError
from metaopt.frozen import FrozenLoss, merge
from metaopt.indices import check_range
from metaopt.losses import ReadingLoss
from metaopt.models import AdapterConfig, TransformerConfig, with_window
from metaopt.models.adapters import split
from metaopt.pytrees import digest_of
from metaopt.ranges import Checked, CountOr0, Length, NotNegative, Rate, Seed, Share, check_value
from metaopt.streams.dynamic_evaluation import rule_with_prior, walk
from metaopt.types import Array, Batch, Key, Params, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig(Checked):
    """How a model learns from what it reads.

    Attributes:
      adapter: what of it learns.
      optimizer: how it steps, once on each chunk; ``'none'`` reads alone.
      learning_rate: its learning rate.
      decay: share of the way back to the start that each step goes as well.
      chunk: B, tokens that are learned from together.
      window: tokens in reach of each layer; that of the model if it has one and this is not given,
        or else 512.
      seed: seed of the start of what an adapter adds.
    """

    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    optimizer: Literal["adam", "sgd", "none"] = "adam"
    learning_rate: Rate = 1e-3
    decay: Share = 0.0
    chunk: Length = 64
    window: Length | None = None
    seed: Seed = 0


class ReaderState(NamedTuple):
    """Where a reader is in a text.

    Attributes:
      fast: what learns.
      opt_state: state of its optimiser.
      context: keys and values of the window before the chunk that is being filled.
      tokens: the last token before that chunk and those of it, int32 ``[B + 1]``.
      num_read: tokens that were read, int32 ``[]``.
    """

    fast: Params
    opt_state: optax.OptState
    context: PyTree
    tokens: np.ndarray
    num_read: np.ndarray


class Reader:
    """A transformer that reads on and learns.

    Attributes:
      config: its shape, with the window.
      how: how it learns.
    """

    def __init__(self, config: TransformerConfig, params: Params, how: ReaderConfig | None = None):
        """Compiles nothing yet.

        Args:
          config: the transformer.
          params: its parameters, such as those of `metaopt.pretrained.open_pretrained`.
          how: how it learns.

        Raises:
          UserError: the model cannot read on, or has no such parameters to learn.
        """
        self.how = how = ReaderConfig() if how is None else how
        self.config = dataclasses.replace(config, window=how.window or config.window or 512)
        self._fast, self._frozen = split(how.adapter, params, jax.random.key(how.seed))
        with_window(self.config)  # raises where it cannot

    def start(self) -> ReaderState:
        """The state before a text."""
        fast = jax.tree.map(jnp.copy, self._fast)
        return ReaderState(
            fast,
            _optimizer(self.how, self._fast).init(fast),
            _loss(self.config, self._frozen).start(fast),
            np.zeros(self.how.chunk + 1, np.int32),
            np.zeros((), np.int32),
        )

    def read(
        self, state: ReaderState, tokens: Array | np.ndarray
    ) -> tuple[ReaderState, np.ndarray]:
        """Reads on.

        What it gives does not depend on how a text is divided among calls, bitwise.

        Args:
          state: where it is. It is not changed.
          tokens: the next ones, integers ``[n]``.

        Returns:
          The state after them, and the logarithm of the probability that each had given all before
          it, nats, float32 ``[n]``; NaN for the first token of a text.

        Raises:
          UserError: they are no vector of the model's tokens.
          Diverged: a loss is NaN or infinite.
        """
        tokens, size = self._checked(tokens), self.how.chunk
        found = np.full(len(tokens), np.nan, np.float32)
        held, number, done = state.tokens.copy(), int(state.num_read), 0
        if not number and len(tokens):
            held[0], number, done = tokens[0], 1, 1
        fast, opt_state, context = state.fast, state.opt_state, state.context
        while done < len(tokens):
            filled = (number - 1) % size
            count = min(size - filled, len(tokens) - done)
            held[filled + 1 : filled + 1 + count] = tokens[done : done + count]
            each = np.asarray(_score(self.config, fast, self._frozen, context, held))
            found[done : done + count] = each[filled : filled + count]
            if not (finite := np.isfinite(found[done : done + count])).all():
                hint = "lower the learning rate"
                if number <= size or self.how.optimizer == "none":
                    hint = "the model has none on this text"
                place = number + int(np.argmin(finite)) + 1
                raise Diverged(f"token {place} has no finite probability: {hint}")
            number, done = number + count, done + count
            if filled + count == size:
                fast, opt_state, context = _learn(
                    self.config, self.how, fast, opt_state, self._fast, self._frozen, context, held
                )
                held = np.append(held[-1], np.zeros(size)).astype(np.int32)
        return ReaderState(fast, opt_state, context, held, np.asarray(number, np.int32)), found

    def generate(
        self,
        state: ReaderState,
        prompt: Array | np.ndarray,
        num_tokens: int,
        key: Key,
        temperature: float = 1.0,
    ) -> Iterator[int]:
        """Continues what was read, and a prompt after it; nothing is learned from either.

        Args:
          state: where it is. It is not changed.
          prompt: tokens, integers ``[p]``; may be empty if something was read.
          num_tokens: number of tokens to add.
          key: typed key; the same key gives the same tokens.
          temperature: 0 takes the likeliest token each time.

        Returns:
          The new tokens, each computed when it is asked for.

        Raises:
          UserError: the prompt is no vector of tokens; there is nothing to continue; or a number is
            out of range.
        """
        check_value("num_tokens", num_tokens, CountOr0)
        check_value("temperature", temperature, NotNegative)
        filled = (int(state.num_read) - 1) % self.how.chunk + 1 if state.num_read else 0
        pending = np.concatenate([state.tokens[:filled], self._checked(prompt)])
        if not len(pending):
            raise UserError("nothing was read and the prompt is empty: give a token to go on from")

        def tokens() -> Iterator[int]:
            params, context = merge(self._frozen, state.fast), state.context
            for token in pending[:-1]:
                _, context = _advance(self.config, params, context, jnp.int32(token))
            token = int(pending[-1])
            for key_of_token in jax.random.split(key, num_tokens):
                logits, context = _advance(self.config, params, context, jnp.int32(token))
                noise = jax.random.gumbel(key_of_token, logits.shape, logits.dtype)
                token = int(jnp.argmax(logits + temperature * noise))
                yield token

        return tokens()

    def save(self, state: ReaderState, path: Path | str) -> None:
        """Writes a state to a new file, to be taken up later.

        Raises:
          UserError: the file is there already, or cannot be written.
        """
        save_adapted(path, cast(Params, state), self._about())

    def load(self, path: Path | str) -> ReaderState:
        """The state that `save` wrote.

        Raises:
          UserError: it is no such file or a damaged one, or of another model or config.
        """
        about, wanted = read_about(path), self._about()
        if about != wanted:
            which = "model" if about.get("model") != wanted["model"] else "config of the reader"
            raise UserError(f"{path} is the state of another {which}: give the one that it is of")
        found = read_adapted(path, cast(Params, self.start()))
        return found._replace(tokens=np.asarray(found.tokens), num_read=np.asarray(found.num_read))

    def _about(self) -> dict[str, Any]:
        given = {"how": dataclasses.asdict(self.how), "config": dataclasses.asdict(self.config)}
        return {"model": self._digest} | json.loads(json.dumps(given))

    @functools.cached_property
    def _digest(self) -> str:
        return digest_of((self._fast, self._frozen))

    def _checked(self, tokens: Array | np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        if tokens.size == 0:
            return np.zeros(0, np.int32)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(
                f"what is read is a vector of integers, not {tokens.dtype}{list(tokens.shape)}"
            )
        check_range("the tokens", tokens, self.config.vocab_size)
        return tokens.astype(np.int32)


def _loss(config: TransformerConfig, frozen: Params) -> FrozenLoss:
    return FrozenLoss(ReadingLoss(with_window(config)), frozen)  # type: ignore[arg-type]


def _optimizer(how: ReaderConfig, anchor: Params) -> optax.GradientTransformation:
    back = anchor if how.decay else None
    return rule_with_prior(how.optimizer, how.learning_rate, back, how.decay)


@functools.partial(jax.jit, static_argnames=("config",))
def _score(
    config: TransformerConfig, fast: Params, frozen: Params, context: PyTree, tokens: Array
) -> Array:
    """The logarithms of the probabilities of a chunk, ``[B]``, the tokens before it given."""
    params = merge(frozen, fast)
    logits, _ = with_window(config).read(params, context, tokens[None, :-1])
    return -optax.softmax_cross_entropy_with_integer_labels(
        logits[0].astype(jnp.float32), tokens[1:]
    )


@functools.partial(jax.jit, static_argnames=("config", "how"))
def _learn(
    config: TransformerConfig,
    how: ReaderConfig,
    fast: Params,
    opt_state: optax.OptState,
    anchor: Params,
    frozen: Params,
    context: PyTree,
    tokens: Array,
) -> tuple[Params, optax.OptState, PyTree]:
    """A step on a full chunk, and the context after it."""
    loss_fn, chunk = _loss(config, frozen), Batch(tokens[None, :-1], tokens[None, 1:])
    if how.optimizer == "none":
        return fast, opt_state, loss_fn.step(fast, chunk, context)[1]
    rule = _optimizer(how, anchor)
    found = walk(loss_fn, rule, fast, chunk, opt_state=opt_state, context=context)
    return found.params, found.opt_state, found.context


@functools.partial(jax.jit, static_argnames=("config",))
def _advance(
    config: TransformerConfig, params: Params, context: PyTree, token: Array
) -> tuple[Array, PyTree]:
    """The logits ``[V]`` after one more token."""
    logits, context = with_window(config).read(params, context, token[None, None])
    return logits[0, 0], context
