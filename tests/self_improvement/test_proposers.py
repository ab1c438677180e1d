import pytest

from metaopt.self_improvement.proposers import pattern_search
from metaopt.self_improvement.records import Decision, TriedChange
from metaopt.self_improvement.workload import Choice, Scale, Snapshot

RATE = Scale(low=1e-3, high=1e3, factor=16.0)


def snapshot(**settings):
    return Snapshot(None, settings, 0)  # type: ignore[arg-type]


def decision(*entries, phase=0, changes=None):
    """``(setting, value, verdict, accepted)`` each."""
    trials = []
    for name, value, verdict, accepted in entries:
        direction = 0 if isinstance(value, str) else 1 if value > 1 else -1
        compared = (None, None, None, verdict, accepted, 0.0, 0)
        trials.append(TriedChange(name, {name: value}, direction, "loss", *compared))
    verdict = "accepted" if changes else "kept"
    return Decision("search", 0, 0, verdict, changes or {}, "", 0.0, phase, trials)


def values(proposer, now, decisions=(), phase=0, name="rate"):
    changes = proposer(now, list(decisions), phase)
    changes = [change for change in changes if change.rank == min(c.rank for c in changes)]
    return [change.settings[name] for change in changes if change.setting == name]


UP = decision(
    ("rate", 16.0, "better", True), ("rate", 1 / 16, "worse", False), changes={"rate": (1.0, 16.0)}
)
NEITHER = decision(("rate", 16.0, "worse", False), ("rate", 1 / 16, "worse", False))
MIXED = decision(("rate", 16.0, "noise", False), ("rate", 1 / 16, "worse", False))
NOISE = decision(("rate", 16.0, "noise", False), ("rate", 1 / 16, "noise", False))
OTHER = ("decay", 2.0, "better", True), {"decay": (1.0, 2.0)}
ALMOST = decision(
    ("rate", 16.0, "worse", False), ("rate", 1 / 16, "better", False), OTHER[0], changes=OTHER[1]
)
BEATEN = decision(
    ("rate", 16.0, "noise", False), ("rate", 1 / 16, "noise", False), OTHER[0], changes=OTHER[1]
)
ROLLED_BACK = Decision("rollback", 0, 0, "rolled back", {"rate": (1.0, 0.25)}, "", 0.0)
DIVERGED = NEITHER._replace(verdict="rolled back")


@pytest.mark.parametrize(
    ("decisions", "now", "expected"),
    [
        ([], 1.0, [16.0, 1 / 16]),
        ([UP], 16.0, [256.0]),  # on in the direction that helped
        ([UP], 100.0, [1e3]),  # no farther than the bound
        ([UP], 500.0, [125.0, 1e3]),  # to which it is not worth the while: refined
        ([NEITHER], 1.0, []),  # the start is good
        ([MIXED], 1.0, []),
        ([UP, NEITHER], 16.0, [4.0, 64.0]),  # the smaller one first
        ([UP, MIXED], 16.0, [4.0, 64.0]),
        ([UP, NOISE], 16.0, [4.0, 64.0]),
        ([UP, NEITHER, NEITHER], 16.0, [8.0, 32.0]),
        ([UP] + [NEITHER] * 3, 16.0, []),  # the root of 2 is no change worth a trial
        ([NOISE], 1.0, []),
        ([ALMOST], 1.0, [1 / 16]),  # better, but not the best
        ([BEATEN], 1.0, [1 / 16]),  # another was changed, and this one may now differ
        ([BEATEN, NOISE], 1.0, []),
        ([ROLLED_BACK], 1.0, [16.0, 1 / 16]),
        ([DIVERGED], 1.0, [16.0, 1 / 16]),  # says nothing of the batch that it was on
    ],
)
def test_where_a_search_stands_is_read_off_the_decisions(decisions, now, expected):
    search = pattern_search({"rate": RATE})
    assert values(search, snapshot(rate=now), decisions) == pytest.approx(expected)


def test_a_later_phase_begins_anew_with_a_small_factor():
    search = pattern_search({"rate": RATE})
    found = values(search, snapshot(rate=1.0), [NOISE, NEITHER], phase=1)
    assert found == pytest.approx([2.0, 0.5])


def test_at_a_bound_only_the_way_back_is_proposed():
    search = pattern_search({"rate": RATE})
    assert values(search, snapshot(rate=1e3)) == pytest.approx([1e3 / 16])


def test_what_is_coupled_goes_along_by_its_power_and_within_its_bounds():
    batch = Scale(low=1, high=64, factor=4.0, integer=True, coupled={"rate": 0.5, "free": -1.0})
    search = pattern_search({"batch": batch, "rate": Scale(low=0.6, high=9.0)})
    up, down = [
        change.settings
        for change in search(snapshot(batch=8, rate=1.0, free=1.0), [], 0)
        if change.setting == "batch"
    ]
    assert up == {"batch": 32, "rate": 2.0, "free": 0.25}
    assert down == {"batch": 2, "rate": 0.6, "free": 4.0}


def test_each_other_value_of_a_choice_is_tried_once_a_phase():
    search = pattern_search({"o": Choice(values=("a", "b", "c", "d"))})
    past = decision(
        ("o", "b", "worse", False),
        ("o", "c", "better", False),
        ("o", "d", "better", True),
        changes={"o": ("a", "d")},
    )
    assert values(search, snapshot(o="a"), name="o") == ["b", "c", "d"]
    # The one that was better, but beaten, is worth another trial.
    assert values(search, snapshot(o="d"), [past], name="o") == ["c"]
    assert values(search, snapshot(o="d"), [past], phase=1, name="o") == ["a", "b", "c"]


def test_optimisers_are_compared_when_the_rates_are_found_and_in_long_trials():
    axis = Choice(values=("sgd", "adam", "lion"))
    search = pattern_search({"o": axis, "rate": Scale(low=0.1, high=9.0, factor=16.0)})
    now = snapshot(o="adam", rate=1.0)
    assert values(search, now, name="o") == []
    sgd, lion = search(now, [NOISE], 0)
    assert sgd.settings == {"o": "sgd"}
    assert lion.settings == {"o": "lion"} and sgd.level == lion.level == sgd.rank == lion.rank == 1
    taken = decision(("o", "adam", "better", True), changes={"o": ("sgd", "adam")})
    assert values(search, now, [NOISE, taken]) == [0.5, 2.0]  # the rate may now differ
    assert {change.level for change in search(now, [NOISE, taken], 0)} == {1}
    assert values(search, now, [NOISE, taken, NOISE], name="o") == ["lion"]
    timed = {"o": Choice(values=("a", "b"), score="efficiency"), "rate": RATE}
    assert {c.setting for c in pattern_search(timed)(snapshot(o="a", rate=1.0), [], 0)} == {
        "o",
        "rate",
    }


def test_what_is_judged_by_a_clock_is_not_refined():
    search = pattern_search({"rate": Scale(low=1e-3, high=1e3, factor=16.0, score="efficiency")})
    assert values(search, snapshot(rate=1.0)) == [16.0, 1 / 16]
    assert values(search, snapshot(rate=1.0), [NEITHER]) == []
