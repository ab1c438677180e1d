"""Shares of the data by assessment: what is proposed, and runs that keep it or do not."""

import dataclasses
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from noisy_quadratic import as_bytes

from metaopt.errors import UserError
from metaopt.files import as_record, read_json_lines
from metaopt.self_improvement.assess import assess
from metaopt.self_improvement.builders import constant, default_settings, plain_training
from metaopt.self_improvement.loop import LoopConfig, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.proposers import data_shares
from metaopt.self_improvement.records import Decision, TriedChange, decision_of
from metaopt.self_improvement.trials import TrialConfig
from metaopt.self_improvement.workload import begin, known_settings
from metaopt.signals import Interrupted
from metaopt.training.monitor import MonitorConfig
from metaopt.types import Batch, Model

EIGHT = [f"d{i}" for i in range(8)]


def assessed(losses, step=10, names=EIGHT):
    """An assessment of 8 held-out losses a domain that have these means."""
    spread = np.linspace(-0.01, 0.01, 8)
    values = np.concatenate([loss + spread for loss in losses])
    return assess(values, step=step, tokens=0, seconds=1.0, groups=np.repeat(names, 8).tolist())


UNEQUAL = assessed([1, 1, 5, 4, 1, 6, 1, 1])
SHARES = {f"share of {name}": 1.0 for name in EIGHT}


def decided(settings, accepted, phase=0):
    name, verdict = next(iter(settings)), "accepted" if accepted else "kept"
    trial = TriedChange(name, settings, 1, "loss", 1.0, 0.0, 0.0, "noise", accepted, 0.0, 0)
    return Decision("search", 10, 80, verdict, {}, "", 0.0, phase, [trial])


def proposed(decisions=(), assessment=UNEQUAL, domains=EIGHT, settings=SHARES):
    return [c.settings for c in data_shares(domains, assessment, settings, decisions, 0)]


def test_the_weakest_quarter_of_the_domains_is_given_four_times_its_share():
    (change,) = data_shares(EIGHT, UNEQUAL, SHARES, [], 0)
    assert UNEQUAL.weaknesses == ("d5", "d2", "d3")
    assert change.settings == {"share of d5": 4.0, "share of d2": 4.0}
    assert change.reason == "share of 2 weak domains (d5, d2) times 4"
    assert proposed(domains=["d0", "d3"]) == [{"share of d3": 4.0}]  # of those that may be changed
    assert proposed(domains=["d0", "d1"]) == []
    assert proposed(assessment=assessed([1] * 8)) == []
    assert proposed(assessment=assessed([1] * 7 + [5], step=0)) == []  # of an untrained model


def test_a_better_share_is_raised_once_more_and_another_tried_at_half():
    four = {"share of d5": 4.0, "share of d2": 4.0}
    again = proposed([decided(four, accepted=True)], settings=SHARES | four)
    assert again == [{"share of d5": 16.0, "share of d2": 16.0}]
    kept = decided(four, accepted=False)
    assert proposed([kept]) == [{"share of d5": 2.0, "share of d2": 2.0}]
    for accepted in (True, False):
        assert proposed([kept, decided(four, accepted)]) == []
    assert (
        proposed([kept._replace(verdict="rolled back")])
        == proposed()
        == proposed([decided(four, accepted=True, phase=1)])
    )


def test_a_domain_may_have_any_name():
    domains = ["this and that", *EIGHT[1:]]
    losses, settings = [9] + [1] * 7, {f"share of {name}": 1.0 for name in domains}
    (change,) = data_shares(domains, assessed(losses, names=domains), settings, [], 0)
    assert change.settings == {"share of this and that": 4.0}
    decision_of(as_record(decided(change.settings, accepted=False)))


NAMES, TARGETS = ("common", "rare"), np.array([1.0, 3.0])
CONFIG = LoopConfig(
    phases=(0.0,),
    shares=(0.6,),
    margins=(0.002,),
    assess_every=0.25,
    count_flops=False,
    trials=TrialConfig(examples=0.02),
    monitor=MonitorConfig(least_step_seconds=1e3),
)
SETTINGS = default_settings(
    batch_size=16, microbatch=0, optimizer="sgd", outer_learning_rate=0.1, clip_norm=1e9
)
MODEL = Model(lambda key: {"head": jnp.zeros(2)}, lambda params, x: params["head"][x])


def unequal(parts=(0.95, 0.05), noise=(0.1, 0.1), **changes):
    """A mean to learn for each of two domains, from examples of that domain alone."""

    def examples(rng, domains):
        spread = np.asarray(noise)[domains] * rng.normal(size=len(domains))
        return Batch(domains.astype(np.int32), (TARGETS[domains] + spread).astype(np.float32))

    def draw(position, number, shares):
        chances, rng = np.asarray(parts) * shares, np.random.default_rng((5, position))
        return examples(rng, rng.choice(2, size=number, p=chances / chances.sum()))

    return plain_training(
        "domains",
        task={"kind": "domains"},
        model=MODEL,
        loss_fn=lambda params, batch: jnp.mean(0.5 * (params["head"][batch[0]] - batch[1]) ** 2),
        draw=draw,
        held_out=examples(np.random.default_rng(6), np.repeat([0, 1], 16)),
        groups=np.repeat(NAMES, 16).tolist(),
        domains=NAMES,
        num_examples=3200,
        tokens_per_example=1,
        space={},
        schedule=constant,
        num_devices=1,
    )._replace(**changes)


def improved(directory, problem=None, settings=SETTINGS, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return run(problem or unequal(), settings, directory=directory, config=config)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    return directory, improved(directory)


def test_a_weak_domain_has_a_larger_share_if_the_whole_gets_better(tmp_path, straight):
    outcome, plain = straight[1], improved(tmp_path, phases=(), shares=())
    assert outcome.curve[1].weaknesses == ("rare",)
    assert outcome.snapshot.settings["share of rare"] == 16.0
    assert outcome.snapshot.settings["share of common"] == 1.0
    first, second = outcome.decisions
    assert first.examples == second.examples == 800 and first.phase == second.phase == 0
    assert first.reason.startswith("share of 1 weak domain (rare) times 4: loss -")
    assert outcome.curve[-1].loss.mean < 0.9 * plain.curve[-1].loss.mean
    assert plain.decisions == [] and plain.snapshot.settings["share of rare"] == 1.0


def test_a_share_that_makes_nothing_better_is_not_kept(tmp_path):
    """What is weak for its noise alone."""
    problem = unequal(parts=(0.5, 0.5), noise=(0.1, 9.0))
    outcome = improved(tmp_path, problem)
    tried = [trial.settings for d in outcome.decisions for trial in d.trials]
    assert tried == [{"share of rare": 4.0}, {"share of rare": 2.0}]
    assert [d.verdict for d in outcome.decisions] == ["kept", "kept"]
    assert outcome.snapshot.settings["share of rare"] == 1.0


def test_a_report_changes_no_share(tmp_path):
    outcome = improved(tmp_path, report_only=True)
    assert outcome.snapshot.settings["share of rare"] == 1.0
    assert {d.verdict for d in outcome.decisions} == {"reported"}


def timeless(outcome):
    return [
        d._replace(seconds=0.0, trials=[t._replace(seconds=0.0) for t in d.trials])
        for d in outcome.decisions
    ]


@pytest.mark.parametrize("decided", [1, 2])
def test_a_run_that_is_killed_after_the_decision_ends_as_if_it_were_not(
    tmp_path, straight, decided
):
    problem = unequal()

    def step(state, batch):
        if len(read_json_lines(tmp_path / "decisions.jsonl")) >= decided:
            raise MemoryError
        return problem.step(SETTINGS)(state, batch)

    with pytest.raises(MemoryError):
        improved(tmp_path, problem._replace(step=lambda settings: step))
    check_resumed(tmp_path, straight[1])


def test_a_run_that_is_stopped_before_an_assessment_tries_nothing_before_it(tmp_path, straight):
    problem = unequal()

    def step(state, batch):
        if int(state.step) == 30:
            signal.raise_signal(signal.SIGTERM)
        return problem.step(SETTINGS)(state, batch)

    with pytest.raises(Interrupted):
        improved(tmp_path, problem._replace(step=lambda settings: step))
    check_resumed(tmp_path, straight[1])


def check_resumed(directory, straight):
    outcome = improved(directory)
    assert as_bytes(outcome.snapshot.state) == as_bytes(straight.snapshot.state)
    assert outcome.snapshot.settings == straight.snapshot.settings
    assert timeless(outcome) == timeless(straight)


def test_shares_need_no_other_step_and_are_checked_at_the_start(tmp_path):
    problem = unequal()
    other = problem.step(SETTINGS | {"share of rare": 4.0})
    assert other is problem.step(SETTINGS) and other is not problem.step(SETTINGS | {"x": 1})
    assert begin(problem, SETTINGS | {"share of rare": 3.0}).settings["share of rare"] == 3.0
    for wrong in (0.0, -1.0, np.nan, np.inf, "much"):
        with pytest.raises(UserError, match="share of rare is"):
            improved(tmp_path, problem, SETTINGS | {"share of rare": wrong})
    found = known_settings(problem.all_axes, {"share of rare": 4.0, "share of none": 2.0})
    assert found == {"share of rare": 4.0}


def test_a_second_run_starts_with_the_shares_of_the_first(tmp_path):
    memory = Memory(tmp_path / "memory.sqlite")
    options = {"config": CONFIG, "memory": memory}
    first = run(unequal(), SETTINGS, directory=tmp_path / "1", **options)
    second = run(unequal(), SETTINGS, directory=tmp_path / "2", **options)
    assert second.snapshot.settings == first.snapshot.settings and second.decisions == []
