"""What is read: documents to train on, to choose rates on, and to report."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.table_test_time_training.config import Config
from metaopt.errors import UserError
from metaopt.streams.drift import DriftConfig, drifting, filter_losses
from metaopt.streams.dynamic_evaluation import cut_segments
from metaopt.tasks.sources.text import (
    Domain,
    draw_window,
    fingerprint,
    folder_domains,
    stdlib_domains,
)
from metaopt.tasks.sources.text_checks import check_text
from metaopt.types import Batch, Episode, Key, TaskFamily, TaskSplit


class Source(NamedTuple):
    """What a table reads.

    Attributes:
      name: Name of the table.
      vocab_size: V.
      window, chunk: W and B of its model, in tokens.
      train: Documents of N chunks, support and query ``[T, N / 2, B]`` together.
      valid: Documents to choose rates on, chunks ``[D, N, B]``.
      test: Documents to report.
      limit: Losses of the exact filter on them, nats ``[D, N]``; None if there is none.
      general: A document of its own, chunks ``[N, B]``, to see what is forgotten.
      digest: Digest of all text.
    """

    name: str
    vocab_size: int
    window: int
    chunk: int
    train: TaskFamily
    valid: Batch
    test: Batch
    limit: np.ndarray | None
    general: Batch
    digest: str


def documents(draw: Callable[[np.random.Generator], np.ndarray], size: int) -> TaskFamily:
    """Documents to train on, which ``draw`` gives, in chunks."""

    def sample(key: Key, num_tasks: int) -> Episode:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        found = [cut_segments(draw(rng), size) for _ in range(num_tasks)]
        chunks = jax.tree.map(lambda *x: np.stack(x), *found)
        half = chunks.inputs.shape[1] // 2
        parts = (
            jax.tree.map(lambda x, p=p: x[:, p], chunks) for p in (slice(half), slice(half, None))
        )
        return Episode(*parts, np.zeros(num_tasks, np.int32))  # type: ignore[arg-type]

    return TaskFamily("documents", *3 * [TaskSplit(sample)])


def find(name: str, config: Config) -> Source:
    """A source by its name.

    Raises:
      UserError: there is no such folder, or too few of its documents are long enough.
    """
    if name == "switching":
        return _switching(config)
    if name == "code":
        return _of_domains(name, stdlib_domains(), config)
    assert config.books is not None
    return _of_domains(name, folder_domains(Path(config.books).expanduser()), config)


def _of_domains(name: str, domains: Sequence[Domain], config: Config) -> Source:
    order = np.random.default_rng(config.seed).permutation(len(domains)).tolist()
    shuffled = [domains[i] for i in order]
    long = [domain for domain in shuffled if domain.size > config.test_bytes]
    number = config.num_test + config.num_valid + 1
    needed = config.num_chunks * config.chunk + 1
    rest = [x for x in shuffled if x not in long[:number] and x.size >= needed]
    if len(long) < number or not rest:
        raise UserError(
            f"{number} documents of {name} with more than {config.test_bytes:,} bytes are read, "
            f"and others are trained on: there are {len(long)}; lower test_bytes or num_test"
        )
    check_text(shuffled)
    test, valid = long[: config.num_test], long[config.num_test : number - 1]

    def cut(chosen: Sequence[Domain], size: int) -> Batch:
        found = [cut_segments(domain.read(0, size + 1), config.chunk) for domain in chosen]
        return jax.tree.map(lambda *x: np.stack(x), *found)

    sizes = np.array([x.size for x in rest], np.float64)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return draw_window(rng, rest[int(rng.choice(len(rest), p=sizes / sizes.sum()))], needed)

    general = long[number - 1].read(0, config.valid_bytes + 1)
    return Source(
        name,
        256,
        config.window,
        config.chunk,
        documents(draw, config.chunk),
        cut(valid, config.valid_bytes),
        cut(test, config.test_bytes),
        None,
        cut_segments(general, config.chunk),
        fingerprint(shuffled),
    )


def _switching(config: Config) -> Source:
    sizes = config.switching
    drift = DriftConfig(
        hazard=sizes.hazard,
        vocab_size=sizes.vocab_size,
        concentration=sizes.concentration,
        num_tokens=sizes.test_tokens,
    )
    short = dataclasses.replace(drift, num_tokens=config.num_chunks * sizes.chunk)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return drifting(short, jax.random.key(int(rng.integers(2**31)))).tokens

    keys = jax.random.split(jax.random.key(config.seed), config.num_valid + config.num_test + 1)
    found = [drifting(drift, key).tokens for key in keys]
    cut = [cut_segments(tokens, sizes.chunk) for tokens in found]
    valid, test = (
        jax.tree.map(lambda *x: np.stack(x), *part)
        for part in (cut[: config.num_valid], cut[config.num_valid : -1])
    )
    limits = [filter_losses(tokens, drift) for tokens in found[config.num_valid : -1]]
    limit = np.stack(limits)[:, : test.inputs[0].size].reshape(test.inputs.shape).mean(axis=2)
    return Source(
        "switching",
        sizes.vocab_size,
        sizes.window,
        sizes.chunk,
        documents(draw, sizes.chunk),
        valid,
        test,
        limit,
        cut[-1],
        "",
    )
