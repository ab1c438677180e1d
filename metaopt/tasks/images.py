"""Few-shot classification of handwritten characters: an episode is N characters to tell apart.

Every episode draws N characters ("ways"), of each some drawings to learn from ("shots")
and others to be judged by, and gives the characters the labels 0 to N - 1 at random.

The split is by characters: a character, in all its rotations, is in one split only.
The names of Omniglot's 1623 characters are ordered, permuted by ``split_seed``, and cut
into 1100 for training, 100 for validation and 423 for test. These are the numbers of the
released code of Finn et al.: of the 1200 training characters of the papers it keeps 100
for validation. Their own list of characters depended on the order of a directory and
cannot be had again.

References:
  Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic
  program induction", 2015: the drawings.
  Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", 2016: 1200
  characters for training, and rotations that make new classes.
  Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
  Networks", 2017, section 5.2.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.ranges import Checked, Count, ImageSize, Range, Seed
from metaopt.tasks.sources import images as image_sources
from metaopt.tasks.sources.images import Characters
from metaopt.tasks.sources.text import data_directory
from metaopt.types import Array, Batch, Episode, Key, TaskFamily, TaskSplit

_TFDS = "tfds:"


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(Checked):
    """Which drawings, how they make an episode, and which characters are held out.

    Attributes:
      source: ``tfds:omniglot``, prepared by TensorFlow Datasets, or a folder of npz files
        as `metaopt.tasks.sources.images.folder_characters` reads them.
      ways: N, characters in an episode.
      shots: support drawings of each character.
      query_shots: query drawings of each character. As many as ``shots`` in the released
        code of Finn et al., so that a transductive batch norm sees every class equally
        often; 15 is usual elsewhere.
      rotations: turn each character of an episode by 0, 90, 180 or 270 degrees, at random,
        all its drawings alike. The N characters are distinct all the same: two rotations
        of one character never meet, since many characters are symmetric.
      rotate_held_out: turn those of validation and test too, as the released code of Finn
        et al. does; that of Reptile and of MAML++ does not.
      image_size: height and width, in pixels.
      num_train_characters: number of characters for training.
      num_valid_characters: number for validation; the rest is for the test.
      split_seed: decides which.
      data_dir: where ``tfds:`` datasets are looked for first; ``$METAOPT_DATA`` if not
        given, or else ``data``.
    """

    source: str = "tfds:omniglot"
    ways: Annotated[int, Range(2, 10_000)] = 5
    shots: Count = 1
    query_shots: Count = 1
    rotations: bool = True
    rotate_held_out: bool = True
    image_size: ImageSize = 28
    num_train_characters: Count = 1100
    num_valid_characters: Count = 100
    split_seed: Seed = 0
    data_dir: str | None = None


def images(config: ImagesConfig) -> TaskFamily:
    """N-way few-shot episodes as a task family, in three splits that share no character.

    Inputs are float32 ``[T, S, size, size, 1]`` in [0, 1], ink 1 on 0, and targets int32
    ``[T, S]`` in 0 to N - 1, with S = N · shots; the query likewise. No drawing is in both.
    Examples stand in rounds of N that hold every class once, each in an order of its own:
    what is cut into ``shots`` batches has all classes in each. Every episode is a new task.

    All drawings go to the default device, 25 MB for Omniglot, when the family is made.

    Raises:
      UserError: a number in ``config`` is too small, the source is missing or unreadable,
        a split has fewer characters than an episode, or a character too few drawings.
    """
    characters = _find_characters(config)
    _check_drawings(characters, config)
    splits = split_characters(characters.names, config)
    held_out = config.rotations and config.rotate_held_out
    train, valid, test = (
        TaskSplit(
            functools.partial(_sample, config, rotate, jnp.asarray(characters.images[indices]))
        )
        for indices, rotate in zip(splits, (config.rotations, held_out, held_out), strict=True)
    )
    return TaskFamily("images", train, valid, test)


def split_characters(
    names: tuple[str, ...], config: ImagesConfig
) -> tuple[list[int], list[int], list[int]]:
    """Which characters are for training, validation and test, as ascending indices.

    Raises:
      UserError: a split would have fewer characters than an episode.
    """
    order = np.random.default_rng(config.split_seed).permutation(len(names))
    ends = np.cumsum([config.num_train_characters, config.num_valid_characters])
    splits = np.split(order, ends)
    for split, indices in zip(("training", "validation", "test"), splits, strict=True):
        if len(indices) < config.ways:
            raise UserError(
                f"a {config.ways}-way episode needs {config.ways} characters, and {split} has "
                f"{len(indices)} of the {len(names)} in {config.source}: lower ways, or change "
                "num_train_characters and num_valid_characters"
            )
    train, valid, test = (sorted(indices.tolist()) for indices in splits)
    return train, valid, test


@functools.partial(jax.jit, static_argnames=("config", "rotate", "num_tasks"))
def _sample(
    config: ImagesConfig, rotate: bool, drawings: Array, key: Key, num_tasks: int
) -> Episode:
    """T episodes. The drawings are an argument: as a constant, they would be compiled in."""
    keys = jax.random.split(key, num_tasks)
    draw_episode = functools.partial(_draw_episode, config, rotate, drawings)
    support, query = jax.vmap(draw_episode)(keys)
    return Episode(support, query, jnp.arange(num_tasks, dtype=jnp.int32))


def _draw_episode(
    config: ImagesConfig, rotate: bool, drawings: Array, key: Key
) -> tuple[Batch, Batch]:
    """One episode of drawings uint8 ``[C, E, height, width]``, in rounds of all N classes."""
    num_characters, num_drawings = drawings.shape[:2]
    rounds = config.shots + config.query_shots
    shapes = [(num_characters,), (config.ways, num_drawings), (rounds, config.ways), (config.ways,)]
    for_characters, for_drawings, for_labels, for_turns = _uniform(key, shapes)
    character_of_label = _distinct(for_characters, config.ways)
    drawing_of_label = _distinct(for_drawings, rounds)
    labels = _distinct(for_labels, config.ways)
    chosen = drawing_of_label[labels, jnp.arange(rounds)[:, None]]
    pictures = drawings[character_of_label[labels], chosen]
    if rotate:
        turns = (4 * for_turns).astype(jnp.int32)
        pictures = jax.vmap(jax.vmap(rotate_quarters))(pictures, turns[labels])
    inputs = pictures.astype(jnp.float32)[..., None] / 255
    support, query = (
        Batch(inputs[part].reshape(-1, *inputs.shape[2:]), labels[part].reshape(-1))
        for part in (slice(config.shots), slice(config.shots, None))
    )
    return support, query


def _uniform(key: Key, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Float32 numbers in [0, 1) of several shapes, from one draw: several compile for longer."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(
        jax.random.uniform(key, (sum(sizes),), jnp.float32), list(itertools.accumulate(sizes[:-1]))
    )
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _distinct(numbers: Array, count: int) -> Array:
    """Indices into the last axis, drawn without replacement, int32 ``[..., count]``.

    They are where the largest of independent uniform ``numbers`` stand.
    `jax.random.choice` would sort all of them, which takes ten times as long on CPU.
    """
    return jax.lax.top_k(numbers, count)[1]


def rotate_quarters(image: Array, turns: Array) -> Array:
    """Turns a square image ``[size, size]`` by 90 degrees, anticlockwise, ``turns`` times.

    Args:
      image: any dtype.
      turns: int32 scalar, 0 to 3.
    """
    return jax.lax.switch(turns, [functools.partial(jnp.rot90, k=k) for k in range(4)], image)


def _find_characters(config: ImagesConfig) -> Characters:
    if config.source.startswith(_TFDS):
        data_dir = data_directory(config.data_dir)
        name = config.source.removeprefix(_TFDS)
        return image_sources.dataset_characters(name, config.image_size, data_dir)
    return image_sources.folder_characters(Path(config.source).expanduser(), config.image_size)


def _check_drawings(characters: Characters, config: ImagesConfig) -> None:
    needed, there = config.shots + config.query_shots, characters.images.shape[1]
    if there < needed:
        raise UserError(
            f"{config.shots} shots and {config.query_shots} query_shots need {needed} drawings of "
            f"each character, and {config.source} has {there}: lower shots or query_shots"
        )
