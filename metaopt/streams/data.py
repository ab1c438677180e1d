"""Data that changes: new text comes in, duplicates go, and a bounded part of all of it is kept.

`update_data` is the step ``X ← update_data(X, key)`` of a model that goes on with its data. Text
is cut into passages of a few sequences. Those of a domain that comes for the first time are partly
set apart to be judged on; the others are trained on, and are a sample of all that ever came in, of
each domain alike: memory does not grow with time.

P counts the tokens of a passage, which are `SEQUENCES` sequences of L + 1.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.files import write_bytes
from metaopt.npz import Form, read_npz
from metaopt.ranges import Checked, Count, Range
from metaopt.streams.duplicates import (
    NUM_HASHES,
    Similarity,
    are_near,
    are_repeated,
    digests,
    overlap,
    signatures,
    windows,
)
from metaopt.tasks.text import next_tokens
from metaopt.types import Episode, Key, TaskSplit

SEQUENCES = 8
"""Sequences in a passage."""

MOST_SHARED = 0.35
"""Share of the windows of a passage that may be in text that is judged on."""

Adjust = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""``(generator, passages [n, P]) -> passages [n, P]``: noise or augmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """What is kept of data that comes in.

    Attributes:
      capacity: most passages that are kept to train on, of all domains together; but an episode of
        each is always kept.
      valid_passages: most passages of a domain that are set apart to be judged on.
      valid_share: share of a domain, when it first comes, that is set apart, if that is less.
      near: Jaccard similarity from which on a passage is a near duplicate; 1 for equal ones alone.
      arriving: most passages of a domain that are looked at when it comes, equal ones aside.
    """

    capacity: Count = 16384
    arriving: Count = 1024
    valid_passages: Count = 16
    valid_share: Annotated[float, Range(0.01, 1.0)] = 0.1
    near: Similarity = 0.7


class DataState(NamedTuple):
    """All that is kept of the data, n passages of D domains.

    Attributes:
      names: names of the domains, in the order that they came in.
      tokens: int32 ``[n, P]``.
      domain: which domain each passage is of, int32 ``[n]``.
      generation: when it came in, int32 ``[n]``.
      is_valid: whether it is set apart to be judged on, bool ``[n]``.
      marks: signatures of the passages, uint32 ``[n, H]``.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    domain: np.ndarray
    generation: np.ndarray
    is_valid: np.ndarray
    marks: np.ndarray

    @classmethod
    def empty(cls, length: int) -> "DataState":
        """No data, for sequences of L = ``length`` tokens and the one that follows."""
        none = np.zeros(0, np.int32)
        return cls(
            names=(),
            tokens=np.zeros((0, SEQUENCES * (length + 1)), np.int32),
            domain=none,
            generation=none,
            is_valid=none.astype(bool),
            marks=np.zeros((0, NUM_HASHES), np.uint32),
        )

    def sequences(self, name: str, *, valid: bool) -> np.ndarray:
        """The sequences of a domain to train on, or to be judged on, int32 ``[m, L + 1]``."""
        chosen = (self.domain == self.names.index(name)) & (self.is_valid == valid)
        tokens = self.tokens[chosen]
        return tokens.reshape(SEQUENCES * len(tokens), -1 if len(tokens) else 1)


class TakenIn(NamedTuple):
    """What became of what came in of a domain, in passages.

    Attributes:
      offered: all.
      equal, near: duplicates, which are thrown away: equal to a passage that is kept, or near to
        one or a shifted copy of some.
      kept: those that are kept, to be trained on or judged on. The rest gave way to other domains,
        or was not looked at.
    """

    offered: int
    equal: int
    near: int
    kept: int


def passages_needed(num_sequences: int) -> int:
    """The number of passages that hold so many sequences."""
    return -(-num_sequences // SEQUENCES)


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Passages of a text, int32 ``[n, P]``; what is left over at its end is not used."""
    size = SEQUENCES * (length + 1)
    count = len(tokens) // size
    return np.asarray(tokens[: count * size], np.int32).reshape(count, size)


def update_data(
    state: DataState,
    arrivals: Mapping[str, np.ndarray],
    key: Key,
    config: DataConfig,
    *,
    generation: int,
    num_sequences: int = 1,
    barred: np.ndarray | None = None,
    adjust: Adjust | None = None,
) -> tuple[DataState, dict[str, TakenIn]]:
    """Takes new text in: without duplicates, and within the capacity.

    Pure: it reads nothing but its arguments. All domains may keep equally many passages, and where
    more came in, those that are kept have the least numbers by a hash of their content: a uniform
    sample of all different passages that ever came, however often they come. What is set apart to
    be judged on is chosen when a domain first comes, and never changes: losses on it can be
    compared for ever. What shares more than `MOST_SHARED` of its windows with it does not come in,
    wherever it is cut.

    Args:
      state: the data before.
      arrivals: passages by the name of their domain, int32 ``[n, P]``; see `cut`.
      key: what is set apart is drawn from it.
      config: what is kept.
      generation: number of this step.
      num_sequences: sequences that a domain must have to train on, and to be judged on. One that
        comes for the first time and has fewer that are new is left out.
      barred: ascending windows of other text that must not come in, such as held-out domains; see
        `metaopt.streams.duplicates.windows`.
      adjust: applied to the new passages that are trained on, once they are known to be new.

    Returns:
      The data after, and what became of each arrival.

    References:
      Cohen and Kaplan, 2007, "Summarizing Data Using Bottom-k Sketches"; Chrysakis and Moens, 2020,
      "Online Continual Learning from Imbalanced Data" (equal shares of the memory).
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    least = passages_needed(num_sequences)
    tokens = np.concatenate([state.tokens[:0], *arrivals.values()])
    origin = np.repeat(np.arange(len(arrivals)), [len(x) for x in arrivals.values()])
    numbers = digests(tokens)
    is_equal = are_repeated(numbers, digests(state.tokens))
    looked_at = _least_of_each(origin, numbers, ~is_equal, config.arriving)
    tokens, from_which = tokens[looked_at], origin[looked_at]
    marks = signatures(tokens)
    is_near = _are_known(tokens, state, barred, config.near)
    is_near[~is_near] = are_near(marks[~is_near], state.marks, config.near)
    counts: dict[str, tuple[int, int, int]] = {}
    taken: list[_Taken] = []
    for i, name in enumerate(arrivals):
        new = rng.permutation(np.flatnonzero((from_which == i) & ~is_near))
        number = 0 if name in state.names else _number_apart(len(new), least, config)
        if number is not None:
            taken.append(_Taken(name, *np.split(new, [number])))
        of_all, of_near = origin == i, (from_which == i) & is_near
        counts[name] = int(of_all.sum()), int((of_all & is_equal).sum()), int(of_near.sum())
    merged = _merge(state, taken, tokens, marks, generation, rng, adjust)
    merged = _within(merged, config.capacity, least)
    came_now = merged.domain[merged.generation == generation]
    kept = {name: int((came_now == i).sum()) for i, name in enumerate(merged.names)}
    return merged, {n: TakenIn(*counts[n], kept=kept.get(n, 0)) for n in arrivals}


OF_PASSAGES = ("tokens", "domain", "generation", "is_valid", "marks")
"""The fields of a `DataState` that have an entry for each passage."""


def _are_known(
    tokens: np.ndarray, state: DataState, barred: np.ndarray | None, near: float
) -> np.ndarray:
    """Which passages are in text that is judged on, or are shifted copies of what is kept."""
    judged = windows_of(state.tokens[state.is_valid])
    if barred is not None:
        judged = np.union1d(judged, barred)
    found = overlap(tokens, judged) > MOST_SHARED
    return found | (overlap(tokens, windows_of(state.tokens)) >= near)


def windows_of(passages: np.ndarray) -> np.ndarray:
    """The windows of several passages; see `metaopt.streams.duplicates.windows`."""
    found = [np.zeros(0, np.uint64), *(windows(passage) for passage in passages)]
    return np.unique(np.concatenate(found))


def _least_of_each(
    origin: np.ndarray, numbers: np.ndarray, allowed: np.ndarray, most: int
) -> np.ndarray:
    """The rows of each arrival that have the least numbers, at most so many, in their order."""
    chosen = [np.zeros(0, np.int64)]
    for i in np.unique(origin):
        rows = np.flatnonzero((origin == i) & allowed)
        chosen.append(np.sort(rows[np.argsort(numbers[rows], kind="stable")[:most]]))
    return np.concatenate(chosen)


class _Taken(NamedTuple):
    """The rows of an arrival that are to be judged on, and those to be trained on."""

    name: str
    valid: np.ndarray
    train: np.ndarray


def _number_apart(num_new: int, least: int, config: DataConfig) -> int | None:
    """The passages of a new domain that are set apart; None if it has too few.

    A domain that is held out as a whole, ``valid_share = 1``, needs none to train on.
    """
    is_whole = config.valid_share == 1
    wanted = min(round(config.valid_share * num_new), config.valid_passages)
    number = max(wanted, least)
    return number if num_new >= number + (0 if is_whole else least) else None


def _merge(
    state: DataState,
    taken: Sequence[_Taken],
    tokens: np.ndarray,
    marks: np.ndarray,
    generation: int,
    rng: np.random.Generator,
    adjust: Adjust | None,
) -> DataState:
    """The data with all that is taken, whatever the capacity."""
    names = (*state.names, *(x.name for x in taken if x.name not in state.names))
    parts = [state]
    for name, valid, train in taken:
        number = names.index(name)
        rows, is_valid = np.concatenate([valid, train]), np.arange(len(valid) + len(train))
        is_valid = is_valid < len(valid)
        mine = tokens[rows]
        if adjust is not None:
            mine = np.where(is_valid[:, None], mine, adjust(rng, mine))
        same = np.full(len(rows), 1, np.int32)
        new = DataState(names, mine, number * same, generation * same, is_valid, marks[rows])
        parts.append(new)
    arrays = {n: np.concatenate([getattr(part, n) for part in parts]) for n in OF_PASSAGES}
    return DataState(names=names, **arrays)


def _within(merged: DataState, capacity: int, least: int) -> DataState:
    """The data with at most so many passages to train on, of each domain equally many."""
    counts = np.bincount(merged.domain[~merged.is_valid], minlength=len(merged.names))
    quota = np.maximum(_equal_shares(counts, capacity), np.minimum(counts, least))
    keep, numbers = np.ones(len(merged.tokens), bool), digests(merged.tokens)
    for i in np.flatnonzero(counts > quota):
        mine = np.flatnonzero((merged.domain == i) & ~merged.is_valid)
        keep[mine[np.argsort(numbers[mine], kind="stable")[quota[i] :]]] = False
    return merged._replace(**{name: getattr(merged, name)[keep] for name in OF_PASSAGES})


def _equal_shares(counts: np.ndarray, capacity: int) -> np.ndarray:
    """How many each domain may keep: all the same number, but for those that have fewer."""
    left, quota = capacity, np.zeros(len(counts), np.int64)
    for rank, i in enumerate(np.argsort(counts, kind="stable")):
        quota[i] = min(int(counts[i]), left // (len(counts) - rank))
        left -= int(quota[i])
    return quota


def episodes(
    groups: Mapping[str, np.ndarray],
    chances: np.ndarray | None,
    num_support: int,
    num_query: int,
) -> TaskSplit:
    """Domains as tasks: the S + Q sequences of an episode are different ones of its domain.

    Args:
      groups: sequences by the name of their domain, int32 ``[m, L + 1]``, each with S + Q or more.
      chances: chances of the domains, which sum to one; None takes them in turn.
      num_support: S.
      num_query: Q.

    Returns:
      A split whose ``task`` indexes the names of the groups; numpy arrays.
    """
    names, held = tuple(groups), list(groups.values())

    def sample(key: Key, num_tasks: int) -> Episode:
        tasks: Any
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        if chances is None:
            rounds = -(-num_tasks // len(held))
            order = [rng.permutation(len(held)) for _ in range(rounds)]
            tasks = np.concatenate(order)[:num_tasks]
        else:
            tasks = rng.choice(len(held), num_tasks, p=chances)
        drawn = np.stack([_choose(rng, held[i], num_support + num_query) for i in tasks.tolist()])
        support, query = drawn[:, :num_support], drawn[:, num_support:]
        return Episode(next_tokens(support), next_tokens(query), tasks.astype(np.int32))

    return TaskSplit(sample, names)


def _choose(rng: np.random.Generator, sequences: np.ndarray, number: int) -> np.ndarray:
    return sequences[rng.choice(len(sequences), number, replace=False)]


_FORMS = {
    "tokens": Form(np.int32, ("n", "P")),
    "domain": Form(np.int32, ("n",)),
    "generation": Form(np.int32, ("n",)),
    "is_valid": Form(np.bool_, ("n",)),
    "marks": Form(np.uint32, ("n", "H")),
}


def save(state: DataState, path: Path) -> None:
    """Writes the arrays of a state to an npz file, whole or not at all; not its names."""
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **{n: getattr(state, n) for n in _FORMS})
    write_bytes(path, packed.getvalue())


def read(path: Path, names: Iterable[str]) -> DataState:
    """A state that `save` wrote, of domains of these names.

    Raises:
      UserError: it is no such file, or a damaged one, or of other domains.
    """
    names, found = tuple(names), read_npz(path, _FORMS)
    if len(np.unique(found["domain"])) != len(names) or found["domain"].max(initial=-1) >= len(
        names
    ):
        raise UserError(f"{path} is not of the {len(names)} domains that it should be of")
    return DataState(names, **found)
