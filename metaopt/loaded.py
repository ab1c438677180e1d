"""What a row of a run learned, and its use: adapt to a text, score, generate, keep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import losses
from metaopt.adapted_file import read_about, read_adapted, save_adapted
from metaopt.eager import compile_once
from metaopt.errors import Diverged, UserError
from metaopt.frozen import Bind, unbound, whole
from metaopt.indices import check_range
from metaopt.inner_loop import InnerLoop, adapt
from metaopt.languages import LanguageConfig
from metaopt.models import TransformerConfig
from metaopt.pytrees import all_finite, digest_of
from metaopt.ranges import Count, InnerSteps, Rate, Seed, check_value
from metaopt.sequence import decoding
from metaopt.statistics import Score, t_interval
from metaopt.tasks.codecs import Codec
from metaopt.types import Array, Batch, Hparams, Learner, LossFn, MetaParams, Model, Params

Text = str | bytes | np.ndarray | Array | Sequence[int]
"""Text, its bytes, or its tokens: integers ``[n]``."""
SEGMENTS_AT_A_TIME = 64
LOGITS_AT_A_TIME = 2**26
"""Fewer segments are scored together where the logits of a large vocabulary would be more."""
STEPS_A_CALL = 16
"""Inner steps in a compiled call, between which a long adaptation says how far it is."""
MOST_STEPS = 10_000
"""Number of steps that a long text is adapted to with, if no other is asked for."""


class Loaded(NamedTuple):
    """What a row of a run learned, and what it takes to use it.

    Attributes:
      row: name of the row.
      seed: seed that it was trained with.
      model: the model.
      loss_fn: next-token loss of the model, in nats a token.
      learner: what was meta-learned.
      inner: the inner loop that it was trained with.
      meta_params: what was learned.
      hparams: scalars of the end of the training, with the inner rate that the run's results
        name for the trained number of inner steps.
      config: languages, model and inner loop of the run.
      codec: how text is written as tokens.
      pretrained: the transformer that the model is part of, if it was trained elsewhere.

    Example:
      >>> found = metaopt.load("runs/adapt_languages/cpu-20260101-120000")
      >>> adapted = found.adapt(text)
      >>> print(found.score(found.start, more), found.score(adapted, more), sep="\\n")
      >>> print(found.generate(adapted, "The ", 200))
    """

    row: str
    seed: int
    model: Model
    loss_fn: LossFn
    learner: Learner
    inner: InnerLoop
    meta_params: MetaParams
    hparams: Hparams
    config: LanguageConfig
    codec: Codec
    pretrained: TransformerConfig | None = None

    @property
    def start(self) -> Params:
        """The parameters that adaptation starts from."""
        return self.learner.start(self.meta_params)

    @property
    def sequences_a_step(self) -> int:
        """The number of sequences that an inner step of training read."""
        inner = self.inner
        split = inner.num_steps if inner.batching == "split" else 1
        return max(1, self.config.num_support // split)

    def tokens(self, text: Text) -> np.ndarray:
        """Text as tokens, int32 ``[n]``.

        Raises:
          UserError: it is not of the vocabulary.
        """
        if isinstance(text, str):
            text = text.encode("utf-8", errors="surrogateescape")
        if isinstance(text, bytes):
            return self.codec.encode(text)
        tokens = np.asarray(text)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(
                f"tokens are a list of integers, not {tokens.dtype} of the shape {tokens.shape}"
            )
        check_range("tokens", tokens, self.codec.vocab_size)
        return tokens.astype(np.int32)

    def adapt(
        self,
        text: Text,
        *,
        num_steps: int | None = None,
        sequences: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        update: Callable[[int], None] = lambda done: None,
    ) -> Params:
        """The parameters after inner steps on a text, with the learner's optimiser and rate.

        Each step takes the next sequences of the text, in a random order (`supports`). A text that
        has only those of one step is stepped on again and again, as in training; a longer one is
        read once.

        Args:
          text: text of the language to adapt to.
          num_steps: number of steps; `steps_of` the text if not given.
          sequences: number of sequences in a step; as in training if not given.
          learning_rate: inner rate; the one of `hparams` if not given. Rates that are learned are
            factors on it.
          seed: seed of the order of the sequences.
          update: called with the number of steps that are done, now and then.

        Raises:
          UserError: the text is too short for one step, or not of the vocabulary, or a number is
            out of range.
          Diverged: the parameters became NaN or infinite.
        """
        tokens = self.tokens(text)
        steps = self.steps_of(tokens, sequences) if num_steps is None else num_steps
        support = self.supports(tokens, steps, sequences, seed)
        hparams = dict(self.hparams)
        if learning_rate is not None:
            check_value("learning_rate", learning_rate, Rate)
            hparams["inner_learning_rate"] = jnp.float32(learning_rate)
        loss_fn = self.learner.inner_loss(self.meta_params, self.loss_fn)
        optimizer = self.learner.inner_opt(self.meta_params, hparams)
        params, opt_state = self.start, optimizer.init(self.start)
        size = len(support.inputs) // steps
        for begin in range(0, steps, STEPS_A_CALL):
            end = min(begin + STEPS_A_CALL, steps)
            batch = jax.tree.map(lambda x, i=begin, j=end: x[i * size : j * size], support)
            inner = InnerLoop(num_steps=end - begin, batching="split", unroll=False)
            adapted = adapt(loss_fn, optimizer, params, batch, inner, opt_state=opt_state)
            params, opt_state = adapted.params, adapted.opt_state
            if not all_finite(params):
                raise Diverged("adaptation diverged: lower the rate, or take fewer steps")
            update(end)
        return params

    def steps_of(self, text: Text, sequences: int | None = None) -> int:
        """The number of steps that read a text once, and at least that of training.

        Args:
          text, sequences: as for `adapt`.
        """
        size = self.sequences_a_step if sequences is None else sequences
        check_value("sequences", size, Count)
        once = len(self.tokens(text)) // (self.config.length + 1) // size
        return max(self.inner.num_steps, min(once, MOST_STEPS))

    def supports(
        self, text: Text, num_steps: int, sequences: int | None = None, seed: int = 0
    ) -> Batch:
        """The sequences that each inner step takes, one step after the other.

        The text is cut into sequences of L + 1 tokens, as in training; what is left over at its
        end is not used. They are taken in a random order, B a step; when fewer than B are left, all
        are taken again in another order.

        Args:
          text, num_steps, seed: as for `adapt`.
          sequences: B.

        Returns:
          int32 ``[num_steps * B, L]``.

        Raises:
          UserError: see `adapt`.
        """
        size = self.sequences_a_step if sequences is None else sequences
        check_value("num_steps", num_steps, InnerSteps)
        check_value("sequences", size, Count)
        check_value("seed", seed, Seed)
        tokens, width = self.tokens(text), self.config.length + 1
        count = len(tokens) // width
        if count < size:
            raise UserError(
                f"a text of {len(tokens)} tokens is too short to adapt to: a step takes {size} "
                f"sequences of {width}, which are {size * width} tokens"
            )
        rng, rounds = np.random.default_rng(seed), -(-num_steps // (count // size))
        order = [rng.permutation(count)[: count // size * size] for _ in range(rounds)]
        cells = tokens[: count * width].reshape(count, width)
        chosen: Any = cells[np.concatenate(order)[: num_steps * size]]
        return Batch(chosen[:, :-1], chosen[:, 1:])

    def score(self, params: Params, text: Text) -> Score:
        """The loss of parameters on a text: adapted ones, or those before, `start`.

        The text is cut into segments of L tokens. Every token but the first is predicted once, from
        the tokens before it in its segment, as in training.

        Args:
          params: parameters of the model.
          text: text of two tokens or more.

        Raises:
          UserError: it is shorter or not of the vocabulary.
        """
        tokens, length = self.tokens(text), self.config.length
        if len(tokens) < 2:
            raise UserError(f"a text of {len(tokens)} tokens holds nothing to predict: give 2")
        total = len(tokens) - 1
        missing = -total % length
        inputs = np.pad(tokens[:-1], (0, missing)).reshape(-1, length)
        targets = np.pad(tokens[1:], (0, missing), constant_values=losses.IGNORED)
        segments = inputs, targets.reshape(-1, length)
        bind, frozen = unbound(self.loss_fn)
        fitting = max(1, LOGITS_AT_A_TIME // (length * self.codec.vocab_size))
        together = min(SEGMENTS_AT_A_TIME, fitting)
        losses_of = compile_once(_segment_losses(bind, together))
        nats = np.asarray(losses_of(params, segments, frozen), np.float64)
        counts = (segments[1] != losses.IGNORED).sum(axis=1)
        unit, scale = "nats/token", 1.0
        if self.codec.is_text:
            num_bytes = len(self.codec.decode(tokens[1:]))
            unit, scale = "bits/byte", losses.NATS_TO_BITS * total / num_bytes
        whole = nats[: total // length]
        ci95 = t_interval(whole).ci95 if len(whole) > 1 else float("nan")
        return Score(float(nats @ counts) / total * scale, ci95 * scale, unit, total)

    def generate(
        self,
        params: Params,
        prompt: Text = "",
        length: int = 200,
        *,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> str:
        """Text that a model of these parameters continues a prompt with, the prompt first.

        The model sees the last L tokens, the number that it was trained on; a pretrained one sees
        all.

        Args:
          params: parameters of the model, adapted or not.
          prompt: text to continue; that of `Codec.opening` if it is empty.
          length: number of tokens to add.
          temperature: 0 takes the likeliest token each time.
          seed: the same seed gives the same text.

        Raises:
          UserError: the prompt is not of the vocabulary, or a number is out of range.
        """
        check_value("seed", seed, Seed)
        tokens = self.tokens(prompt)
        start = jnp.asarray(tokens if len(tokens) else self.codec.encode(self.codec.opening))
        key, window = jax.random.key(seed), self.config.length
        if self.pretrained is not None:
            params = whole(self.model, params)
            drawn = decoding.stream(self.pretrained, params, start, length, key, temperature)
            return self.codec.show([*start.tolist(), *drawn])
        made = decoding.generate(self.model, params, start, length, key, temperature, window)
        return self.codec.show(made)

    def save(self, params: Params, path: Path | str) -> None:
        """Writes adapted parameters to an npz file, with whose they are.

        Raises:
          UserError: the file is there already, or cannot be written.
        """
        save_adapted(path, params, self._about())

    def read(self, path: Path | str) -> Params:
        """Adapted parameters that `save` wrote for this row of this run.

        Raises:
          UserError: it is no such file or a damaged one, or those of another row or run.
        """
        about = read_about(path)
        if about.get("learned") != self._about()["learned"]:
            whose = about.get("row", "something else")
            raise UserError(
                f"{path} was adapted from another run or row ({whose}, and not what {self.row} of "
                "this run learned): give the run and row that it was adapted from"
            )
        return read_adapted(path, self.start)

    def _about(self) -> dict[str, Any]:
        """Whose adapted parameters a file holds; ``learned`` is the same in a copy of the run."""
        return {"row": self.row, "seed": self.seed, "learned": digest_of(self.meta_params)}


def _segment_losses(bind: Bind, together: int):
    """``(params, (inputs, targets) [N, L], frozen) -> [N]``, the mean of each segment."""

    def found(params, segments, frozen):
        def one(segment):
            return bind(frozen)(params, Batch(*(x[None] for x in segment)))

        return jax.lax.map(one, segments, batch_size=together)

    return found
