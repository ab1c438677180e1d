import dataclasses

import jax
import numpy as np
import pytest

from experiments.table_test_time_training import documents, memory, presets, reading, run
from experiments.table_test_time_training.rows import (
    ALONE,
    SECOND,
    STATIC,
    TTT,
    WINDOW,
    Settings,
    Starts,
)
from metaopt.errors import UserError
from metaopt.reporting.tables import read_records
from metaopt.training.loop import train

SMOKE = dataclasses.replace(presets("smoke"), parts=("switching",))


def starts(tmp_path, **changes):
    config = dataclasses.replace(SMOKE, **changes)
    source = documents.find("switching", config)
    return Starts(config, source, tmp_path, train, lambda *_: Settings(0.1, 0.0))


def test_a_run_writes_tables_and_figure(tmp_path):
    run(dataclasses.replace(SMOKE, root=str(tmp_path), rows=(TTT.name, SECOND.name)))
    (place,) = (tmp_path / "table_test_time_training").iterdir()
    records = read_records(place / "results.jsonl")
    main = {
        (r["row"], r["column"]): r["value"]
        for r in records
        if r["table"] == "test_time_training/switching"
    }
    names = [STATIC.name, WINDOW.name, TTT.name, SECOND.name]
    assert list(dict.fromkeys(row for row, _ in main)) == names
    assert np.isfinite(list(main.values())).all()
    loss = {name: main[name, "bits/symbol"] for name in names}
    gain = loss[STATIC.name] - loss[WINDOW.name]
    assert main[SECOND.name, "context gain"] == pytest.approx(gain)  # that of the plain start
    gain = loss[WINDOW.name] - loss[SECOND.name]
    assert main[SECOND.name, "adaptation gain"] == pytest.approx(gain)
    assert (place / "switching.png").exists()


def test_nothing_of_a_chunk_is_known_before_it_is_scored(tmp_path):
    """What comes later in a document changes no loss before it, under any rule."""
    found = starts(tmp_path)
    test = found.source.test
    other = jax.tree.map(np.copy, test)
    other.inputs[:, 16:], other.targets[:, 16:] = 1, 1
    meta_params = found.learner("joint").init(found._initial("joint"))
    for row in (STATIC, WINDOW, TTT):
        settings = [Settings(0.3, 0.01)]
        one, two = (reading.read(found, row, meta_params, x, settings)[0] for x in (test, other))
        np.testing.assert_array_equal(one.nats[:, :16], two.nats[:, :16])
        assert not np.allclose(one.nats[:, 16:], two.nats[:, 16:])


def test_every_row_spends_as_many_operations(tmp_path):
    sizes = {"vocab_size": 16, "window": 16, "chunk": 16, "test_tokens": 512, "full_window": 64}
    sizes |= {"width": 32, "num_layers": 2, "meta_steps": 100}
    switching = dataclasses.replace(SMOKE.switching, **sizes)
    found = starts(tmp_path, switching=switching)
    names = ("joint", "FOMAML", "second order", "learned rates")
    cost = {name: found._operations(name) for name in (*names, *ALONE)}
    assert cost["joint"] < cost["FOMAML"] < cost["second order"]
    budget = 100 * cost["second order"]
    for name in names:
        assert abs(found.steps(name) * cost[name] - budget) <= cost[name] / 2
    budget += found.sizes.pretrain_steps * cost["joint"]
    for name in ALONE:
        assert abs(found.steps(name) * cost[name] - budget) <= cost[name] / 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_chunks": 3}, "must be even"),
        ({"full_window": 64}, "tokens of a training document"),
        ({"test_tokens": 500}, "no multiple of the window"),
        ({"valid_tokens": 1024}, "more than test_tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMOKE.sizes, **changes)


def test_parts_and_pairs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="unknown part 'book'"):
        dataclasses.replace(SMOKE, parts=("book",))
    for changes, words in (
        ({"widths": (8,)}, "width 8 is that of sizes"),
        ({"widths": (9,)}, "not divisible by num_heads"),
        ({"updates": (3,)}, "updates 3 must be even"),
        ({"rms_rates": (0.1, 0.2)}, "must be as many"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(SMOKE, **changes)
    assert presets("gpu").sizes.num_layers == 16  # its sizes fit one another
    with pytest.raises(UserError, match="read in pairs"):
        dataclasses.replace(SMOKE.recall, chunk=1, num_chunks=16)


def test_a_choice_of_nothing_is_refused(tmp_path):
    config = dataclasses.replace(SMOKE, root=str(tmp_path))
    for changes, words in (
        ({"parts": ("books",)}, "needs --books"),
        ({"rows": ("recurrent",)}, "none of these rows"),
        ({"parts": ("pretrained",)}, "pretrained.model PATH"),
        ({"parts": ("scale",)}, "give two of them"),
    ):
        with pytest.raises(UserError, match=words):
            run(dataclasses.replace(config, **changes))


def test_books_are_apart(tmp_path):
    for i in range(6):
        text = np.random.default_rng(i).integers(97, 123, 800).astype(np.uint8)
        (tmp_path / f"{i}.txt").write_bytes(text.tobytes())
    config = dataclasses.replace(SMOKE, books=str(tmp_path))
    source = documents.find("books", config)
    drawn = source.train.train.sample(jax.random.key(0), 50).support.inputs
    texts = [
        set(map(tuple, x.reshape(-1, x.shape[-1]).tolist())) for x in (drawn, source.test.inputs)
    ]
    assert len(source.test.inputs) == config.num_test and not texts[0] & texts[1]


def test_recall_scores_values_and_knows_when_they_were_last_read():
    source = documents.find("recall", SMOKE)
    tokens, targets = (x[0].reshape(-1) for x in (source.test.inputs, source.test.targets))
    distances = source.distances[0].reshape(-1)
    last, window = {}, source.sizes.window
    for i in range(0, len(tokens), 2):
        assert targets[i + 1] == -100 and np.isnan(distances[i + 1])  # a key to come
        assert distances[i] == (i - last.get(tokens[i], -np.inf)) / window
        if tokens[i] in last:
            assert tokens[last[tokens[i]] + 1] == targets[i]  # it has the same value
        last[tokens[i]] = i
    new = np.isinf(source.distances[0]).sum(axis=1) / (source.sizes.chunk / 2)
    np.testing.assert_allclose(source.limit[0], new * np.log(2))


@pytest.mark.slow
def test_what_was_read_is_recalled_within_the_window(tmp_path):
    """Of a model that is given the answers: of each key its last value, in its window."""
    sizes = dataclasses.replace(SMOKE.recall, pretrain_steps=150, width=16, num_layers=2)
    config = dataclasses.replace(SMOKE, parts=("recall",), recall=sizes, root=str(tmp_path))
    run(dataclasses.replace(config, rows=(WINDOW.name,)))
    (place,) = (tmp_path / "table_test_time_training").iterdir()
    found = {
        (r["row"], r["column"]): r["value"]
        for r in read_records(place / "results.jsonl")
        if r["table"] == "test_time_training/recall by distance"
    }
    assert found[WINDOW.name, "0 to 1 windows"] > found[WINDOW.name, "never read"] + 0.15


@pytest.mark.slow
def test_the_scale_compares_widths(tmp_path):
    for i in range(6):
        text = np.random.default_rng(i).integers(97, 123, 800).astype(np.uint8)
        (tmp_path / f"{i}.txt").write_bytes(text.tobytes())
    config = dataclasses.replace(
        SMOKE,
        books=str(tmp_path),
        widths=(32,),
        parts=("books", "scale"),
        root=str(tmp_path / "runs"),
    )
    run(dataclasses.replace(config, rows=(SECOND.name,)))
    (place,) = (tmp_path / "runs" / "table_test_time_training").iterdir()
    records = read_records(place / "results.jsonl")
    scale = [r for r in records if r["table"] == "test_time_training/scale"]
    assert [(r["row"], r["column"]) for r in scale] == [
        (SECOND.name, "0.0049 M"),
        (SECOND.name, "0.029 M"),
    ]
    gain = next(
        r["value"]
        for r in records
        if r["table"] == "test_time_training/books"
        and (r["row"], r["column"]) == (SECOND.name, "adaptation gain")
    )
    assert scale[0]["value"] == pytest.approx(gain)
    assert (place / "scale.png").exists()


def test_planned_memory_is_a_part_of_what_reverse_mode_takes(tmp_path):
    run(dataclasses.replace(SMOKE, parts=("memory",), root=str(tmp_path), updates=(2, 8)))
    (place,) = (tmp_path / "table_test_time_training").iterdir()
    found = {(r["row"], r["column"]): r["value"] for r in read_records(place / "results.jsonl")}
    names = [form.name for form in memory.FORMS]
    many = [found[name, "8 updates"] for name in names]
    assert many[3] < many[0] and many[2] < many[0]
    again = [found[name, "computed again, 8"] for name in names]
    assert again[0] == again[1] == 0 and again[2] == again[3] == 1.5  # 4 steps to states not kept
    assert found["reverse mode", "2 updates"] < found["reverse mode", "8 updates"]
