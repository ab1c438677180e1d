import dataclasses

import jax
import numpy as np
import pytest

from experiments.table_test_time_training import documents, presets, reading, run
from experiments.table_test_time_training.rows import SECOND, STATIC, TTT, WINDOW, Settings, Starts
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
    found = starts(tmp_path, meta_steps=40)
    cost = {name: found._operations(name) for name in ("joint", "FOMAML", "second order")}
    assert cost["joint"] < cost["FOMAML"] < cost["second order"]


def test_books_are_apart(tmp_path):
    for i in range(5):
        text = np.random.default_rng(i).integers(97, 123, 800).astype(np.uint8)
        (tmp_path / f"{i}.txt").write_bytes(text.tobytes())
    config = dataclasses.replace(SMOKE, books=str(tmp_path))
    source = documents.find("books", config)
    drawn = source.train.train.sample(jax.random.key(0), 50).support.inputs
    texts = [
        set(map(tuple, x.reshape(-1, x.shape[-1]).tolist())) for x in (drawn, source.test.inputs)
    ]
    assert len(source.test.inputs) == config.num_test and not texts[0] & texts[1]
