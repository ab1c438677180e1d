"""The rows of a table that are no learners: what is possible, and what other ways reach.

On Markov languages the exact Bayes limits. On ciphers, from above, the unigram entropy, which a
model that cannot adapt does not pass; from below the same model trained on the plain text, and
n-grams that know the key; between them the classical ways to find a key.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.adapt_languages.config import Config
from metaopt.comparison import Comparison, Row
from metaopt.console import log
from metaopt.fit import Problem
from metaopt.languages import cipher_config, is_cipher, is_markov, markov_config
from metaopt.learners import maml
from metaopt.meta_gradients import joint
from metaopt.tasks.cipher_solvers import Solver, climbed_key, frequency_key
from metaopt.tasks.ciphers import ciphers, read_books
from metaopt.tasks.markov import bayes_loss
from metaopt.types import Batch, Episode

SUPPORT_LIMIT, PREFIX_LIMIT = "Bayes: support", "Bayes: support + prefix"
UNIGRAM, PLAIN = "unigram entropy", "plain text, same model"
NGRAM, FREQUENCY, CLIMBING = "n-gram with the key", "frequency analysis", "hill climbing"
ENDS = (UNIGRAM, PLAIN)
"""The references from which to which a cipher is cracked."""

MakeLosses = Callable[[], np.ndarray]
"""Computes the losses of test episodes, nats ``[E, 2]``: without the support and with it."""


def make_references(
    config: Config, comparison: Comparison, directory: Path
) -> Iterator[tuple[str, MakeLosses]]:
    """The references of a table by name, in its order, each with what computes its losses.

    Args:
      config: Config of the run.
      comparison: Its problem and episodes.
      directory: Directory of the run, for what is trained.
    """
    if is_markov(config.tasks):
        yield SUPPORT_LIMIT, lambda: bayes_limit(config, comparison, use_prefix=False)
        yield PREFIX_LIMIT, lambda: bayes_limit(config, comparison, use_prefix=True)
    if is_cipher(config.tasks):
        plain = on_plain_text(config, comparison)
        yield from _classical(config, comparison, plain)
        yield PLAIN, lambda: plain_loss(plain, directory)


def bayes_limit(config: Config, comparison: Comparison, *, use_prefix: bool) -> np.ndarray:
    """The losses of the best possible learner, nats ``[E, 2]``.

    It predicts each token from the support, if it has one, and with ``use_prefix`` from the query
    so far too.
    """
    languages = markov_config(config)
    columns = [
        bayes_loss(languages, comparison.test, use_support=use_support, use_prefix=use_prefix)
        for use_support in (False, True)
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def on_plain_text(config: Config, comparison: Comparison) -> Comparison:
    """The comparison of the same model on the same passages before they were enciphered."""
    family = ciphers(dataclasses.replace(cipher_config(config), cipher="none"))
    problem = Problem(family, comparison.problem.model, comparison.problem.loss_fn)
    settings = dataclasses.replace(
        comparison.config, meta_steps=config.plain_steps, pretrain_steps=0
    )
    return Comparison(problem, comparison.inner, comparison.outer, settings)


def plain_loss(plain: Comparison, directory: Path) -> np.ndarray:
    """The losses of a model trained on plain text, which needs no support, nats ``[E, 2]``."""
    result = plain.run(Row(PLAIN, maml(), joint), plain.random_init(), directory)
    return result.curves[:, [0, 0]]


def _classical(
    config: Config, comparison: Comparison, plain: Comparison
) -> Iterator[tuple[str, MakeLosses]]:
    """The classical predictors; those that find a key are for ciphers that rename symbols."""

    @functools.cache
    def solver() -> Solver:
        texts, _, _ = read_books(cipher_config(config))
        return Solver(texts, cipher_config(config).vocab_size)

    def with_key(order: int | None) -> np.ndarray:
        losses = solver().with_key(whole(plain.test.query), order)
        return np.stack([losses, losses], axis=1)

    def found(name: str, find: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        log(f"{name}: finding the keys of the validation and test messages")
        valid, test = (
            (whole(episodes.support), whole(episodes.query))
            for episodes in (comparison.valid, comparison.test)
        )
        losses = solver().with_found_key(find, valid, test)
        return np.stack([np.full_like(losses, np.nan), losses], axis=1)  # none without a support

    yield UNIGRAM, lambda: with_key(1)
    yield NGRAM, lambda: with_key(None)
    if config.cipher in ("substitution", "caesar"):
        yield (
            FREQUENCY,
            lambda: found(FREQUENCY, lambda support: frequency_key(support, solver().ngrams)),
        )
        rng = np.random.default_rng(comparison.config.eval_seed)
        yield (
            CLIMBING,
            lambda: found(CLIMBING, lambda support: climbed_key(support, solver().ngrams, rng)),
        )


def cracked(losses: np.ndarray, references: Mapping[str, np.ndarray]) -> np.ndarray:
    """How much of the way from the unigram entropy to the plain text's loss, per cent ``[E]``.

    The length of the way is the mean over the episodes, so that the mean of what is returned is
    the ratio of the means.
    """
    unigram, plain = references[UNIGRAM][:, 1], references[PLAIN][:, 1]
    return 100 * (unigram - losses) / (unigram - plain).mean()


def reading_key(hidden: Episode, plain: Episode, vocab_size: int) -> np.ndarray:
    """The plain symbol of each symbol of a cipher that renames them, ``[V]``.

    Args:
      hidden: an episode.
      plain: the same episode before it was enciphered.
      vocab_size: V; symbols that do not occur stand for themselves.
    """
    key = np.arange(vocab_size)
    for cut, read in zip(jax.tree.leaves(hidden[:2]), jax.tree.leaves(plain[:2]), strict=True):
        key[np.asarray(cut)] = read
    return key


def whole(batch: Batch) -> np.ndarray:
    """Sequences of L + 1 symbols, as before inputs and targets were cut, ``[E, n, L + 1]``."""
    return np.concatenate([batch.inputs, np.asarray(batch.targets)[..., -1:]], axis=-1)
