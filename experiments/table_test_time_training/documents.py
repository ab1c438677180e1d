"""What is read: documents to train on, to choose rates on, and to report."""

import codecs
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.table_test_time_training.config import Config, Sizes
from metaopt.errors import UserError
from metaopt.losses import IGNORED, NATS_TO_BITS
from metaopt.pretrained import Pretrained
from metaopt.pytrees import digest_of
from metaopt.streams.drift import DriftConfig, drifting, filter_losses
from metaopt.streams.dynamic_evaluation import cut_segments
from metaopt.tasks.codecs import Codec
from metaopt.tasks.sources.text import (
    Domain,
    draw_window,
    fingerprint,
    folder_domains,
    stdlib_domains,
)
from metaopt.tasks.sources.text_checks import check_text
from metaopt.tasks.tokenizers import bytes_of
from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit


class Source(NamedTuple):
    """What a table reads.

    Attributes:
      name: Name of the table.
      unit: What losses are bits a: byte, symbol or value.
      vocab_size: V.
      sizes: Its model, and how that reads.
      train: Documents of N chunks, support and query ``[T, N / 2, B]`` together.
      valid: Documents to choose rates on, chunks ``[D, N, B]``.
      test: Documents to report.
      limit: Losses of the exact filter on them, nats ``[D, N]``; None if there is none.
      distances: How long before each of their tokens the same was last to be seen, in windows
        ``[D, N, B]``: infinite where it was not, NaN where none is scored. None of other sources.
      general: A document of its own, chunks ``[N, B]``, to see what is forgotten.
      digest: Digest of all text.
      per_byte: Tokens a byte of the documents to report ``[D]``; None where tokens are bytes or
        symbols.
    """

    name: str
    unit: str
    vocab_size: int
    sizes: Any
    train: TaskFamily
    valid: Batch
    test: Batch
    limit: np.ndarray | None
    distances: np.ndarray | None
    general: Batch
    digest: str
    per_byte: np.ndarray | None = None

    def bits(self, nats: np.ndarray) -> np.ndarray:
        """Bits a byte, or a symbol, of the documents to report ``[D]``, of nats of their chunks."""
        per_byte = 1.0 if self.per_byte is None else self.per_byte
        return nats.mean(axis=1) * NATS_TO_BITS * per_byte


def documents(draw: Callable[[np.random.Generator], Batch]) -> TaskFamily:
    """Documents to train on, which ``draw`` gives in chunks."""

    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        chunks = _stacked([draw(rng) for _ in range(num_tasks)])
        half = chunks.inputs.shape[1] // 2
        parts = (
            jax.tree.map(lambda x, p=p: x[:, p], chunks) for p in (slice(half), slice(half, None))
        )
        return Episode(*parts, np.zeros(num_tasks, np.int32))  # type: ignore[arg-type]

    return TaskFamily("documents", *3 * [TaskSplit(sample)])


def _stacked(found: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *found)


def find(name: str, config: Config, width: int | None = None) -> Source:
    """A source by its name, read by a model of a width, if that is not its own.

    Raises:
      UserError: there is no such folder, or too few of its documents are long enough.
    """
    if name == "switching":
        return _switching(config)
    if name == "recall":
        return _recall(config)
    sizes = dataclasses.replace(config.sizes, width=width or config.sizes.width)
    folder = config.books if name == "books" else None
    domains = stdlib_domains() if folder is None else folder_domains(Path(folder).expanduser())
    return _of_domains(name if width is None else f"{name}, width {width}", domains, config, sizes)


def _of_domains(name: str, domains: Sequence[Domain], config: Config, sizes: Sizes) -> Source:
    order = np.random.default_rng(config.seed).permutation(len(domains)).tolist()
    shuffled = [domains[i] for i in order]
    long = [domain for domain in shuffled if domain.size > sizes.test_tokens]
    number = config.num_test + config.num_valid + 1
    needed = sizes.num_chunks * sizes.chunk + 1
    rest = [x for x in shuffled if x not in long[:number] and x.size >= needed]
    if len(long) < number or not rest:
        raise UserError(
            f"{number} documents of {name} with more than {sizes.test_tokens:,} bytes are read, "
            f"and others are trained on: there are {len(long)}; lower test_tokens or num_test"
        )
    check_text(shuffled)
    test, valid = long[: config.num_test], long[config.num_test : number - 1]

    def cut(chosen: Sequence[Domain], size: int) -> Batch:
        return _stacked([cut_segments(x.read(0, size + 1), sizes.chunk) for x in chosen])

    lengths = np.array([x.size for x in rest], np.float64)

    def draw(rng: np.random.Generator) -> Batch:
        chosen = rest[int(rng.choice(len(rest), p=lengths / lengths.sum()))]
        return cut_segments(draw_window(rng, chosen, needed), sizes.chunk)

    general = long[number - 1].read(0, sizes.valid_tokens + 1)
    return Source(
        name,
        "byte",
        256,
        sizes,
        documents(draw),
        cut(valid, sizes.valid_tokens),
        cut(test, sizes.test_tokens),
        None,
        None,
        cut_segments(general, sizes.chunk),
        fingerprint(shuffled),
    )


def of_pretrained(config: Config, found: Pretrained) -> Source:
    """Documents in the tokens of a model that was trained elsewhere.

    Raises:
      UserError: there is no such folder, or too few of its documents are long enough.
    """
    sizes, codec = config.pretrained, found.codec
    folder = sizes.folder or config.books
    domains = stdlib_domains() if folder is None else folder_domains(Path(folder).expanduser())
    check_text(domains)
    order = np.random.default_rng(config.seed).permutation(len(domains)).tolist()
    number = config.num_test + config.num_valid + 1
    needed = sizes.num_chunks * sizes.chunk + 1
    whole, rest = [], []
    for domain in (domains[i] for i in order):
        tokens = _encoded(codec, domain, sizes.train_bytes)
        if len(whole) < number and len(tokens) > sizes.test_tokens:
            whole.append(cut_segments(tokens[: sizes.test_tokens + 1], sizes.chunk))
        elif len(tokens) >= needed:
            rest.append(tokens)
    if len(whole) < number or not rest:
        raise UserError(
            f"{number} documents with more than {sizes.test_tokens:,} tokens in their first "
            f"{sizes.train_bytes:,} bytes are read, and others of {needed:,} are trained on: there "
            f"are {len(whole)} and {len(rest)}; lower test_tokens, num_test or num_chunks"
        )
    lengths = np.array([len(tokens) for tokens in rest], np.float64)

    def draw(rng: np.random.Generator) -> Batch:
        tokens = rest[int(rng.choice(len(rest), p=lengths / lengths.sum()))]
        begin = int(rng.integers(len(tokens) - needed + 1))
        return cut_segments(tokens[begin : begin + needed], sizes.chunk)

    test, valid = _stacked(whole[: config.num_test]), _stacked(whole[config.num_test : -1])
    valid = jax.tree.map(lambda x: x[:, : sizes.valid_tokens // sizes.chunk], valid)
    per_byte = 1 / bytes_of(codec)[test.targets].mean(axis=(1, 2))
    return Source(
        "pretrained",
        "byte",
        codec.vocab_size,
        sizes,
        documents(draw),
        valid,
        test,
        None,
        None,
        whole[-1],
        f"{fingerprint(domains)}-{digest_of(found.params)[:16]}",
        per_byte,
    )


def _encoded(codec: Codec, domain: Domain, most: int) -> np.ndarray:
    """The tokens of the begin of a document, up to the last whole character."""
    data = domain.read(0, min(domain.size, most)).tobytes()
    try:
        return codec.encode(codecs.getincrementaldecoder("utf-8")().decode(data).encode())
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{domain.name}: {error}") from None


def _switching(config: Config) -> Source:
    sizes = config.switching
    drift = DriftConfig(
        hazard=sizes.hazard,
        vocab_size=sizes.vocab_size,
        concentration=sizes.concentration,
        num_tokens=sizes.test_tokens,
    )
    short = dataclasses.replace(drift, num_tokens=sizes.num_chunks * sizes.chunk)

    def draw(rng: np.random.Generator) -> Batch:
        tokens = drifting(short, jax.random.key(int(rng.integers(2**31)))).tokens
        return cut_segments(tokens, sizes.chunk)

    keys = jax.random.split(jax.random.key(config.seed), config.num_valid + config.num_test + 1)
    found = [drifting(drift, key).tokens for key in keys]
    cut = [cut_segments(tokens, sizes.chunk) for tokens in found]
    valid, test = _stacked(cut[: config.num_valid]), _stacked(cut[config.num_valid : -1])
    limits = [filter_losses(tokens, drift) for tokens in found[config.num_valid : -1]]
    limit = np.stack(limits)[:, : test.inputs[0].size].reshape(test.inputs.shape).mean(axis=2)
    return Source(
        "switching",
        "symbol",
        sizes.vocab_size,
        sizes,
        documents(draw),
        valid,
        test,
        limit,
        None,
        cut[-1],
        "",
    )


def _recall(config: Config) -> Source:
    sizes, number = config.recall, config.num_valid + config.num_test + 1

    def draw(rng: np.random.Generator, size: int) -> tuple[Batch, np.ndarray]:
        """The chunks of a document, and how many pairs ago the key of each pair was last read."""
        values = sizes.num_keys + rng.integers(sizes.num_values, size=sizes.num_keys)
        keys = rng.integers(sizes.num_keys, size=size // 2)
        tokens = np.stack([keys, values[keys]], axis=1).reshape(-1)
        chunks = cut_segments(np.append(tokens, keys[0]), sizes.chunk)
        targets = np.array(chunks.targets)
        targets[:, 1::2] = IGNORED  # of keys nothing can be known
        same = keys[:, None] == keys  # [pair, earlier pair]
        earlier = np.tril(same, -1)
        last = np.where(earlier.any(1), len(keys) - 1 - earlier[:, ::-1].argmax(1), -np.inf)
        return chunks._replace(targets=targets), np.arange(len(keys)) - last

    rng = np.random.default_rng(config.seed)
    drawn = [draw(rng, sizes.test_tokens) for _ in range(number)]
    chunks, ago = [x for x, _ in drawn], np.stack([x for _, x in drawn])
    valid = jax.tree.map(
        lambda x: x[:, : sizes.valid_tokens // sizes.chunk], _stacked(chunks[: config.num_valid])
    )
    test, ago = _stacked(chunks[config.num_valid : -1]), ago[config.num_valid : -1]
    distances = np.full(test.inputs.shape, np.nan).reshape(len(ago), -1)
    distances[:, ::2] = 2 * ago / sizes.window
    distances = distances.reshape(test.inputs.shape)
    chance = np.where(np.isinf(distances), np.log(sizes.num_values), 0.0)
    limit = chance[..., ::2].mean(axis=2)  # a value that was read is certain
    whole = sizes.num_chunks * sizes.chunk
    return Source(
        "recall",
        "value",
        sizes.num_keys + sizes.num_values,
        sizes,
        documents(lambda rng: draw(rng, whole)[0]),
        valid,
        test,
        limit,
        distances,
        chunks[-1],
        "",
    )
