"""A real language model reads real texts: what does adapting gain that a longer context does not?

A pretrained model scores texts in segments of 256 tokens. A longer context helps, and so does
one step on each segment after it was scored (dynamic evaluation, Krause et al., 2018,
arXiv:1709.07432); much of what adapting seems to gain is what context gains too. Here the two are
told apart: all rows score the same tokens, and the second table has the gain of each adapting row
on the model as it is *with the same context*, paired over segments. The third has what the model
has lost on general text when it has read a stream to its end, which steps back to the start may
keep small.

    metaopt model smollm2                                 # 135 M parameters, once
    python -m experiments.table_pretrained                # two hours on two cores
    python -m experiments.table_pretrained --model PATH --streams FILE FILE
    python -m experiments.table_pretrained --preset smoke --model PATH

Without ``--streams`` they are WikiText-2, Hardy's *Tess*, a log, chess openings and Wikipedia in
German from ``data/``, those that are there, or if none is the text of Python's help. Learning rates
are not tuned, but the same for all streams. General text is the validation part of WikiText-2, or
Python's help: the first half of it gives the scale of the optimizer RMS, the second is judged.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from experiments import harness
from metaopt.console import log
from metaopt.errors import UserError
from metaopt.files import local_path, read_text
from metaopt.frozen import merge
from metaopt.models.adapters import AdapterConfig
from metaopt.pretrained import Pretrained, ReadingConfig, open_pretrained, read_along
from metaopt.pretrained.packages import fetched
from metaopt.pretrained.reading import Read, Segments, gain, score_of, segment_losses, step_bytes
from metaopt.pytrees import digest_of
from metaopt.ranges import Count, CountOr0, Layers, Length, Range, Rate, Seed, Several, Share
from metaopt.statistics import Interval, Score
from metaopt.tasks.sources.text import data_directory, python_help
from metaopt.training.progress import Progress

STREAMS = {
    "WikiText-2": "data/wikitext2/test.txt",
    "Tess": "data/books/hardy_tess_1891.txt",
    "Kafka log": "data/text_domains/log_kafka.txt",
    "chess": "data/text_domains/chess_openings.txt",
    "German": "data/text_domains/wiki_qa_de.txt",
}
GENERAL = "data/wikitext2/valid.txt"
Characters = Annotated[int, Range(0, 10**8)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.RunConfig):
    """A pretrained model reads texts, as it is and adapting.

    Attributes:
      model: A folder of Hugging Face or a GGUF file; the one of metaopt model smollm2 if not given.
      streams: Texts; five from data/ if none.
      first: Characters of a text that are passed over, if it is long enough; the last of them are
        context.
      characters: Characters that are read.
      length: Tokens of a segment.
      contexts: Tokens carried before each segment; with the first all rows are run, with the others
        those of Adam.
      static_contexts: More of them for the model as it is.
      blocks: Number of last blocks that adapt in the row of that name.
      rank: Rank of the products beside the matrices.
      rate: Learning rate of all weights and of the last blocks, by Adam and RMS.
      beside_rate: Learning rate of products of low rank, norms and biases by Adam.
      beside_rms_rate: Learning rate of products of low rank, norms and biases by RMS.
      sgd_rate: Learning rate of all weights and of the last blocks by SGD.
      beside_sgd_rate: Learning rate of products of low rank, norms and biases by SGD.
      decay: Share of the way back to the start that each step goes in rows with decay.
      general: Text that stands for what the model was trained on.
      general_characters: Characters of it that are used.
      seed: Seed of the start of products of low rank.
      rows: Names of the rows to run; all if none.
    """

    model: str | None = None
    streams: tuple[str, ...] = ()
    first: Characters = 100_000
    characters: Annotated[int, Range(100, 10**8)] = 24_000
    length: Length = 256
    contexts: Annotated[tuple[CountOr0, ...], Several(different=True)] = (0, 768)
    static_contexts: tuple[CountOr0, ...] = (1792,)
    blocks: Layers = 6
    rank: Count = 8
    rate: Rate = 1e-4
    beside_rate: Rate = 1e-3
    beside_rms_rate: Rate = 1e-4
    sgd_rate: Rate = 1e-2
    beside_sgd_rate: Rate = 1e-1
    decay: Share = 0.003
    general: str | None = None
    general_characters: Annotated[int, Range(100, 10**8)] = 32_000
    seed: Seed = 0
    rows: tuple[str, ...] = ()


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        small = {"first": 300, "characters": 200, "length": 8, "contexts": (0, 8), "blocks": 1}
        small["general_characters"] = 200
        return dataclasses.replace(config, **small, static_contexts=(), rank=2)
    if preset == "gpu":
        return dataclasses.replace(config, characters=240_000)
    return config


class ReadingRow(NamedTuple):
    """One way to read.

    Attributes:
      name: Name in the table, with the tokens that the model sees.
      how: What adapts.
    """

    name: str
    how: ReadingConfig

    @property
    def is_static(self) -> bool:
        """Whether nothing adapts."""
        return self.how.optimizer == "none"


def static_name(config: Config, context: int) -> str:
    """The name of the row of the model as it is."""
    return f"static {context + config.length}"


def make_rows(config: Config) -> list[ReadingRow]:
    """The rows that the config asks for.

    Raises:
      UserError: there is no row of a name.
    """
    rows = []
    for context in dict.fromkeys((*config.contexts, *config.static_contexts)):
        base = ReadingConfig(length=config.length, context=context, seed=config.seed)
        still = dataclasses.replace(base, optimizer="none")
        rows.append(ReadingRow(static_name(config, context), still))
        if context in config.contexts:
            for name, how in adapting_ways(config, base):
                rows.append(ReadingRow(f"adapting {name}, {context + config.length}", how))
    return harness.select(rows, config.rows)


def adapting_ways(config: Config, base: ReadingConfig) -> Iterator[tuple[str, ReadingConfig]]:
    """The ways to adapt at a context, by their names."""
    weights = {"adam": config.rate, "rms": config.rate, "sgd": config.sgd_rate}
    beside = {"adam": config.beside_rate, "sgd": config.beside_sgd_rate}
    beside["rms"] = config.beside_rms_rate
    last = AdapterConfig(kind="blocks", blocks=config.blocks)
    for part, adapter, rates in (
        ("all", AdapterConfig(kind="all"), weights),
        (f"last {config.blocks}", last, weights),
        ("low rank", AdapterConfig(rank=config.rank), beside),
        ("norms", AdapterConfig(kind="norms"), beside),
    ):
        for name, optimizer, decay in (
            ("Adam", "adam", 0.0),
            ("Adam with decay", "adam", config.decay),
            ("SGD", "sgd", 0.0),
            ("RMS with decay", "rms", config.decay),
        ):
            if name != "Adam" and base.context != config.contexts[0]:
                continue
            if name == "Adam with decay" and part != "all":
                continue
            if optimizer == "rms" and part == "all":
                # Explodes: on general text most embeddings have no gradient, which is their scale.
                continue
            how = {"optimizer": optimizer, "learning_rate": rates[optimizer], "decay": decay}
            yield f"{part}, {name}", dataclasses.replace(base, adapter=adapter, **how)


def open_streams(config: Config) -> dict[str, str]:
    """The texts by name.

    Raises:
      UserError: a file is missing or no UTF-8.
    """
    if config.streams:
        return {Path(path).stem: read_text(local_path(path)) for path in config.streams}
    there = {name: Path(path) for name, path in STREAMS.items() if Path(path).is_file()}
    if there:
        return {name: read_text(path) for name, path in there.items()}
    log("note: no stream is there: the text is that of Python's help")
    return {"Python's help": python_help()}


def open_general(config: Config, found: Pretrained) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of general text: the half that gives a scale, and the half that is judged.

    Raises:
      UserError: the file is missing or no UTF-8, or too short.
    """
    if config.general is not None:
        text = read_text(local_path(config.general))
    else:
        path = Path(GENERAL)
        text = read_text(path) if path.is_file() else python_help()
    tokens = found.codec.encode(text[: config.general_characters].encode())
    if len(tokens) < 2 * (config.length + 1):
        raise UserError(
            f"{len(tokens)} tokens of general text, and {2 * (config.length + 1)} are needed: give "
            "a longer text, or shorter segments"
        )
    half = len(tokens) // 2
    return tokens[:half], tokens[half:]


def cut(config: Config, found: Pretrained, name: str, text: str) -> tuple[np.ndarray, int]:
    """The tokens of a stream, and where those begin that are scored.

    Before them is the longest context that a row asks for.

    Raises:
      UserError: the text is too short.
    """
    longest = max((*config.contexts, *config.static_contexts))
    first = max(0, min(config.first, len(text) - config.characters))
    before = found.codec.encode(text[:first].encode())[-longest:] if longest else []
    tokens = found.codec.encode(text[first : first + config.characters].encode())
    begin = longest - len(before)  # of a text without so much before it, the first are context
    if len(tokens) < begin + 2 * config.length + 1:
        raise UserError(
            f"{name} has {len(tokens)} tokens to read, and {begin + 2 * config.length + 1} are "
            "needed: give a longer text, or shorter segments or contexts"
        )
    return np.concatenate([before, tokens]).astype(np.int32), longest


def run(config: Config) -> None:
    """Reads the streams in every way, and writes the tables."""
    harness.begin()
    rows, texts = make_rows(config), open_streams(config)
    path = config.model or fetched("smollm2", data_directory(None))
    log(f"loading {path}")
    found = open_pretrained(path)
    streams = {name: cut(config, found, name, text) for name, text in texts.items()}
    general = open_general(config, found)
    tokens = [tokens for tokens, _ in streams.values()]
    table = harness.TableRun(
        "table_pretrained",
        config,
        presets,
        table="pretrained/reading",
        unit="bits/byte",
        rows=[row.name for row in rows],
        seeds=[config.seed],
        data=digest_of((found.params, tokens, general))[:16],
    )
    over = f"95 % intervals over segments of {config.length} tokens"
    for row in table.pending(rows):
        spent, count = 0.0, 0
        for name, (tokens, begin) in streams.items():
            began = time.monotonic()
            read = read_stream(found, row, name, tokens[begin - row.how.context :], general[0])
            spent += time.monotonic() - began
            segments = read.segments
            count += int(segments.num_tokens.sum())
            table.add(row.name, name, as_interval(score_of(segments), segments), over=over)
            table.keep(f"{row.name}, {name}", **segments._asdict())
            if not row.is_static:
                add_gain(table, config, row, name, segments, over)
                add_lost(table, row, name, found, read, general[1], over)
        seconds, needed = spent / count, step_bytes(found, row.how) / 2**30
        for column, value in (("seconds a token", seconds), ("GiB", needed)):
            cost = Interval(value, float("nan"), 1)
            table.add(row.name, column, cost, unit="", over=over, limit=True)
    table.finish(
        titles={
            "pretrained/gain": "What adapting gains at equal context",
            "pretrained/forgetting": "What has been lost on general text after reading",
        }
    )


def read_stream(
    found: Pretrained, row: ReadingRow, name: str, tokens: np.ndarray, general: np.ndarray
) -> Read:
    """A stream, as a row reads it."""
    total = (len(tokens) - 1 - row.how.context) // row.how.length
    with Progress(f"{row.name}: {name}", total=total, first="compiling") as shown:
        return read_along(found, tokens, row.how, shown.update, general)


def add_lost(
    table: harness.TableRun,
    row: ReadingRow,
    name: str,
    found: Pretrained,
    read: Read,
    general: np.ndarray,
    over: str,
) -> None:
    """What the loss on general text has risen by when a stream has been read to its end."""

    def judged(row: str, model: Pretrained) -> Segments:
        kept = table.remember(
            f"{row}, general text",
            lambda: segment_losses(model, general, length, 0)._asdict(),
        )
        return Segments(**kept)

    length = row.how.length
    adapted = found._replace(params=merge(read.frozen, read.fast))
    before, after = judged("as it is", found), judged(f"{row.name}, {name}", adapted)
    lost = as_interval(gain(after, before), before)
    table.add(row.name, name, lost, table="pretrained/forgetting", over=over)


def add_gain(
    table: harness.TableRun,
    config: Config,
    row: ReadingRow,
    name: str,
    segments: Segments,
    over: str,
) -> None:
    """What a row gains on the model as it is with the same context, if that was run."""
    still = static_name(config, row.how.context)
    if not table.has(still):
        return
    before = Segments(**table.kept(f"{still}, {name}"))
    gained = as_interval(gain(before, segments), segments)
    table.add(row.name, name, gained, table="pretrained/gain", better="higher", over=over)


def as_interval(score: Score, segments: Segments) -> Interval:
    """A score with its interval over segments."""
    return Interval(score.mean, score.ci95, len(segments.nats), "Student t")


if __name__ == "__main__":
    harness.main("table_pretrained", run, presets, __doc__)
