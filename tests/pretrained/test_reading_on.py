"""The table of test-time training of a model that was trained elsewhere."""

import dataclasses

import jax
import numpy as np
import pytest
from pretrained_text import write_model

from experiments.table_test_time_training import documents, presets, run
from experiments.table_test_time_training.rows import DYNAMIC, FULL, SECOND, STATIC, TTT, WINDOW
from metaopt.losses import ReadingLoss
from metaopt.models import with_window
from metaopt.pretrained import open_pretrained
from metaopt.reporting.tables import read_records

SMOKE = presets("smoke")


@pytest.mark.slow
def test_a_model_that_was_trained_elsewhere_is_read_with(tmp_path):
    pytest.importorskip("tokenizers")
    model = write_model(tmp_path / "model", num_layers=2)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        words = np.random.default_rng(i).choice(["some", "words", "of", "a", "text"], 200)
        (folder / f"{i}.txt").write_text(" ".join(words))
    sizes = dataclasses.replace(SMOKE.pretrained, model=str(model), folder=str(folder))
    config = dataclasses.replace(SMOKE, parts=("pretrained",), pretrained=sizes)
    rows = (TTT.name, DYNAMIC.name, SECOND.name, FULL.name)
    run(dataclasses.replace(config, rows=rows, root=str(tmp_path / "runs")))
    (place,) = (tmp_path / "runs" / "table_test_time_training").iterdir()
    found = {
        (r["row"], r["column"]): r["value"]
        for r in read_records(place / "results.jsonl")
        if r["table"] == "test_time_training/pretrained"
    }
    names = [STATIC.name, WINDOW.name, *rows]
    assert list(dict.fromkeys(row for row, _ in found)) == names
    loss = {name: found[name, "bits/byte"] for name in names}
    opened = open_pretrained(model)
    source = documents.of_pretrained(config, opened)
    loss_fn = ReadingLoss(with_window(dataclasses.replace(opened.config, window=8)))
    read = [loss_fn(opened.params, jax.tree.map(lambda x, i=i: x[i], source.test)) for i in (0, 1)]
    sizes_of = [len(opened.codec.decode(x.reshape(-1))) for x in source.test.targets]
    bits = [x * 32 / np.log(2) / size for x, size in zip(read, sizes_of, strict=True)]
    assert loss[WINDOW.name] == pytest.approx(float(np.mean(bits)), rel=1e-4)
    for name, has_learned in ((TTT.name, False), (DYNAMIC.name, True), (SECOND.name, True)):
        cells = {column: value for (row, column), value in found.items() if row == name}
        gained = cells["adaptation gain"] + cells.get("training gain", 0.0)
        assert loss[WINDOW.name] - loss[name] == pytest.approx(gained, abs=1e-6)
        assert ("training gain" in cells) == has_learned
