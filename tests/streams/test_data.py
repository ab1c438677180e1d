import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.streams.adjust import jitter, replace_tokens, shift, shuffle_words
from metaopt.streams.data import (
    SEQUENCES,
    DataConfig,
    DataState,
    cut,
    episodes,
    read,
    save,
    update_data,
    windows_of,
)

LENGTH = 9
SIZE = SEQUENCES * (LENGTH + 1)
EMPTY = DataState.empty(LENGTH)


def text(seed, number):
    """Passages, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (number, SIZE)).astype(np.int32)


def take(state, arrivals, key=0, *, capacity=64, generation=1, **options):
    config = DataConfig(capacity=capacity, valid_passages=3)
    key = jax.random.key(key)
    return update_data(state, arrivals, key, config, generation=generation, **options)


def test_a_text_is_cut_into_passages_of_sequences():
    found = cut(np.arange(2 * SIZE + 7), LENGTH)
    assert found.shape == (2, SIZE) and found.dtype == np.int32
    np.testing.assert_array_equal(found.ravel(), np.arange(2 * SIZE))
    assert cut(np.arange(SIZE - 1), LENGTH).shape == (0, SIZE)


def test_the_step_is_pure():
    before, _ = take(EMPTY, {"a": text(0, 30)})
    copies = [np.copy(x) for x in before[1:]]
    (one, told), (other, again) = (take(before, {"b": text(1, 60)}, key=3) for _ in range(2))
    assert told == again and one.names == other.names == ("a", "b")
    for x, y in zip(one[1:], other[1:], strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(before[1:], copies, strict=True):
        np.testing.assert_array_equal(x, y)


def test_duplicates_are_thrown_away_and_counted():
    one, _ = take(EMPTY, {"a": text(0, 20)})
    changed = text(0, 20)
    changed[:, 7] += 1
    grown = np.concatenate([text(0, 20)[:8], changed[8:20], text(1, 5)])
    two, told = take(one, {"a": grown}, generation=2)
    assert told == {"a": (25, 8, 12, 5)}
    assert len(two.tokens) == 25 and (two.generation == 2).sum() == 5


def test_what_is_held_out_elsewhere_does_not_come_in():
    held_out, barred = text(0, 10), windows_of(text(0, 10))
    found, told = take(EMPTY, {"a": np.concatenate([held_out, text(1, 10)])}, barred=barred)
    assert told["a"].near == 10 and told["a"].kept == 10
    shown = {x.tobytes() for x in held_out}
    assert not shown & {x.tobytes() for x in found.tokens}


def test_what_was_put_in_before_a_text_brings_nothing_else_in():
    """All passages of it are cut elsewhere then, those that are judged on too."""
    long = np.random.default_rng(0).integers(0, 256, 400 * 520).astype(np.int32)
    config = DataConfig(capacity=1000)
    empty = DataState.empty(64)
    state, _ = update_data(empty, {"a": cut(long, 64)}, jax.random.key(0), config, generation=1)
    new = np.random.default_rng(1).integers(0, 256, 260).astype(np.int32)
    grown = {"a": cut(np.concatenate([new, long]), 64)}
    after, told = update_data(state, grown, jax.random.key(1), config, generation=2)
    assert told["a"].kept <= 2 and told["a"].near >= 395
    judged = windows_of(state.tokens[state.is_valid])
    trained = windows_of(after.tokens[~after.is_valid])
    assert np.isin(judged, trained).mean() < 0.02


def test_what_is_judged_on_is_chosen_once_and_never_trained_on():
    state, _ = take(EMPTY, {"a": text(0, 40), "b": text(1, 12)})
    valid = {name: state.sequences(name, valid=True) for name in "ab"}
    assert [len(valid[name]) // SEQUENCES for name in "ab"] == [3, 1]
    for generation in (2, 3):
        arrivals = {"a": text(generation, 50), "c": text(9 + generation, 50)}
        state, _ = take(state, arrivals, key=generation, generation=generation)
        for name in "ab":
            np.testing.assert_array_equal(state.sequences(name, valid=True), valid[name])
    for name in state.names:
        trained, judged = (
            {x.tobytes() for x in state.sequences(name, valid=v)} for v in (False, True)
        )
        assert judged and trained and not judged & trained


def test_memory_is_bounded_and_shared_equally():
    state = EMPTY
    for generation, number in enumerate((30, 300, 5, 100), 1):
        arrivals = {f"domain {generation}": text(generation, number)}
        state, _ = take(state, arrivals, key=generation, generation=generation)
        assert (~state.is_valid).sum() <= 64
    counts = np.bincount(state.domain[~state.is_valid]).tolist()
    assert counts == [20, 20, 4, 20]  # the third has no more
    tight, _ = take(state, {"new": text(9, 30)}, key=9, generation=9, capacity=5, num_sequences=16)
    assert np.bincount(tight.domain[~tight.is_valid]).tolist() == [2, 2, 2, 2, 2]


def test_what_is_kept_is_a_uniform_sample_of_all_that_came():
    """Three arrivals of one domain, of which a quarter may be kept, of many domains."""
    config, kept, number = DataConfig(capacity=20, near=1.0), np.zeros(3), 60
    sizes = np.array([16, 24, 40])
    for domain in range(number):
        state = EMPTY
        for i, size in enumerate(sizes, 1):
            named, key = {"a": text((domain, i), size)}, jax.random.key(domain)
            state, _ = update_data(state, named, key, config, generation=i)
        trained = state.generation[~state.is_valid]
        kept += np.bincount(trained, minlength=4)[1:] / number
    chance = 20 / (14 + 24 + 40)  # two of the first 16 are set apart
    np.testing.assert_allclose(kept / [14, 24, 40], [chance] * 3, rtol=0.15)


def test_what_was_evicted_does_not_come_back_by_coming_again():
    config, state = DataConfig(capacity=20), EMPTY
    for generation in range(1, 5):
        grown = {"a": np.concatenate([text(0, 100), text(1, generation)])}
        key = jax.random.key(generation)
        before = {x.tobytes() for x in state.tokens}
        state, _ = update_data(state, grown, key, config, generation=generation)
        if generation > 1:
            assert len({x.tobytes() for x in state.tokens} - before) <= 1


def test_of_a_long_arrival_a_sample_is_looked_at():
    config = DataConfig(capacity=500, valid_passages=3, arriving=40)
    state, _ = update_data(EMPTY, {"a": text(0, 30)}, jax.random.key(0), config, generation=1)
    grown = {"a": np.concatenate([text(0, 30), text(1, 300)])}
    found, told = update_data(state, grown, jax.random.key(1), config, generation=2)
    assert told["a"] == (330, 30, 0, 40) and len(found.tokens) == 70
    new = {x.tobytes() for x in found.tokens[found.generation == 2]}
    places = [i for i, x in enumerate(text(1, 300)) if x.tobytes() in new]
    assert min(places) < 60 and max(places) > 240


def test_a_domain_that_is_too_short_is_left_out():
    state, told = take(EMPTY, {"a": text(0, 3), "b": text(1, 4)}, num_sequences=2 * SEQUENCES)
    assert state.names == ("b",) and told["a"].kept == 0 and told["b"].kept == 4
    assert len(state.sequences("b", valid=True)) == 2 * SEQUENCES


def test_a_domain_can_be_held_out_whole():
    config = DataConfig(capacity=1, valid_passages=6, valid_share=1.0)
    state, _ = update_data(EMPTY, {"a": text(0, 9)}, jax.random.key(0), config, generation=0)
    assert state.is_valid.sum() == 6 and (~state.is_valid).sum() == 1


def test_new_passages_are_adjusted_and_those_that_judge_are_not():
    def zero(rng, passages):
        return np.zeros_like(passages)

    state, _ = take(EMPTY, {"a": text(0, 20)}, adjust=zero)
    assert not state.tokens[~state.is_valid].any() and state.tokens[state.is_valid].any()


def test_a_state_is_saved_and_read(tmp_path):
    state, _ = take(EMPTY, {"a": text(0, 20), "b": text(1, 20)})
    save(state, tmp_path / "x.npz")
    found = read(tmp_path / "x.npz", state.names)
    assert found.names == state.names
    for x, y in zip(found[1:], state[1:], strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    with pytest.raises(UserError, match="domains"):
        read(tmp_path / "x.npz", ["a"])
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(UserError):
        read(tmp_path / "x.npz", state.names)


def test_an_episode_has_different_sequences_of_one_domain():
    groups = {name: text(i, 4).reshape(-1, LENGTH + 1) for i, name in enumerate("abc")}
    found = episodes(groups, None, 3, 2).sample(jax.random.key(0), 7)
    assert sorted(np.bincount(found.task).tolist()) == [2, 2, 3]
    for i in range(7):
        mine = {x.tobytes() for x in groups["abc"[found.task[i]]]}
        whole = np.concatenate([found.support.inputs[i], found.query.inputs[i]])
        last = np.concatenate([found.support.targets[i], found.query.targets[i]])[:, -1:]
        drawn = {x.tobytes() for x in np.concatenate([whole, last], axis=1)}
        assert len(drawn) == 5 and drawn <= mine


def test_domains_are_drawn_by_their_chances():
    groups = {name: text(i, 4).reshape(-1, LENGTH + 1) for i, name in enumerate("abc")}
    split = episodes(groups, np.array([0.7, 0.3, 0.0]), 1, 1)
    shares = np.bincount(split.sample(jax.random.key(0), 2000).task, minlength=3) / 2000
    np.testing.assert_allclose(shares, [0.7, 0.3, 0.0], atol=0.04)


def test_tokens_are_replaced_at_the_rate_asked_for():
    found = replace_tokens(np.random.default_rng(0), np.zeros((50, 400), np.int32), 0.1, 1000)
    assert abs((found > 0).mean() - 0.1) < 0.01 and found.dtype == np.int32 and found.max() < 1000


def test_words_are_shuffled_and_none_is_lost():
    passage = np.frombuffer(b"one two three four five six", np.uint8)[None].astype(np.int32)
    found = shuffle_words(np.random.default_rng(0), passage, 32)
    words = bytes(found[0].tolist()).split(b" ")
    assert sorted(words) == sorted(b"one two three four five six".split(b" "))
    assert words != b"one two three four five six".split(b" ")


def test_numbers_and_images_are_augmented():
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 3, (2000, 2))
    noise = jitter(rng, numbers, 0.1) - numbers
    np.testing.assert_allclose(noise.std(axis=0), 0.3, rtol=0.1)
    images = np.zeros((30, 5, 6))
    images[:, 2, 3] = 1
    moved = shift(rng, images, 1)
    rows, columns = np.nonzero(moved)[1:]
    assert len(rows) == 30 and {*rows} == {1, 2, 3} and {*columns} == {2, 3, 4}
