import dataclasses
import itertools
import json
import math
import signal

import jax
import jax.numpy as jnp
import noisy_quadratic as quadratic
import numpy as np
import pytest
from noisy_quadratic import SETTINGS, as_bytes, workload

from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.measure import count_flops
from metaopt.self_improvement.improving import Searched, improving_train, reported_losses
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.trials import TrialConfig
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.loop import Interrupted, TrainConfig, Training
from metaopt.training.monitor import MonitorConfig

LOOP = LoopConfig(
    phases=(0.0,),
    shares=(1.0,),
    assess_every=0.5,
    trials=TrialConfig(examples=0.1),
    monitor=MonitorConfig(divergence_factor=100.0),  # batches of 4 are noisy
    max_responses=0,  # a busy machine is slow
)
PLAIN = dataclasses.replace(LOOP, phases=(), shares=())
SIZE = 4


def sample(i):
    return quadratic.sample(SETTINGS, SIZE * i)


def update(state, examples):
    """One that also reads a scalar which the training sets."""
    after, metrics = quadratic.update(state, examples)
    gained = 1 + 0.1 * state.hparams["query_annealing"]
    return after._replace(
        meta_params=jax.tree.map(lambda p: p * gained, after.meta_params)
    ), metrics


STEP = jax.jit(update, donate_argnums=0)


def train(directory, state=None, step=STEP, num_steps=60, sample=sample, loop=LOOP, **options):
    if state is None:
        state = quadratic.initial_state()
        scalars = {"outer_learning_rate": 0.2, "weight_decay": 1e-4, "query_annealing": 0.1}
        state = state._replace(hparams={k: jnp.float32(v) for k, v in scalars.items()})
    training = Training(
        name="drop-in",
        state=state,
        step_fn=step,
        sample=sample,
        tasks_per_step=SIZE,
        tokens_per_task=2,
        fingerprint=Fingerprint({}),
    )
    config = TrainConfig(num_steps=num_steps)
    return improving_train(training, config, directory, loop=loop, **options).state


def tried(directory):
    lines = read_json_lines(directory / "decisions.jsonl")
    return {name for d in lines for e in d["trials"] for name in e["settings"]}


def test_what_the_training_sets_is_searched_only_where_the_caller_names_it(tmp_path):
    train(tmp_path / "1")
    assert tried(tmp_path / "1") == {"outer_learning_rate", "weight_decay"}
    train(tmp_path / "2", searched=Searched(scalars=("query_annealing",)))
    assert tried(tmp_path / "2") == {"query_annealing"}
    with pytest.raises(UserError, match="'query_anealing' is to be searched, but the state has no"):
        train(tmp_path / "3", searched=Searched(scalars=("query_anealing",)))


def test_the_losses_that_a_step_reports_cost_no_update():
    state, calls = quadratic.initial_state(), []

    def counted(state, examples):
        calls.append(jax.core.is_concrete(state.step))
        return quadratic.step(state, examples)

    before = as_bytes(state)
    losses = reported_losses(counted, sample, 3)(state)
    copies = [jax.tree.map(jnp.copy, state) for _ in range(3)]
    expected = [quadratic.step(copy, sample(i))[1]["loss"] for i, copy in enumerate(copies)]
    np.testing.assert_array_equal(losses, np.array(expected, np.float64))
    assert as_bytes(state) == before and calls == [False]  # traced once, and never run


def test_what_it_costs_to_judge_by_steps_counts_as_examples_of_training(tmp_path):
    state, examples = quadratic.initial_state(), sample(0)
    loss = lambda state, examples: quadratic.update(state, examples)[1]["loss"]  # noqa: E731
    share = count_flops(loss, state, examples).total
    share /= count_flops(quadratic.update, state, examples).total
    assert 0 < share < 0.7
    free = workload(800)
    costly = free._replace(evaluation_examples=8 * SIZE * share)
    settings, outcomes = SETTINGS | {"outer_learning_rate": 0.02}, []
    for name, problem in (("free", free), ("costly", costly)):
        config = dataclasses.replace(LOOP, shares=(50.0,))  # both try all that there is
        outcomes.append(run(problem, settings, directory=tmp_path / name, config=config))
    plain, counted = outcomes
    assert as_bytes(plain.snapshot.state) == as_bytes(counted.snapshot.state)
    evaluations = 0
    for first, (a, b) in enumerate(zip(plain.decisions, counted.decisions, strict=True)):
        longer = a.size != plain.decisions[max(0, first - 1)].size
        number = len(a.trials) + (1 if first == 0 else int(longer))
        assert b.trial_examples - a.trial_examples == math.ceil(number * costly.evaluation_examples)
        evaluations += number
    assert evaluations >= 4
    each = costly.evaluation_examples
    assert counted.ledger.assessment_examples == len(counted.curve) * each > 0
    spent = counted.ledger.examples + counted.ledger.trial_examples + 2 * each  # but for the last
    step = count_flops(quadratic.update, quadratic.initial_state(), examples).total / SIZE
    assert counted.curve[-1].flops == pytest.approx(spent * step)


def test_a_search_that_evaluations_would_take_past_its_budget_tries_nothing(tmp_path, capfd):
    train(tmp_path / "1", loop=dataclasses.replace(LOOP, shares=(0.1,)))
    said = "drop-in: nothing is tried from 0% of the run on: a round takes more than the 10% that"
    assert capfd.readouterr().err.count(said) == 1
    train(tmp_path / "2", loop=LOOP)
    assert "nothing is tried" not in capfd.readouterr().err
    assert not read_json_lines(tmp_path / "1" / "decisions.jsonl")
    assert read_json_lines(tmp_path / "2" / "decisions.jsonl")


def test_phases_of_a_training_go_on_from_one_another_and_each_can_be_resumed(tmp_path):
    seen = []

    def watched(i):
        seen.append(i)
        return sample(i)

    def phases(directory, *lengths):
        state = None
        for length in lengths:
            state = train(directory, state, num_steps=length, sample=watched, loop=PLAIN)
        return state

    twice = phases(tmp_path / "twice", 20, 60)
    assert as_bytes(twice) == as_bytes(phases(tmp_path / "once", 60)) and int(twice.step) == 60
    names = {line["name"] for line in read_json_lines(tmp_path / "twice" / "metrics.jsonl")}
    assert names == {"drop-in", "drop-in, from step 20"}
    trained, seen[:] = set(seen), []
    assert as_bytes(phases(tmp_path / "twice", 20, 60)) == as_bytes(twice)
    assert trained >= set(range(60)) and set(seen) <= {0, 20, 60}  # looked at, for their shapes


def test_a_step_that_cannot_be_judged_without_an_update_is_refused(tmp_path):
    def step(state, examples):
        return quadratic.step(state, examples) if int(state.step) >= 0 else None

    with pytest.raises(UserError, match="the step of 'drop-in' cannot be traced"):
        train(tmp_path, step=step)
    assert not list(tmp_path.iterdir())


def timeless(directory):
    lines = read_json_lines(directory / "decisions.jsonl")
    return [
        {k: v for k, v in d.items() if k not in ("seconds", "trials", "checksum")} for d in lines
    ]


@pytest.mark.parametrize("at", [3, 20, 40])
def test_a_run_that_is_judged_by_steps_and_stopped_goes_on_as_if_it_were_not(tmp_path, at):
    """In a trial round, and in training."""
    left = [at]

    def stopping(i):
        if [i] == left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
        return sample(i)

    straight = train(tmp_path / "1")
    with pytest.raises(Interrupted):
        train(tmp_path / "2", sample=stopping)
    assert as_bytes(train(tmp_path / "2")) == as_bytes(straight)
    assert timeless(tmp_path / "2") == timeless(tmp_path / "1") != []


def test_a_report_says_what_would_change_and_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain", loop=PLAIN)
    told = train(tmp_path / "told", loop=dataclasses.replace(LOOP, report_only=True))
    assert as_bytes(plain) == as_bytes(told)
    decisions = read_json_lines(tmp_path / "told" / "decisions.jsonl")
    reported = [d for d in decisions if d["verdict"] == "reported"]
    assert reported and reported[0]["changes"] and "would be changed" in reported[0]["reason"]
    changed = train(tmp_path / "changed")
    assert as_bytes(changed) != as_bytes(plain)


def wrecked(directory, sample=sample):
    """A training whose rate is far too large, with an assessment at the end of its warm-up."""
    state = quadratic.initial_state()
    scalars = {"outer_learning_rate": 8.0, "weight_decay": 0.0}
    state = state._replace(hparams={k: jnp.float32(v) for k, v in scalars.items()})
    training = Training(
        name="wrecked",
        state=state,
        step_fn=jax.jit(quadratic.update, donate_argnums=0),
        sample=sample,
        tasks_per_step=SIZE,
        tokens_per_task=2,
        fingerprint=Fingerprint({}),
        warmup_steps=6,
    )
    loop = dataclasses.replace(LOOP, shares=(3.0,), assess_every=0.1)
    return improving_train(training, TrainConfig(num_steps=60), directory, loop=loop).state


def test_a_rate_that_wrecks_the_warm_up_is_tried_again_from_the_start(tmp_path):
    """Nothing is tried before the warm-up is over."""
    found = wrecked(tmp_path)
    decisions = read_json_lines(tmp_path / "decisions.jsonl")
    searches = [d for d in decisions if d["kind"] == "search"]
    assert {d["examples"] for d in searches} == {6 * SIZE}
    (again,) = [d for d in searches if d["from_start"]]
    assert again["verdict"] == "accepted" and again["trial_examples"] >= 6 * SIZE
    assert float(found.hparams["outer_learning_rate"]) < 8.0 and int(found.step) == 60
    assert float(jnp.abs(found.meta_params["params"]).max()) < 10


def test_a_trial_from_the_start_that_was_not_saved_is_made_again(tmp_path):
    """Its decision was written, and then the process was killed: the state is not that one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = wrecked(whole)

    def stopping(i, calls=itertools.count()):  # noqa: B008
        if 6 <= i < 60 and next(calls) == 0:  # the first trial
            signal.raise_signal(signal.SIGTERM)
        return sample(i)

    with pytest.raises(Interrupted):
        wrecked(cut, stopping)
    lines = (whole / "decisions.jsonl").read_text("utf-8").splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if json.loads(line)["from_start"]) + 1
    (cut / "decisions.jsonl").write_text("".join(lines[:number]), "utf-8")
    assert as_bytes(wrecked(cut)) == as_bytes(expected)
