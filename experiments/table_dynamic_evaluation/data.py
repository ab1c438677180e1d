"""The text of `table_dynamic_evaluation`: streams to walk along, and stretches to train on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.table_dynamic_evaluation.config import Config
from metaopt.errors import UserError
from metaopt.streams.dynamic_evaluation import cut_segments
from metaopt.tasks.sources.text import (
    Domain,
    array_domain,
    draw_window,
    file_domain,
    fingerprint,
    folder_domains,
    stdlib_domains,
)
from metaopt.tasks.sources.text_checks import check_text
from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit

STDLIB_STREAMS = ("asyncio", "email")


class Stream(NamedTuple):
    """A stream of bytes: uint8 ``valid`` to tune on and ``test`` to report."""

    name: str
    valid: np.ndarray
    test: np.ndarray

    def domains(self) -> list[Domain]:
        """Both parts, as text to be checked."""
        return [
            array_domain(f"{self.name} {name}", part)
            for name, part in (("valid", self.valid), ("test", self.test))
        ]


class Text(NamedTuple):
    """All text of a run: domains to train on, streams, and a digest of all of it."""

    train: tuple[Domain, ...]
    streams: tuple[Stream, ...]
    digest: str


def find_text(config: Config) -> Text:
    """The text that the config names, checked to be long enough.

    Raises:
      UserError: a file or a folder is missing, no text, or too short for what is asked of it; or
        two are identical.
    """
    domains = [d for folder in config.train for d in folder_domains(Path(folder).expanduser())]
    library = stdlib_domains()
    if config.streams:
        streams = [_stream_at(Path(path).expanduser(), config) for path in config.streams]
    else:
        found = {domain.name: domain for domain in library}
        streams = [_beginning_and_end(found[name], config) for name in STDLIB_STREAMS]
        library = [domain for domain in library if domain.name not in STDLIB_STREAMS]
    if len({stream.name for stream in streams}) < len(streams):
        raise UserError(f"two streams have one name: {', '.join(s.name for s in streams)}")
    train = [domain for domain in domains or library if domain.name not in config.exclude]
    needed = config.inner.num_steps * config.window + 1
    short = [domain.name for domain in train if domain.size < needed]
    if short or not train:
        raise UserError(
            f"training text must have {needed} bytes a file, and {short[0] if short else 'none'} "
            "has not: leave it out by --exclude, or lower inner.num_steps, context or lengths"
        )
    walked = [part for stream in streams for part in stream.domains()]
    check_text([*train, *walked], lambda i: "(training)" if i < len(train) else "(stream)")
    return Text(tuple(train), tuple(streams), fingerprint([*train, *walked]))


def stretches(config: Config, train: Sequence[Domain], length: int, context: int) -> TaskFamily:
    """Training tasks: stretches of text cut into consecutive segments with context.

    Support and query are the first and the second half of a stretch, int32 ``[T, K, context +
    length]`` together. Stretches of whole windows without context start where those of segments
    start and, as nothing is read twice, end later.
    """
    count = config.inner.num_steps
    used = context + count * length + 1

    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        chosen: Any = rng.integers(len(train), size=num_tasks, dtype=np.int32)
        drawn = [draw_window(rng, train[i], count * config.window + 1)[:used] for i in chosen]
        cut = [cut_segments(stretch, length, context) for stretch in drawn]
        segments = jax.tree.map(lambda *leaves: np.stack(leaves), *cut)
        support, query = (
            jax.tree.map(lambda x, half=half: x[:, half], segments)
            for half in (slice(count // 2), slice(count // 2, None))
        )
        return Episode(support, query, chosen)

    return TaskFamily("stretches of text", *3 * [TaskSplit(sample)])


def statistics_segments(config: Config, train: Sequence[Domain], length: int) -> Batch:
    """Single segments of training text with context, for the mean squared gradients."""
    rng = np.random.default_rng(config.eval_seed)
    size = config.context + length + 1
    drawn = [
        draw_window(rng, train[i % len(train)], size) for i in range(config.statistics_segments)
    ]
    cut = [cut_segments(stretch, length, config.context) for stretch in drawn]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *cut)


def _stream_at(path: Path, config: Config) -> Stream:
    """A folder with valid.txt and test.txt, or a file."""
    if not path.exists():
        raise UserError(
            f"there is no stream {path}: give a file, or a folder with valid.txt and test.txt"
        )
    if not path.is_dir():
        return _beginning_and_end(file_domain(path.stem, [path]), config)
    valid, test = (
        file_domain(f"{path.name}/{part}.txt", [path / f"{part}.txt"]) for part in ("valid", "test")
    )
    _require(valid, config.valid_bytes)
    _require(test, config.test_bytes)
    return Stream(path.name, valid.read(0, config.valid_bytes), test.read(0, config.test_bytes))


def _beginning_and_end(domain: Domain, config: Config) -> Stream:
    _require(domain, config.valid_bytes + config.test_bytes)
    valid = domain.read(0, config.valid_bytes)
    test = domain.read(domain.size - config.test_bytes, config.test_bytes)
    return Stream(domain.name, valid, test)


def _require(domain: Domain, size: int) -> None:
    if domain.size < size:
        raise UserError(
            f"the stream {domain.name} has {domain.size} bytes and {size} are needed: give a "
            "longer one, or lower valid_bytes or test_bytes"
        )
