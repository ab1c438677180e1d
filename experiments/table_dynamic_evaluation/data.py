"""The text of `table_dynamic_evaluation`: streams to walk along, and stretches to train on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.table_dynamic_evaluation.config import Config
from metaopt.errors import UserError
from metaopt.streams.dynamic_evaluation import cut_segments
from metaopt.tasks.sources.text import Domain, file_domain, folder_domains, join, stdlib_domains
from metaopt.tasks.sources.text_checks import check_text
from metaopt.types import Batch, Episode, Key

STDLIB_STREAMS = ("asyncio", "email")
PARTS = ("valid", "test")


class Stream(NamedTuple):
    """A stream of bytes: uint8 ``valid`` to tune on and ``test`` to report."""

    name: str
    valid: np.ndarray
    test: np.ndarray


class Text(NamedTuple):
    """All text of a run: domains to train on, and streams."""

    train: tuple[Domain, ...]
    streams: tuple[Stream, ...]


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
    needed = stretch_bytes(config)
    short = [domain.name for domain in train if domain.size < needed]
    if short or not train:
        raise UserError(
            f"training text must have {needed} bytes a file, and {short[0] if short else 'none'} "
            "has not: leave it out by --exclude, or lower inner.num_steps, context or lengths"
        )
    walked = [_whole(f"{s.name} {part}", getattr(s, part)) for s in streams for part in PARTS]
    check_text([*train, *walked], lambda i: "(training)" if i < len(train) else "(stream)")
    return Text(tuple(train), tuple(streams))


def _whole(name: str, data: np.ndarray) -> Domain:
    return join(name, [len(data)], lambda _, start, length: data[start : start + length])


def stretch_bytes(config: Config) -> int:
    """Bytes of one stretch of training text."""
    return config.inner.num_steps * config.window + 1


def plain_episodes(config: Config, train: Sequence[Domain], key: Key) -> Episode:
    """Stretches cut into windows that do not overlap, int32 ``[T, K, W]`` in all.

    They begin where those of `stream_episodes` begin and, as nothing is read twice, go on
    further. Support and query are the first and the second half of a stretch.
    """
    return _episodes(config, train, key, config.window, 0)


def stream_episodes(config: Config, train: Sequence[Domain], key: Key, length: int) -> Episode:
    """Stretches cut into consecutive segments with context; as many as there are windows."""
    return _episodes(config, train, key, length, config.context)


def statistics_segments(config: Config, train: Sequence[Domain], length: int) -> Batch:
    """Single segments of training text with context, for the mean squared gradients."""
    rng = np.random.default_rng(config.eval_seed)
    size = config.context + length + 1
    count = config.statistics_segments
    stretches = [_draw(rng, train[i % len(train)], size) for i in range(count)]
    cut = [cut_segments(stretch, length, config.context) for stretch in stretches]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *cut)


def _episodes(
    config: Config, train: Sequence[Domain], key: Key, length: int, context: int
) -> Episode:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    chosen: Any = rng.integers(len(train), size=config.tasks_per_step, dtype=np.int32)
    stretches = [_draw(rng, train[i], stretch_bytes(config)) for i in chosen]
    used = context + config.inner.num_steps * length + 1
    cut = [cut_segments(stretch[:used], length, context) for stretch in stretches]
    segments = jax.tree.map(lambda *leaves: np.stack(leaves), *cut)
    half = config.inner.num_steps // 2
    support = jax.tree.map(lambda x: x[:, :half], segments)
    query = jax.tree.map(lambda x: x[:, half:], segments)
    return Episode(support, query, chosen)


def _draw(rng: np.random.Generator, domain: Domain, size: int) -> np.ndarray:
    return domain.read(int(rng.integers(domain.size - size + 1)), size)


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
