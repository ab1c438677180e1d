"""Domains of text as tasks, byte by byte: one domain is one task.

An episode holds S support and Q query sequences of L + 1 bytes from one domain, no two
of which overlap; the model predicts each next byte, of V = 256. Whole domains are held
out for validation and test, so what is measured is adaptation to text of a new kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metaopt.errors import UserError
from metaopt.ranges import Checked, Count, Length, Seed
from metaopt.tasks.sources import text as text_sources
from metaopt.tasks.sources.text import Domain
from metaopt.tasks.sources.text_checks import check_text
from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit

VOCAB_SIZE = 256
_TFDS = "tfds:"


@dataclass(frozen=True, kw_only=True)
class TextConfig(Checked):
    """Which text, how it is cut into episodes, and which domains are held out.

    Attributes:
      source: folder with one file a domain; ``stdlib``, the source of the running
        Python's library; or ``tfds:NAME[/CONFIG][:VERSION]``, a prepared TensorFlow
        Datasets dataset whose examples are grouped by a feature.
      num_support: S, support sequences in an episode.
      num_query: Q, query sequences in an episode.
      length: L, bytes in a sequence.
      num_valid_domains: number of domains held out for validation.
      num_test_domains: number of domains held out for the test.
      test_domains: names of the test domains, instead of ``num_test_domains`` random ones.
      split_seed: seed of the choice of held-out domains.
      text_feature: string feature of a ``tfds:`` dataset that is the text.
      domain_feature: its class label, integer or string feature that names the domain.
      data_dir: directory where text is stored for reading, and where ``tfds:`` datasets are
        looked for first; ``$METAOPT_DATA`` if not given, or else ``data``.
    """

    source: str = "stdlib"
    num_support: Count = 8
    num_query: Count = 8
    length: Length = 64
    num_valid_domains: Count = 4
    num_test_domains: Count = 8
    test_domains: tuple[str, ...] = ()
    split_seed: Seed = 0
    text_feature: str = "text"
    domain_feature: str = "label"
    data_dir: str | None = None


def text(config: TextConfig) -> TaskFamily:
    """Text domains as a task family, in three splits that share no domain.

    Episodes are numpy arrays: int32 inputs and targets ``[T, S, L]`` and ``[T, Q, L]``
    of bytes 0 to 255, targets one byte after inputs, and ``task`` int32 ``[T]``, which
    indexes the split's ``task_names``. The first use of a source stores it under
    ``data_dir``; see `store`.

    Raises:
      UserError: the source is missing, empty or unreadable; a domain is shorter than an
        episode, no text, or another once more; or there are too few domains for the splits.
        Nothing has been written then, unless the source is ``tfds:``.
    """
    data_dir = text_sources.data_directory(config.data_dir)
    domains = _find_domains(config, data_dir)
    _check_sizes(domains, config)
    splits = split_domains([domain.name for domain in domains], config)
    named = dict(zip(("(training)", "(validation)", "(test)"), splits, strict=True))
    check_text(domains, lambda i: next(name for name, split in named.items() if i in split))
    if not config.source.startswith(_TFDS):
        domains = store(Path(config.source).resolve().name, domains, data_dir)
    train, valid, test = ([domains[i] for i in split] for split in splits)
    return TaskFamily(
        name="text",
        train=_task_split(train, config),
        valid=_task_split(valid, config),
        test=_task_split(test, config),
    )


def digest(config: TextConfig) -> str | None:
    """The names and contents of all domains of a folder or of the standard library.

    None for a ``tfds:`` dataset, whose contents its name and version say.

    Raises:
      UserError: the source is missing, empty or unreadable.
    """
    if config.source.startswith(_TFDS):
        return None
    return text_sources.fingerprint(_find_domains(config, Path()))


def split_domains(
    names: Sequence[str], config: TextConfig
) -> tuple[list[int], list[int], list[int]]:
    """Which domains are for training, validation and test, as ascending indices.

    Raises:
      UserError: none would be left to train on, or a test domain is unknown.
    """
    unknown = sorted(set(config.test_domains) - set(names))
    if unknown:
        raise UserError(f"no domain {unknown[0]!r} in {config.source}: there are {sorted(names)}")
    order = np.random.default_rng(config.split_seed).permutation(len(names)).tolist()
    chosen = [names.index(name) for name in dict.fromkeys(config.test_domains)]
    test = chosen or order[: config.num_test_domains]
    rest = [i for i in order if i not in test]
    too_few = not chosen and len(names) < config.num_test_domains
    if too_few or len(rest) <= config.num_valid_domains:
        raise UserError(
            f"{config.source} has {len(names)} domains, too few for {config.num_valid_domains} to "
            f"validate, {len(chosen) or config.num_test_domains} to test and at least 1 to train "
            "on: add domains or hold out fewer"
        )
    valid, train = rest[: config.num_valid_domains], rest[config.num_valid_domains :]
    return sorted(train), sorted(valid), sorted(test)


def _task_split(domains: Sequence[Domain], config: TextConfig) -> TaskSplit:
    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        tasks = _balanced_tasks(rng, len(domains), num_tasks)
        sequences = np.stack([_draw_sequences(rng, domains[i], config) for i in tasks])
        support, query = np.split(sequences.astype(np.int32), [config.num_support], axis=1)
        return Episode(_next_byte(support), _next_byte(query), tasks)

    return TaskSplit(sample, tuple(domain.name for domain in domains))


def _balanced_tasks(rng: np.random.Generator, num_domains: int, num_tasks: int) -> Any:
    """Random orders of all the domains, one after the other, int32 ``[num_tasks]``."""
    cycles = -(-num_tasks // num_domains)
    orders = [rng.permutation(num_domains) for _ in range(cycles)]
    return np.concatenate(orders)[:num_tasks].astype(np.int32)


def _draw_sequences(rng: np.random.Generator, domain: Domain, config: TextConfig) -> np.ndarray:
    """Distinct cells of a grid laid over the domain at a random offset, uint8 ``[S+Q, L+1]``."""
    count, width = config.num_support + config.num_query, config.length + 1
    offset = int(rng.integers(min(width, domain.size - count * width + 1)))
    cells = rng.choice((domain.size - offset) // width, count, replace=False)
    return np.stack([domain.read(offset + cell * width, width) for cell in cells.tolist()])


def _next_byte(sequences: Any) -> Batch:
    return Batch(inputs=sequences[..., :-1], targets=sequences[..., 1:])


def _find_domains(config: TextConfig, data_dir: Path) -> tuple[Domain, ...]:
    if config.source == "stdlib":
        return text_sources.stdlib_domains()
    if not config.source.startswith(_TFDS):
        return text_sources.folder_domains(Path(config.source).expanduser())
    name = config.source.removeprefix(_TFDS)
    text_sources.require_tfds(name)
    from metaopt.tasks.sources import tfds  # late: it takes a second, and is not always needed

    return tfds.grouped_domains(name, config.text_feature, config.domain_feature, data_dir)


def store(label: str, domains: Sequence[Domain], data_dir: Path) -> tuple[Domain, ...]:
    """Copies domains, once, into a dataset under ``data_dir``, and reads them from there.

    The dataset is keyed by a fingerprint of the names and the contents, so text that
    has changed is prepared again beside the old. A line says what is copied where. If TensorFlow
    Datasets or its ArrayRecord is not installed, the domains are returned unchanged; they give the
    same bytes.

    Raises:
      UserError: ``data_dir`` cannot be written.
    """
    if not text_sources.has_tfds():
        return tuple(domains)
    from metaopt.tasks.sources import tfds

    name = f"{text_sources.safe_name(label)}-{text_sources.fingerprint(domains)}"
    return tfds.stored_domains(data_dir / name, lambda: domains)


def _check_sizes(domains: Sequence[Domain], config: TextConfig) -> None:
    count, width = config.num_support + config.num_query, config.length + 1
    for domain in domains:
        if domain.size < count * width:
            raise UserError(
                f"domain {domain.name!r} has {domain.size} bytes, and an episode of {count} "
                f"sequences of {width} needs {count * width}: remove the domain, or lower "
                "num_support, num_query or length"
            )
