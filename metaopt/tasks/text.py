"""Domains of text as tasks, byte by byte or token by token: one domain is one task.

An episode holds S support and Q query sequences of L + 1 tokens from one domain, no two
of which overlap; the model predicts each next token. Whole domains are held out for
validation and test, so what is measured is adaptation to text of a new kind.
"""

import difflib
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt.console import printable
from metaopt.errors import UserError
from metaopt.files import local_path, read_text
from metaopt.ranges import Checked, Count, CountOr0, Length, Seed
from metaopt.tasks.codecs import BYTES, Codec
from metaopt.tasks.sources import text as text_sources
from metaopt.tasks.sources.text import Domain, array_domain
from metaopt.tasks.sources.text_checks import check_text
from metaopt.tasks.tokenizers import tokenizer, train_bpe
from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit

_TFDS = "tfds:"
OF_MODEL = "of the model"
"""The tokenizer of a config whose codec is given."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(Checked):
    """Which text, how it is cut into episodes, and which domains are held out.

    Attributes:
      source: folder with one file a domain; ``stdlib``, the source of the running
        Python's library; or ``tfds:NAME[/CONFIG][:VERSION]``, a prepared TensorFlow
        Datasets dataset whose examples are grouped by a feature.
      num_support: S, support sequences in an episode.
      num_query: Q, query sequences in an episode.
      length: L, bytes or tokens in a sequence.
      num_valid_domains: number of domains held out for validation.
      num_test_domains: number of domains held out for the test.
      test_domains: names of the test domains, instead of ``num_test_domains`` random ones.
      num_folds: number of folds that the domains are dealt to, instead of ``num_test_domains``
        random ones: over all folds each domain is held out once. 0 for none.
      fold: which of them is the test, from 0 on.
      kin: file of domains that are held out together, such as translations of one text: the names
        of a group on a line, between blanks. Names that are not there are passed over.
      split_seed: seed of the choice of held-out domains.
      skip_small: leave out domains that are shorter than an episode, in place of refusing them.
      tokenizer: ``bytes``; ``bpe:SIZE``, byte pair encoding of that many tokens, trained on the
        training domains; a JSON file of the library ``tokenizers``; or `OF_MODEL`.
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
    num_folds: CountOr0 = 0
    fold: CountOr0 = 0
    kin: str | None = None
    split_seed: Seed = 0
    skip_small: bool = False
    tokenizer: str = "bytes"
    text_feature: str = "text"
    domain_feature: str = "label"
    data_dir: str | None = None


class Found(NamedTuple):
    """The domains of a source, split.

    Attributes:
      train, valid, test: domains of each split, in the order of their names.
      skipped: names and sizes in bytes of domains that are left out as too short.
    """

    train: tuple[Domain, ...]
    valid: tuple[Domain, ...]
    test: tuple[Domain, ...]
    skipped: dict[str, int]

    @property
    def splits(self) -> dict[str, tuple[Domain, ...]]:
        """The domains by the name of their split."""
        return {"training": self.train, "validation": self.valid, "test": self.test}


def find(config: TextConfig) -> Found:
    """The domains of a config and their split; of their text nothing is read yet.

    Raises:
      UserError: the source is missing, empty or unreadable; a domain is shorter than an
        episode; or there are too few domains for the splits.
    """
    domains = _find_domains(config, text_sources.data_directory(config.data_dir))
    skipped = {}
    if config.skip_small:
        skipped = {d.name: d.size for d in domains if d.size < episode_size(config)}
        domains = tuple(domain for domain in domains if domain.name not in skipped)
    _check_sizes(domains, config, "bytes")
    splits = split_domains([domain.name for domain in domains], config)
    train, valid, test = (tuple(domains[i] for i in split) for split in splits)
    return Found(train, valid, test, skipped)


def text(config: TextConfig, codec: Codec | None = None) -> TaskFamily:
    """Text domains as a task family, in three splits that share no domain.

    Episodes are numpy arrays: int32 inputs and targets ``[T, S, L]`` and ``[T, Q, L]``
    of tokens, targets one token after inputs, and ``task`` int32 ``[T]``, which
    indexes the split's ``task_names``. The first use of a source stores it under
    ``data_dir``; see `store`. Tokens other than bytes are kept in memory.

    Args:
      config: which text, and how it is split.
      codec: tokens of a tokenizer that is `OF_MODEL`; those of the config otherwise.

    Raises:
      UserError: see `find`; a domain is no text, or another once more; or the tokenizer cannot
        be had, or not used on a domain. Nothing has been written then, unless the source is
        ``tfds:``.
    """
    found, codec = find(config), codec or make_codec(config)
    domains = [domain for split in found.splits.values() for domain in split]
    where = {d.name: f"({name})" for name, split in found.splits.items() for d in split}
    check_text(domains, lambda i: where[domains[i].name])
    if config.tokenizer != "bytes":
        domains = [_encoded(domain, codec) for domain in domains]
        _check_sizes(domains, config, "tokens")
    elif not config.source.startswith(_TFDS):
        data_dir = text_sources.data_directory(config.data_dir)
        by_name = sorted(domains, key=lambda domain: domain.name)  # a split does not rename it
        domains = store(Path(config.source).resolve().name, by_name, data_dir)
    named = {domain.name: domain for domain in domains}
    train, valid, test = (
        _task_split([named[domain.name] for domain in split], config)
        for split in found.splits.values()
    )
    return TaskFamily("text", train, valid, test)


@functools.cache
def make_codec(config: TextConfig) -> Codec:
    """The tokens of a config; a tokenizer that is trained is trained once in a process.

    Raises:
      UserError: the tokenizer cannot be had: see `metaopt.tasks.tokenizers`.
    """
    return BYTES if config.tokenizer == "bytes" else tokenizer(definition(config), config.tokenizer)


@functools.cache
def definition(config: TextConfig) -> str:
    """The JSON of the tokenizer of a config, which is not ``bytes``.

    Raises:
      UserError: its file cannot be read, or it cannot be trained.
    """
    size = re.fullmatch(r"bpe:(\d{1,7})", config.tokenizer)
    if size is None:
        return read_text(local_path(config.tokenizer))
    parts = (domain.read(0, domain.size).tobytes() for domain in find(config).train)
    return train_bpe((part.decode("utf-8", errors="replace") for part in parts), int(size[1]))


def summary(config: TextConfig) -> list[str]:
    """What the text of a config is, in Markdown: domains, sizes, splits, and what is left out.

    Raises:
      UserError: see `find`.
    """
    found = find(config)
    lines = [f"Text of {config.source}, tokens: {config.tokenizer}", ""]
    lines += ["| split | domain | bytes |", "|---|---|---:|"]
    for name, split in found.splits.items():
        lines += [f"| {name} | {_cell(domain.name)} | {domain.size:,} |" for domain in split]
    needed = f"shorter than an episode of {episode_size(config):,} bytes"
    lines += [
        f"| left out: {needed} | {_cell(n)} | {size:,} |" for n, size in found.skipped.items()
    ]
    return lines


def short_summary(config: TextConfig) -> list[str]:
    """The same in a line for each split."""
    found = find(config)
    lines = [
        f"{name}: {len(split)} domains, {sum(domain.size for domain in split):,} bytes"
        for name, split in found.splits.items()
    ]
    lines[-1] += f": {printable(', '.join(domain.name for domain in found.test))}"
    if found.skipped:
        left_out = printable(", ".join(found.skipped))
        lines.append(f"left out as too short: {len(found.skipped)} domains: {left_out}")
    return lines


def _cell(name: str) -> str:
    return printable(name).replace("|", "\\|")


def _encoded(domain: Domain, codec: Codec) -> Domain:
    """A domain whose positions are tokens."""
    try:
        return array_domain(domain.name, codec.encode(domain.read(0, domain.size).tobytes()))
    except UserError as error:
        raise UserError(f"domain {domain.name!r}: {error}") from None


def digest(config: TextConfig) -> str | None:
    """The names and contents of all domains of a folder or of the standard library.

    None for a ``tfds:`` dataset, whose contents its name and version say. A tokenizer that is read
    from a file counts as well.

    Raises:
      UserError: the source is missing, empty or unreadable.
    """
    found = None
    if not config.source.startswith(_TFDS):
        found = text_sources.fingerprint(_find_domains(config, Path()))
    if config.tokenizer in ("bytes", OF_MODEL):
        return found
    return f"{found or ''}-{hashlib.sha256(definition(config).encode()).hexdigest()[:16]}"


def split_domains(
    names: Sequence[str], config: TextConfig
) -> tuple[list[int], list[int], list[int]]:
    """Which domains are for training, validation and test, as ascending indices.

    Groups of kin are never parted, so that there may be fewer domains in validation and test than
    were asked for.

    Raises:
      UserError: none would be left to train on, a test domain is unknown, or the folds or the file
        of kin are wrong.
    """
    unknown = sorted(set(config.test_domains) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names) or sorted(names)
        raise UserError(
            f"no domain {unknown[0]!r} in {config.source}: there is {', '.join(map(repr, near))}"
        )
    if config.num_folds and (config.fold >= config.num_folds or config.test_domains):
        raise UserError(
            f"fold {config.fold} of {config.num_folds}: folds are numbered from 0 on, and take no "
            "test domains"
        )
    kin = kin_of(names, config)
    order = np.random.default_rng(config.split_seed).permutation(len(names)).tolist()
    groups = list({kin[i]: [j for j in order if kin[j] == kin[i]] for i in order}.values())
    if config.test_domains:
        test = [g for g in groups if any(names[i] in config.test_domains for i in g)]
    elif config.num_folds:
        test = _folds(groups, config.num_folds)[config.fold]
    else:
        test = _first(groups, config.num_test_domains)
    rest = [group for group in groups if group not in test]
    valid = _first(rest, config.num_valid_domains)
    train = [group for group in rest if group not in valid]
    random = not (config.test_domains or config.num_folds)
    if not (train and valid and test) or (random and len(names) < config.num_test_domains):
        held_out = sum(map(len, test)) if test and not random else config.num_test_domains
        raise UserError(
            f"{config.source} has {len(names)} domains, too few for {config.num_valid_domains} to "
            f"validate, {held_out} to test and at least 1 to train on: add domains or hold out "
            "fewer"
        )
    parts = (sorted(i for group in part for i in group) for part in (train, valid, test))
    return next(parts), next(parts), next(parts)


def kin_of(names: Sequence[str], config: TextConfig) -> list[int]:
    """The group of kin of each domain, as the index of its first one; without kin, its own.

    Raises:
      UserError: the file cannot be read, or has a name twice.
    """
    group = list(range(len(names)))
    if config.kin is None:
        return group
    seen, number = set(), {name: i for i, name in enumerate(names)}
    for line in read_text(local_path(config.kin)).splitlines():
        found = line.split()
        for name in found:
            if name in seen:
                raise UserError(f"{config.kin} has {name!r} twice: a domain is of one group")
            seen.add(name)
        of_line = sorted(number[name] for name in found if name in number)
        for i in of_line:
            group[i] = of_line[0]
    return group


def _first(groups: Sequence[list[int]], most: int) -> list[list[int]]:
    """The first groups that have together at most this number of domains."""
    taken: list[list[int]] = []
    for group in groups:
        if sum(map(len, taken)) + len(group) <= most:
            taken.append(group)
    return taken


def _folds(groups: Sequence[list[int]], number: int) -> list[list[list[int]]]:
    """Groups dealt to folds: the largest first, each to the fold with the fewest domains."""
    folds: list[list[list[int]]] = [[] for _ in range(number)]
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=lambda fold: sum(map(len, fold))).append(group)
    return folds


def _task_split(domains: Sequence[Domain], config: TextConfig) -> TaskSplit:
    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        tasks = _balanced_tasks(rng, len(domains), num_tasks)
        sequences = np.stack([_draw_sequences(rng, domains[i], config) for i in tasks])
        support, query = np.split(sequences.astype(np.int32), [config.num_support], axis=1)
        return Episode(next_tokens(support), next_tokens(query), tasks)

    return TaskSplit(sample, tuple(domain.name for domain in domains))


def _balanced_tasks(rng: np.random.Generator, num_domains: int, num_tasks: int) -> Any:
    """Random orders of all the domains, one after the other, int32 ``[num_tasks]``."""
    cycles = -(-num_tasks // num_domains)
    orders = [rng.permutation(num_domains) for _ in range(cycles)]
    return np.concatenate(orders)[:num_tasks].astype(np.int32)


def _draw_sequences(rng: np.random.Generator, domain: Domain, config: TextConfig) -> np.ndarray:
    """Distinct cells of a grid laid over the domain at a random offset, ``[S+Q, L+1]``."""
    count, width = config.num_support + config.num_query, config.length + 1
    offset = int(rng.integers(min(width, domain.size - count * width + 1)))
    cells = rng.choice((domain.size - offset) // width, count, replace=False)
    return np.stack([domain.read(offset + cell * width, width) for cell in cells.tolist()])


def next_tokens(sequences: Any) -> Batch:
    """Inputs ``[..., L]`` and targets ``[..., L]`` of sequences ``[..., L + 1]``."""
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


def episode_size(config: TextConfig) -> int:
    """Tokens of an episode: S + Q sequences of L + 1."""
    return (config.num_support + config.num_query) * (config.length + 1)


def _check_sizes(domains: Sequence[Domain], config: TextConfig, unit: str) -> None:
    count, width = config.num_support + config.num_query, config.length + 1
    for domain in domains:
        if domain.size < count * width:
            raise UserError(
                f"domain {domain.name!r} has {domain.size} {unit}, and an episode of {count} "
                f"sequences of {width} needs {count * width}: remove the domain or give "
                "skip_small, or lower num_support, num_query or length"
            )
