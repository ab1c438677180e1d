import functools
import time

import jax
import noisy_quadratic as quadratic
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.trials import Change, TrialConfig
from metaopt.self_improvement.workload import begin

WAYS = {"wait": (2, 0, 20, -1)}  # milliseconds
CONFIG = LoopConfig(
    phases=(0.0,),
    shares=(0.2,),
    assess_every=1.0,
    ways_seconds=20.0,
    trials=TrialConfig(examples=0.05),
)
START = SETTINGS | {"wait": 2}


@functools.cache
def waiting(milliseconds):
    """The step, after a while."""

    @jax.jit
    def step(state, batch):
        def wait(x):
            time.sleep(milliseconds / 1000)
            return x

        if milliseconds:
            batch = jax.pure_callback(wait, jax.ShapeDtypeStruct(batch.shape, batch.dtype), batch)
        return quadratic.update(state, batch)

    return step


def step_of(settings):
    if settings["wait"] < 0:
        raise UserError("nobody waits for less than nothing")
    return waiting(settings["wait"])


def problem(**changes):
    return workload(400, step=step_of, execution_options=WAYS, **changes)


def test_the_quickest_way_is_found_before_anything_else_and_gives_the_same(tmp_path):
    still = problem(space={})
    outcome = run(still, START, directory=tmp_path / "found", config=CONFIG)
    (decision,) = outcome.decisions
    verdicts = {e["settings"]["wait"]: e["verdict"] for e in decision.evidence}
    assert set(verdicts) == {-1, 0, 2, 20} and verdicts[-1] == "refused"
    assert decision.verdict == "accepted" and decision.changes == {"wait": [2, 0]}
    assert decision.examples == 0 and decision.trial_examples == 0
    (line,) = read_json_lines(tmp_path / "found" / "decisions.jsonl")
    assert line["reason"] == "steps are quicker: wait 2 to 0"
    calm = LoopConfig(phases=(), shares=(), assess_every=1.0)
    plain = run(still, START, directory=tmp_path / "plain", config=calm)
    assert plain.decisions == [] and plain.snapshot.settings["wait"] == 2
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain.snapshot.state)


def test_another_batch_is_computed_in_the_way_that_is_quickest_for_it(tmp_path):
    def propose(snapshot, decisions, phase):
        better = {"batch_size": 4, "outer_learning_rate": 0.5}
        known = snapshot.settings["batch_size"] == 4
        return [] if known else [Change(better, "batch_size", "loss", "a batch of 4")]

    start = START | {"batch_size": 1, "outer_learning_rate": 0.001}
    found = run(problem(), start, directory=tmp_path, config=CONFIG, proposer=propose)
    assert [d.phase for d in found.decisions] == [-1, 0, -1]
    before, search, after = found.decisions
    assert before.changes == {"wait": [2, 0]} and search.verdict == "accepted"
    assert after.verdict == "kept" and before.examples == 0 < after.examples
    assert all(entry["settings"].keys() == {"wait"} for entry in after.evidence)


def test_a_way_needs_a_value_to_start_from():
    with pytest.raises(UserError, match="'wait' is an execution option"):
        begin(problem(), SETTINGS)
