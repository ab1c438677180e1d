import dataclasses
import functools
import itertools
import signal
import subprocess
import sys
import time

import jax
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import LEAST, RATE, SETTINGS, as_bytes, loss_of, workload

import metaopt.self_improvement as si
from metaopt.errors import UserError
from metaopt.files import as_record, read_json_lines
from metaopt.measure import count_flops
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import Scale, begin, steps
from metaopt.training.loop import Interrupted
from metaopt.training.monitor import MonitorConfig
from metaopt.training.recorder import Diverged
from metaopt.training.runs import lock_directory

PLAIN = LoopConfig(phases=(), shares=(), assess_every=0.5, count_flops=False)
IMPROVING = LoopConfig(
    phases=(0.0, 0.3, 0.6),
    shares=(0.4, 0.15, 0.15),
    margins=(0.002, 0.002, 0.002),
    assess_every=0.25,
    count_flops=False,  # the steps of some tests count how often they are called
    trials=TrialConfig(examples=0.04, anneal=0.33, least_steps=4),
    monitor=MonitorConfig(least_step_seconds=1e3),  # no clock of a busy machine decides anything
)
SLOW = SETTINGS | {"outer_learning_rate": 0.02}
TIMES = ("seconds", "per_second", "per_cost", "gib", "checksum")


def improved(directory, num_examples=800, settings=SETTINGS, config=IMPROVING, **options):
    problem = options.pop("problem", None) or workload(num_examples)
    return run(problem, settings, directory=directory, config=config, **options)


def lines(directory, file):
    """Without the times, the memory and the checksum, which is of these too."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in TIMES}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return [timeless(line) for line in read_json_lines(directory / file)]


def saved_steps(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints" / "quadratic").glob("[0-9]*"))


@functools.cache
def plain_end(num_examples, **settings) -> jax.Array:
    """The end of a run that nothing is done about."""
    problem = workload(num_examples)
    state = None
    for step in steps(problem, begin(problem, SETTINGS | settings), num_examples):
        state = step.snapshot.state
    return state


def test_without_phases_it_is_a_plain_run(tmp_path):
    outcome = improved(tmp_path, 400, config=PLAIN)
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain_end(400))
    assert outcome.decisions == [] and outcome.ledger.trial_examples == 0
    assert [point.tokens for point in outcome.curve] == [0, 400, 800]
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [0, 50, 100]
    assert outcome.ledger.examples == 400 and 0 < outcome.ledger.seconds < 60


@pytest.mark.parametrize("wrong", [1 / 30, 30.0])
def test_a_wrong_rate_ends_where_the_best_fixed_one_does(tmp_path, wrong):
    best = min(loss_of(plain_end(800, outer_learning_rate=r)) for r in (0.1, 0.3, 1.0))
    rate = SETTINGS["outer_learning_rate"] * wrong
    assert not loss_of(plain_end(800, outer_learning_rate=rate)) < 1.2 * best
    outcome = improved(tmp_path, settings=SETTINGS | {"outer_learning_rate": rate})
    assert loss_of(outcome.snapshot.state) < 1.02 * best
    assert all(
        1 / 9 < d.changes["outer_learning_rate"][1] / d.changes["outer_learning_rate"][0] < 9
        for d in outcome.decisions
        if d.changes
    )


def test_absurd_weight_decay_is_brought_down(tmp_path):
    problem = workload(800, space={"weight_decay": Scale(low=1e-6, high=100.0)})
    settings = SETTINGS | {"weight_decay": 3.0}
    outcome = improved(tmp_path, settings=settings, problem=problem)
    assert outcome.snapshot.settings["weight_decay"] < 0.1
    assert loss_of(outcome.snapshot.state) < 1.05 * LEAST


def test_a_batch_that_is_too_small_grows_while_that_is_efficient(tmp_path):
    """A step takes 3 ms and an example 0.1 ms."""

    def timed(settings):
        def step(state, batch):
            time.sleep(0.003 + 0.0001 * settings["batch_size"])
            return quadratic.step(state, batch)

        return step

    batch = Scale(low=1, high=64, factor=4.0, integer=True, score="efficiency")
    settings = SETTINGS | {"batch_size": 1, "outer_learning_rate": 0.05}
    problem = workload(2000, space={"batch_size": batch}, step=timed)
    outcome = improved(tmp_path, settings=settings, problem=problem)
    assert outcome.snapshot.settings["batch_size"] >= 4
    config = IMPROVING.trials
    for decision in outcome.decisions:
        for entry in decision.trials:
            assert 80 / entry.settings["batch_size"] >= config.least_steps


def test_a_batch_without_numbers_is_gone_back_from_and_left_out(tmp_path):
    outcome = improved(tmp_path, config=PLAIN, problem=workload(800, bad={401}))
    (decision,) = outcome.decisions
    (alarm,) = [a for a in outcome.alarms if a.kind == "nan"]
    assert alarm.step == 101  # the very step
    assert decision.verdict == "rolled back" and decision.left_out == (400, 404)
    assert decision.changes == {} and 0 < decision.trial_examples <= 100
    assert outcome.ledger.trial_examples == decision.trial_examples
    assert int(outcome.snapshot.state.step) == 199 and outcome.snapshot.examples == 800
    assert loss_of(outcome.snapshot.state) == pytest.approx(loss_of(plain_end(800)), rel=0.01)
    # The checkpoint of step 100 is from after the snapshot that it went back to.
    assert saved_steps(tmp_path) == [0, 199]
    # Exactly a run that never saw it.
    problem, state = workload(800), None
    start = begin(problem, SETTINGS)._replace(left_out=frozenset({(400, 404)}))
    for step in steps(problem, start, 800):
        state = step.snapshot.state
    assert as_bytes(outcome.snapshot.state) == as_bytes(state)


def test_a_batch_without_numbers_in_a_race_is_left_out_too(tmp_path):
    settings = SETTINGS | {"outer_learning_rate": 0.02}
    outcome = improved(tmp_path, settings=settings, problem=workload(800, bad={5}))
    assert outcome.decisions[0].left_out == (4, 8)
    assert outcome.decisions[1].verdict == "accepted"
    assert loss_of(outcome.snapshot.state) < 1.03 * LEAST


def test_what_was_decided_is_not_gone_back_behind(tmp_path):
    config = dataclasses.replace(IMPROVING, phases=(0.0,), shares=(0.4,), keep_every=10**6)
    outcome = improved(tmp_path, settings=SLOW, config=config, problem=workload(800, bad={701}))
    *decided, back = outcome.decisions
    arrived = decided[-1].examples + decided[-1].gained
    assert back.verdict == "rolled back" and back.examples >= arrived > 0
    assert outcome.snapshot.settings["outer_learning_rate"] > 0.1


def test_a_rate_raised_from_outside_is_taken_back(tmp_path):
    at = 602  # not where a snapshot is kept, and of no interest to the batch
    intervention = (at, {"outer_learning_rate": 1000 * SETTINGS["outer_learning_rate"]})
    outcome = improved(tmp_path, config=PLAIN, interventions=[intervention])
    (decision,) = outcome.decisions
    (alarm,) = [a for a in outcome.alarms if a.kind == "divergence"]
    raised_at = -(-at // 4)  # updates done by then
    assert raised_at < alarm.step <= raised_at + 2
    assert decision.changes == {"outer_learning_rate": (500.0, 0.5)}
    assert outcome.snapshot.settings == SETTINGS
    # Bit for bit, since it went back to before it and on as if it had not been.
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain_end(800))


@pytest.mark.parametrize("keep_every", [1, 2, 29, 30, 31])
def test_what_is_gone_back_to_is_from_before_the_damage(tmp_path, keep_every):
    """Wherever the damage falls between two snapshots."""
    config = dataclasses.replace(PLAIN, keep_every=keep_every)
    fault = (120, {"outer_learning_rate": 500.0})
    outcome = improved(tmp_path, 240, config=config, interventions=[fault])
    assert outcome.decisions and outcome.decisions[0].examples <= 120
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain_end(240))


def test_divergence_again_and_again_lowers_the_rate_further_each_time(tmp_path):
    settings = SETTINGS | {"outer_learning_rate": 40.0}
    outcome = improved(tmp_path, settings=settings, config=PLAIN)
    rates = [d.changes.get("outer_learning_rate") for d in outcome.decisions]
    assert rates == [None, (40.0, 10.0), (10.0, 2.5), (2.5, 0.625)][: len(rates)]
    assert len(rates) >= 3 and loss_of(outcome.snapshot.state) < 1.05 * LEAST


def test_what_is_past_help_says_so(tmp_path):
    problem = workload(400, bad=frozenset(range(400)))
    with pytest.raises(Diverged, match="is nan, and going back did not help"):
        improved(tmp_path, problem=problem, config=PLAIN)
    decisions = read_json_lines(tmp_path / "decisions.jsonl")
    assert len(decisions) == PLAIN.max_roll_backs


def test_a_state_that_an_evaluation_finds_broken_is_gone_back_from(tmp_path):
    """Though every metric of every step was finite."""
    calls = []

    def evaluate(state):
        calls.append(int(state.step))
        losses = quadratic.evaluate(state)
        return losses * np.nan if calls.count(50) == 1 and calls[-1] == 50 else losses

    outcome = improved(tmp_path, 400, config=PLAIN, problem=workload(400, evaluate=evaluate))
    assert [d.verdict for d in outcome.decisions] == ["rolled back"]
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain_end(400))


def stopping(step):
    """The step, and in the first one from there a signal."""
    at = [step]

    def update(state, batch):
        if [int(state.step)] == at:
            at.clear()
            signal.raise_signal(signal.SIGTERM)
        return quadratic.step(state, batch)

    return lambda settings: update


STOPPED = {"settings": SLOW, "interventions": [(300, {"outer_learning_rate": 0.004})]}
LOOKED_AT = ("decisions.jsonl", "metrics.jsonl")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp("straight")
    outcome = improved(directory, 600, **STOPPED)
    assert [d.verdict for d in outcome.decisions].count("accepted") >= 2
    assert {d.phase for d in outcome.decisions} == {0, 1, 2}
    return as_bytes(outcome.snapshot.state), outcome, [lines(directory, f) for f in LOOKED_AT]


@pytest.mark.parametrize("at", [3, 9, 30, 76, 120])
def test_a_run_that_is_stopped_goes_on_as_if_it_were_not(tmp_path, straight, at):
    """In the first trial round, in a later one, in training before and after an assessment."""
    state, outcome, written = straight
    with pytest.raises(Interrupted) as error:
        improved(tmp_path, problem=workload(600, step=stopping(at)), **STOPPED)
    assert error.value.code == 143
    assert saved_steps(tmp_path)[-1] == {3: 0, 9: 0}.get(at, at + 1)  # from a search, its ground
    decided = lines(tmp_path, "decisions.jsonl")
    assert decided == written[0][: len(decided)] and bool(decided) == (at > 3)
    resumed = improved(tmp_path, 600, **STOPPED)
    assert as_bytes(resumed.snapshot.state) == state
    assert [lines(tmp_path, file) for file in LOOKED_AT] == written
    assert resumed.snapshot.settings == outcome.snapshot.settings
    assert len(resumed.decisions) == len(outcome.decisions)
    losses = [point.loss.mean for point in resumed.curve]
    assert losses == [point.loss.mean for point in outcome.curve]
    assert resumed.ledger.trial_examples == outcome.ledger.trial_examples


def test_a_search_that_is_stopped_again_and_again_comes_to_its_end(tmp_path, straight):
    """Each process has time for a round or two, and not for all of a search."""
    state, outcome, written = straight
    numbers = []
    for _ in range(20):
        calls = itertools.count()

        def update(state, batch, calls=calls):
            if next(calls) == 80:
                signal.raise_signal(signal.SIGTERM)
            return quadratic.step(state, batch)

        try:
            improved(
                tmp_path, problem=workload(600, step=lambda _, update=update: update), **STOPPED
            )
        except Interrupted:
            numbers.append(len(read_json_lines(tmp_path / "decisions.jsonl")))
        else:
            break
    assert numbers == sorted(numbers) and 0 < numbers[0] < numbers[-1] and len(numbers) < 20
    resumed = improved(tmp_path, 600, **STOPPED)
    assert as_bytes(resumed.snapshot.state) == state
    assert [lines(tmp_path, file) for file in LOOKED_AT] == written
    assert resumed.ledger.trial_examples == outcome.ledger.trial_examples


@pytest.mark.parametrize(
    ("at", "file", "redone"),
    [(9, "decisions.jsonl", True), (76, "decisions.jsonl", False), (120, "metrics.jsonl", False)],
)
def test_a_digit_that_changed_in_a_line_is_seen(tmp_path, straight, capsys, at, file, redone):
    """A decision from after the checkpoint is made again; other lines are not believed."""
    with pytest.raises(Interrupted):
        improved(tmp_path, problem=workload(600, step=stopping(at)), **STOPPED)
    before, dot, digits = (tmp_path / file).read_text().rpartition("0.")
    (tmp_path / file).write_text(before + dot + str((int(digits[0]) + 1) % 10) + digits[1:])
    if redone:
        assert as_bytes(improved(tmp_path, 600, **STOPPED).snapshot.state) == straight[0]
        assert "is left out (its checksum does not match)" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=f"{file}:[0-9]+ of 'quadratic' is damaged"):
            improved(tmp_path, 600, **STOPPED)


def test_what_was_done_from_outside_is_not_done_again(tmp_path):
    options = {"config": PLAIN, "interventions": [(402, {"outer_learning_rate": 500.0})]}
    with pytest.raises(Interrupted):
        improved(tmp_path, problem=workload(800, step=stopping(150)), **options)
    outcome = improved(tmp_path, **options)
    assert len(outcome.decisions) == 1
    assert "divergence" in {alarm.kind for alarm in outcome.alarms}
    assert as_bytes(outcome.snapshot.state) == as_bytes(plain_end(800))


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path, straight):
    def dies(state, batch):
        if int(state.step) == 120:
            raise MemoryError
        return quadratic.step(state, batch)

    with pytest.raises(MemoryError):
        improved(tmp_path, problem=workload(600, step=lambda _: dies), **STOPPED)
    with (tmp_path / "decisions.jsonl").open("a") as file:  # of another, and one too many
        file.write('{"name": "other"}\n{"name": "quadratic"}\n{"name": "quad')
    resumed = improved(tmp_path, 600, **STOPPED)
    assert as_bytes(resumed.snapshot.state) == straight[0]
    assert [x for x in lines(tmp_path, "decisions.jsonl") if len(x) > 1] == straight[2][0]
    assert {"name": "other"} in lines(tmp_path, "decisions.jsonl")


def test_a_run_that_is_at_its_end_returns_at_once(tmp_path):
    first = improved(tmp_path, 400, config=PLAIN)

    def must_not(*_):
        raise AssertionError

    problem = workload(400, evaluate=must_not)
    again = improved(tmp_path, problem=problem, config=PLAIN)
    assert as_bytes(again.snapshot.state) == as_bytes(first.snapshot.state)
    assert [p.loss for p in again.curve] == [p.loss for p in first.curve]


def test_a_run_of_another_config_is_refused(tmp_path):
    improved(tmp_path, 400, config=PLAIN)
    drawn, start, other_key = workload(400).sample, workload(400).start, jax.random.key(99)
    for other in (
        {"settings": SETTINGS | {"outer_learning_rate": 0.1}},
        {"config": dataclasses.replace(PLAIN, keep_every=7)},
        {"num_examples": 500},
        {"fingerprint": {"seed": 1}},
        {"problem": workload(400, sample=lambda settings, position: 2 * drawn(settings, position))},
        {"problem": workload(400, start=lambda settings: start(settings)._replace(key=other_key))},
    ):
        with pytest.raises(UserError, match=r"another (run|config|training)"):
            improved(tmp_path, **({"num_examples": 400, "config": PLAIN} | other))


def test_another_process_may_not_have_the_directory_at_the_same_time(tmp_path):
    waits = (
        "import sys, metaopt.training.runs as r\n"
        "with r.lock_directory(sys.argv[1]): print(), input()"
    )
    command, pipes = [sys.executable, "-uc", waits, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipes, stdout=pipes, encoding="utf-8") as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            improved(tmp_path, 400, config=PLAIN)
        other.communicate("\n")
    with lock_directory(tmp_path):  # by this one it may
        improved(tmp_path, 400, config=PLAIN)


def test_trials_keep_to_their_budget_and_settings_to_their_bounds(tmp_path):
    space = {"outer_learning_rate": Scale(low=0.01, high=0.6), "weight_decay": RATE}
    settings = SETTINGS | {"outer_learning_rate": 0.02, "weight_decay": 0.1}
    config, problem = LoopConfig(), workload(2000, space=space)
    outcome = improved(tmp_path, settings=settings, problem=problem, config=config)
    trial = config.trials.anneal * config.trials.examples * 2000 + 8 * 4
    for phase, share in enumerate(config.shares):
        spent = sum(d.trial_examples for d in outcome.decisions if d.phase == phase)
        assert 0 < spent <= share * 2000 + trial
    tried = [e.settings for d in outcome.decisions for e in d.trials]
    assert any(entry.get("outer_learning_rate") == 0.6 for entry in tried)
    assert all(0.01 <= entry.get("outer_learning_rate", 0.1) <= 0.6 for entry in tried)
    for decision in outcome.decisions:
        for name, (old, new) in decision.changes.items():
            assert 1 / 8 - 1e-9 <= new / old <= 8 + 1e-9, name


def test_a_search_waits_for_its_phase_and_asks_for_nothing_after_the_end(tmp_path):
    seen = []

    def sample(settings, position):
        seen.append(position)
        return quadratic.sample(settings, position)

    config = dataclasses.replace(IMPROVING, phases=(0.5, 0.95), shares=(0.3, 0.3))
    outcome = improved(
        tmp_path, 600, settings=SLOW, config=config, problem=workload(600, sample=sample)
    )
    assert {d.phase for d in outcome.decisions} == {0}  # for the other there is no room
    assert min(d.examples for d in outcome.decisions) == 300 and max(seen) < 600


def tried(decisions):
    return {repr(e.settings) for d in decisions if d.phase == 0 for e in d.trials}


def test_the_second_run_goes_on_where_the_first_ended(tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    first = improved(tmp_path / "1", settings=SLOW, memory=memory)
    improved(tmp_path / "1", settings=SLOW, memory=memory)  # at its end: not told again
    assert len(memory.records()) == 1
    stopped = workload(800, step=stopping(60))
    with pytest.raises(Interrupted):
        improved(tmp_path / "2", problem=stopped, settings=SLOW, memory=memory)
    second = improved(tmp_path / "2", settings=SLOW, memory=memory)
    learned = first.snapshot.settings["outer_learning_rate"]
    assert learned > 0.05 and second.curve[0].loss == first.curve[0].loss
    searched = [d for d in first.decisions if d.phase == 0]
    assert list(second.earlier) == searched and not tried(second.decisions) & tried(searched)
    assert second.ledger.trial_examples < first.ledger.trial_examples
    told = memory.records()[1].decisions  # to a third run: all of the search
    assert told == as_record([*searched, *second.decisions])
    similar = workload(200, task={"kind": "quadratic", "width": 7})
    other = improved(tmp_path / "4", problem=similar, settings=SLOW, memory=memory)
    assert other.decisions[0].phase == 0 and other.decisions[0].examples == 0
    (tmp_path / "memory.sqlite").write_bytes(b"no database at all" * 1000)
    third = improved(tmp_path / "3", 200, settings=SLOW, memory=memory, config=PLAIN)
    assert third.snapshot.settings["outer_learning_rate"] == 0.02


def test_what_similar_runs_decided_holds_only_where_all_is_as_it_was(tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    first = improved(tmp_path / "1", settings=SLOW | {"kind": "old"}, memory=memory)
    again = improved(tmp_path / "2", 200, settings=SLOW | {"kind": "old"}, memory=memory)
    other = improved(tmp_path / "3", 200, settings=SLOW | {"kind": "new"}, memory=memory)
    narrow = {"outer_learning_rate": Scale(low=1e-6, high=0.021)}
    narrow = workload(200, space=narrow)
    clipped = improved(
        tmp_path / "4", problem=narrow, settings=SLOW | {"kind": "old"}, memory=memory
    )
    assert again.earlier == [d for d in first.decisions if d.phase == 0] and again.earlier
    assert other.earlier == clipped.earlier == []


def test_a_start_that_gives_no_number_is_left(tmp_path):
    """The first assessment of all fails, and the rates are lowered until one does not."""
    evaluations = itertools.count()

    def evaluate(state):
        losses = quadratic.evaluate(state)
        return np.full_like(losses, np.nan) if next(evaluations) < 2 else losses

    outcome = improved(tmp_path, problem=workload(600, evaluate=evaluate), settings=SLOW)
    assert [d.verdict for d in outcome.decisions][:1] == ["rolled back"]
    assert outcome.snapshot.examples == 600 and loss_of(outcome.snapshot.state) < 1.0


def test_operations_are_counted_those_of_trials_too(tmp_path):
    config = dataclasses.replace(IMPROVING, count_flops=True)
    outcome = improved(tmp_path, settings=SLOW, config=config)
    examples = outcome.ledger.examples + outcome.ledger.trial_examples
    state, batch = quadratic.initial_state(), quadratic.sample(SETTINGS, 0)
    step = count_flops(quadratic.update, state, batch).total
    last = outcome.curve[-1]
    assert last.flops == examples * step / SETTINGS["batch_size"] and step > 40
    assert last.per_flop is not None and outcome.curve[0].per_flop is None
    rates = [line for line in read_json_lines(tmp_path / "monitor.jsonl") if "utilisation" in line]
    assert rates and all(0 < line["utilisation"] < 1 for line in rates)
    loop = dataclasses.replace(PLAIN, count_flops=True)
    uncounted = workload(
        40, step=lambda settings: lambda state, batch: jax.jit(unknown)(state, batch)
    )
    assert improved(tmp_path / "2", problem=uncounted, config=loop).curve[-1].flops is None


def unknown(state, batch):
    """A step whose operations nobody can count."""
    mean = jax.lax.while_loop(lambda x: x < batch.mean(), lambda x: x + 1, 0.0)
    return quadratic.update(state, batch + 0 * mean)


def test_scores_are_noted_and_decide_nothing(tmp_path):
    spent = []

    def scores(state):
        began = time.perf_counter()
        time.sleep(0.05)
        jax.jit(lambda x: x * time.time())(state.step)  # compiles anew each time
        spent.append(time.perf_counter() - began)
        return {"so far": int(state.step)}

    scored, began = workload(800, scores=scores), time.perf_counter()
    outcome = improved(tmp_path / "1", problem=scored, config=PLAIN)
    written = read_json_lines(tmp_path / "1" / "metrics.jsonl")
    assert [line["scores"] for line in written] == [{"so far": p.step} for p in outcome.curve]
    ledger, lasted = outcome.ledger, time.perf_counter() - began
    assert 0 < ledger.seconds + ledger.compile_seconds < lasted - sum(spent) and len(spent) == 3
    bare = improved(tmp_path / "2", config=PLAIN)
    assert as_bytes(bare.snapshot.state) == as_bytes(outcome.snapshot.state)


def test_several_processes_do_not_decide_by_their_clocks(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    space = {"batch_size": Scale(low=1, high=64, integer=True, score="efficiency")}
    with pytest.raises(UserError, match="batch_size would be chosen by the clock of each"):
        improved(tmp_path, problem=workload(800, space=space))
    with pytest.raises(UserError, match="remat would be chosen"):
        improved(tmp_path, problem=workload(800, execution_options={"remat": (0, 1)}))
    with pytest.raises(UserError, match="ask the memory before"):
        improved(tmp_path, memory=Memory(tmp_path / "memory.sqlite"))


def test_configs_that_cannot_be_are_refused():
    for wrong in (
        {"phases": (0.0, 0.5), "shares": (0.1,)},
        {"phases": (0.5, 0.0), "shares": (0.1, 0.1)},
        {"phases": (0.0, 1.0), "shares": (0.1, 0.1)},
        {"phases": (0.0, 0.5), "shares": (0.1, -0.1)},
        {"assess_every": 0.0},
        {"keep_every": 0},
        {"options_seconds": -1.0},
        {"memory_budget": 0.0},
    ):
        with pytest.raises(UserError):
            LoopConfig(**wrong)


def test_the_package_gives_what_a_notebook_wants():
    assert si.run is run and all(hasattr(si, name) for name in si.__all__)
