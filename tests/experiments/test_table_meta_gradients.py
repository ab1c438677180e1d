import json

import jax
import numpy as np
import pytest

from experiments import table_meta_gradients as table
from experiments.table_meta_gradients import forms
from experiments.table_meta_gradients.forms import FORMS, NAIVE, ON_HOST, PLANNED, ROUNDED, Size
from metaopt import models

TINY = Size(width=4, layers=1, length=6, steps=3, sequences=2, head_size=2)


@pytest.mark.slow
def test_forms_count_the_operations_that_the_theory_gives():
    """In units of a forward pass F: a gradient is 3, its derivative 6 backward or 9 forward."""
    counted = {name: forms.flops(FORMS[name], TINY).matmul for name in FORMS if name != PLANNED}
    unit = (counted["first order"]) / (3 * TINY.steps + 3)  # K inner gradients and one outer
    assert counted[NAIVE] == counted["reverse"] == unit * (9 * TINY.steps + 3)
    assert counted["mixed + saved, layers kept"] == unit * (12 * TINY.steps + 3)
    assert counted["per-step checkpoint"] > counted["reverse"]
    assert counted["mixed + saved gradients"] < counted["mixed mode"]
    more, less = (forms.flops(FORMS[PLANNED], TINY, extra_steps=n).matmul for n in (2, 0))
    assert counted[ROUNDED] == counted[ON_HOST] == counted["mixed mode"]
    # A gradient is 3; with layers that are recomputed it is up to 4.
    assert 2 * 3 * unit < more - less < 2 * 4 * unit


def test_the_naive_form_keeps_what_the_others_do_not():
    assert FORMS[NAIVE].plain and not FORMS[NAIVE].inner


@pytest.mark.parametrize("name", ["gpu", "cpu", "smoke"])
def test_presets_hold_together(name):
    config = table.presets(name)
    assert config.preset == name
    assert len(config.growth_steps) == len(config.growth_budgets) + 1
    assert config.offload == (name == "gpu")
    assert all(size.width % size.head_size == 0 for size in config.sizes)


@pytest.mark.slow
def test_a_run_writes_the_named_cells(tmp_path, monkeypatch, capsys):
    kept = (NAIVE, table.CHECKPOINT, table.QUICKEST, PLANNED, "mixed mode", ROUNDED, ON_HOST)
    kept = {name: FORMS[name] for name in (*kept, "mixed + saved gradients")}
    monkeypatch.setattr(table, "FORMS", kept)
    monkeypatch.setattr(table.measure, "matmul_peak", lambda *_: 1e11)
    # A model that compiles in no time: the transformer's forms are compared above.
    monkeypatch.setattr(forms, "model_of", lambda size, ways: models.bigram(forms.VOCAB_SIZE))
    monkeypatch.setattr(forms, "plain_model", lambda size: models.bigram(forms.VOCAB_SIZE))
    config = table.Config(
        preset="smoke",
        sizes=(TINY,),
        time_size=TINY,
        utilisation_sizes=(),
        exact_size=TINY,
        growth_steps=(3, 5),
        growth_budgets=(1.5,),
        ratio_sizes=1,
        rounds=1,
        run_dir=str(tmp_path / "run"),
    )
    table.run(config)
    records = [json.loads(x) for x in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    ratios = {r["row"]: r["value"] for r in records if r["table"] == "meta_gradients/reference"}
    assert set(ratios) == {
        *("time best/naive", "utilisation", "relative error float64", "relative error float32"),
        *(f"naive/best {TINY}", f"checkpoint/best {TINY}", "K5/K3"),
    }
    assert ratios["relative error float64"] < 1e-12 and ratios["relative error float32"] < 1e-4
    assert ratios[f"naive/best {TINY}"] >= 1
    assert (tmp_path / "run/memory.png").stat().st_size > 10_000
    assert "meta_gradients/growth" in (tmp_path / "run/table.md").read_text()
    assert not any(ON_HOST in (r["row"], r["column"]) for r in records)
    (error,) = [
        r["value"]
        for r in records
        if r["table"] == "meta_gradients/exactness"
        and (r["row"], r["column"]) == (ROUNDED, "float32")
    ]
    assert 0 < error < 1e-2
    (predicted,) = [
        r["value"] for r in records if r["row"] == "K = 5" and r["column"] == "predicted"
    ]
    (compiled,) = [r["value"] for r in records if r["row"] == "K = 5" and r["column"] == "compiled"]
    assert abs(predicted / compiled - 1) < 0.15


def test_the_relative_error_is_one_of_norms():
    found, expected = {"a": np.array([3.0, 0.0])}, {"a": np.array([3.0, 4.0])}
    assert table.relative_error(found, expected) == pytest.approx(0.8)


def test_arguments_have_the_shapes_of_the_size():
    meta_params, hparams, episode, _ = forms.shapes(TINY)
    assert episode.support.inputs.shape == (2, 6) == episode.query.targets.shape
    assert set(hparams) == {"inner_learning_rate"}
    assert meta_params["params"]["embed"]["embedding"].shape == (forms.VOCAB_SIZE, 4)
    tokens = forms.arguments(TINY, seed=1)[2].support
    assert jax.numpy.array_equal(tokens.inputs[:, 1:], tokens.targets[:, :-1])
