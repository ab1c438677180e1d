import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

from metaopt.errors import UserError
from metaopt.tasks.markov import (
    MarkovConfig,
    bayes_loss,
    dirichlet_weights,
    draw_language,
    draw_sequences,
    markov,
    number_ngrams,
)
from metaopt.types import Batch, Episode

TINY = MarkovConfig(vocab_size=3, num_support=2, num_query=2, length=12)


def whole(batch):
    """Sequences of L + 1 tokens, as they were before inputs and targets were cut."""
    return np.concatenate([batch.inputs, batch.targets[..., -1:]], axis=-1)


def count_transitions(sequences, order):
    return Counter(
        (tuple(s[i - order : i]), s[i])
        for s in np.asarray(sequences).tolist()
        for i in range(order, len(s))
    )


def episode_of(config, support, query):
    batches = (Batch(x[None, :, :-1], x[None, :, 1:]) for x in (support, query))
    return Episode(*batches, task=jnp.zeros(1, jnp.int32))


def test_episodes_are_pure_in_the_key_and_differ_between_splits():
    family = markov(MarkovConfig())
    key = jax.random.key(0)
    episodes = family.train.sample(key, 2)
    assert episodes.support.inputs.shape == episodes.query.targets.shape == (2, 4, 32)
    assert episodes.support.inputs.dtype == jnp.int32
    np.testing.assert_array_equal(episodes.query.inputs[..., 1:], episodes.query.targets[..., :-1])
    jax.tree.map(np.testing.assert_array_equal, episodes, family.train.sample(key, 2))
    others = (family.valid.sample(key, 2), family.train.sample(jax.random.key(1), 2))
    for other in others:
        assert (other.support.inputs != episodes.support.inputs).mean() > 0.5


def test_order_two_sequences_follow_their_language():
    config = MarkovConfig(vocab_size=5, order=2, length=20)
    older, newer = np.divmod(np.arange(25), 5)
    rule = (older + 2 * newer) % 5
    language = jnp.log(jax.nn.one_hot(rule, 5))
    tokens = np.asarray(draw_sequences(config, jax.random.key(0), language, 200))
    assert tokens.shape == (200, 21)
    np.testing.assert_array_equal(tokens[:, 2:], (tokens[:, :-2] + 2 * tokens[:, 1:-1]) % 5)
    np.testing.assert_array_equal(rule[number_ngrams(config, tokens, 2)][:, :-1], tokens[:, 2:])
    starts = np.bincount(tokens[:, 0] * 5 + tokens[:, 1], minlength=25)
    assert ((starts - 8) ** 2 / 8).sum() < 60  # chi-squared, 24 degrees of freedom


@pytest.mark.parametrize("concentration", [0.3, 1e-3])
def test_languages_have_dirichlet_moments(concentration):
    config = MarkovConfig(vocab_size=8, order=3, concentration=concentration)
    language = draw_language(config, jax.random.key(0))
    assert language.shape == (512, 8) and jnp.isfinite(language).all()
    rows = np.exp(language)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(rows.mean(0), 1 / 8, atol=0.06)
    sum_of_squares = (concentration + 1) / (8 * concentration + 1)
    np.testing.assert_allclose((rows**2).sum(1).mean(), sum_of_squares, atol=0.03)


def test_under_the_prior_rows_the_languages_of_a_family_share_their_means():
    config = MarkovConfig(vocab_size=6, prior="rows", prior_seed=3)
    weights = dirichlet_weights(config)
    languages = jax.vmap(lambda key: jnp.exp(draw_language(config, key)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    sums = weights.sum(axis=1, keepdims=True)
    mean = weights / sums
    np.testing.assert_allclose(languages.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(languages.var(0), mean * (1 - mean) / (sums + 1), atol=0.02)


def test_the_weights_of_rows_follow_their_seed_and_span_their_range():
    config = MarkovConfig(vocab_size=64, prior="rows")
    weights = dirichlet_weights(config)
    np.testing.assert_array_equal(weights, dirichlet_weights(config))
    other = dirichlet_weights(dataclasses.replace(config, prior_seed=1))
    assert (weights != other).mean() > 0.5
    sums = np.asarray(weights.sum(axis=1))
    assert (sums > 0.49).all() and (sums < 51).all()
    np.testing.assert_allclose(np.log(sums).mean(), np.log(5), atol=0.5)  # log-uniform
    assert (dirichlet_weights(MarkovConfig(concentration=0.7)) == np.float32(0.7)).all()


def test_without_evidence_every_token_costs_log_v():
    episodes = markov(TINY).train.sample(jax.random.key(0), 3)
    losses = bayes_loss(TINY, episodes, use_support=False)
    np.testing.assert_allclose(losses, np.full(3, np.log(3)), rtol=1e-6)


@pytest.mark.parametrize(("prior", "concentration"), [("symmetric", 1.5), ("rows", 20.0)])
def test_the_predictive_is_the_posterior_integrated_numerically(prior, concentration):
    sizes = {"vocab_size": 2, "num_support": 2, "num_query": 2, "length": 6}
    config = MarkovConfig(prior=prior, prior_seed=2, concentration=concentration, **sizes)
    episode = markov(config).train.sample(jax.random.key(3), 1)
    middle = (np.arange(400) + 0.5) / 400
    ones = np.stack(np.meshgrid(middle, middle, indexing="ij"))  # p(1 | context), both contexts
    table = np.stack([1 - ones, ones], axis=1)  # [context, token, 400, 400]
    weights = np.asarray(dirichlet_weights(config))
    assert (weights > 1).all()  # or the density is infinite at an edge of the grid
    weight = (table ** (weights[..., None, None] - 1)).prod((0, 1))
    for sequence in whole(episode.support)[0]:
        for context, token in itertools.pairwise(sequence):
            weight = weight * table[context, token]
    predictive = (table * weight).sum((2, 3)) / weight.sum()
    query = jax.tree.map(np.asarray, episode.query)
    expected = -np.log(predictive[query.inputs, query.targets]).mean()
    np.testing.assert_allclose(bayes_loss(config, episode), [expected], rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("use_support", [True, False])
def test_prefix_losses_add_up_to_the_log_marginal_likelihood(order, use_support):
    config = dataclasses.replace(TINY, order=order, num_query=1)
    episodes = markov(config).train.sample(jax.random.key(0), 4)
    losses = bayes_loss(config, episodes, use_support=use_support, use_prefix=True)
    for t, loss in enumerate(losses):
        known = count_transitions(whole(episodes.support)[t], order) if use_support else Counter()
        joined = known + count_transitions(whole(episodes.query)[t], order)
        log_marginal = log_evidence(config, joined) - log_evidence(config, known)
        expected = ((order - 1) * np.log(3) - log_marginal) / config.length
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def log_evidence(config, transitions):
    """Log probability of the transitions, up to what cancels in a ratio."""
    a, contexts = config.concentration, Counter()
    for (context, _), n in transitions.items():
        contexts[context] += n
    followed = sum(gammaln(a + n) - gammaln(a) for n in transitions.values())
    v_a = config.vocab_size * a
    return followed - sum(gammaln(v_a + n) - gammaln(v_a) for n in contexts.values())


def test_each_query_sequence_sees_only_its_own_prefix():
    episodes = markov(TINY).train.sample(jax.random.key(0), 2)
    together = bayes_loss(TINY, episodes, use_prefix=True)
    apart = [
        bayes_loss(
            TINY,
            episodes._replace(query=jax.tree.map(lambda x, q=q: x[:, q : q + 1], episodes.query)),
            use_prefix=True,
        )
        for q in range(2)
    ]
    np.testing.assert_allclose(together, np.mean(apart, axis=0), rtol=1e-5)


def test_much_support_leaves_the_entropy_of_the_language():
    config = MarkovConfig(vocab_size=4, order=2, length=256)
    language = draw_language(config, jax.random.key(0))
    tokens = draw_sequences(config, jax.random.key(1), language, 84)
    loss = bayes_loss(config, episode_of(config, tokens[:80], tokens[80:]))[0]
    pairs = number_ngrams(config, tokens[80:], 3)
    truth = (4 * np.log(4) - language.ravel()[pairs].sum()) / (4 * 256)
    np.testing.assert_allclose(loss, truth, atol=0.005)


@pytest.mark.parametrize("other", [0.15, 0.6])
@pytest.mark.parametrize("use_prefix", [True, False])
def test_no_other_smoothing_is_better_on_average(other, use_prefix):
    config = MarkovConfig(vocab_size=8, concentration=0.3, num_support=2, length=16)
    episodes = markov(config).train.sample(jax.random.key(0), 500)
    wrong = dataclasses.replace(config, concentration=other)
    excess = bayes_loss(wrong, episodes, use_prefix=use_prefix)
    excess -= bayes_loss(config, episodes, use_prefix=use_prefix)
    assert excess.mean() > 3 * excess.std() / np.sqrt(len(excess))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"order": 0}, "order is 0"),
        ({"num_support": 0}, "num_support"),
        ({"num_query": 0}, "num_query"),
        ({"length": 2, "order": 3}, r"length \(2\) must be at least the order \(3\)"),
        ({"concentration": 0.0}, "concentration"),
        ({"concentration": float("nan")}, "concentration"),
        ({"vocab_size": 256, "order": 3}, "transition probabilities"),
    ],
)
def test_bad_configs(bad, message):
    with pytest.raises(UserError, match=message):
        MarkovConfig(**bad)
