"""Text domains as a TensorFlow Datasets dataset of blocks, without TensorFlow.

One split holds the blocks of all the domains in order, so that record i is block i, and
the metadata hold the domains' names and sizes. ArrayRecord gives any record at once;
a few blocks are kept in memory. This is the only module of the library that imports
`tensorflow_datasets`, and it is itself imported only when it is needed.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from metaopt.console import log
from metaopt.errors import UserError
from metaopt.measure import human_bytes
from metaopt.tasks.sources.text import Domain, join, safe_name

BLOCK_BYTES = 4096
CACHED_BLOCKS = 4096
_SPLIT = "text"


class TextBlocks(tfds.core.GeneratorBasedBuilder):
    """Cuts domains into blocks of `BLOCK_BYTES`; the last block of each may be shorter."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # no downloads, so no checksums to look for beside this module

    def __init__(self, domains: Sequence[Domain], **kwargs: Any):
        self._domains = domains
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Domains of text as consecutive blocks of bytes.",
            features=tfds.features.FeaturesDict({"block": tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                names=[domain.name for domain in self._domains],
                sizes=[domain.size for domain in self._domains],
            ),
        )

    def _split_generators(self, dl_manager: Any):
        del dl_manager  # nothing is downloaded
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self):
        blocks = (
            domain.read(start, min(BLOCK_BYTES, domain.size - start)).tobytes()
            for domain in self._domains
            for start in range(0, domain.size, BLOCK_BYTES)
        )
        for position, block in enumerate(blocks):
            yield position, {"block": block}


def stored_domains(directory: Path, domains: Callable[[], Sequence[Domain]]) -> tuple[Domain, ...]:
    """The domains stored in a directory; if there are none yet, they are stored first.

    TensorFlow Datasets writes beside the final place and renames at the end: what was
    interrupted is never taken as whole, and of several processes one wins.

    Args:
      directory: directory of this dataset alone.
      domains: gives what is to be stored; called only when nothing is there.

    Raises:
      UserError: the directory cannot be written.
    """
    done = directory / "text_blocks" / str(TextBlocks.VERSION)
    if not done.is_dir():
        found = domains()
        size = human_bytes(sum(domain.size for domain in found))
        log(f"note: {size} of text are copied to {directory}, to be read from there")
        try:
            TextBlocks(found, data_dir=directory).download_and_prepare()
        except OSError as error:
            if not done.is_dir():
                raise UserError(
                    f"cannot store text under {directory}: {error}; give another data_dir"
                ) from error
    return _open_blocks(done)


def _open_blocks(directory: Path) -> tuple[Domain, ...]:
    """The domains of a dataset that `TextBlocks` prepared, read block by block."""
    builder: Any = tfds.builder_from_directory(directory)
    records = builder.as_data_source(split=_SPLIT)
    names, sizes = builder.info.metadata["names"], builder.info.metadata["sizes"]
    firsts = np.concatenate([[0], np.cumsum([-(-size // BLOCK_BYTES) for size in sizes])])

    @functools.lru_cache(CACHED_BLOCKS)
    def block(position: int) -> np.ndarray:
        return np.frombuffer(records[position]["block"], np.uint8)

    def open_one(name: str, size: int, first: int) -> Domain:
        lengths = [min(BLOCK_BYTES, size - start) for start in range(0, size, BLOCK_BYTES)]
        return join(
            name, lengths, lambda piece, start, length: block(first + piece)[start : start + length]
        )

    return tuple(map(open_one, names, sizes, firsts[:-1].tolist()))


def grouped_domains(
    name: str, text_feature: str, domain_feature: str, data_dir: Path
) -> tuple[Domain, ...]:
    """A prepared dataset as domains: its examples grouped by a feature, stored as blocks.

    All its splits are taken together, in the order in which it lists them. A domain is
    the text of its examples, each followed by a newline. Domains are ordered by name;
    unlabelled examples (class -1) are left out.

    Args:
      name: ``NAME``, ``NAME/CONFIG`` or ``NAME/CONFIG:VERSION``, prepared under
        ``data_dir`` or in TensorFlow Datasets' own directory.
      text_feature: name of a string feature.
      domain_feature: name of a class label, integer or string feature.
      data_dir: where the blocks are stored.

    Raises:
      UserError: the dataset is unknown, not prepared, or prepared in a format that
        only TensorFlow reads; it has no such feature; or ``data_dir`` cannot be written.
    """
    builder = find_dataset(name, data_dir)
    _check_features(builder, name, text_feature, domain_feature)
    examples = open_split(builder, name, "all")
    info = Path(builder.data_path, "dataset_info.json").read_bytes()
    digest = hashlib.sha256(f"{name} {text_feature} {domain_feature} ".encode() + info)
    return stored_domains(
        data_dir / f"tfds_{safe_name(name)}-{digest.hexdigest()[:16]}",
        lambda: _group(examples, builder.info.features, text_feature, domain_feature),
    )


def find_dataset(name: str, data_dir: Path) -> Any:
    """A prepared dataset, looked for in ``data_dir`` and where TFDS keeps its own."""
    failure = None
    for root in (data_dir, None):
        try:
            builder = tfds.builder(name, data_dir=root)
        except Exception as error:  # each dataset's own code runs here, and may raise anything
            failure = error
            continue
        if (builder.data_path / "dataset_info.json").exists():
            return builder
    if failure is not None:
        reason = (str(failure).strip() or repr(failure)).splitlines()[0]
        raise UserError(
            f"cannot open 'tfds:{name}': {reason} Check the name, the configuration and the version"
        ) from failure
    raise UserError(
        f"'tfds:{name}' is not prepared: run tfds.builder({name!r}, file_format='array_record')"
        ".download_and_prepare(), or give the data_dir it is in"
    )


def open_split(builder: Any, name: str, split: str) -> Any:
    """The examples of a split; UserError if there is none, or only TensorFlow reads its format."""
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"'tfds:{name}' under {builder.data_path} cannot be read without TensorFlow, or lacks "
            f"the split {split!r}: prepare it again, in another directory, with "
            "file_format='array_record'"
        ) from error


def _check_features(builder: Any, name: str, text_feature: str, domain_feature: str) -> None:
    features = dict(builder.info.features or {})
    texts = {key for key, one in features.items() if _is_scalar(one, np.object_)}
    labels = {key for key, one in features.items() if _is_scalar(one, np.integer)} | texts
    for option, key, usable in (
        ("text_feature", text_feature, texts),
        ("domain_feature", domain_feature, labels),
    ):
        if key not in usable:
            raise UserError(
                f"'tfds:{name}' has no {option} {key!r}: choose one of {sorted(usable)}"
            )


def _is_scalar(feature: Any, dtype: Any) -> bool:
    return getattr(feature, "shape", None) == () and np.issubdtype(feature.np_dtype, dtype)


def _group(examples: Any, features: Any, text_feature: str, domain_feature: str) -> list[Domain]:
    """One pass over the examples for their labels and sizes; the text is read again later."""
    members: dict[Any, list[tuple[int, int]]] = {}
    for position, example in enumerate(examples):
        size = len(example[text_feature]) + 1
        members.setdefault(example[domain_feature], []).append((position, size))
    feature = features[domain_feature]
    unlabelled = {-1} if isinstance(feature, tfds.features.ClassLabel) else set()
    names = {label: _label_name(feature, label) for label in members.keys() - unlabelled}

    @functools.lru_cache(16)  # blocks are read in order, and an example may span several
    def line(position: int) -> np.ndarray:
        return np.frombuffer(examples[position][text_feature] + b"\n", np.uint8)

    def group(label: Any) -> Domain:
        positions, sizes = zip(*members[label], strict=True)
        return join(
            names[label],
            sizes,
            lambda piece, start, length: line(positions[piece])[start : start + length],
        )

    return [group(label) for label in sorted(names, key=names.__getitem__)]


def _label_name(feature: Any, label: Any) -> str:
    if isinstance(label, bytes):
        return label.decode(errors="backslashreplace")
    return feature.int2str(label) if isinstance(feature, tfds.features.ClassLabel) else str(label)
