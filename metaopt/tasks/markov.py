"""Random Markov languages, and the exact loss of the best possible learner on them.

A task is a language of order m over V symbols. Each of its V^m contexts has a
distribution of the next token, drawn from a Dirichlet distribution: the same symmetric one
for all contexts, or one for each context, which the languages of a family share. A sequence
starts with m tokens drawn uniformly and independently, and follows the chain from there.
"""

import dataclasses
import functools
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from metaopt.errors import UserError
from metaopt.indices import as_int32
from metaopt.ranges import Checked, Count, Length, Range, Seed
from metaopt.tasks.fresh import fresh_tasks
from metaopt.types import Array, Batch, Episode, Key, TaskFamily

_MAX_TABLE = 2**24
BYTES_TO_DRAW = 150  # of working memory for each probability of a language, measured on CPU

Order = Annotated[int, Range(1, 24)]
Symbols = Annotated[int, Range(2, 4096)]
Concentration = Annotated[float, Range(1e-3, 1e4)]
"""Concentration of a Dirichlet prior: below, every language is one word repeated; above, noise."""
Prior = Literal["symmetric", "rows"]
ROW_WEIGHTS = (0.5, 50.0)
"""Range of the sum of the Dirichlet weights of a context under the prior ``rows``."""
_LEAST_WEIGHT = 1e-4  # below, float32 draws of its gamma variable tell a language nothing new


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkovConfig(Checked):
    """Size and prior of the languages, and sizes of an episode in sequences and tokens.

    Raises UserError on values that contradict each other or have no meaning, and
    where a language's table of V^(m+1) probabilities would pass 64 MiB.

    Attributes:
      vocab_size: V.
      order: m, tokens that the next one depends on.
      prior: ``symmetric``: every context has the Dirichlet prior of all weights
        ``concentration``, so the family looks the same when its symbols are renamed. ``rows``:
        context c has the weights ``k_c b_c``, drawn once for the family, ``b_c`` from the
        symmetric Dirichlet distribution and ``k_c`` log-uniform in `ROW_WEIGHTS`. What is common
        to the languages, and how fast each context departs from it, can then be learned.
      prior_seed: Seed of the weights of ``rows``.
      concentration: Concentration of the symmetric Dirichlet distribution of either prior.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, tokens in a sequence.
    """

    vocab_size: Symbols = 16
    order: Order = 1
    prior: Prior = "symmetric"
    prior_seed: Seed = 0
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


def dirichlet_weights(config: MarkovConfig) -> Array:
    """The weights of the Dirichlet prior of each context, float32 ``[V^m, V]``.

    Rows are in the order of `number_ngrams`.
    """
    shape = (config.vocab_size**config.order, config.vocab_size)
    if config.prior == "symmetric":
        return jnp.full(shape, config.concentration, jnp.float32)
    base_key, sum_key = jax.random.split(jax.random.key(config.prior_seed))
    base = jax.nn.softmax(jax.random.loggamma(base_key, config.concentration, shape))
    low, high = map(math.log, ROW_WEIGHTS)
    sums = jnp.exp(jax.random.uniform(sum_key, (shape[0], 1), minval=low, maxval=high))
    return jnp.maximum(sums * base, _LEAST_WEIGHT)


def draw_language(config: MarkovConfig, key: Key) -> Array:
    """Log-probabilities of the next token in each context, float32 ``[V^m, V]``.

    Rows are in the order of `number_ngrams`. The Dirichlet distribution is drawn as
    normalised gamma variables, in log space: at small concentrations most of them
    underflow otherwise. They take most of the time of `markov`: about a microsecond
    each on one CPU core.
    """
    return jax.nn.log_softmax(jax.random.loggamma(key, dirichlet_weights(config)))


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

    With n the counts of transitions in the evidence and a the weights of the prior,
    ``p(j | c) = (n_cj + a_cj) / (n_c + a_c)``, where a sum over j has lost its index; no
    learner with the same evidence does better on average. Targets among a sequence's first m
    tokens cost log V each.

    The evidence is counted by comparing transitions pairwise, and tasks are taken one at a
    time, so that memory does not grow with their number.

    Args:
      config: the config that the episode was drawn with; static.
      episode: T tasks from `markov`, of tokens of any integer dtype.
      use_support: the support is evidence, as for a learner that adapts on it.
      use_prefix: so are the earlier tokens of the same query sequence, as for a model
        that learns in context. With neither, it is the prior's own, log V if that is symmetric.

    Returns:
      float32 ``[T]``; NaN for a task with a token that is not of the vocabulary.
    """

    weights = dirichlet_weights(config)

    def loss(batches: tuple[Batch, Batch]) -> Array:
        sequences = [_sequences(batch) for batch in batches]
        known = [((tokens >= 0) & (tokens < config.vocab_size)).all() for tokens in sequences]
        support, query = (number_ngrams(config, s, config.order + 1) for s in sequences)
        earlier = jnp.tri(query.shape[1], k=-1, dtype=bool)
        in_context, followed = _count(
            config, query, support.reshape(1, -1), visible=use_support
        ) + _count(config, query, query, visible=earlier[None] & use_prefix)
        of_token = weights.reshape(-1)[query]
        of_context = weights.sum(axis=1)[query // config.vocab_size]
        log_probs = jnp.log((followed + of_token) / (in_context + of_context))
        num_uniform = batches[1].targets.size - query.size
        uniform = num_uniform * math.log(config.vocab_size)
        mean = (uniform - log_probs.sum()) / batches[1].targets.size
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
