import dataclasses
import itertools
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.tasks.sources import text as text_sources
from metaopt.tasks.text import TextConfig, kin_of, split_domains, store, text

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text_domains"


@pytest.fixture
def folder(tmp_path):
    """Seven domains of random bytes, in which any nine in a row are found at one place only."""
    path = tmp_path / "source"
    path.mkdir()
    names = ["a", "b.txt", "c d", "é漢🙂", "new\nline", "train[:5%]", "g"]
    for seed, name in enumerate(names):
        size = 9001 + 300 * seed
        (path / name).write_bytes(np.random.default_rng(seed).bytes(size))
    return path


@pytest.fixture
def config(folder, tmp_path):
    return TextConfig(
        source=str(folder),
        num_support=3,
        num_query=5,
        length=12,
        num_valid_domains=1,
        num_test_domains=2,
        data_dir=str(tmp_path / "data"),
    )


@pytest.fixture
def no_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


def sequences(batch):
    return np.concatenate([batch.inputs, batch.targets[..., -1:]], axis=-1)


def starts(split, episode, folder):
    """Where in its domain each sequence of each task begins, [T, S + Q]."""
    found = []
    for t, task in enumerate(episode.task):
        whole = (folder / split.task_names[task]).read_bytes()
        both = np.concatenate([sequences(episode.support)[t], sequences(episode.query)[t]])
        found.append([whole.index(bytes(row.tolist())) for row in both])
    return np.array(found)


def test_targets_are_inputs_one_byte_later(config, no_tfds):
    episode = text(config).train.sample(jax.random.key(0), 6)
    assert episode.support.inputs.shape == episode.support.targets.shape == (6, 3, 12)
    assert episode.query.inputs.shape == episode.query.targets.shape == (6, 5, 12)
    assert {leaf.dtype for leaf in jax.tree.leaves(episode)} == {np.dtype(np.int32)}
    for batch in (episode.support, episode.query):
        np.testing.assert_array_equal(batch.inputs[..., 1:], batch.targets[..., :-1])


@pytest.mark.parametrize("length", [12, 1124])  # the longer leaves a domain of 9001 one byte over
def test_no_two_sequences_of_an_episode_overlap(config, folder, no_tfds, length):
    config = dataclasses.replace(config, length=length)
    for split in text(config)[1:]:
        begins = np.sort(starts(split, split.sample(jax.random.key(1), 9), folder), axis=1)
        assert np.diff(begins, axis=1).min() >= length + 1


def test_episodes_reach_the_whole_domain(config, folder, no_tfds):
    config = dataclasses.replace(config, length=600, test_domains=("a",))  # 8 of 14 or 15 cells
    test = text(config).test
    begins = starts(test, test.sample(jax.random.key(2), 400), folder)
    assert begins.min() < 100 and begins.max() > 9001 - 601 - 100
    assert len(set((begins % 601).flat)) > 250  # not always the same grid


def test_sampling_is_pure_in_the_key(config, no_tfds):
    train = text(config).train
    one, same, other = (train.sample(jax.random.key(seed), 4) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one.support.inputs, other.support.inputs)


def test_tasks_come_in_balanced_cycles(config, no_tfds):
    train = text(config).train
    tasks = train.sample(jax.random.key(0), 14).task
    assert [sorted(tasks[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert len(set(tasks[12:])) == 2
    firsts = {train.sample(jax.random.key(seed), 1).task.item() for seed in range(40)}
    assert firsts == {0, 1, 2, 3}


def test_splits_share_no_domain_and_follow_their_seed(config):
    names = [f"domain {i}" for i in range(9)]
    splits = [
        split_domains(names, dataclasses.replace(config, split_seed=seed)) for seed in range(5)
    ]
    for split in splits:
        assert [len(part) for part in split] == [6, 1, 2]
        assert sorted(itertools.chain(*split)) == list(range(9))
    assert splits[0] == split_domains(names, config)
    assert any(split != splits[0] for split in splits[1:])
    chosen = split_domains(names, dataclasses.replace(config, test_domains=(names[7], names[1])))
    assert chosen[2] == [1, 7] and sorted(itertools.chain(*chosen)) == list(range(9))


def test_stored_blocks_and_files_in_place_give_the_same_bytes(config, folder, monkeypatch):
    stored = text(config)
    assert "tensorflow" not in sys.modules
    domains = text_sources.folder_domains(folder)
    blocks = store("source", domains, Path(config.data_dir))
    for one, file in zip(blocks, domains, strict=True):
        assert (one.name, one.size) == (file.name, file.size)
        for start, length in ((0, one.size), (4095, 2), (4096, 4096), (one.size, 0), (8000, 1001)):
            np.testing.assert_array_equal(one.read(start, length), file.read(start, length))
        with pytest.raises(IndexError):
            one.read(one.size - 1, 2)

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    in_place = text(config)
    for ours, theirs in zip(stored[1:], in_place[1:], strict=True):
        assert ours.task_names == theirs.task_names
        jax.tree.map(
            np.testing.assert_array_equal,
            *(split.sample(jax.random.key(5), 5) for split in (ours, theirs)),
        )


def test_changed_text_is_stored_again_beside_the_old(config, folder, capsys):
    data_dir = Path(config.data_dir)
    text(config)
    (first,) = data_dir.iterdir()
    assert f"KiB of text are copied to {first}" in capsys.readouterr().err
    written = {path: path.stat().st_mtime_ns for path in first.rglob("*.*")}
    text(config)
    assert list(data_dir.iterdir()) == [first] and "copied" not in capsys.readouterr().err
    assert written == {path: path.stat().st_mtime_ns for path in first.rglob("*.*")}

    whole = bytearray((folder / "g").read_bytes())
    whole[5000] ^= 1
    (folder / "g").write_bytes(whole)
    text(config)
    (folder / "g").rename(folder / "h")
    text(config)
    assert first in data_dir.iterdir() and len(list(data_dir.iterdir())) == 3


KILLED_HALFWAY = """
import os, sys
from pathlib import Path
import metaopt.tasks.text
from metaopt.tasks.sources import text as text_sources
assert "tensorflow_datasets" not in sys.modules
from metaopt.tasks.sources import tfds as text_dataset

def read_then_die(start, length):
    if start >= 8192:
        os._exit(7)
    return domain.read(start, length)

folder, directory = map(Path, sys.argv[1:])
domain, *rest = text_sources.folder_domains(folder)
text_dataset.stored_domains(directory, lambda: [*rest, domain._replace(read=read_then_die)])
"""


def test_interrupted_storing_is_not_taken_as_whole(folder, tmp_path):
    from metaopt.tasks.sources import tfds as text_dataset

    directory = tmp_path / "half"
    command = [sys.executable, "-c", KILLED_HALFWAY, str(folder), str(directory)]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == 7, killed.stderr
    assert list(directory.rglob("incomplete*"))

    domains = text_sources.folder_domains(folder)
    again = text_dataset.stored_domains(directory, lambda: domains)
    for stored, file in zip(again, domains, strict=True):
        np.testing.assert_array_equal(stored.read(0, stored.size), file.read(0, file.size))


def test_of_two_processes_that_store_one_wins(folder, tmp_path):
    from metaopt.tasks.sources import tfds as text_dataset

    domains = text_sources.folder_domains(folder)

    def read_while_another_finishes(start, length):
        text_dataset.stored_domains(tmp_path / "both", lambda: domains)
        return domains[0].read(start, length)

    slow = [domains[0]._replace(read=read_while_another_finishes), *domains[1:]]
    stored = text_dataset.stored_domains(tmp_path / "both", lambda: slow)
    np.testing.assert_array_equal(stored[0].read(0, 9001), domains[0].read(0, 9001))


def test_stdlib_domains_are_the_sources_end_to_end():
    domains = {domain.name: domain for domain in text_sources.stdlib_domains()}
    assert {"argparse", "asyncio", "typing"} <= set(domains)
    assert not {"test", "site-packages", "encodings"} & set(domains)
    assert min(domain.size for domain in domains.values()) >= text_sources.STDLIB_MIN_BYTES
    package = domains["asyncio"]
    paths = sorted(Path(sysconfig.get_paths()["stdlib"], "asyncio").glob("*.py"))
    whole = b"".join(path.read_bytes() for path in paths)
    assert package.read(0, package.size).tobytes() == whole


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="the text domains are not on this machine")
def test_real_text_holds_each_domain_once_in_a_cycle(no_tfds):
    train = text(TextConfig(source=str(REAL_TEXT))).train
    episode = train.sample(jax.random.key(0), len(train.task_names))
    assert sorted(episode.task) == list(range(len(train.task_names)))
    assert len(np.unique(episode.support.inputs)) > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_query": 0}, "num_query is 0"),
        ({"length": -1}, "length is -1"),
        ({"source": "no/such/folder"}, "'no/such/folder' is no folder"),
        ({"length": 1125}, "'a' has 9001 bytes.* needs 9008"),
        ({"num_test_domains": 6}, "7 domains, too few for 1 to validate, 6 to test"),
        ({"num_test_domains": 60}, "7 domains, too few"),
        ({"test_domains": ("zebra",)}, "no domain 'zebra'"),
    ],
)
def test_bad_configs_say_what_to_do(config, change, words):
    with pytest.raises(UserError, match=words) as caught:
        text(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)
    assert not Path(config.data_dir).exists()


def test_bad_folders_say_what_to_do(config, folder, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="is empty"):
        text(dataclasses.replace(config, source=str(empty)))

    (folder / ".hidden").mkdir()  # passed over
    (folder / "inner").mkdir()
    with pytest.raises(UserError, match="inner is not a file"):
        text(config)
    (folder / "inner").rmdir()

    (folder / "dangling").symlink_to(folder / "nothing")
    with pytest.raises(UserError, match="dangling is not a file"):
        text(config)
    (folder / "dangling").unlink()

    really_open = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "g":
            raise PermissionError(13, "Permission denied")
        return really_open(path, *args, **kwargs)

    with monkeypatch.context() as patch:  # permission bits do not bind a superuser
        patch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"cannot read .*g: Permission denied"):
            text(config)

    occupied = dataclasses.replace(config, data_dir=str(folder / "a"))
    with pytest.raises(UserError, match="cannot store text under"):
        text(occupied)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A small prepared dataset: reviews with a class label, one of them unlabelled."""
    import tensorflow_datasets as tfds

    class MetaoptReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "place": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["poor", "good"]),
                "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0), "test": self._generate_examples(4)}

        def _generate_examples(self, first=0):
            for i in range(4):
                example = {"text": f"review {first + i}", "place": f"town {i % 3}"}
                yield i, {**example, "label": (1, 0, 1, -1)[i], "scores": [0, 1]}

    root = tmp_path_factory.mktemp("tfds")
    MetaoptReviews(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def whole(domain):
    return domain.read(0, domain.size).tobytes()


def test_tfds_examples_are_grouped_by_a_feature(reviews):
    from metaopt.tasks.sources import tfds

    by_label = tfds.grouped_domains("metaopt_reviews", "text", "label", reviews)
    assert [domain.name for domain in by_label] == ["good", "poor"]
    assert whole(by_label[0]) == b"review 0\nreview 2\nreview 4\nreview 6\n"
    by_place = tfds.grouped_domains("metaopt_reviews:1.0.0", "text", "place", reviews)
    assert [domain.name for domain in by_place] == ["town 0", "town 1", "town 2"]
    assert whole(by_place[1]) == b"review 1\nreview 5\n"


def test_a_tfds_dataset_makes_episodes(reviews):
    config = TextConfig(
        source="tfds:metaopt_reviews",
        num_support=1,
        num_query=1,
        length=4,
        num_valid_domains=1,
        num_test_domains=1,
        domain_feature="place",
        data_dir=str(reviews),
    )
    family = text(config)
    assert family.train.sample(jax.random.key(0), 2).query.inputs.shape == (2, 1, 4)
    with pytest.raises(UserError, match="'town 1' has 18 bytes"):
        text(dataclasses.replace(config, length=9))
    assert "tensorflow" not in sys.modules


def test_bad_tfds_datasets_say_what_to_do(reviews, tmp_path, monkeypatch):
    from metaopt.tasks.sources import tfds

    def raises(words, name="metaopt_reviews", text_feature="text", label="label", data_dir=reviews):
        with pytest.raises(UserError, match=words) as caught:
            tfds.grouped_domains(name, text_feature, label, data_dir)
        assert "\n" not in str(caught.value)

    raises("cannot open 'tfds:no_such': Dataset no_such not found", name="no_such")
    raises("cannot open 'tfds:'", name="")
    raises("cannot open .*zebra", name="metaopt_reviews/zebra")
    raises("'tfds:ag_news_subset' is not prepared", name="ag_news_subset", data_dir=tmp_path)
    raises(r"no text_feature 'label': choose one of \['place', 'text'\]", text_feature="label")
    raises(r"no domain_feature 'scores': .*\['label', 'place', 'text'\]", label="scores")

    info = reviews / "metaopt_reviews" / "1.0.0" / "dataset_info.json"
    kept = info.read_text()
    info.write_text(kept.replace('"array_record"', '"tfrecord"'))
    try:
        raises("cannot be read without TensorFlow")
    finally:
        info.write_text(kept)

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="needs TensorFlow Datasets: pip install"):
        text(TextConfig(source="tfds:metaopt_reviews", data_dir=str(reviews)))


def test_folds_hold_out_every_domain_once_and_never_part_kin(tmp_path):
    names = [f"{kind}_{i}" for kind in ("bible", "log", "novel") for i in range(6)]
    kin = tmp_path / "kin.txt"
    kin.write_text("bible_0 bible_1 bible_2 bible_3 bible_4 bible_5\nlog_0 log_4 elsewhere\n\n")
    config = TextConfig(num_folds=3, kin=str(kin), num_valid_domains=3)
    tests = []
    for fold in range(3):
        train, valid, test = split_domains(names, dataclasses.replace(config, fold=fold))
        assert sorted(train + valid + test) == list(range(18)) and train and valid
        for part in (train, valid, test):
            assert len({0, 1, 2, 3, 4, 5} & set(part)) in (0, 6)
            assert len({6, 10} & set(part)) in (0, 2)
        assert len(test) == 6 and len(valid) <= 3
        tests += test
    assert sorted(tests) == list(range(18))
    assert kin_of(names, config)[:11] == [0] * 6 + [6, 7, 8, 9, 6]
    one = dataclasses.replace(config, num_folds=0, test_domains=("log_4",))
    assert split_domains(names, one)[2] == [6, 10]  # its kin too


def test_wrong_folds_and_kin_are_refused(tmp_path):
    names = ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="fold 2 of 2"):
        split_domains(names, TextConfig(num_folds=2, fold=2))
    (tmp_path / "kin").write_text("a b\nc a\n")
    with pytest.raises(UserError, match="'a' twice"):
        split_domains(names, TextConfig(kin=str(tmp_path / "kin")))
    with pytest.raises(UserError, match="nowhere"):
        split_domains(names, TextConfig(kin="nowhere"))


@pytest.mark.parametrize("stored", [True, False])
def test_tasks_are_drawn_by_several_threads_at_once(config, monkeypatch, stored):
    """As a training that waits for data does; blocks of a stored text are in a common cache."""
    if not stored:
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    train = text(config).train
    alone = [train.sample(jax.random.key(seed), 3) for seed in range(40)]
    again = text(config).train  # with an empty cache
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: again.sample(jax.random.key(seed), 3), range(40)))
    for one, other in zip(alone, together, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
