"""Rows of data shares: a corpus whose domains have unequal parts, and what the loop makes of them.

The parts are by size, as a raw corpus has them. Files that are cut at one size are about equal, so
a second row draws them by Zipf's law, as languages are in a crawl of the web. Held out and tested
are equally many sequences of each domain. The run starts well, and may change the shares alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.table_self_improvement import tuning
from experiments.table_self_improvement.config import Config
from experiments.table_self_improvement.study import Cell, Study, described, ratio
from experiments.table_self_improvement.workloads import Problem, Text, per_example, transformer
from metaopt import losses
from metaopt.self_improvement.builders import default_settings, plain_training
from metaopt.self_improvement.loop import run
from metaopt.statistics import Interval, t_interval

PHASE, BUDGET = 0.2, 0.4
"""Part of the run after which shares are tried, and what discarded trials may cost."""
MARGIN = 0.0
"""The mean loss must fall beyond its interval, by however little: the gain is that of the weak."""
NUM_SEEDS = 3
"""Runs of each row, whose test sequences are pooled."""
SHARES_ROWS = {"data shares": False, "data shares, Zipf parts": True}
"""Names of the rows, and whether the parts of the data are by Zipf's law."""
LONGER = 12.0
"""Factor on the length of trials: what a share is worth shows late, unlike what a rate is."""


def parts_of(text: Text, seed: int, *, zipf: bool) -> np.ndarray:
    """Chances of the domains, float64 ``[D]``: by size, or 1 / rank in an order that is drawn."""
    sizes = np.array([domain.size for domain in text.domains], np.float64)
    if zipf:
        sizes = 1.0 / (1 + np.random.default_rng((seed, 0)).permutation(len(sizes)))
    return sizes / sizes.sum()


def unequal_domains(config: Config, *, zipf: bool) -> Problem:
    """The language model on domains with unequal parts, whose shares may be changed."""
    lm, sizes = config.lm, config.domains
    text, model = Text(config.folder, lm.length, config.seed), transformer(lm)
    names, parts = [x.name for x in text.domains], parts_of(text, config.seed, zipf=zipf)
    loss_fn = losses.next_token(model)

    def draw(position: int, number: int, shares: np.ndarray):
        chances = parts * shares
        return text.draw((0.0, 0.9), 3 + position, number, chances / chances.sum())

    workload = plain_training(
        "unequal domains",
        task={"kind": "unequal domains", "data": config.folder or "stdlib", "width": lm.width}
        | {"layers": lm.num_layers, "length": lm.length, "zipf": int(zipf)},
        model=model,
        loss_fn=loss_fn,
        draw=draw,
        held_out=text.of_each((0.9, 0.95), 1, sizes.num_held_out),
        groups=np.repeat(names, sizes.num_held_out).tolist(),
        domains=names,
        num_examples=sizes.num_examples,
        tokens_per_example=lm.length,
        space={},
        seed=config.seed,
        num_devices=1,
    )
    test = per_example(loss_fn, text.of_each((0.95, 1.0), 2, sizes.num_test))
    return Problem(workload, default_settings(batch_size=lm.batches[0]), test, loss_fn)


def shares_row(study: Study, name: str, *, zipf: bool) -> Iterator[Cell]:
    """The domains that are weakest without the loop, and all of them, with it, over seeds.

    The weakest quarter is that of the highest held-out losses at the end of the plain run, so that
    the test says nothing of which they are.
    """
    runs = [_shared(study, name, zipf, study.config.seed + i) for i in range(NUM_SEEDS)]
    now, reference = (np.concatenate([getattr(x, n) for x in runs]) for n in ("now", "reference"))
    is_weak = np.concatenate([x.is_weak for x in runs])
    seeds = {"seeds": [study.config.seed + i for i in range(NUM_SEEDS)]}
    more = {"unit": "% of the test loss without the loop", "better": "higher"} | seeds
    each = {
        "of_weakest": [gain(x.now[x.is_weak], x.reference[x.is_weak]).mean for x in runs],
        "of_all": [gain(x.now, x.reference).mean for x in runs],
        "runs": [x.said for x in runs],
    }
    yield Cell("weakest quarter", gain(now[is_weak], reference[is_weak]), more | each)
    yield Cell("all domains", gain(now, reference), more)
    times = np.array([x.time_ratio for x in runs])
    yield Cell("time ratio", t_interval(times), {"over": "that of times over seeds"} | seeds)


class Shared(NamedTuple):
    """A run whose shares may change, beside one without the loop.

    Attributes:
      now, reference: Test losses with the loop and without, ``[E]``.
      is_weak: Which of them are of the weakest quarter of the domains, ``[E]``.
      time_ratio: Ratio of their seconds.
      said: What the loop did, and which domains are weakest.
    """

    now: np.ndarray
    reference: np.ndarray
    is_weak: np.ndarray
    time_ratio: float
    said: dict[str, Any]


def _shared(study: Study, name: str, zipf: bool, seed: int) -> Shared:
    config, (_, settings, _) = dataclasses.replace(study.config, seed=seed), study.lm()
    problem = unequal_domains(config, zipf=zipf)
    plain = tuning.plain(problem, settings, study.directory / f"plain {name} {seed}")
    place = study.directory / f"shared {name} {seed}"
    place.mkdir(parents=True, exist_ok=True)
    how = {"phases": (PHASE,), "shares": (BUDGET,), "margins": (MARGIN,)}
    trials = dataclasses.replace(config.loop.trials, longer=LONGER)
    loop = dataclasses.replace(config.loop, trials=trials, **how)
    outcome = run(problem.workload, settings, directory=place, config=loop)
    groups = sorted(plain.curve[-1].groups, key=lambda x: -x.loss.mean)
    weakest = [x.group for x in groups][: len(groups) // 4]
    return Shared(
        now=problem.test(outcome.snapshot.state),
        reference=problem.test(plain.snapshot.state),
        is_weak=np.repeat(
            [x in weakest for x in problem.workload.domains], config.domains.num_test
        ),
        time_ratio=outcome.ledger.seconds / plain.ledger.seconds,
        said=described(outcome) | {"weakest": weakest},
    )


def gain(losses_now: np.ndarray, reference: np.ndarray) -> Interval:
    """By how many per cent of it a mean loss is lower, with the interval of the paired losses."""
    found = ratio(losses_now, reference)
    return Interval(100 * (1 - found.mean), 100 * found.ci95, found.n)
