"""The rows of `table_self_improvement`: bad starts, and what the loop makes of them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optuna

from experiments.table_self_improvement import recovery, tuning
from experiments.table_self_improvement.config import Config
from experiments.table_self_improvement.domains import SHARES_ROWS, shares_row
from experiments.table_self_improvement.faults import FAULTS
from experiments.table_self_improvement.mnist import mnist_row
from experiments.table_self_improvement.study import Cell, Study, described, in_turns, ratio, single
from experiments.table_self_improvement.workloads import (
    Problem,
    language_model,
    markov_languages,
    transformer,
)
from metaopt import learners, losses, meta_gradients
from metaopt.autotune import tune_options
from metaopt.files import as_record
from metaopt.measure import compile_for, interleaved
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import init_state, make_meta_step
from metaopt.self_improvement.builders import constant
from metaopt.self_improvement.loop import Outcome, record_of, run
from metaopt.self_improvement.memory import Memory
from metaopt.self_improvement.workload import Setting, Settings
from metaopt.statistics import t_interval
from metaopt.types import Batch, Episode, MetaState

TIME_ROUNDS, OVER_ROUNDS = 3, "those of times over 3 rounds"


def language_model_row(
    study: Study, name: str, bad: Callable[[dict], dict[str, Setting]]
) -> Iterator[Cell]:
    """A language model that starts badly."""
    problem, settings, best = study.lm()
    start, every = settings | bad(settings), study.config.loop.assess_every

    def plain(settings: Settings, place: str) -> Outcome:
        return tuning.plain(problem, settings, study.directory / place, assess_every=every)

    outcome, times = in_turns(
        TIME_ROUNDS,
        lambda: plain(settings, "beside"),
        lambda again: study.improved(problem, start, f"improved {name}{again}"),
    )
    reference = problem.test(best.snapshot.state)
    losses_now = problem.test(outcome.snapshot.state)
    more = described(outcome) | {"loss": float(losses_now.mean()), "start": bad(settings)}
    more["tuned_loss"] = float(reference.mean())
    yield Cell("ratio to tuned", ratio(losses_now, reference), more)
    yield Cell("time ratio", times, {"over": OVER_ROUNDS})
    untreated = plain(start, f"untreated {name}")
    yield Cell("untreated ratio", ratio(problem.test(untreated.snapshot.state), reference))


def maml_row(study: Study) -> Iterator[Cell]:
    """MAML on Markov languages, both rates wrong."""
    languages, config = markov_languages(study.config), study.config
    problem = languages.problem

    def suggest(trial: optuna.Trial) -> dict[str, Setting]:
        return {
            "inner_learning_rate": trial.suggest_float("inner", 0.1, 100.0, log=True),
            "outer_learning_rate": trial.suggest_float("outer", 1e-4, 1.0, log=True),
        }

    place = study.directory / "tuning"
    settings = tuning.tuned(problem, suggest, config.num_trials, config.seed, place)
    every = config.loop.assess_every
    best = tuning.plain(problem, settings, study.directory / "tuned maml", assess_every=every)
    start = {
        **settings,
        "inner_learning_rate": float(settings["inner_learning_rate"]) / 30,
        "outer_learning_rate": float(settings["outer_learning_rate"]) * 30,
    }
    outcome, times = in_turns(
        TIME_ROUNDS,
        lambda: tuning.plain(problem, settings, study.directory / "beside", assess_every=every),
        lambda again: study.improved(problem, start, f"improved maml rates{again}"),
    )
    reference = problem.test(best.snapshot.state)
    now = problem.test(outcome.snapshot.state)
    above = t_interval(now - reference, np.arange(len(now)))
    gap = t_interval(now - languages.limit, np.arange(len(now)))
    more = described(outcome) | {"nats_above_tuned": above.mean, "nats_above_bayes": gap.mean}
    yield Cell("ratio to tuned", ratio(now, reference), more)
    yield Cell("nats above tuned", above, {"unit": "nats a token", "better": "lower"})
    yield Cell("time ratio", times, {"over": OVER_ROUNDS})
    untreated = tuning.plain(problem, start, study.directory / "untreated")
    yield Cell("untreated ratio", ratio(problem.test(untreated.snapshot.state), reference))


def resources_row(study: Study) -> Iterator[Cell]:
    """The same batch, computed in the worst way: tokens a second after the search."""
    lm, size = study.config.lm, 4 * max(study.config.lm.batches)
    space: dict[str, list[Setting]] = {
        "microbatch": [m for m in (4, 16, 64, 256) if size % m == 0],
        "together": ["all", "one by one"],
        "remat": [True, False],
    }
    start: dict[str, Setting] = {"microbatch": 4, "together": "all", "remat": True}
    build = functools.partial(training_step, study.config, size)
    result = tune_options(
        build, space, start, memory_budget=0.5, seconds_budget=study.config.resources_seconds
    )
    everything = [
        dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())
    ]
    programs = {str(settings): jitted(*build(settings)) for settings in everything}
    timings = interleaved(programs, rounds=study.config.resources_rounds)
    seconds = {name: timing.median for name, timing in timings.items()}
    best = min(seconds, key=lambda name: seconds[name])
    found = seconds[best] / seconds[str(result.settings)]
    more = {
        "settings": result.settings,
        "best": best,
        "tokens_per_second": size * lm.length / seconds[str(result.settings)],
        "untreated": seconds[best] / seconds[str(start)],
        "evidence": [record._asdict() for record in result.timings],
        "better": "higher",
    }
    yield Cell("throughput ratio", single(found), more)


def training_step(config: Config, size: int, settings: Settings) -> tuple[Callable, tuple]:
    """A training step of a number of sequences, computed as the settings say, and its arguments."""
    lm, micro, remat = config.lm, int(settings["microbatch"]), bool(settings["remat"])
    model = transformer(lm, remat=remat, scan_layers=remat)
    loss_fn, outer = losses.next_token(model), OuterConfig()
    step = make_meta_step(
        meta_gradients.joint(learners.maml(), loss_fn),
        outer_optimizer(outer),
        tasks_at_a_time=1 if settings["together"] == "one by one" else 0,
    )
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(256, size=(size // micro, micro, lm.length + 1)).astype(np.int32)
    support = Batch(tokens[..., :-1], tokens[..., 1:])  # type: ignore[arg-type]
    query = jax.tree.map(lambda x: x[:, :0], support)
    episode = Episode(support, query, np.zeros(size // micro, np.int32))  # type: ignore[arg-type]
    key = jax.random.key(config.seed)
    state = init_state(
        key, model.init(key), learners.maml(), outer_optimizer(outer), outer.hparams()
    )
    return step, (state, episode)


def jitted(function: Callable, args: tuple) -> Callable[[], Any]:
    """A compiled call without arguments."""
    compiled = compile_for(function, *args)
    return lambda: compiled(*args)


def memory_row(study: Study) -> Iterator[Cell]:
    """A second run that starts badly too, but remembers the first one.

    Both may change the optimiser as well, once nothing is left to change in the rates; the run
    that the second is compared with was tuned for the first optimiser.
    """
    config, (_, settings, best) = study.config, study.lm()
    problem = language_model(config, optimizers=config.lm.optimizers)
    start = {**settings, "outer_learning_rate": float(settings["outer_learning_rate"]) / 30}
    first = study.improved(problem, start, "first of two")
    reached = problem.test(first.snapshot.state)
    spent = first.ledger.examples + first.ledger.trial_examples

    def second(share: float) -> tuple[Outcome, np.ndarray]:
        size = round(share * config.lm.num_examples)
        shorter = language_model(config, size, optimizers=config.lm.optimizers)
        memory = Memory(study.directory / f"memory of {share}.sqlite")
        if not memory.records():  # each remembers the first one alone
            memory.remember(record_of(problem.workload, first))
        outcome = study.improved(shorter, start, f"second of {share}", memory=memory)
        return outcome, shorter.test(outcome.snapshot.state)

    for share in config.second_runs:
        outcome, losses_now = second(share)
        if losses_now.mean() <= reached.mean():
            break
    tokens = (outcome.ledger.examples + outcome.ledger.trial_examples) / spent
    arrived = bool(losses_now.mean() <= reached.mean())
    more = described(outcome) | {
        "first_loss": float(reached.mean()),
        "second_loss": float(losses_now.mean()),
        "first_examples": spent,
        "reached": arrived,
    }
    yield Cell("tokens ratio", single(tokens if arrived else float("nan")), more)
    whole, losses_now = second(1.0)
    reference = problem.test(best.snapshot.state)
    yield Cell("ratio to tuned", ratio(losses_now, reference), described(whole))


def fault_row(study: Study, name: str, inject: Callable) -> Iterator[Cell]:
    """A well-tuned run with a fault in its middle that is rolled back, against one without."""
    problem, settings, _ = study.lm()
    calm = study.config.loop
    calm = dataclasses.replace(calm, phases=(), shares=(), max_responses=0)
    undisturbed = tuning.plain(
        problem, settings, study.directory / "undisturbed", assess_every=calm.assess_every
    )
    size = problem.workload.examples_per_step(settings)
    at = problem.workload.num_examples // 2 // size * size
    place = study.directory / name.replace(":", "")
    place.mkdir(parents=True, exist_ok=True)
    with inject(problem.workload, settings, at) as (workload, options, kind):
        outcome = run(workload, settings, directory=place, config=calm, **options)
    expected = at // size + 1  # the step that takes the batch of this position
    late = [a.step - expected for a in outcome.alarms if a.kind == kind and a.step >= expected]
    reference = problem.test(undisturbed.snapshot.state)
    now = problem.test(outcome.snapshot.state)
    more = {"alarms": [alarm._asdict() for alarm in outcome.alarms]}
    more["decisions"] = as_record(outcome.decisions)
    yield Cell("ratio to undisturbed", ratio(now, reference), more)
    steps_late = single(float(late[0]) if late else float("nan"))
    yield Cell("steps to the alarm", steps_late, {"unit": "steps"})


def times(factor: float) -> Callable[[dict], dict[str, Setting]]:
    """The learning rate, multiplied by a factor."""
    return lambda settings: {"outer_learning_rate": settings["outer_learning_rate"] * factor}


def decayed(settings: dict) -> dict[str, Setting]:
    """Weight decay that leaves no weight."""
    return {"weight_decay": 10.0}


def few(settings: dict) -> dict[str, Setting]:
    """A sixteenth of the batch."""
    return {"batch_size": max(1, int(settings["batch_size"]) // 16)}


BAD_STARTS: dict[str, Callable[[dict], dict[str, Setting]]] = {
    "learning rate too small": times(1 / 30),
    "learning rate too large": times(30.0),
    "weight decay": decayed,
    "small batch": few,
    "all at once": lambda settings: times(30.0)(settings) | decayed(settings) | few(settings),
}
"""Of the language model: what is wrong with the tuned settings."""


def make_rows(study: Study) -> dict[str, Callable[[], Iterator[Cell]]]:
    """All rows by name."""

    rows: dict[str, Callable[[], Iterator[Cell]]] = {
        name: functools.partial(language_model_row, study, name, bad)
        for name, bad in BAD_STARTS.items()
    }
    rows |= {
        "maml rates": lambda: maml_row(study),
        "mnist": lambda: mnist_row(study),
        "resources": lambda: resources_row(study),
        "memory of the first run": lambda: memory_row(study),
    }
    rows |= {
        name: functools.partial(fault_row, study, name, inject) for name, inject in FAULTS.items()
    }
    reference = functools.cache(lambda: recovery.reference(study))
    rows |= {
        name: functools.partial(recovery.row, study, name, reference, inject)
        for name, inject in recovery.FAULTS.items()
    }
    rows["fault: plateau"] = functools.partial(recovery.plateau_row, study)
    for name, zipf in SHARES_ROWS.items():
        rows[name] = functools.partial(shares_row, study, name, zipf=zipf)
    return rows


def baselines(study: Study) -> dict[str, Callable[[], Cell]]:
    """Other ways to spend on the language model what the loop spends, by name."""
    problem, settings, best = study.lm()
    config, share = study.config, sum(study.config.loop.shares)
    rate = float(settings["outer_learning_rate"])
    bounds = {"outer_learning_rate": (rate / 100, rate * 100)}

    def cell(state: MetaState) -> Cell:
        reference = problem.test(best.snapshot.state)
        return Cell("ratio to tuned", ratio(problem.test(state), reference))

    def whole_run(chosen: Callable[[], Settings], of: Problem = problem) -> Cell:
        return cell(tuning.plain(of, chosen(), study.directory / "trial").snapshot.state)

    def schedule_free(rate: float) -> Cell:
        steady = problem._replace(workload=problem.workload._replace(schedule=constant))
        chosen = {**settings, "optimizer": "schedule_free", "outer_learning_rate": rate}
        return whole_run(lambda: chosen, steady)

    def at(factor: float) -> dict[str, Setting]:
        return {**settings, "outer_learning_rate": rate * factor}

    def population(factor: float) -> Cell:
        how = {"size": config.population, "seed": config.seed}
        return cell(tuning.by_population(problem, at(factor), 1 + share, bounds, **how))

    search = functools.partial(tuning.searched, problem, study.lm_settings, share, seed=config.seed)
    found: dict[str, Callable[[], Cell]] = {
        "TPE, then a whole run": lambda: whole_run(lambda: search(num_parts=8, prune=False)),
        "Hyperband, then a whole run": lambda: whole_run(lambda: search(num_parts=4, prune=True)),
        "cosine at the default rate": lambda: whole_run(lambda: at(1e-3 / rate)),
        "Schedule-Free AdamW, default rate": lambda: schedule_free(1e-3),
        "Schedule-Free AdamW, rate 0.0025": lambda: schedule_free(2.5e-3),
    }
    for start, factor in (("too small", 1 / 30), ("too large", 30.0)):
        found[f"hypergradient, rate {start}"] = functools.partial(
            lambda factor: cell(tuning.by_hypergradient(problem, at(factor))), factor
        )
        name = f"population of {config.population}, rate {start}"
        found[name] = functools.partial(population, factor)
    return found
