import json
import shutil

import noisy_quadratic as quadratic
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.files import as_record, read_json_lines, write_json_lines
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.memory import Memory, RunRecord
from metaopt.self_improvement.records import Decision, decision_of, past_search
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import Choice, Scale, known_settings
from metaopt.training.monitor import Alarm

CONFIG = LoopConfig(
    phases=(0.0,),
    shares=(0.4,),
    assess_every=0.5,
    count_flops=False,
    trials=TrialConfig(examples=0.04),
)
RATE = "outer_learning_rate"
NUMBERS = ("step", "examples", "trial_examples", "seconds", "size", "gained")


def improved(directory, problem=None):
    problem = problem or workload(600)
    return run(problem, SETTINGS | {RATE: 0.02}, directory=directory, config=CONFIG)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp("straight")
    outcome = improved(directory)
    assert sum(d.verdict == "accepted" for d in outcome.decisions) >= 2
    return directory, as_bytes(outcome.snapshot.state)


@pytest.fixture(scope="module")
def in_search(tmp_path_factory):
    """One that was killed when two races had been decided and nothing trained."""
    directory = tmp_path_factory.mktemp("killed")
    calls = []

    def dies(state, batch):
        if directory.exists() and len(read_json_lines(directory / "decisions.jsonl")) == 2:
            raise MemoryError
        calls.append(None)
        return quadratic.step(state, batch)

    with pytest.raises(MemoryError):
        improved(directory, workload(600, step=lambda settings: dies))
    assert calls
    return directory


def with_change(tmp_path, directory, file, number, change):
    """A copy of a run with a line that is not what it was, and no checksum to say so."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    lines = read_json_lines(copy / file)
    lines[number] = change(json.loads(json.dumps(lines[number])))
    lines[number].pop("checksum")
    write_json_lines(copy / file, lines)
    return copy


def other_rate(line):
    line["changes"][RATE][1] *= 1.5
    return line


def other_rates(line):
    """With evidence that agrees."""
    for entry in line["trials"]:
        entry["settings"][RATE] *= 1e9
    line["changes"][RATE][1] *= 1e9
    return line


def entry_with(**fields):
    def change(line):
        line["trials"][0] |= fields
        return line

    return change


DAMAGES = [
    ("decisions.jsonl", other_rate, "to 0.24 is none that a trial accepts"),
    ("decisions.jsonl", entry_with(verdict="beter"), "in its trials, 'verdict' is"),
    ("decisions.jsonl", entry_with(direction=7), "no change that was tried"),
    ("decisions.jsonl", entry_with(settings={}), "no change that was tried"),
    ("decisions.jsonl", lambda x: x | {"changes": {RATE: [0.02]}}, "of the wrong type"),
    ("decisions.jsonl", lambda x: x | {"left_out": [8, 4]}, "no stretch of examples"),
    *[("decisions.jsonl", lambda x, n=n: x | {n: -3}, f"'{n}' is -3, below 0") for n in NUMBERS],
    ("metrics.jsonl", lambda x: x | {"tokens": -3}, "'tokens' is -3, below 0"),
    ("metrics.jsonl", lambda x: x | {"loss": {**x["loss"], "mean": None}}, "is no number"),
]


@pytest.mark.parametrize(("file", "change", "problem"), DAMAGES)
def test_a_damaged_line_that_is_needed_is_refused_by_file_and_line(
    tmp_path, straight, file, change, problem
):
    directory = with_change(tmp_path, straight[0], file, 0, change)
    before = (directory / file).read_bytes()
    with pytest.raises(UserError, match="damaged") as error:
        improved(directory)
    assert f"{file}:1 " in str(error.value) and problem in str(error.value)
    assert (directory / file).read_bytes() == before


@pytest.mark.parametrize(
    "change", [None, other_rate, other_rates, entry_with(direction=7), lambda x: x | {"gained": -3}]
)
def test_a_decision_of_an_open_search_is_made_again_where_its_line_is_damaged(
    tmp_path, straight, in_search, change, capfd
):
    directory = with_change(tmp_path, in_search, "decisions.jsonl", 1, change or (lambda x: x))
    assert as_bytes(improved(directory).snapshot.state) == straight[1]
    said = "decisions.jsonl:2 is left out" in capfd.readouterr().err
    assert said == (change is not None)


def test_a_reason_says_the_rule_and_the_threshold(straight):
    lines = read_json_lines(straight[0] / "decisions.jsonl")
    for line in lines:
        rule = {"accepted": "the margin of 0.0", "kept": "95 % interval and a margin of 0.0"}
        assert rule[line["verdict"]] in line["reason"]
        if line["verdict"] == "accepted":
            (chosen,) = (e for e in line["trials"] if e["accepted"])
            assert f"loss {chosen['difference']:.3g} ± {chosen['ci95']:.2g}" in line["reason"]


def test_what_a_memory_holds_is_used_only_where_it_is_sound(tmp_path, straight, capfd):
    lines = read_json_lines(straight[0] / "decisions.jsonl")
    for line in lines:
        del line["name"], line["checksum"]
    known = past_search(lines)
    assert known is not None and len(known) == len(lines) > 0
    assert past_search([*lines, lines[0] | {"size": -1}]) is None
    assert past_search([lines[0] | {"seconds": float("nan")}]) is None
    memory = Memory(tmp_path / "memory.sqlite")
    record = RunRecord(name="a", task={}, settings={RATE: 0.1}, loss=1.0, tokens=10, seconds=1.0)
    for tokens in (-1.0, 5.0):
        memory.remember(RunRecord(**vars(record) | {"curve": [(tokens, 2.0), (10, 1.0)]}))
    assert [run.curve[0][0] for run in memory.records()] == [5.0]
    assert "1 of 2 entries are no runs" in capfd.readouterr().err
    space = {"a": Scale(low=0.1, high=2.0), "b": Choice(values=("x", "y"))}
    for wrong in (True, 10**400, float("nan"), float("inf"), -1.0, "1", None):
        assert known_settings(space, {"a": wrong, "b": wrong}) == {}


def test_a_response_is_one_to_an_alarm_that_was_raised():
    alarm = Alarm("starved", 7, True, 0.9, 0.5, "it waits")
    fields = {"changes": {"workers": (1, 2)}, "reason": "", "seconds": 0.1, "alarm": alarm}
    sound = Decision("response", 8, 32, "accepted", **fields)
    assert decision_of(as_record(sound)) == sound
    for wrong in (
        sound._replace(alarm=None),
        sound._replace(alarm=alarm._replace(raised=False)),
        sound._replace(kind="rollback", verdict="stopped"),
        sound._replace(kind="answer"),
        sound._replace(seconds=-1.0),
    ):
        with pytest.raises(ValueError):
            decision_of(as_record(wrong))
