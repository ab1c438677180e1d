"""Data with copies and noise put in: what de-duplication and a rater of the data bring back.

Of the passages that are trained on half are copies of a few others and three tenths are noise, of
one kind a row. Trained are, with equal steps: a model on the clean passages alone, one on
everything, and one on what is left without duplicates, weighted by a rater that learns beside it
(`metaopt.streams.data_rater`). `recovered` is the part of the loss that copies and noise cost and
that comes back; `AUC` how well the rater's scores tell clean passages from noise that it did not
train on. The rater sees a few clean sequences, and is not told which of the others are.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.table_continual.config import Config
from experiments.table_continual.text import make_model, next_token
from metaopt import losses
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.learners.training_run import adamw_from_values
from metaopt.losses import NATS_TO_BITS
from metaopt.meta_gradients.windows import InnerRun
from metaopt.statistics import Interval, interval, t_interval
from metaopt.streams.adjust import replace_tokens, shuffle_words
from metaopt.streams.data import SEQUENCES
from metaopt.streams.data_rater import RatedState, auc, rated_training, transformer_rater
from metaopt.streams.duplicates import are_near, are_repeated, digests, signatures
from metaopt.tasks.sources.text import Domain
from metaopt.training.progress import Progress
from metaopt.types import Batch, Params

TABLE = "continual/cleaning"
COPIES = "duplicates"
EDITED = 0.01
"""Part of the bytes of every second copy that are changed."""
MOST_COPIED = 0.1
"""Part of the clean passages that copies are made of."""
NEAR = 0.7
BLANK = 32
NEW = 400
"""Passages of each kind that the AUC is on."""

Spoil = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]
"""``(generator, clean passages, passages of another language) -> noise``."""

KINDS: dict[str, Spoil] = {
    "random bytes": lambda rng, clean, other: replace_tokens(rng, clean, 1.0, 256),
    "shuffled words": lambda rng, clean, other: shuffle_words(rng, clean, BLANK),
    "a tenth replaced": lambda rng, clean, other: replace_tokens(rng, clean, 0.1, 256),
    "wrong language": lambda rng, clean, other: other,
}


class Row(NamedTuple):
    """A kind of noise."""

    name: str


ROWS = (Row(COPIES), *(Row(kind) for kind in KINDS))


class Pool(NamedTuple):
    """Passages that are trained on.

    Attributes:
      passages: int32 ``[n, P]``.
      is_copy: which of them are copies, bool ``[n]``; the first of several alike is none.
      is_noise: which of them are noise.
    """

    passages: np.ndarray
    is_copy: np.ndarray
    is_noise: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        """The passages that are neither."""
        return self.passages[~(self.is_copy | self.is_noise)]


class Texts(NamedTuple):
    """Passages of the clean domain and of the other, in parts that do not overlap.

    Attributes:
      train, fresh: to train on, and for the AUC, ``[n, P]``.
      held_out, test: sequences that the rater is judged by, and that losses are on, ``[m, L + 1]``.
      other: passages of the other domain.
    """

    train: np.ndarray
    fresh: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    other: np.ndarray


def choose(domains: Sequence[Domain], config: Config) -> tuple[Domain, Domain]:
    """The clean domain and the one that is noise.

    Raises:
      UserError: there is no such domain.
    """
    named = {domain.name: domain for domain in domains}
    longest = sorted(domains, key=lambda domain: (-domain.size, domain.name))
    found = []
    for name, usual in zip((config.cleaning.clean, config.cleaning.wrong), longest, strict=False):
        if name is not None and name not in named:
            raise UserError(f"there is no domain {name!r}: there are {', '.join(named)}")
        found.append(usual if name is None else named[name])
    if len(found) < 2 or found[0].name == found[1].name:
        raise UserError("cleaning needs two different domains: clean and wrong")
    return found[0], found[1]


def cut(domains: tuple[Domain, Domain], config: Config, seed: int) -> Texts:
    """The parts of the two domains, drawn by a seed.

    Raises:
      UserError: one of them is too short.
    """
    sizes, width = config.cleaning, config.length + 1
    size = SEQUENCES * width
    noise = round(sizes.noise * sizes.passages)
    unique = sizes.passages - noise - round(sizes.duplicates * sizes.passages)
    judged = -(-(sizes.held_out + sizes.test_sequences) // SEQUENCES)
    wanted = (max(unique, 1) + noise + 2 * fresh_of(config) + judged, noise + fresh_of(config))
    found = []
    rng = np.random.default_rng(seed)
    for domain, number in zip(domains, wanted, strict=True):
        if domain.size < number * size:
            raise UserError(
                f"{domain.name!r} has {domain.size:,} bytes, and cleaning needs {number * size:,}: "
                "lower cleaning.passages or length, or name a longer domain"
            )
        tokens = domain.read(0, domain.size // size * size).astype(np.int32)
        passages = tokens.reshape(-1, size)
        found.append(passages[rng.permutation(len(passages))[:number]])
    clean, other = found
    parts = np.split(clean, np.cumsum([judged, 2 * fresh_of(config)]))
    sequences = parts[0].reshape(-1, width)
    return Texts(
        train=parts[2],
        fresh=parts[1],
        held_out=sequences[: sizes.held_out],
        test=sequences[sizes.held_out :][: sizes.test_sequences],
        other=other,
    )


def fresh_of(config: Config) -> int:
    """The passages of each kind that the AUC is on."""
    return min(NEW, config.cleaning.passages // 5)


def make_pool(texts: Texts, spoil: Spoil, config: Config, rng: np.random.Generator) -> Pool:
    """Clean passages, copies of a few of them, and noise, in random order."""
    sizes = config.cleaning
    noise, copies = (round(share * sizes.passages) for share in (sizes.noise, sizes.duplicates))
    unique = max(1, sizes.passages - noise - copies)
    clean, rest = texts.train[:unique], texts.train[unique : unique + noise]
    few = max(1, round(MOST_COPIED * unique))
    copied = rng.integers(few, size=copies)
    repeated = clean[copied]
    edited = np.arange(copies) % 2 == 1
    repeated[edited] = replace_tokens(rng, repeated[edited], EDITED, 256)
    spoiled = spoil(rng, rest, texts.other[:noise])
    passages = np.concatenate([clean, repeated, spoiled])
    kind = np.repeat([0, 1, 2], [len(clean), copies, noise])
    order = rng.permutation(len(passages))
    # Of a passage and its copies it is the first that is none of them.
    source = np.arange(len(passages))
    source[len(clean) : len(clean) + copies] = copied
    shuffled, is_copy, seen = source[order], np.zeros(len(passages), bool), set()
    for i, one in enumerate(shuffled.tolist()):
        is_copy[i] = one in seen
        seen.add(one)
    return Pool(passages[order], is_copy, kind[order] == 2)


def duplicates_of(passages: np.ndarray) -> np.ndarray:
    """Which passages are found to be duplicates of one before them, bool ``[n]``."""
    found = are_repeated(digests(passages), digests(passages[:0]))
    rows = np.flatnonzero(~found)
    marks = signatures(passages[rows])
    found[rows] = are_near(marks, marks[:0], NEAR)
    return found


class Trained(NamedTuple):
    """What a training gave: parameters, and those of its rater, None if it has none."""

    params: Params
    rater: Params | None


class Study:
    """What the rows share: the model, its loss, and the texts of each seed."""

    def __init__(self, config: Config, domains: Sequence[Domain]):
        self.config = config
        chosen = choose(domains, config)
        self.names = tuple(domain.name for domain in chosen)
        seeds = range(config.seed, config.seed + config.cleaning.num_seeds)
        self.texts = {seed: cut(chosen, config, seed) for seed in seeds}
        self.model = make_model(config)
        self.loss_fn = losses.next_token(self.model)
        tokens = feasible.tokens(config.cleaning.batch, config.length)
        most = config.cleaning.rater.window
        feasible.check([], self.model.init, self.loss_fn, tokens, tokens, most)
        self.rater = transformer_rater(256, config.cleaning.rater)
        values = {"learning_rate": config.cleaning.learning_rate}
        training = rated_training(
            adamw_from_values, values, self.loss_fn, self.rater, config.cleaning.rater
        )
        self._init, self._step = training.init, jax.jit(training.step)

        @jax.jit
        def plain(run: InnerRun, batches: Batch) -> InnerRun:
            def one(run: InnerRun, batch: Batch):
                grads = jax.grad(self.loss_fn)(run.params, batch)
                optimizer = adamw_from_values(
                    {"learning_rate": jax.tree.map(lambda x: values["learning_rate"], run.params)}
                )
                updates, opt_state = optimizer.update(grads, run.opt_state, run.params)
                params = jax.tree.map(lambda p, u: p + u, run.params, updates)
                return InnerRun(params, opt_state, run.step + 1), None

            return jax.lax.scan(one, run, batches)[0]

        self._plain = plain

    def train(self, passages: np.ndarray, seed: int, name: str, *, rated: bool) -> Trained:
        """Trains on passages, each sequence as likely as any other, with a rater or without."""
        config, sizes = self.config, self.config.cleaning
        width, window = config.length + 1, sizes.rater.window
        sequences = passages.reshape(-1, width)
        held_out = self.texts[seed].held_out
        keys = jax.random.split(jax.random.key(seed))
        state: RatedState = self._init(self.model.init(keys[0]), self.rater.init(keys[1]))
        rng = np.random.default_rng((seed, 1))
        total = -(-sizes.steps // window)
        with Progress(name, total=total, first="compiling") as progress:
            for i in range(total):
                rows = rng.integers(len(sequences), size=(window, sizes.batch))
                judge = rng.integers(len(held_out), size=sizes.batch)
                batches = next_token(sequences[rows])
                if rated:
                    state, metrics = self._step(state, batches, next_token(held_out[judge]))
                    shown = {"held_out": metrics["loss"]} if i % 50 == 0 else {}
                else:
                    state, shown = state._replace(run=self._plain(state.run, batches)), {}
                progress.update(i + 1, **{k: float(v) for k, v in shown.items()})
        return Trained(state.run.params, state.rater if rated else None)

    def losses(self, params: Params, seed: int) -> np.ndarray:
        """The loss of each test sequence, bits a byte ``[m]``."""
        batch = next_token(self.texts[seed].test)
        one = jax.jit(lambda p, b: jax.lax.map(lambda x: self.loss_fn(p, _single(x)), b))
        return NATS_TO_BITS * np.asarray(one(params, batch), np.float64)

    def auc(self, rater: Params, spoil: Spoil, seed: int) -> float:
        """How well scores tell fresh clean sequences from fresh noise."""
        number, texts, width = fresh_of(self.config), self.texts[seed], self.config.length + 1
        rng = np.random.default_rng((seed, 2))
        noise = spoil(rng, texts.fresh[number:], texts.other[-number:])
        sequences = np.concatenate([texts.fresh[:number], noise]).reshape(-1, width)
        score = jax.jit(functools.partial(self.rater.score, rater))
        parts = np.array_split(sequences[:, :-1], max(1, len(sequences) // 256))
        scores = np.concatenate([np.asarray(score(jnp.asarray(part))) for part in parts])
        return auc(scores, np.arange(len(scores)) < len(scores) - noise.size // width)


def add_rows(table: harness.TableRun, study: Study, rows: Sequence[Row]) -> None:
    """Trains the rows, each with and without what cleans its data."""
    log(f"cleaning: {study.names[0]}, with {study.names[1]} as the wrong language")
    for row in table.pending(rows):
        cells = copies(study) if row.name == COPIES else noise(study, table, row.name)
        for column, found, fields in cells:
            table.add(row.name, column, found, table=TABLE, **fields)


def copies(study: Study) -> Iterator[tuple[str, Interval, dict[str, Any]]]:
    """How well copies are found, whatever the noise."""
    config, pairs = study.config, []
    for seed, texts in study.texts.items():
        for i, spoil in enumerate(KINDS.values()):
            pool = make_pool(texts, spoil, config, np.random.default_rng((seed, 3, i)))
            found = duplicates_of(pool.passages)
            right = (found & pool.is_copy).sum()
            pairs.append((right / max(found.sum(), 1), right / max(pool.is_copy.sum(), 1)))
    about = {"unit": "share of passages", "better": "higher", "over": "over seeds and kinds"}
    for column, values in zip(("precision", "recall"), np.array(pairs).T, strict=True):
        yield column, t_interval(values), about


def noise(
    study: Study, table: harness.TableRun, kind: str
) -> Iterator[tuple[str, Interval, dict[str, Any]]]:
    """What a kind of noise costs and what of it comes back."""
    config, spoil = study.config, KINDS[kind]
    names = ("clean", "everything", "without duplicates", "cleaned")
    aucs, lost = [], {name: [] for name in names}
    for seed, texts in study.texts.items():
        rng = np.random.default_rng((seed, 3, [*KINDS].index(kind)))
        pool = make_pool(texts, spoil, config, rng)
        left = pool.passages[~duplicates_of(pool.passages)]
        sets = (pool.clean, pool.passages, left, left)
        for name, passages in zip(names, sets, strict=True):
            trained = study.train(passages, seed, f"{kind}, {name}", rated=name == "cleaned")
            lost[name].append(study.losses(trained.params, seed))
            if trained.rater is not None:
                aucs.append(study.auc(trained.rater, spoil, seed))
    found = {name: np.concatenate(values) for name, values in lost.items()}
    table.keep(kind, **{name.replace(" ", "_"): x for name, x in found.items()})
    seeds = {"seeds": [*study.texts]}
    over = {"over": "95 % intervals over test sequences, paired", **seeds}
    for column, name in (("recovered", "cleaned"), ("by de-duplication", "without duplicates")):
        back = part_of(found["everything"] - found[name], found["everything"] - found["clean"])
        yield column, back, over | {"unit": "% of the lost loss", "better": "higher"}
    about = {"unit": "chance", "better": "higher", "over": "over seeds", **seeds}
    yield "AUC", t_interval(np.array(aucs)), about
    for name in names:
        yield name, interval(found[name]), over | {"limit": name == "clean"}


def part_of(gain: np.ndarray, cost: np.ndarray) -> Interval:
    """The mean of a gain in per cent of that of a cost, of the same sequences.

    NaN if nothing was lost beyond noise. The interval is that of the ratio R, to first order: of
    ``(x − R c) / mean c``.
    """
    lost = interval(cost)
    if lost.mean - lost.ci95 <= 0:
        return Interval(float("nan"), float("nan"), lost.n)
    ratio = gain.mean() / lost.mean
    around = interval(100 * (gain - ratio * cost) / lost.mean)
    return around._replace(mean=float(100 * ratio))


def _single(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[None], batch)
