import dataclasses
import io
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.images import ImagesConfig, images, rotate_quarters, split_characters
from metaopt.tasks.sources import images as image_sources

OMNIGLOT = Path(__file__).parents[3] / "shared" / "data" / "omniglot"
SIZE, NUM_CHARACTERS, NUM_DRAWINGS = 6, 20, 6
NAMES = tuple(f"Alphabet/character{i + 1:02d}" for i in range(NUM_CHARACTERS))


def write_npz(path, pictures, names=NAMES):
    """Files in two orders, so that what comes out can owe nothing to theirs."""
    order = np.random.default_rng(1).permutation(len(names) * pictures.shape[1])
    characters = np.repeat(np.arange(len(names)), pictures.shape[1])[order]
    flat = pictures.reshape(-1, *pictures.shape[2:])[order]
    np.savez(path, images=flat, character=characters, character_names=np.array(names))


@pytest.fixture(scope="module")
def pictures():
    """Random pixels: no two drawings alike, in any rotation. [C, E, size, size]."""
    shape = (NUM_CHARACTERS, NUM_DRAWINGS, SIZE, SIZE)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawings")
    half = NUM_CHARACTERS // 2
    write_npz(path / "a_6x6.npz", pictures[half:], NAMES[half:])
    write_npz(path / "b_6x6.npz", pictures[:half], NAMES[:half])
    return path


@pytest.fixture(scope="module")
def config(folder):
    return ImagesConfig(
        source=str(folder),
        ways=4,
        shots=2,
        query_shots=3,
        image_size=SIZE,
        num_train_characters=10,
        num_valid_characters=4,
    )


@pytest.fixture(scope="module")
def identify(pictures):
    """From inputs ``[..., S, size, size, 1]`` to (character, drawing, turns) ``[..., S, 3]``."""
    known = {
        np.rot90(pictures[c, e], k).tobytes(): (c, e, k)
        for c, e, k in np.ndindex(NUM_CHARACTERS, NUM_DRAWINGS, 4)
    }

    def identities(inputs):
        pixels = np.rint(np.asarray(inputs)[..., 0] * 255).astype(np.uint8)
        found = [known[image.tobytes()] for image in pixels.reshape(-1, SIZE, SIZE)]
        return np.array(found).reshape(*pixels.shape[:-2], 3)

    return identities


@pytest.fixture(scope="module")
def episodes(config):
    """100 episodes of each split."""
    return [split.sample(jax.random.key(0), 100) for split in images(config)[1:]]


def both(batches):
    """Support and query after one another, along the axis of examples."""
    return (np.concatenate(pair, axis=1) for pair in zip(*batches, strict=True))


def test_an_episode_holds_every_class_once_a_round(episodes):
    for episode in episodes:
        for batch, shots in ((episode.support, 2), (episode.query, 3)):
            assert batch.inputs.shape == (100, 4 * shots, SIZE, SIZE, 1)
            assert batch.inputs.dtype == jnp.float32 and batch.targets.dtype == jnp.int32
            rounds = np.sort(batch.targets.reshape(100, shots, 4), axis=-1)
            np.testing.assert_array_equal(rounds, np.broadcast_to(np.arange(4), rounds.shape))
            assert batch.inputs.min() >= 0 and 0.9 < batch.inputs.max() <= 1
        np.testing.assert_array_equal(episode.task, np.arange(100))


def test_a_label_is_one_character_in_one_rotation_and_no_drawing_comes_twice(episodes, identify):
    for episode in episodes:
        inputs, targets = both([episode.support, episode.query])
        for label in range(4):
            one = identify(inputs)[targets == label].reshape(100, 5, 3)
            assert (one[:, :, 0] == one[:, :1, 0]).all() and (one[:, :, 2] == one[:, :1, 2]).all()
            assert all(len(set(drawings)) == 5 for drawings in one[:, :, 1])
        for labels, found in zip(targets, identify(inputs), strict=True):
            assert len(set(found[:, 0])) == len(set(labels)) == 4


def test_labels_and_places_are_drawn_anew(episodes, identify):
    inputs, targets = both([episodes[0].support, episodes[0].query])
    characters = identify(inputs)[..., 0]
    for character in np.unique(characters):
        assert set(targets[characters == character]) == {0, 1, 2, 3}
    counts = np.stack([(targets == label).sum(0) for label in range(4)])  # [label, place]
    assert counts.min() > 8 and counts.max() < 45  # 25 expected, standard deviation 4.3
    assert len({tuple(row) for row in targets[:, :4]}) > 18  # of 24 orders of a round


def test_splits_share_no_character_in_any_rotation(episodes, identify, config):
    seen = [identify(episode.support.inputs) for episode in episodes]
    characters = [set(found[..., 0].ravel()) for found in seen]
    assert [len(one) for one in characters] == [10, 4, 6]
    assert len(set.union(*characters)) == NUM_CHARACTERS
    for found, split in zip(seen, split_characters(NAMES, config), strict=True):
        assert set(found[..., 0].ravel()) == set(split)
        assert set(found[..., 1].ravel()) == set(range(NUM_DRAWINGS))
        assert set(found[..., 2].ravel()) == {0, 1, 2, 3}


def test_rotations_are_a_choice(config, identify):
    def turns(split):
        return set(identify(split.sample(jax.random.key(0), 20).query.inputs)[..., 2].ravel())

    upright = images(dataclasses.replace(config, rotate_held_out=False))
    assert [len(turns(split)) for split in upright[1:]] == [4, 1, 1]
    assert turns(images(dataclasses.replace(config, rotations=False)).train) == {0}


def test_a_quarter_is_ninety_degrees_anticlockwise():
    image = jnp.zeros((5, 5)).at[0, 1].set(1.0)  # at the top, left of the middle
    places = [jnp.argwhere(rotate_quarters(image, jnp.int32(k)))[0].tolist() for k in range(4)]
    assert places == [[0, 1], [3, 0], [4, 3], [1, 4]]


def test_sampling_is_pure_in_the_key(config, episodes):
    train = images(config).train
    jax.tree.map(np.testing.assert_array_equal, train.sample(jax.random.key(0), 100), episodes[0])
    other = train.sample(jax.random.key(1), 100)
    assert not np.array_equal(other.query.targets, episodes[0].query.targets)
    assert not np.array_equal(other.query.inputs, episodes[0].query.inputs)


def test_splits_follow_their_seed(config):
    seeds = [split_characters(NAMES, dataclasses.replace(config, split_seed=s)) for s in range(4)]
    for split in seeds:
        assert [len(part) for part in split] == [10, 4, 6]
        assert sorted(itertools.chain(*split)) == list(range(NUM_CHARACTERS))
    assert seeds[0] == split_characters(NAMES, config) and len({str(split) for split in seeds}) == 4


def test_drawings_are_ordered_by_character_and_pixels(folder, pictures):
    characters = image_sources.folder_characters(folder, SIZE)
    assert characters.names == NAMES and characters.images.dtype == np.uint8
    for ours, theirs in zip(characters.images, pictures, strict=True):
        ordered = [image.tobytes() for image in ours]
        assert ordered == sorted(image.tobytes() for image in theirs)


def by_area(pictures):
    """From 105x105 to 28x28 through 420x420, of which both are divisors."""
    fine = np.kron(pictures, np.ones((4, 4))).reshape(*pictures.shape[:-2], 28, 15, 28, 15)
    return np.rint(fine.mean((-3, -1))).astype(np.uint8)


def test_reducing_keeps_the_mean_ink_of_every_area():
    picture = np.random.default_rng(0).integers(0, 2, (105, 105), dtype=np.uint8) * np.uint8(255)
    np.testing.assert_array_equal(image_sources.reduce_by_area(picture, 28), by_area(picture))
    np.testing.assert_array_equal(image_sources.reduce_by_area(picture, 105), picture)


@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="Omniglot is not on this machine")
def test_real_omniglot():
    config = ImagesConfig(source=str(OMNIGLOT), ways=20, shots=5, query_shots=5)
    characters = image_sources.folder_characters(OMNIGLOT, 28)
    assert characters.images.shape == (1623, 20, 28, 28) and len(set(characters.names)) == 1623
    assert [len(split) for split in split_characters(characters.names, config)] == [1100, 100, 423]
    episode = images(config).test.sample(jax.random.key(0), 2)
    assert 0.05 < episode.query.inputs.mean() < 0.12  # ink, not paper, is 1

    for part in ("background", "evaluation"):
        with np.load(OMNIGLOT / f"omniglot_{part}_105x105_packed.npz") as packed:
            bits = np.unpackbits(packed["packed"][::400], axis=1)[:, :11025].reshape(-1, 105, 105)
        with np.load(OMNIGLOT / f"omniglot_{part}_28x28.npz") as small:
            reduced = [image_sources.reduce_by_area(image * 255, 28) for image in bits]
            np.testing.assert_array_equal(reduced, small["images"][::400])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ways": 1}, "ways is 1"),
        ({"shots": 0}, "shots is 0"),
        ({"query_shots": 0}, "query_shots is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_valid_characters": 0}, "num_valid_characters is 0"),
        ({"ways": 5}, "5-way episode needs 5 characters, and validation has 4 of the 20"),
        ({"ways": 11}, "and training has 10 of the 20"),
        ({"num_train_characters": 15}, "and test has 1 of the 20"),
        ({"num_train_characters": 1100}, "and validation has 0 of the 20"),
        ({"query_shots": 5}, "2 shots and 5 query_shots need 7 drawings .* has 6"),
        ({"source": "no/such/folder"}, "'no/such/folder' is no folder.*download_and_prepare"),
        ({"image_size": 28}, r"has no file \*_28x28.npz"),
    ],
)
def test_bad_configs_say_what_to_do(config, change, words):
    with pytest.raises(UserError, match=words) as caught:
        images(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


def test_bad_files_say_what_to_do(pictures, tmp_path):
    def raises(words):
        with pytest.raises(UserError, match=words) as caught:
            image_sources.folder_characters(tmp_path, SIZE)
        assert "\n" not in str(caught.value)

    path = tmp_path / "x_6x6.npz"
    good = {
        "images": pictures[:2, 0],
        "character": np.array([0, 1]),
        "character_names": np.array(["a", "b"]),
    }
    for change, words in (
        ({"images": good["images"] / 255}, r"images is float64 \[2, 6, 6\], not uint8"),
        ({"images": good["images"][:, :4]}, r"images is uint8 \[2, 4, 6\], not uint8 \[N, 6, 6\]"),
        ({"character": np.array([0, 1, 1])}, r"character is int64 \[3\], not"),
        ({"character": np.array([0, 2])}, "character in .* must be from 0 to 1.*such as 2"),
        ({"character": np.array([0, -1])}, "character in .* must be from 0 to 1.*such as -1"),
        ({"character": np.array([0.0, 1.0])}, r"character is float64 \[2\], not integers"),
        ({"character": np.array([[0], [1]])}, r"character is int64 \[2, 1\], not integers"),
        ({"images": pictures[:0, 0], "character": np.array([], int)}, "holds no drawings"),
    ):
        np.savez(path, **{**good, **change})
        raises(words)
    np.savez(path, images=good["images"])
    raises("cannot read .*x_6x6.npz: .*character")
    for content in (b"no npz file", b"", path.read_bytes()[:-99]):
        path.write_bytes(content)
        raises("cannot read .*x_6x6.npz")

    np.savez(path, **good)
    np.savez(tmp_path / "y_6x6.npz", **good)
    raises("'a' is in more than one file")
    uneven = {**good, "images": pictures[:3, 0], "character": np.array([0, 0, 1])}
    (tmp_path / "y_6x6.npz").unlink()
    np.savez(path, **uneven)
    raises("'b' has 1 drawings and 'a' has 2")


@pytest.fixture(scope="module")
def scans():
    """Ink in 105x105 pixels, uint8 0 or 255, 3 characters of each of 2 alphabets, 2 drawings."""
    return np.random.default_rng(3).integers(0, 2, (6, 2, 105, 105), dtype=np.uint8) * 255


@pytest.fixture(scope="module")
def prepared(scans, tmp_path_factory):
    """The scans as TensorFlow Datasets would prepare Omniglot: black on white, one bit a pixel."""
    import tensorflow_datasets as tfds
    from PIL import Image

    root = tmp_path_factory.mktemp("tfds")

    class Scans(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(105, 105, 3), encoding_format="png"),
                "alphabet": tfds.features.ClassLabel(names=["Greek", "Arcadian"]),
                "alphabet_char_id": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            parts = {"train": range(3), "test": range(3, 6), "small1": range(1)}
            return {name: self._generate_examples(part) for name, part in parts.items()}

        def _generate_examples(self, part=()):
            for c, e in itertools.product(part, range(2)):
                png = io.BytesIO()
                Image.fromarray(255 - scans[c, e]).convert("1", dither=0).save(png, "png")
                png.seek(0)
                yield f"{c} {e}", {"image": png, "alphabet": c // 3, "alphabet_char_id": c % 3}

    class Numbers(Scans):
        def _info(self):
            features = tfds.features.FeaturesDict({"image": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, part=()):
            yield 0, {"image": 0}

    for builder in (Scans, Numbers):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def test_a_tfds_dataset_gives_what_a_folder_gives(scans, prepared, tmp_path):
    names = [f"{alphabet}/character0{i}" for alphabet in ("Greek", "Arcadian") for i in (1, 2, 3)]
    write_npz(tmp_path / "scans_28x28.npz", by_area(scans), names)
    from_folder = image_sources.folder_characters(tmp_path, 28)
    from_dataset = image_sources.dataset_characters("scans:1.0.0", 28, prepared)
    assert from_dataset.names == from_folder.names == tuple(sorted(names))
    np.testing.assert_array_equal(from_dataset.images, from_folder.images)
    assert "tensorflow" not in sys.modules

    config = ImagesConfig(
        source="tfds:scans",
        ways=2,
        num_train_characters=2,
        num_valid_characters=2,
        data_dir=str(prepared),
    )
    assert images(config).train.sample(jax.random.key(0), 3).query.inputs.shape == (3, 2, 28, 28, 1)


def test_bad_tfds_datasets_say_what_to_do(prepared, tmp_path, monkeypatch):
    def raises(words, name="scans", data_dir=prepared):
        with pytest.raises(UserError, match=words) as caught:
            image_sources.dataset_characters(name, 28, data_dir)
        assert "\n" not in str(caught.value)

    raises("cannot open 'tfds:no_such'", name="no_such")
    raises("'tfds:scans' is not prepared", data_dir=tmp_path)
    raises("'tfds:numbers' has no feature 'alphabet'", name="numbers")

    info = prepared / "scans" / "1.0.0" / "dataset_info.json"
    kept = info.read_text()
    info.write_text(kept.replace('"array_record"', '"tfrecord"'))
    try:
        raises("cannot be read without TensorFlow")
    finally:
        info.write_text(kept)

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    raises("needs TensorFlow Datasets: pip install")
