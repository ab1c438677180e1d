import dataclasses
import random
import signal
import time

import jax
import jax.numpy as jnp
import noisy_quadratic as quadratic
import pytest
from noisy_quadratic import SETTINGS, as_bytes, loss_of, workload

from metaopt.autotune import TimedOptions
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.resources import MemoryUse
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.records import Decision
from metaopt.self_improvement.responses import choose, workers_of
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import begin, steps
from metaopt.training.loop import Interrupted
from metaopt.training.monitor import Alarm, MonitorConfig

CONFIG = LoopConfig(phases=(), shares=(), assess_every=0.25, count_flops=False)
WAYS = {"way": ("fast", "slow")}
FAST = SETTINGS | {"way": "fast"}
UNEVEN = ("seconds", "per_second", "per_cost", "gib", "checksum", "lower", "upper", "rounds")
UNEVEN += ("compile_seconds",)


def alarm_of(kind, step=9):
    return Alarm(kind, step, True, 2.0, 1.0, "it is so")


def response(kind, verdict="accepted", step=5, **fields):
    fields = {"examples": 20, "changes": {}, "reason": "", "seconds": 0.0} | fields
    return Decision("response", step, verdict=verdict, alarm=alarm_of(kind, step), **fields)


def chosen(kind, past=(), problem=None, **options):
    problem = problem or workload(execution_options=WAYS)
    options = {"max_responses": 2} | options
    return choose(alarm_of(kind), problem, FAST, past, **options)


def test_each_kind_has_its_response():
    found = {kind: chosen(kind).action for kind in ("slow", "idle", "memory", "starved", "plateau")}
    timed = "time options"
    assert found == {
        **{"slow": timed, "idle": timed, "memory": "save memory"},
        **{"starved": "add workers", "plateau": "search"},
    }
    assert chosen("plateau", stop_on_plateau=True).action == "stop"


def test_why_there_is_no_response_is_said():
    bare, timed = workload(space={}), [TimedOptions({"way": "fast"}, "kept", seconds=1.0)]
    twice = [response("slow"), response("slow", "kept", timings=timed)]
    for found, why in (
        (chosen("slow", problem=bare), "no execution options"),
        (chosen("memory", problem=bare), "no execution options"),
        (chosen("plateau", problem=bare), "no learning rate"),
        (chosen("slow", twice), "2 responses"),
        (chosen("slow", active=("starved", "slow")), "wait for data"),
        (chosen("idle", [response("slow", "kept", timings=timed)]), "the fastest"),
        (chosen("idle", [response("slow", step=9, timings=timed)]), "just now"),
        (chosen("slow", [response("memory", changes={"way": ("fast", "slow")})]), "memory"),
        (chosen("slow", num_processes=2), "several processes"),
        (chosen("starved", num_processes=2), "several processes"),
    ):
        assert found.action == "nothing" and why in found.reason
    untried = [response("slow", "kept")] * 5
    assert chosen("slow", untried).action == "time options"
    assert chosen("slow", [response("slow", "kept", timings=timed)]).action == "time options"
    assert chosen("plateau", num_processes=2).action == "search"


def test_workers_double_up_to_eight():
    past, found = [], []
    while (said := chosen("starved", past)).action != "nothing":
        found.append(said.workers)
        past.append(response("starved", changes={"workers": (workers_of(past), said.workers)}))
    assert found == [2, 4, 8] and "8 threads" in said.reason


class Clock:
    """A time that only steps move, each by as much as its settings say."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        return self.now


def sleeping(way):
    """A compiled step that takes a millisecond, or six; the result is the same."""

    def wait(loss):
        time.sleep({"fast": 0.001, "slow": 0.006}[way])
        return loss

    def step(state, batch):
        state, metrics = quadratic.update(state, batch)
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return state, metrics | {"loss": jax.pure_callback(wait, like, metrics["loss"])}

    return jax.jit(step, donate_argnums=0)


STEPS = {way: sleeping(way) for way in WAYS["way"]}


def timed(clock, at=lambda state: None, **fields):
    """A workload of 200 steps, each of which moves the clock; ``at`` is called before it."""

    def step_of(settings):
        def step(state, batch):
            at(state)
            clock.now += clock.seconds(settings)
            return STEPS[settings["way"]](state, batch)

        return step

    fields = {"execution_options": WAYS} | fields
    return workload(800, step=step_of, **fields)


def seconds(settings):
    return {"fast": 1 / 32, "slow": 3 / 32}[settings["way"]]


def responses_of(directory):
    """The decisions without what a clock or a compiler says."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in UNEVEN}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return [timeless(line) for line in read_json_lines(directory / "decisions.jsonl")]


SLOWED = {"interventions": [(120, {"way": "slow"})], "config": CONFIG}


def slowed(directory, at=lambda state: None):
    clock = Clock(seconds)
    return run(timed(clock, at), FAST, directory=directory, clock=clock, **SLOWED)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that someone slowed down, and that was never stopped."""
    directory = tmp_path_factory.mktemp("straight")
    return slowed(directory), responses_of(directory)


def test_a_run_that_was_slowed_down_is_as_fast_as_before(straight, capsys):
    outcome, written = straight
    (decision,) = outcome.decisions
    assert decision.kind == "response" and decision.alarm.kind == "slow"
    assert decision.verdict == "accepted" and decision.changes == {"way": ("slow", "fast")}
    assert decision.step == decision.alarm.step + 1 and decision.seconds > 0
    assert {timing.settings["way"] for timing in decision.timings} == {"fast", "slow"}
    assert outcome.snapshot.settings["way"] == "fast" and outcome.snapshot.examples == 800
    assert outcome.snapshot.settings == FAST and len(written) == 1


def killed_in_the_response():
    """Dies once the options are compiled, which nothing but a response does."""
    left = [1]

    def at(state):
        if isinstance(state.step, jax.core.Tracer) and left:
            left.clear()
            raise MemoryError

    return at


def killed_at(step):
    def at(state):
        if not isinstance(state.step, jax.core.Tracer) and int(state.step) == step:
            raise MemoryError

    return at


def stopped_at(step):
    def at(state):
        if not isinstance(state.step, jax.core.Tracer) and int(state.step) == step:
            signal.raise_signal(signal.SIGTERM)

    return at


def test_a_run_that_is_killed_between_alarm_and_response_is_the_same(tmp_path, straight):
    outcome, written = straight
    alarm = outcome.decisions[0].alarm.step
    for i, at in enumerate(
        (
            killed_in_the_response(),
            killed_at(alarm - 3),
            killed_at(alarm),  # before the alarm is seen
            stopped_at(alarm),  # the alarm is saved
            killed_at(alarm + 1),  # after the response
            killed_at(alarm + 60),
            stopped_at(alarm + 4),
        )
    ):
        with pytest.raises((MemoryError, Interrupted)):
            slowed(tmp_path / str(i), at)
        resumed = slowed(tmp_path / str(i))
        assert as_bytes(resumed.snapshot.state) == as_bytes(outcome.snapshot.state)
        assert resumed.snapshot.settings == outcome.snapshot.settings
        assert responses_of(tmp_path / str(i)) == written
        assert resumed.alarms == outcome.alarms


def test_a_run_that_only_reports_says_what_it_would_do(tmp_path):
    clock, config = Clock(seconds), dataclasses.replace(CONFIG, report_only=True)
    options = SLOWED | {"config": config}
    outcome = run(timed(clock), FAST, directory=tmp_path, clock=clock, **options)
    (decision,) = outcome.decisions
    assert decision.verdict == "reported" and not decision.changes
    assert outcome.snapshot.settings["way"] == "slow"


def test_without_responses_an_alarm_changes_nothing(tmp_path, capsys):
    clock, config = Clock(seconds), dataclasses.replace(CONFIG, max_responses=0)
    options = SLOWED | {"config": config}
    outcome = run(timed(clock), FAST, directory=tmp_path, clock=clock, **options)
    assert outcome.decisions == [] and [alarm.kind for alarm in outcome.alarms] == ["slow"]
    assert "slow: " in capsys.readouterr().err


def test_an_alarm_without_a_response_says_why(tmp_path, capsys):
    clock = Clock(seconds)
    problem = timed(clock, execution_options={})
    outcome = run(problem, FAST, directory=tmp_path, clock=clock, **SLOWED)
    (decision,) = outcome.decisions
    assert decision.verdict == "kept" and "no execution options" in decision.reason
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "slow: " in line]
    assert decision.reason in said
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain(problem))


def plain(problem, settings=FAST):
    state = None
    for step in steps(problem, begin(problem, settings), problem.num_examples):
        state = step.snapshot.state
    return state


@pytest.mark.parametrize("seed", range(10))
def test_a_clean_run_is_left_alone(tmp_path, seed):
    rng = random.Random(seed)
    clock = Clock(lambda settings: 0.03 * rng.lognormvariate(0, 0.2))
    outcome = run(timed(clock), FAST, directory=tmp_path, clock=clock, config=CONFIG)
    assert outcome.decisions == [] and outcome.alarms == []


def test_short_steps_ring_nothing(tmp_path):
    clock = Clock(lambda settings: seconds(settings) / 8)
    outcome = run(timed(clock), FAST, directory=tmp_path, clock=clock, **SLOWED)
    assert outcome.alarms == []


def test_a_starved_run_draws_by_more_threads(tmp_path):
    """A step takes 25 ms, and from the 15th on a batch 60 ms."""

    def sample(settings, position):
        time.sleep(0.06 if position >= 60 else 0.0)
        return quadratic.sample(settings, position)

    def step(state, batch):
        time.sleep(0.025)
        return quadratic.step(state, batch)

    problem = workload(280, sample=sample, step=lambda settings: step)
    outcome = run(problem, SETTINGS, directory=tmp_path, config=CONFIG)
    decided = [d for d in outcome.decisions if d.alarm and d.alarm.kind == "starved"]
    pairs = [decision.changes["workers"] for decision in decided]
    assert pairs in ([(1, 2), (2, 4)], [(1, 2)], [(1, 2), (2, 4), (4, 8)])
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain(workload(280), SETTINGS))


def padded(settings):
    """A step with more results, of which nothing is made."""

    def step(state, batch):
        state, metrics = quadratic.update(state, batch)
        size = {"fast": 1 << 18, "slow": 8}[settings["way"]]
        return state, metrics | {"unused": jnp.full(size, metrics["loss"])}

    return jax.jit(step, donate_argnums=0)


def test_less_memory_is_taken_if_there_is_too_little(tmp_path):
    read = []

    def read_memory():
        read.append(1)
        return MemoryUse(host=95 if len(read) > 20 else 50, host_limit=100)

    problem = workload(800, step=padded, execution_options=WAYS)
    outcome = run(problem, FAST, directory=tmp_path, config=CONFIG, read_memory=read_memory)
    (decision,) = outcome.decisions
    assert decision.alarm.kind == "memory" and decision.changes == {"way": ("fast", "slow")}
    least, most = sorted(timing.bytes for timing in decision.timings)
    assert most > least + (1 << 19) and "1.0 MiB" in decision.reason
    lean = run(
        problem,
        FAST | {"way": "slow"},
        directory=tmp_path / "lean",
        config=CONFIG,
        read_memory=lambda: MemoryUse(host=95, host_limit=100),
    )
    (decision,) = lean.decisions
    assert decision.verdict == "kept" and "less memory than" in decision.reason


STALLED = SETTINGS | {"outer_learning_rate": 5e-5}
TRIALS = TrialConfig(examples=0.03, least_steps=4)
NO_CLOCK = MonitorConfig(least_step_seconds=1e3)  # that of a busy machine decides nothing
LONG = dataclasses.replace(
    CONFIG, assess_every=0.1, trials=TRIALS, alarm_share=0.2, monitor=NO_CLOCK
)


def stalled(directory, at=lambda state: None, config=LONG):
    def step(state, batch):
        at(state)
        return quadratic.step(state, batch)

    problem = workload(4000, step=lambda settings: step, schedule=lambda done: 1.0)
    return run(problem, STALLED, directory=directory, config=config)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A run whose rate is far too small, and what the response to its plateau makes of it."""
    directory = tmp_path_factory.mktemp("searched")
    return stalled(directory), responses_of(directory)


def test_a_plateau_begins_a_search_of_the_rates(searched):
    outcome, _ = searched
    first, *rounds = outcome.decisions
    assert first.kind == "response" and first.alarm.kind == "plateau"
    assert first.examples == 4 * first.step and "outer_learning_rate" in first.reason
    begun = [d for d in outcome.decisions if d.kind == "response" and d.verdict == "accepted"]
    assert 1 <= len(begun) <= LONG.max_responses
    own = [d for d in rounds if d.phase == 1]
    assert own and {d.examples for d in own} == {first.examples}
    assert sum(d.trial_examples for d in own) <= 1.1 * LONG.alarm_share * 4000
    rates = [d.changes["outer_learning_rate"] for d in own if d.changes]
    assert rates and all(new > old for old, new in rates)


@pytest.mark.parametrize("after", [-1, 0, 3, 12, 30])
def test_a_search_in_response_is_continued_after_a_stop(tmp_path, searched, after):
    outcome, written = searched
    calls, alarm = [], outcome.decisions[0].alarm.step

    def at(state):
        if isinstance(state.step, jax.core.Tracer):
            return
        calls.append(1)
        if len(calls) == alarm + 1 + after:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        stalled(tmp_path, at)
    resumed = stalled(tmp_path)
    assert as_bytes(resumed.snapshot.state) == as_bytes(outcome.snapshot.state)
    assert responses_of(tmp_path) == written


def test_a_plateau_ends_the_run_if_that_is_asked_for(tmp_path):
    config = dataclasses.replace(LONG, stop_on_plateau=True)
    outcome = stalled(tmp_path, config=config)
    (decision,) = outcome.decisions
    assert decision.verdict == "stopped" and outcome.snapshot.examples < 4000
    assert outcome.curve[-1].step == decision.step
    again = stalled(tmp_path, killed_at(0), config=config)  # no step is made
    assert again.from_checkpoint == decision.step and again.decisions == outcome.decisions
    assert as_bytes(again.snapshot.state) == as_bytes(outcome.snapshot.state)
    assert loss_of(again.snapshot.state) == pytest.approx(outcome.curve[-1].loss.mean)


def test_fields_that_cannot_be_are_refused():
    for wrong in ({"max_responses": -1}, {"alarm_share": -0.1}):
        with pytest.raises(UserError):
            LoopConfig(**wrong)
    with pytest.raises(UserError, match="least_step_seconds"):
        MonitorConfig(least_step_seconds=-1.0)
