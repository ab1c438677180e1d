"""Random Markov languages, and the exact loss of the best possible learner on them.

A task is a language of order m over V symbols. Each of its V^m contexts has a
distribution of the next token, drawn from the symmetric Dirichlet distribution of
the given concentration. A sequence starts with m tokens drawn uniformly and
independently, and follows the chain from there.
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.indices import as_int32
from metaopt.ranges import Checked, Count, Length, Range
from metaopt.tasks.fresh import fresh_tasks
from metaopt.types import Array, Batch, Episode, Key, TaskFamily

_MAX_TABLE = 2**24
BYTES_TO_DRAW = 150  # of working memory for each probability of a language, measured on CPU

Order = Annotated[int, Range(1, 24)]
Symbols = Annotated[int, Range(2, 4096)]
Concentration = Annotated[float, Range(1e-3, 1e4)]
"""Concentration of a Dirichlet prior: below, every language is one word repeated; above, noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkovConfig(Checked):
    """Size and prior of the languages, and sizes of an episode in sequences and tokens.

    Raises UserError on values that contradict each other or have no meaning, and
    where a language's table of V^(m+1) probabilities would pass 64 MiB.
    """

    vocab_size: Symbols = 16
    order: Order = 1
    concentration: Concentration = 0.3
    num_support: Count = 4
    num_query: Count = 4
    length: Length = 32

    def __post_init__(self):
        super().__post_init__()
        if self.length < self.order:
            raise UserError(f"length ({self.length}) must be at least the order ({self.order})")
        if self.vocab_size ** (self.order + 1) > _MAX_TABLE:
            raise UserError(
                f"vocab_size {self.vocab_size} with order {self.order} makes more than "
                f"{_MAX_TABLE} transition probabilities a language: lower one of them"
            )


def bytes_to_draw(config: MarkovConfig, num_tasks: int) -> int:
    """The memory that it takes to draw ``num_tasks`` episodes at once, each with its language."""
    return BYTES_TO_DRAW * num_tasks * config.vocab_size ** (config.order + 1)


def markov(config: MarkovConfig) -> TaskFamily:
    """Languages drawn afresh for every episode; int32 tokens ``[T, S, L]``."""
    return fresh_tasks("markov", functools.partial(_draw_examples, config), config.num_support)


def draw_language(config: MarkovConfig, key: Key) -> Array:
    """Log-probabilities of the next token in each context, float32 ``[V^m, V]``.

    Rows are in the order of `number_ngrams`. The Dirichlet distribution is drawn as
    normalised gamma variables, in log space: at small concentrations most of them
    underflow otherwise. They take most of the time of `markov`: about a microsecond
    each on one CPU core.
    """
    shape = (config.vocab_size**config.order, config.vocab_size)
    return jax.nn.log_softmax(jax.random.loggamma(key, config.concentration, shape))


def draw_sequences(config: MarkovConfig, key: Key, language: Array, num_sequences: int) -> Array:
    """Sequences of one language, int32 ``[num_sequences, length + 1]``.

    Args:
      config: the config that the language was drawn with.
      key: typed key.
      language: what `draw_language` returns.
      num_sequences: number of sequences, independent of one another.
    """
    start_key, chain_key = jax.random.split(key)
    start = jax.random.randint(start_key, (num_sequences, config.order), 0, config.vocab_size)

    def step(contexts: Array, key: Key) -> tuple[Array, Array]:
        tokens = jax.random.categorical(key, language[contexts]).astype(jnp.int32)
        contexts = (contexts * config.vocab_size + tokens) % len(language)
        return contexts, tokens

    keys = jax.random.split(chain_key, config.length + 1 - config.order)
    _, chain = jax.lax.scan(step, number_ngrams(config, start, config.order)[:, 0], keys)
    return jnp.concatenate([start, chain.T], axis=1)


def number_ngrams(config: MarkovConfig, tokens: Array, n: int) -> Array:
    """Number of each run of n tokens: its tokens as digits in base V, the latest last.

    A context is numbered as an m-gram, a transition as an (m+1)-gram.

    Args:
      config: gives V.
      tokens: integers from 0 to V - 1, ``[..., L]`` with L at least n.
      n: tokens in a run.

    Returns:
      int32 ``[..., L - n + 1]``.
    """
    tokens = as_int32("tokens", tokens)
    num_ngrams = tokens.shape[-1] - n + 1
    numbers = jnp.zeros((*tokens.shape[:-1], num_ngrams), jnp.int32)
    for i in range(n):
        numbers = numbers * config.vocab_size + tokens[..., i : i + num_ngrams]
    return numbers


@functools.partial(jax.jit, static_argnums=0)
def bayes_loss(
    config: MarkovConfig, episode: Episode, *, use_support: bool = True, use_prefix: bool = False
) -> Array:
    """Mean query loss of the posterior predictive of the Dirichlet prior, in nats a token.

    With n the counts of transitions in the evidence and a the concentration,
    ``p(j | c) = (n_cj + a) / (n_c + V a)``; no learner with the same evidence does
    better on average. Targets among a sequence's first m tokens cost log V each.

    The evidence is counted by comparing transitions pairwise, so that memory does not
    grow with V^m, and tasks are taken one at a time.

    Args:
      config: the config that the episode was drawn with; static.
      episode: T tasks from `markov`, of tokens of any integer dtype.
      use_support: the support is evidence, as for a learner that adapts on it.
      use_prefix: so are the earlier tokens of the same query sequence, as for a model
        that learns in context. With neither, the loss is log V.

    Returns:
      float32 ``[T]``; NaN for a task with a token that is not of the vocabulary.
    """

    def loss(batches: tuple[Batch, Batch]) -> Array:
        sequences = [_sequences(batch) for batch in batches]
        known = [((tokens >= 0) & (tokens < config.vocab_size)).all() for tokens in sequences]
        support, query = (number_ngrams(config, s, config.order + 1) for s in sequences)
        earlier = jnp.tri(query.shape[1], k=-1, dtype=bool)
        in_context, followed = _count(
            config, query, support.reshape(1, -1), visible=use_support
        ) + _count(config, query, query, visible=earlier[None] & use_prefix)
        alpha, vocab_size = config.concentration, config.vocab_size
        log_probs = jnp.log((followed + alpha) / (in_context + vocab_size * alpha))
        num_uniform = batches[1].targets.size - query.size
        mean = (num_uniform * math.log(vocab_size) - log_probs.sum()) / batches[1].targets.size
        return jnp.where(known[0] & known[1], mean, jnp.nan)

    return jax.lax.map(loss, (episode.support, episode.query))


def _sequences(batch: Batch) -> Array:
    """Inputs and the last target, int32 ``[S, L + 1]``."""
    inputs, targets = as_int32("inputs", batch.inputs), as_int32("targets", batch.targets)
    return jnp.concatenate([inputs, targets[:, -1:]], axis=1)


def _count(
    config: MarkovConfig, query_QxM: Array, evidence_RxE: Array, visible: Array | bool
) -> Array:
    """How often the evidence holds each query transition's context, and it: ``[2, Q, M]``."""

    def matches(query: Array, evidence: Array) -> Array:
        same_QxMxE = (query[:, :, None] == evidence[:, None, :]) & visible
        return same_QxMxE.sum(-1)

    contexts = matches(query_QxM // config.vocab_size, evidence_RxE // config.vocab_size)
    return jnp.stack([contexts, matches(query_QxM, evidence_RxE)])


def _draw_examples(config: MarkovConfig, key: Key) -> Batch:
    language_key, sequences_key = jax.random.split(key)
    language = draw_language(config, language_key)
    num_sequences = config.num_support + config.num_query
    tokens = draw_sequences(config, sequences_key, language, num_sequences)
    return Batch(tokens[:, :-1], tokens[:, 1:])
