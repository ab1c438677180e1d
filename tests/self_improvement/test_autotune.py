import dataclasses
import functools
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.autotune import tune_options
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.measure import compile_for
from metaopt.outer_step import mean_over_tasks
from metaopt.parallel import AXIS, default_devices, parallel_step, replicate
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.trials import Change, TrialConfig
from metaopt.self_improvement.workload import begin

MIB = 2**20


class Machine:
    """Programs that take known times on a clock of their own, and note what is done to them."""

    def __init__(self, seconds, memory=lambda settings: MIB, compiling=1.0, seed=0, text=str):
        self.text = text
        self.seconds, self.memory, self.compiling = seconds, memory, compiling
        self.now, self.rng = 0.0, np.random.default_rng(seed)
        self.compiled, self.ran = [], []

    def build(self, settings):
        if settings.get("microbatch") == 3:
            raise UserError("16 does not divide by 3")

        def lower():
            text = self.text(settings)
            return SimpleNamespace(compile=lambda: self.compile(settings), as_text=lambda: text)

        return SimpleNamespace(lower=lower), ()

    def compile(self, settings):
        machine = self
        self.now += self.compiling
        self.compiled.append(dict(settings))

        class Program:
            args_info = ((), {})

            def memory_analysis(self):
                sizes = dict.fromkeys(("argument_size_in_bytes", "output_size_in_bytes"), 0)
                return SimpleNamespace(temp_size_in_bytes=machine.memory(settings), **sizes)

            def __call__(self):
                machine.ran.append(dict(settings))
                machine.now += machine.seconds(settings) * np.exp(0.03 * machine.rng.normal())

        return Program()

    def tune(self, space, start, memory_budget=10 * MIB, seconds_budget=1e9):
        budgets = {"memory_budget": memory_budget, "seconds_budget": seconds_budget}
        return tune_options(self.build, space, start, **budgets)


@pytest.fixture
def use(monkeypatch):
    """Makes the clock of a machine the clock."""

    def use(machine):
        monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
        return machine

    return use


SPACE = {"microbatch": (1, 2, 4, 8, 16), "remat": (True, False), "precision": ("f32", "bf16")}
START = {"microbatch": 1, "remat": True, "precision": "f32", "unvaried": 5}


def cost(settings):
    """The best are microbatches of 8; recomputing costs a third, bfloat16 helps a little."""
    seconds = {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3, 16: 0.36}[settings["microbatch"]]
    return (
        seconds
        * (4 / 3 if settings["remat"] else 1)
        * (0.9 if settings["precision"] == "bf16" else 1)
    )


def activations(settings):
    return MIB * settings["microbatch"] * (0.5 if settings["remat"] else 1)


def test_what_only_pays_together_is_found(use):
    together = {"a": 1, "b": 1}
    machine = use(Machine(lambda s: 0.5 if s == together else 1.0 + 0.2 * (s["a"] + s["b"])))
    found = machine.tune({"a": (0, 1), "b": (0, 1)}, {"a": 0, "b": 0})
    assert found.settings == together


def test_the_best_of_the_space_is_found_and_nothing_is_compiled_twice(use):
    for seed in range(10):
        machine = use(Machine(cost, seed=seed))
        found = machine.tune(SPACE, START)
        assert found.settings == {**START, "microbatch": 8, "remat": False, "precision": "bf16"}
        assert len(machine.compiled) == len({str(s) for s in machine.compiled})
        json.dumps([record._asdict() for record in found.timings])
        (best,) = [e for e in found.timings if e.verdict == "adopted"]
        assert best.settings == found.settings
        assert best.seconds == pytest.approx(0.27, rel=0.05)
        assert best.lower <= best.seconds <= best.upper and best.rounds == 16
        assert best.bytes == MIB and best.compile_seconds == 1.0
        assert found.timings[0].settings == START and found.timings[0].verdict == "replaced"
        assert {e.verdict for e in found.timings[1:]} <= {"adopted", "slower"}


def test_what_gives_the_same_program_is_not_compiled_again():
    machine = Machine(lambda settings: 1.0, text=lambda settings: f"remat {settings['remat']}")
    found = machine.tune({"remat": [0, 1], "unread": [0, 1]}, {"remat": 0, "unread": 0})
    assert len(machine.compiled) == 2
    verdicts = {str(t.settings): t.verdict for t in found.timings}
    assert [v for k, v in verdicts.items() if "'unread': 1" in k] == ["same program"] * 2


def test_what_is_over_the_memory_is_never_run(use):
    machine = use(Machine(cost, activations))
    found = machine.tune(SPACE, START, memory_budget=3 * MIB)
    # With remat 4 fit, without it 2: 0.4 s · 4/3 against 0.6 s.
    assert found.settings == {**START, "microbatch": 4, "precision": "bf16"}
    assert all(activations(settings) <= 3 * MIB for settings in machine.ran)
    over = [e for e in found.timings if e.verdict == "over memory"]
    assert {e.settings["microbatch"] for e in over} == {4, 8, 16}
    assert "takes 4.0 MiB of a budget of 3.0 MiB" in over[0].reason


def test_a_start_that_does_not_fit_gives_way_to_the_nearest_that_does(use):
    machine = use(Machine(cost, activations))
    start = {**START, "microbatch": 16, "remat": False}
    found = machine.tune(SPACE, start, memory_budget=3 * MIB)
    assert found.settings == {**START, "microbatch": 4, "precision": "bf16"}
    assert found.timings[0].verdict == "over memory"
    assert found.timings[0].settings == start
    with pytest.raises(UserError, match=r"for the start, it takes 16.0 MiB of a budget of 1.0 KiB"):
        machine.tune(SPACE, start, memory_budget=1024)


def test_refused_settings_are_gone_past(use):
    machine = use(Machine(lambda s: 1 / s["microbatch"]))
    found = machine.tune({"microbatch": (1, 3, 4)}, {"microbatch": 1})
    assert found.settings == {"microbatch": 4}
    (refused,) = [e for e in found.timings if e.verdict == "refused"]
    assert refused.settings == {"microbatch": 3} and refused.reason == "16 does not divide by 3"
    with pytest.raises(UserError, match="remat: may be varied, but has no value"):
        machine.tune(SPACE, {"microbatch": 1, "precision": "f32"})


@pytest.mark.parametrize("budget", [0.0, 3.0, 10.0, 30.0, 100.0])
def test_the_budget_holds_but_for_what_has_begun(budget, use):
    machine = use(Machine(cost))
    found = machine.tune(SPACE, START, seconds_budget=budget)
    # The start is compiled and called in any case; then a compilation, a first call and a
    # round of all may be under way.
    assert machine.now <= budget + 2.5 + 1 + 1.4 + sum(map(cost, (START, START)))
    assert cost(found.settings) <= cost(START)
    if budget == 100:
        assert cost(found.settings) < 0.5 * cost(START)


def test_between_equals_the_start_stays(use):
    changed = 0
    for seed in range(30):
        machine = use(Machine(lambda settings: 1.0, seed=seed))
        changed += machine.tune(SPACE, START).settings != START
    assert changed <= 3


def test_the_nearest_to_the_start_come_first_and_leave_time_to_compare_them(use):
    machine = use(Machine(cost))
    found = machine.tune(SPACE, START, seconds_budget=25.0)
    differing = [sum(s[name] != START[name] for name in SPACE) for s in machine.compiled]
    assert differing == sorted(differing) and 2 < len(machine.compiled) < 20
    assert {e.verdict for e in found.timings[len(machine.compiled) :]} == {"no time"}
    assert found.timings[0].rounds >= 5 and cost(found.settings) < cost(START)


def test_donated_arguments_survive_the_trials():
    devices = default_devices(2)
    state = replicate({"w": jnp.ones(4)}, devices)

    def step(state, x):
        return jax.tree.map(lambda w: w + jax.lax.pmean(x.sum(), AXIS), state), x.sum()

    def build(settings):
        return parallel_step(step, devices), (state, np.ones((2, settings["size"]), np.float32))

    found = tune_options(
        build, {"size": (1, 2)}, {"size": 1}, memory_budget=0.5, seconds_budget=10.0
    )
    timed = [e for e in found.timings if e.rounds > 1]
    assert {e.settings["size"] for e in timed} == {1, 2}
    np.testing.assert_array_equal(state["w"], np.ones(4))
    args = (state, np.ones((2, 1), np.float32))
    donated = jax.tree.leaves(compile_for(parallel_step(step, devices), *args).args_info)
    assert [info.donated for info in donated] == [True, False]


def test_a_real_meta_batch_in_a_scan_is_found_to_be_faster_under_vmap():
    """4096 tiny tasks, at first one by one: on a quiet machine more than 10 times slower."""
    w, x = jnp.eye(4), jnp.ones((4096, 2, 4))

    def build(settings):
        def loss(w, x):
            layer = lambda x: jnp.tanh(x @ w)  # noqa: E731
            layer = jax.checkpoint(layer) if settings["remat"] else layer
            return jnp.mean(layer(layer(x)) ** 2)

        def grad(w, x):
            return mean_over_tasks(
                lambda x: jax.grad(loss)(w, x), (x,), settings["tasks_at_a_time"]
            )

        return grad, (w, x)

    start = {"tasks_at_a_time": 1, "remat": True}
    space = {"tasks_at_a_time": (1, 5, 4096), "remat": (True, False)}
    found = tune_options(build, space, start, memory_budget=0.5, seconds_budget=60.0)
    assert found.settings["tasks_at_a_time"] == 4096
    of = {(e.settings["tasks_at_a_time"], e.settings["remat"]): e for e in found.timings}
    together, alone, uneven = of[4096, True], of[1, True], of[5, True]
    assert together.seconds < alone.seconds
    assert "5 at a time" in uneven.reason and uneven.verdict == "refused"
    assert together.bytes > x.nbytes


OPTIONS = {"wait": (2, 0, 20, -1)}  # milliseconds
CONFIG = LoopConfig(
    phases=(0.0,),
    shares=(0.2,),
    assess_every=1.0,
    options_seconds=20.0,
    trials=TrialConfig(examples=0.05),
)
WAITING = SETTINGS | {"wait": 2}


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
    return workload(400, step=step_of, execution_options=OPTIONS, **changes)


def test_the_fastest_options_are_found_before_anything_else_and_gives_the_same(tmp_path):
    still = problem(space={})
    outcome = run(still, WAITING, directory=tmp_path / "found", config=CONFIG)
    (decision,) = outcome.decisions
    verdicts = {e.settings["wait"]: e.verdict for e in decision.timings}
    assert set(verdicts) == {-1, 0, 2, 20} and verdicts[-1] == "refused"
    assert decision.verdict == "accepted" and decision.changes == {"wait": (2, 0)}
    assert decision.examples == 0 and decision.trial_examples == 0
    (line,) = read_json_lines(tmp_path / "found" / "decisions.jsonl")
    assert line["reason"] == "steps are faster: wait 2 to 0"
    calm = LoopConfig(phases=(), shares=(), assess_every=1.0)
    plain = run(still, WAITING, directory=tmp_path / "plain", config=calm)
    assert plain.decisions == [] and plain.snapshot.settings["wait"] == 2
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain.snapshot.state)


def test_another_batch_is_computed_with_the_options_that_are_fastest_for_it(tmp_path):
    def propose(snapshot, decisions, phase):
        better = {"batch_size": 4, "outer_learning_rate": 0.5}
        known = snapshot.settings["batch_size"] == 4
        return [] if known else [Change(better, "batch_size", "loss", "a batch of 4")]

    start = WAITING | {"batch_size": 1, "outer_learning_rate": 0.001}
    found = run(problem(), start, directory=tmp_path, config=CONFIG, proposer=propose)
    assert [d.kind for d in found.decisions] == ["execution options", "search", "execution options"]
    before, search, after = found.decisions
    assert before.changes == {"wait": (2, 0)} and search.verdict == "accepted"
    assert after.verdict == "kept" and before.examples == 0 < after.examples
    assert all(entry.settings.keys() == {"wait"} for entry in after.timings)


def test_a_run_whose_options_wait_is_resumed_after_another_batch_was_taken(tmp_path):
    """At its very start, where it is not known how long a step takes."""

    def propose(snapshot, decisions, phase):
        better = {"batch_size": 4, "outer_learning_rate": 0.5}
        known = snapshot.settings["batch_size"] == 4
        return [] if known else [Change(better, "batch_size", "loss", "a batch of 4")]

    def killed(settings):
        step = step_of(settings)

        def update(state, batch):
            if read_json_lines(tmp_path / "decisions.jsonl"):
                raise MemoryError
            return step(state, batch)

        return update

    start = WAITING | {"batch_size": 1, "outer_learning_rate": 0.001}
    config = dataclasses.replace(CONFIG, options_share=0.5)
    how = {"directory": tmp_path, "config": config, "proposer": propose}
    with pytest.raises(MemoryError):
        run(problem()._replace(step=killed), start, **how)
    found = run(problem(), start, **how)
    assert [d.kind for d in found.decisions] == ["search"]
    assert found.snapshot.settings["batch_size"] == 4 and found.snapshot.examples >= 400


def test_an_option_needs_a_value_to_start_from():
    with pytest.raises(UserError, match="'wait' is an execution option, but has no value"):
        begin(problem(), SETTINGS)
