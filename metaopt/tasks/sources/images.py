"""Where drawings of characters come from: one array, whatever the source.

A folder of npz files, or Omniglot as TensorFlow Datasets prepares it. Characters are
ordered by name and the drawings of each by their pixels, so that both sources give the
same array, and one seed the same split and the same episodes. Nothing here imports
TensorFlow Datasets until it is used.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metaopt.errors import UserError
from metaopt.indices import check_range
from metaopt.npz import Form, read_npz
from metaopt.tasks.sources import text as text_sources

_TFDS_FEATURES = ("image", "alphabet", "alphabet_char_id")
_TFDS_SPLITS = ("train", "test")  # 'small1' and 'small2' hold some of 'train' once more


class Characters(NamedTuple):
    """Drawings of characters, every character drawn equally often.

    Attributes:
      names: ``Alphabet/character01`` and so on, ascending.
      images: uint8 ``[C, E, height, width]``, E drawings of each of C characters; ink is
        255 on 0. The drawings of a character are in the order of their pixels.
    """

    names: tuple[str, ...]
    images: np.ndarray


def folder_characters(folder: Path, size: int) -> Characters:
    """Reads the files ``*_{size}x{size}.npz`` of a folder, all of them together.

    Each holds ``images`` uint8 ``[N, size, size]`` with ink 255 on 0, ``character``
    integers ``[N]``, and ``character_names``, strings that ``character`` indexes.

    Raises:
      UserError: the folder is missing, has no such file, or one that is not of this
        form; or the drawings are not equally many, see `group`.
    """
    if not folder.is_dir():
        raise UserError(
            f"image source {str(folder)!r} is no folder: give a folder with files "
            f"*_{size}x{size}.npz (arrays images, character, character_names), or "
            "'tfds:omniglot', which tfds.builder('omniglot', file_format='array_record')"
            ".download_and_prepare() downloads"
        )
    paths = sorted(folder.glob(f"*_{size}x{size}.npz"))
    if not paths:
        raise UserError(
            f"the image folder {folder} has no file *_{size}x{size}.npz: give another folder, "
            "or the image_size of its files"
        )
    files = [_read_npz(path, size) for path in paths]
    owners = Counter(name for names, _ in files for name in set(names))
    repeated = sorted(name for name, count in owners.items() if count > 1)
    if repeated:
        raise UserError(
            f"character {repeated[0]!r} is in more than one file of {folder}: keep it in one"
        )
    return group(pair for names, images in files for pair in zip(names, images, strict=True))


def _read_npz(path: Path, size: int) -> tuple[list[str], np.ndarray]:
    """The name of the character of each drawing, and the drawings ``[N, size, size]``."""
    forms = {
        "images": Form(np.uint8, ("N", size, size)),
        "character": Form(np.integer, ("N",)),
        "character_names": Form(np.str_, ("C",)),
    }
    found = read_npz(path, forms)
    names, characters = found["character_names"], found["character"]
    check_range(f"the entries of character in {path}", characters, len(names))
    return names[characters].tolist(), found["images"]


def dataset_characters(name: str, size: int, data_dir: Path) -> Characters:
    """Omniglot, or a dataset of its features, prepared by TensorFlow Datasets.

    Splits ``train`` and ``test`` are taken together. What is not black is paper; the
    105x105 pixels are reduced by `reduce_by_area`. Omniglot takes some 15 seconds to read.

    Args:
      name: ``NAME`` or ``NAME:VERSION``, prepared under ``data_dir`` or in TensorFlow
        Datasets' own directory.
      size: height and width to reduce to, in pixels.
      data_dir: where to look first.

    Raises:
      UserError: TensorFlow Datasets is not installed; the dataset is unknown, not
        prepared, or in a format that only TensorFlow reads; it has other features; or
        the drawings are not equally many, see `group`.
    """
    text_sources.require_tfds(name)
    from metaopt.tasks.sources import tfds as text_dataset

    builder = text_dataset.find_dataset(name, data_dir)
    missing = sorted(set(_TFDS_FEATURES) - set(builder.info.features or {}))
    if missing:
        raise UserError(
            f"'tfds:{name}' has no feature {missing[0]!r}: use one with those of Omniglot, "
            f"{list(_TFDS_FEATURES)}"
        )
    sources = [text_dataset.open_split(builder, name, split) for split in _TFDS_SPLITS]
    alphabet = builder.info.features["alphabet"].int2str
    return group(
        (
            f"{alphabet(example['alphabet'])}/character{example['alphabet_char_id'] + 1:02d}",
            reduce_by_area(_ink(example["image"]), size),
        )
        for source in sources
        for example in source
    )


def _ink(image: np.ndarray) -> np.ndarray:
    """255 where a black and white picture is black, ``[height, width(, 3)]`` to two axes.

    Its white is 1 or 255, depending on the library that decodes the file.
    """
    grey = image.reshape(*image.shape[:2], -1)[..., 0]
    return np.where(grey == 0, np.uint8(255), np.uint8(0))


def reduce_by_area(image: np.ndarray, size: int) -> np.ndarray:
    """Reduces ``[height, width]`` to uint8 ``[size, size]``, rounded to the nearest.

    A new pixel is the mean of the old image over the square that it covers, with old
    pixels that lie partly within counted by that part.
    """
    rows, columns = (_overlaps(length, size) for length in image.shape)
    # From 105x105 to 28x28 the sums are exact: overlaps are quarters, and 255 times 3.75² small.
    sums = rows @ image.astype(np.float32) @ columns.T
    return np.rint(sums * size**2 / image.size).astype(np.uint8)


def _overlaps(length: int, size: int) -> np.ndarray:
    """How much of each old pixel lies in each new one, float32 ``[size, length]`` in [0, 1]."""
    edges = np.arange(size + 1) * length / size
    old = np.arange(length)
    ends = np.minimum(edges[1:, None], old + 1)
    begins = np.maximum(edges[:-1, None], old)
    return np.maximum(ends - begins, 0).astype(np.float32)


def group(drawings: Iterable[tuple[str, np.ndarray]]) -> Characters:
    """Orders drawings by the names of their characters, and then by their pixels.

    Args:
      drawings: pairs of a character's name and a uint8 array ``[height, width]``.

    Raises:
      UserError: there are none, or one character has fewer than another.
    """
    members: dict[str, list[np.ndarray]] = {}
    for name, image in drawings:
        members.setdefault(name, []).append(image)
    if not members:
        raise UserError("the image source holds no drawings: give one that does")
    names = sorted(members)
    fewest, most = (pick(names, key=lambda name: len(members[name])) for pick in (min, max))
    if len(members[fewest]) < len(members[most]):
        raise UserError(
            f"character {fewest!r} has {len(members[fewest])} drawings and {most!r} has "
            f"{len(members[most])}: give every character equally many"
        )
    ordered = [sorted(members[name], key=np.ndarray.tobytes) for name in names]
    return Characters(tuple(names), np.stack([np.stack(images) for images in ordered]))
