import numpy as np
import pytest

from metaopt.self_improvement.trials import Change, Race, Trial, judge


def trial(losses, seconds, score=None, examples=100):
    change = score and Change({}, "x", score, "x")
    return Trial(change, None, np.asarray(losses, np.float64), seconds, examples)  # type: ignore[arg-type]


SPREAD = np.linspace(-0.01, 0.01, 16)


@pytest.mark.parametrize(
    ("score", "fall", "seconds", "outcome"),
    [
        ("loss", 0.5, 9.0, "better"),
        ("loss", -0.5, 0.1, "worse"),
        ("loss", 0.001, 0.1, "noise"),  # within the margin
        ("loss", np.nan, 1.0, "worse"),
        ("efficiency", 0.0, 0.5, "better"),  # the same loss in half of the time
        ("efficiency", 0.0, 2.0, "worse"),
        ("efficiency", 0.0, 0.95, "noise"),
        ("efficiency", -0.12, 0.88, "better"),  # the same a second, and the run ends sooner
        ("efficiency", -0.06, 0.94, "noise"),
        ("efficiency", np.inf, 0.1, "worse"),
        ("throughput", 0.0, 0.8, "better"),
        ("throughput", 0.0, 0.99, "noise"),
        ("throughput", 0.0, 1.5, "noise"),
        ("throughput", -0.5, 0.1, "worse"),
    ],
)
def test_each_score_judges_what_it_says(score, fall, seconds, outcome):
    before, unchanged = np.full(16, 3.0), trial(np.full(16, 2.0), 1.0)
    found = judge(before, unchanged, trial(2.0 - fall + SPREAD, seconds, score), margin=0.002)
    assert found.outcome == outcome


def race(unchanged=2.0, **seconds):
    return Race(np.full(16, 3.0), trial(np.full(16, unchanged), 1.0, **seconds), margin=0.002)


def entered(race, setting, loss, *, score="loss", seconds=1.0, way=0, level=0):
    change = Change({setting: loss}, setting, score, setting, way, level)
    race.enter(trial(loss + SPREAD, seconds)._replace(change=change))
    return change


def test_the_better_of_several_settings_are_tried_together_the_others_not():
    found = race()
    a = entered(found, "a", 1.5)
    entered(found, "a", 1.7)
    b = entered(found, "b", 1.8)
    entered(found, "c", 1.9)  # a fifth of the best difference
    entered(found, "d", 2.5)
    assert found.together() == Change({"a": 1.5, "b": 1.8}, "a and b", "loss", "a; b", parts=(a, b))
    together = entered(found, "a and b", 1.4)
    assert found.best is not None and found.best.change == together
    alone = race()
    entered(alone, "a", 1.5)
    assert alone.together() is None and race().together() is None


def test_the_other_way_is_not_tried_where_one_was_better():
    found = race()
    entered(found, "a", 1.5, way=1)
    entered(found, "b", 2.5, way=1)
    down = Change({"a": 0.0}, "a", "loss", "", way=-1)
    assert found.is_needless(down) and not found.is_needless(down._replace(setting="b"))
    assert not found.is_needless(down._replace(way=1)) and not found.is_needless(
        down._replace(way=0)
    )


def test_nothing_is_tried_after_what_makes_all_else_much_quicker():
    found = race()
    entered(found, "a", 1.9, score="efficiency", seconds=0.9)
    assert not found.is_needless(Change({}, "b", "loss", ""))
    entered(found, "a", 1.9, score="efficiency", seconds=0.5)
    assert found.is_needless(Change({}, "b", "loss", ""))


@pytest.mark.parametrize(
    ("way", "level", "loss", "wins"),
    [(-1, 1, 2.001, True), (1, 1, 2.001, False), (-1, 0, 2.001, False), (-1, 1, 2.5, False)],
)
def test_of_what_refines_the_smaller_wins_a_tie(way, level, loss, wins):
    found = race()
    entered(found, "a", loss, way=way, level=level)
    assert (found.best is not None) == wins
    assert [entry["accepted"] for entry in found.evidence()] == [wins]
