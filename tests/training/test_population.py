import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners import maml
from metaopt.meta_gradients import reverse
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.parallel import default_devices
from metaopt.training.population import (
    Generation,
    exploit,
    explore,
    initial_population,
    lineage,
    select,
    train_population,
)
from metaopt.training.recorder import Diverged
from metaopt.types import MetaState

KEY = jax.random.key(0)
CURVATURES = jnp.array([1.0, 10.0])
BOUNDS = {"rate": (1e-4, 10.0)}


def descent_state(rate=1e-4):
    """Gradient descent on a quadratic, whose best fixed rate is 2 / 11."""
    hparams = {"rate": jnp.float32(rate), "other": jnp.float32(3.0)}
    start = {"params": jnp.array([1.0, 1.0])}
    return MetaState(jnp.int32(0), start, (), hparams, jax.random.key(7))


def descend(state, shift):
    w = state.meta_params["params"]
    w = w - state.hparams["rate"] * (CURVATURES * w + shift)
    return state._replace(step=state.step + 1, meta_params={"params": w}), {}


def distance(state):
    return jnp.sum(CURVATURES * state.meta_params["params"] ** 2)


def run(states, **options):
    options = {"steps": 60, "ready_every": 5, "key": KEY, "bounds": BOUNDS} | options
    return train_population(states, descend, lambda step: jnp.zeros(2), distance, **options)


def member_of(states, index):
    return jax.tree.map(lambda x: x[index], states)


def leaves_equal(a, b):
    def raw(x):
        is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(raw(x), raw(y)) for x, y in pairs)


def selections(scores, fraction, draws=40):
    """Parents [draws, P]."""
    keys = jax.random.split(KEY, draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: select(scores, key, fraction)))(keys))


def test_the_worst_go_on_from_the_best():
    scores = jnp.array([5.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0])
    seen = set()
    for parents in selections(scores, 0.25):
        np.testing.assert_array_equal(parents[[0, 1, 3, 5, 6, 7]], [0, 1, 3, 5, 6, 7])
        seen |= {(i, int(parents[i])) for i in (2, 4)}
    assert seen == {(2, 1), (2, 5), (4, 1), (4, 5)}


def test_what_is_not_finite_is_always_replaced_and_never_copied():
    nan, inf = jnp.nan, jnp.inf
    for parents in selections(jnp.array([nan, 2.0, nan, inf, 1.0, nan]), 0.5):
        assert set(parents[[0, 2, 3, 5]].tolist()) <= {1, 4}
        np.testing.assert_array_equal(parents[[1, 4]], [1, 4])
    np.testing.assert_array_equal(selections(jnp.full(4, nan), 0.25, 1), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(selections(jnp.array([1.0]), 0.25, 1), [[0]])
    at_least_one = selections(jnp.array([1.0, 2.0, 3.0]), 0.1, 1)
    np.testing.assert_array_equal(at_least_one, [[0, 1, 0]])


def test_exploit_copies_bit_for_bit():
    rng = np.random.default_rng(0)
    states = {
        "w": jnp.asarray(rng.normal(size=(8, 3)).astype("f4")),
        "count": jnp.arange(8),
        "key": jax.random.split(KEY, 8),
    }
    found, parents = jax.jit(exploit)(states, jnp.arange(8.0), KEY)
    assert sorted(set(parents.tolist())) == [0, 1, 2, 3, 4, 5]
    for member, parent in enumerate(parents.tolist()):
        assert leaves_equal(member_of(found, member), member_of(states, parent))


def test_explore_perturbs_or_resamples_within_the_bounds():
    hparams = {"rate": jnp.full(2000, 0.1), "decay": jnp.full(2000, 1.0), "other": jnp.ones(2000)}
    bounds = {"rate": (1e-3, 10.0), "decay": (0.5, 1.1)}
    who = jnp.arange(2000) % 2 == 0
    found = explore(hparams, KEY, bounds, who=who, resample=0.25)
    for name in hparams:
        np.testing.assert_array_equal(found[name][1::2], hparams[name][1::2])
    np.testing.assert_array_equal(found["other"], hparams["other"])
    rate, decay = np.asarray(found["rate"][::2]), np.asarray(found["decay"][::2])
    factors = np.isclose(rate, 0.08, rtol=1e-5), np.isclose(rate, 0.125, rtol=1e-5)
    anew = rate[~(factors[0] | factors[1])]
    assert [f.mean() for f in factors] == pytest.approx([0.375, 0.375], abs=0.05)
    assert len(anew) / 1000 == pytest.approx(0.25, abs=0.05)
    assert np.log10(anew).mean() == pytest.approx(-1.0, abs=0.3)  # log-uniform over 4 decades
    assert np.log10(anew).std() == pytest.approx(4 / np.sqrt(12), abs=0.2)
    assert decay.min() >= 0.5 and decay.max() == np.float32(1.1)
    # Names are drawn for on their own.
    assert abs(np.corrcoef(rate < 0.1, decay < 1.0)[0, 1]) < 0.1


def test_an_initial_population_differs_in_its_hyperparameters_alone():
    state = descent_state(0.5)
    states = initial_population(state, 50, BOUNDS, KEY)
    rates = np.asarray(states.hparams["rate"])
    assert rates[0] == 0.5 and len(set(rates.tolist())) == 50
    assert rates.min() >= 1e-4 and rates.max() <= 10 and (rates < 1e-2).sum() in range(10, 35)
    for i in (0, 49):
        member = member_of(states, i)
        assert leaves_equal(member._replace(hparams={}), state._replace(hparams={}))
        assert member.hparams["other"] == 3.0


def test_a_population_of_wrong_rates_finds_good_ones():
    states = initial_population(descent_state(), 8, {"rate": (1e-4, 1e-3)}, KEY)
    best, history = run(states, steps=150)
    alone = float(distance(descent_state())) * (1 - 1e-3) ** 300
    assert alone > 0.5  # the quickest of the rates it starts with goes nowhere
    assert float(distance(best)) < 1e-3
    assert float(best.hparams["rate"]) > 0.02
    assert int(best.step) == 150 and len(history) == 30
    assert float(distance(best)) == history[-1].scores.min()


OPTIONS = {"ready_every": 7, "fraction": 0.5, "resample": 0.0}


@pytest.fixture(scope="module")
def trained():
    states = initial_population(descent_state(), 6, BOUNDS, KEY)
    kept = jax.tree.map(jnp.copy, states)
    return states, kept, *run(states, **OPTIONS)


def test_the_lineage_is_the_schedule_that_the_best_was_trained_with(trained):
    _, _, best, history = trained
    path = lineage(history)
    assert [step for step, _ in path] == [*range(7, 60, 7), 60]
    state, jitted = descent_state(), jax.jit(descend)
    for generation, (step, member) in zip(history, path, strict=True):
        rate = jnp.float32(generation.hparams["rate"][member])
        state = state._replace(hparams=state.hparams | {"rate": rate})
        for _ in range(step - int(state.step)):
            state, _ = jitted(state, jnp.zeros(2))
        np.testing.assert_allclose(distance(state), generation.scores[member], rtol=1e-3)
    np.testing.assert_allclose(
        state.meta_params["params"], best.meta_params["params"], rtol=1e-3, atol=1e-9
    )
    assert len({member for _, member in path}) > 1
    fork = [
        Generation(1, np.zeros(2), {}, np.array([1, 1])),
        Generation(2, np.array([1.0, 2.0]), {}, np.array([0, 1])),
    ]
    assert lineage(fork) == [(1, 1), (2, 0)] and lineage(fork, 1) == [(1, 1), (2, 1)]


def test_copies_alone_change_and_every_time_anew(trained):
    *_, history = trained
    factors = {member: set() for member in range(6)}
    for before, after in itertools.pairwise(history):
        copied = before.parents != np.arange(6)
        assert copied.sum() == 3
        ratios = after.hparams["rate"] / before.hparams["rate"][before.parents]
        assert (ratios[~copied] == 1).all()
        assert (np.isclose(ratios[copied], 0.8) | np.isclose(ratios[copied], 1.25)).all()
        for member in np.flatnonzero(copied):
            factors[member].add(bool(ratios[member] > 1))
    assert {True, False} in factors.values()
    assert (history[-1].parents == np.arange(6)).all()


def test_the_key_decides_everything_and_the_states_passed_in_stay(trained):
    states, kept, best, history = trained
    assert leaves_equal(states, kept)
    again = run(states, **OPTIONS)
    assert leaves_equal((best, history), again)
    other, _ = run(states, **OPTIONS, key=jax.random.key(1))
    assert not leaves_equal(best, other)


def meta_population():
    outer_opt = outer_optimizer(OuterConfig(learning_rate=0.1))
    hparams = OuterConfig(learning_rate=0.1).hparams() | {"inner_learning_rate": 0.1}
    learner = maml()
    step = make_meta_step(reverse(learner, quadratic.loss, InnerLoop(num_steps=1)), outer_opt)
    return init_state(KEY, quadratic.PARAMS, learner, outer_opt, hparams), step


def test_two_devices_do_what_one_does_with_a_meta_step():
    state, step = meta_population()
    bounds = {"inner_learning_rate": (1e-2, 1.0), "outer_learning_rate": (1e-3, 1.0)}
    states = initial_population(state, 4, bounds, KEY)
    held_out = quadratic.episode(seed=9).query

    def evaluate(state):
        return quadratic.loss(state.meta_params["params"], held_out)

    train = partial(
        train_population,
        states,
        step,
        lambda number: quadratic.episodes(2, seed=number),
        evaluate,
        bounds=bounds,
        steps=6,
        ready_every=2,
        key=KEY,
    )
    (one, single), (two, double) = (train(devices=default_devices(n)) for n in (1, 2))
    assert (single[0].parents != np.arange(4)).any()
    for a, b in zip(single, double, strict=True):
        np.testing.assert_array_equal(a.parents, b.parents)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    np.testing.assert_allclose(
        one.meta_params["params"]["head"], two.meta_params["params"]["head"], rtol=1e-4
    )
    assert int(one.opt_state[1].count) == int(two.step) == 6  # its own optimiser state


def test_bad_populations_are_refused():
    states = initial_population(descent_state(), 3, BOUNDS, KEY)
    for options, message in [
        ({"devices": default_devices(2)}, "population of 3 does not divide by 2 devices"),
        ({"steps": 0}, "steps is 0"),
        ({"ready_every": 0}, "ready_every is 0"),
        ({"fraction": 0.6}, "fraction is 0.6"),
        ({"bounds": {"rate": (0.0, 1.0)}}, "0 < low"),
        ({"bounds": {"rat": (0.1, 1.0)}}, "'rat' has bounds but is not in the state"),
    ]:
        with pytest.raises(UserError, match=message):
            run(states, **options)
    hopeless = states._replace(hparams=states.hparams | {"rate": jnp.full(3, 1e30)})
    with pytest.raises(Diverged, match="no member"):
        run(hopeless, steps=5)
