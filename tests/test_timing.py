import time

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.timing import beyond_noise, fastest


class Clock:
    """Time that passes only where a fake function takes it."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def takes(self, name, seconds):
        def function():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return function


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def noisy(rng, seconds, noise=0.05):
    return lambda: seconds * np.exp(noise * rng.normal())


def test_beyond_noise_is_a_sign_test():
    ones, twos = [1.0] * 8, [2.0] * 8
    assert beyond_noise(ones, twos) and not beyond_noise(twos, ones)
    assert not beyond_noise(ones, ones) and not beyond_noise([], [])
    assert not beyond_noise(ones[:4], twos[:4]) and beyond_noise(ones[:5], twos[:5])
    hiccups = [9.0, *ones[1:]]
    assert beyond_noise(hiccups, twos)  # 7 of 8: 9/256
    assert not beyond_noise([9.0, *hiccups[:-1]], twos)  # 6 of 8: 37/256
    assert beyond_noise(ones, [1.03] * 8, 0.02) and not beyond_noise(ones, [1.01] * 8, 0.02)


def test_the_faster_one_wins_whatever_its_place(clock):
    rng = np.random.default_rng(0)
    for _ in range(30):
        seconds = {"a": 1.0, "b": 0.7, "c": 2.0, "d": 0.9, "e": 1.5}
        functions = {n: clock.takes(n, noisy(rng, seconds[n])) for n in rng.permutation([*"abcde"])}
        found = fastest(functions, "a")
        assert found.winner == "b"
        assert found.verdicts["a"] == "replaced" and found.verdicts["b"] == "adopted"
        assert found.timings["b"].median == pytest.approx(0.7, rel=0.1)


def test_equals_seldom_replace_the_incumbent(clock):
    rng = np.random.default_rng(1)
    changed = 0
    for _ in range(200):
        functions = {name: clock.takes(name, noisy(rng, 1.0)) for name in "abcdef"}
        changed += fastest(functions, "c").winner != "c"
    assert changed <= 10  # 5 %


def test_a_busy_moment_neither_makes_nor_breaks_a_winner(clock):
    slow = iter([0.7] * 4 + [7.0] + [0.7] * 20)
    found = fastest({"a": clock.takes("a", 1.0), "b": clock.takes("b", lambda: next(slow))}, "a")
    assert found.winner == "b"
    slow = iter([1.0] * 4 + [9.0] + [1.0] * 20)
    found = fastest({"a": clock.takes("a", lambda: next(slow)), "b": clock.takes("b", 1.0)}, "a")
    assert found.winner == "a"


def test_what_is_slower_leaves_early(clock):
    times = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 0.8, "e": 3.0, "f": 0.9}
    found = fastest({name: clock.takes(name, s) for name, s in times.items()}, "a", rounds=8)
    rounds = {name: len(timing.samples) for name, timing in found.timings.items()}
    # The warm-up is not counted; after 2 rounds 3 of 5 challengers go on, after 4 two, after 8 ...
    assert rounds == {"a": 8, "b": 8, "c": 2, "d": 8, "e": 2, "f": 4}
    assert clock.calls.count("c") == 3 and "".join(clock.calls[:6]) == "abcdef"
    assert found.verdicts == {
        **{"a": "replaced", "b": "adopted", "c": "slower"},
        **{"d": "slower", "e": "slower", "f": "slower"},
    }
    alone = fastest({"a": clock.takes("a", 1.0), "b": clock.takes("b", 1.5)}, "a")
    assert len(alone.timings["a"].samples) == 2  # no other is left to be timed beside


def test_the_budget_holds_and_without_evidence_nothing_changes(clock):
    functions = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 0.5)}
    found = fastest(functions, "a", seconds_budget=5.0)
    assert clock.now <= 5.0 and found.winner == "a"
    assert len(found.timings["b"].samples) == 2 and found.verdicts["b"] == "noise"
    clock.now = 0.0
    assert fastest(functions, "a", seconds_budget=9.0).winner == "b" and clock.now <= 9.0
    assert fastest(functions, "a", seconds_budget=0.0).verdicts["b"] == "not timed"


def test_seconds_an_item_count(clock):
    functions = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 3.0)}
    found = fastest(functions, "a", items={"a": 1.0, "b": 4.0})
    assert found.winner == "b" and found.timings["b"].median == 0.75


def test_short_functions_are_called_until_a_round_can_be_timed(clock):
    functions = {"a": clock.takes("a", 0.001), "b": clock.takes("b", 0.0005)}
    found = fastest(functions, "a", rounds=8)
    assert clock.calls.count("a") == clock.calls.count("b") == 1 + 8 * 10
    assert found.winner == "b" and found.timings["b"].median == pytest.approx(0.0005)


def test_bad_comparisons_are_refused():
    with pytest.raises(UserError, match="fewer than 5"):
        fastest({"a": lambda: None}, "a", rounds=4)
    with pytest.raises(UserError, match="'z' is not among a"):
        fastest({"a": lambda: None}, "z")
