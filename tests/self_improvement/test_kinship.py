import dataclasses
import math

import pytest

from metaopt.self_improvement import memory
from metaopt.self_improvement.memory import (
    CATEGORY_MISMATCH,
    MISSING_COST,
    RunRecord,
    choose,
    distance,
)
from metaopt.self_improvement.records import Decision, TriedChange

TASK = {"family": "markov", "width": 64, "order": 1}


def run(name, loss=1.0, seconds=1.0, decisions=None, **task):
    settings, decisions = {"rate": name}, decisions or [{"phase": 0, "reason": name}]
    return RunRecord(
        name=name,
        task=TASK | task,
        settings=settings,
        loss=loss,
        tokens=10,
        seconds=seconds,
        decisions=decisions,
    )


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, 0.0),
        ({"width": 128}, math.log(2)),
        ({"width": 32}, math.log(2)),
        ({"family": "text"}, CATEGORY_MISMATCH),
        ({"order": "1"}, CATEGORY_MISMATCH),
        ({"order": True}, CATEGORY_MISMATCH),
        ({"order": 0}, 1.0),
        ({"depth": 2}, MISSING_COST),
        ({"width": 128, "family": "text"}, math.log(2) + CATEGORY_MISMATCH),
        ({"width": math.nan}, CATEGORY_MISMATCH),
    ],
)
def test_the_distance_is_a_sum_over_descriptors_and_the_same_both_ways(there, expected):
    assert distance(TASK, TASK | there) == pytest.approx(expected)
    assert distance(TASK | there, TASK) == pytest.approx(expected)


def test_the_distance_does_not_depend_on_units():
    here, there = {"tokens": 3e6, "rate": 0.1}, {"tokens": 2e6, "rate": 0.3}
    rescaled = [{"tokens": t["tokens"] / 1e6, "rate": t["rate"]} for t in (here, there)]
    assert distance(here, there) == pytest.approx(distance(*rescaled))
    assert distance({"x": -2.0}, {"x": 2.0}) == 2.0 and distance({"x": 0}, {"x": 0.0}) == 0.0
    assert distance({"n": 10**400}, {"n": 1}) > 0  # beyond any float


def test_the_best_of_the_nearest_proposes():
    near = [run("same", 1.0), run("slow", 0.9, 5.0), run("quick", 0.9, 2.0, width=66)]
    far = [run("elsewhere", 0.1, width=128), run("other", 0.0, family="text")]
    diverged = run("diverged", math.nan)
    proposal = choose([diverged, *far, *near], TASK)
    assert proposal is not None and proposal.run == "quick"
    assert proposal.distance == pytest.approx(math.log(66 / 64))
    assert proposal.settings == {"rate": "quick"} and "quick" in proposal.reason
    assert proposal.decisions == []  # they were made on another task
    proposal = choose([*far, *near[:2]], TASK)
    assert proposal is not None and (proposal.run, proposal.distance) == ("slow", 0.0)
    assert "the same task" in proposal.reason
    assert proposal.decisions == [{"phase": 0, "reason": "slow"}]

    proposal = choose([diverged, *far], TASK)
    assert proposal is not None and proposal.run == "elsewhere"
    assert proposal.distance == pytest.approx(math.log(2))
    assert "width 128 there, 64 here" in proposal.reason


def test_without_kin_nothing_is_proposed():
    assert choose([], TASK) is None
    assert choose([run("diverged", math.inf)], TASK) is None
    assert choose([run("far", width=64 * 25)], TASK) is None
    assert choose([run("far", width=64 * 25)], TASK, within=3.3) is not None
    assert memory.TIE_DISTANCE < math.log(2) < memory.MAX_DISTANCE


def test_a_choice_with_which_a_run_ended_worse_is_worse():
    def chose(value):
        compared = ("loss", 1.0, -0.5, 0.1, "better", True, 1.0, 40)
        choice = TriedChange("o", {"o": value}, 0, *compared)
        rate = TriedChange("r", {"r": 1.0}, 1, *compared)
        changes = {"o": ("a", value)}
        first = Decision("search", 1, 4, "accepted", changes, "", 1.0, 0, [choice, rate])
        return [first.as_json(), first._replace(phase=1).as_json()]

    best = run("best", 0.5, decisions=chose("b"))
    best = dataclasses.replace(best, settings={"o": "b"})
    worse = run("worse", 0.6, decisions=chose("c"))
    shorter = dataclasses.replace(run("shorter", 0.9, decisions=chose("d")), tokens=9)
    same = run("same", 0.7, decisions=chose("b"))
    damaged = run("damaged", 0.7, decisions=[{"phase": 0, "trials": [{"direction": 0}]}, "x"])
    other = run("other", 0.8, decisions=chose("e"), width=65)
    proposal = choose([worse, best, shorter, same, other, damaged], TASK)
    assert proposal is not None and proposal.run == "best"
    *own, refuted = proposal.decisions
    assert own == best.decisions and refuted["changes"] == {} and refuted["verdict"] == "kept"
    (entry,) = refuted["trials"]
    assert (entry["settings"], entry["verdict"], entry["accepted"]) == ({"o": "c"}, "worse", False)
