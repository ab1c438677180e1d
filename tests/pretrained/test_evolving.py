"""A part of a pretrained model that lives with a folder."""

from pathlib import Path

import jax
import numpy as np
import pytest

from metaopt.evolution import EvolveConfig, Life
from metaopt.inner_loop import InnerLoop
from metaopt.load import load
from metaopt.models import AdapterConfig
from metaopt.pretrained import open_pretrained
from metaopt.streams.data import DataConfig


@pytest.mark.slow
def test_what_evolves_is_an_adapter_on_the_model(folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        words = [f"word{n}" for n in rng.integers(1000, size=600)]
        (texts / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    config = EvolveConfig(
        folder=str(texts),
        waves=2,
        model=Path(folder),
        adapter=AdapterConfig(blocks=1, rank=2),
        num_support=2,
        num_query=2,
        length=8,
        inner=InnerLoop(num_steps=1),
        inner_rates=(0.01,),
        steps=2,
        meta_steps=2,
        tasks_per_step=2,
        num_devices=2,
        episodes=2,
        data=DataConfig(capacity=64, valid_passages=2),
    )
    life = Life(tmp_path / "life", config)
    first, second = life.next(), life.next()
    assert first is not None and second is not None and life.next() is None
    assert len(first["new"]) == len(second["new"]) == 2
    found = load(tmp_path / "life")
    assert found.pretrained == open_pretrained(folder).config
    kept = sum(x.size for x in jax.tree.leaves(found.start))
    assert kept < sum(x.size for x in jax.tree.leaves(open_pretrained(folder).params)) / 4
    text = (texts / "0.txt").read_bytes()[:300]
    adapted = found.adapt(text)
    assert found.score(adapted, text).unit == "bits/byte"
    assert found.generate(adapted, "word", 3).startswith("word")
