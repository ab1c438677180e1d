import itertools
import json

import jax
import numpy as np
import pytest
from words import write

import metaopt
from metaopt.errors import UserError
from metaopt.evolution import EvolveConfig, Life
from metaopt.evolution.arrivals import arrived, make_plan
from metaopt.inner_loop import InnerLoop
from metaopt.optimizers.outer import OuterConfig
from metaopt.streams.data import DataConfig
from metaopt.tasks.sources.text import array_domain, fingerprint, folder_domains
from metaopt.training.loop import train


def small(folder, **fields):
    given = {
        "folder": str(folder),
        "num_held_out": 1,
        "width": 8,
        "num_layers": 1,
        "length": 12,
        "num_support": 2,
        "num_query": 2,
        "inner": InnerLoop(num_steps=1),
        "inner_rates": (0.05,),
        "steps": 6,
        "meta_steps": 0,
        "outer": OuterConfig(learning_rate=0.01, warmup_steps=1),
        "episodes": 2,
        "data": DataConfig(capacity=64, valid_passages=2),
    }
    return EvolveConfig(**given | fields)


def lived(life):
    found = []
    while (generation := life.next()) is not None:
        found.append(generation)
    return found


def without_seconds(generations):
    return [{k: v for k, v in x.items() if k != "seconds"} for x in generations]


def test_a_life_takes_in_trains_judges_and_goes_on(folder, tmp_path):
    config = small(folder, waves=2, meta_steps=3)
    life = Life(tmp_path / "life", config)
    first, second = lived(life)
    assert first["verdict"] == "kept" and first["new_before"] is None
    assert first["means"]["old"] is None and first["forgetting"] is None
    assert second["new_before"] is not None and second["means"]["old"]["n"] == len(first["new"])
    names = {*first["new"], *second["new"], *life.held_out}
    assert names == {f"{i}.txt" for i in range(6)} == second["domains"].keys()
    assert second["tokens"] == len(second["attempts"]) * 9 * 4 * 4 * 12

    assert lived(Life(tmp_path / "life", config)) == []  # nothing is new
    write(folder, "7.txt", 7)
    (third,) = lived(Life(tmp_path / "life", config))
    assert third["new"] == ["7.txt"] and third["generation"] == 3
    best = [min(x["domains"][n]["adapted"] for x in (first, second) if n in x["domains"])
            for n in sorted(names - {*life.held_out})]  # fmt: skip
    now = [third["domains"][n]["adapted"] for n in sorted(names - {*life.held_out})]
    np.testing.assert_allclose(third["forgetting"]["mean"], np.mean(np.subtract(now, best)))

    found = metaopt.load(tmp_path / "life")
    text = (folder / "0.txt").read_bytes()[:500]
    adapted = found.adapt(text)
    assert 0 < found.score(adapted, text).mean < found.score(found.start, text).mean
    assert found.generate(adapted, "ab", 5).startswith("ab")


def test_a_file_that_grew_brings_what_is_new_of_it(folder, tmp_path):
    config = small(folder)
    life = Life(tmp_path / "life", config)
    (first,) = lived(life)
    name = first["new"][0]
    before = (folder / name).read_bytes()
    write(folder, name, 99, 1000)
    (folder / name).write_bytes(before + (folder / name).read_bytes())
    (second,) = lived(Life(tmp_path / "life", config))
    assert second["arrived"].keys() == {name}
    assert second["arrived"][name]["equal"] + second["arrived"][name]["near"] > 0
    assert 0 < second["arrived"][name]["kept"] < second["arrived"][name]["offered"]
    assert name in second["new"]


def test_what_has_all_been_seen_is_not_trained_on(folder, tmp_path):
    config = small(folder, data=DataConfig(capacity=1000, valid_passages=2))
    (first,) = lived(Life(tmp_path / "life", config))
    (folder / "copy.txt").write_bytes((folder / first["new"][0]).read_bytes())
    (second,) = lived(Life(tmp_path / "life", config))
    assert second["verdict"] == "not trained" and second["kept"] == first["kept"]
    assert second["tokens"] == 0 and second["domains"] == first["domains"]


def stopping(after):
    """A train function that is killed when it was called so many times."""
    calls = []

    def train_fn(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return train(*args, **options)

    return train_fn


def test_a_life_that_was_killed_goes_on_to_the_same_numbers(folder, tmp_path):
    """Whatever comes into the folder meanwhile waits for its turn."""
    config = small(folder, waves=2)
    straight = lived(Life(tmp_path / "straight", config))
    for after in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            lived(Life(tmp_path / "killed", config, stopping(after)))
        write(folder, f"late {after}.txt", 20 + after)
    life = Life(tmp_path / "killed", config)
    lived(life)
    assert without_seconds(life.generations[:2]) == without_seconds(straight)
    assert life.generations[2]["new"] == ["late 0.txt", "late 1.txt"]


def worse(training, config, directory=None):
    """A training that does harm, from the second generation on."""
    found = train(training, config, directory)
    if "generation 1" in training.name:
        return found
    spoiled = dict(found.state.meta_params)
    spoiled["params"] = jax.tree.map(lambda x: -3 * x, spoiled["params"])
    return found._replace(state=found.state._replace(meta_params=spoiled))


def test_what_does_harm_is_rolled_back(folder, tmp_path):
    first, second = lived(Life(tmp_path / "life", small(folder, waves=2), worse))
    assert second["verdict"] == "rolled back" and second["kept"] == first["kept"]
    assert [x["is_kept"] for x in second["attempts"]] == [False, False]
    assert second["attempts"][1]["rate"] == second["attempts"][0]["rate"] / 2
    assert second["means"]["held-out"] == first["means"]["held-out"]
    assert "rose" in second["reason"]


def test_a_damaged_life_is_one_line(folder, tmp_path):
    config = small(folder)
    lived(Life(tmp_path / "life", config))
    data = tmp_path / "life" / "data" / "generation-0001.json"
    data.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        lived(Life(tmp_path / "life", config))
    (tmp_path / "life" / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="plan"):
        Life(tmp_path / "life", config)


def test_another_config_is_refused(folder, tmp_path):
    Life(tmp_path / "life", small(folder))
    with pytest.raises(UserError, match=r"seed: 0 saved, 1 now"):
        Life(tmp_path / "life", small(folder, seed=1))


def test_a_life_that_could_not_begin_begins_with_longer_files(folder, tmp_path):
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    life = Life(tmp_path / "life", small(folder))
    for name in {path.name for path in contents} - {*life.held_out}:
        (folder / name).write_bytes(b"too short")
    with pytest.raises(UserError, match="longer files"):
        life.next()
    for path, content in contents.items():
        path.write_bytes(content)
    (first,) = lived(Life(tmp_path / "life", small(folder)))
    assert first["verdict"] == "kept"


def test_what_is_held_out_never_comes_in(folder, tmp_path):
    """Not under another name, nor with something put in before it."""
    life = Life(tmp_path / "life", small(folder, length=40))
    (name,) = life.held_out
    text = (folder / name).read_bytes()
    (folder / "copy.txt").write_bytes(text)
    (folder / "moved.txt").write_bytes(b"and so on " * 3 + text)
    _, second = lived(life)
    assert second["verdict"] == "not trained"
    for copy in ("copy.txt", "moved.txt"):
        assert second["arrived"][copy]["offered"] and second["arrived"][copy]["kept"] == 0
        assert copy not in second["domains"]


def test_domains_are_held_out_with_their_kin_and_dealt_to_waves(tmp_path):
    names = [f"d{i}" for i in range(20)]
    (tmp_path / "kin").write_text("d0 d1 d2\nd3 d4\n", encoding="utf-8")
    for seed in range(5):
        config = EvolveConfig(
            folder="x", waves=4, num_held_out=5, kin=str(tmp_path / "kin"), split_seed=seed
        )
        plan = make_plan(names, config)
        assert sorted([*plan.held_out, *itertools.chain(*plan.waves)]) == sorted(names)
        assert len(plan.held_out) <= 5 and {len(wave) for wave in plan.waves} <= {3, 4, 5}
        for group in ({"d0", "d1", "d2"}, {"d3", "d4"}):
            assert len(group & {*plan.held_out}) in (0, len(group))


def test_too_few_domains_are_refused():
    with pytest.raises(UserError, match="at least 4"):
        make_plan(["a", "b", "c"], EvolveConfig(folder="x"))
    with pytest.raises(UserError, match="waves"):
        make_plan(list("abcdef"), EvolveConfig(folder="x", waves=6))


def test_waves_come_in_turn_and_then_what_is_new(folder):
    domains = folder_domains(folder)
    plan = make_plan([x.name for x in domains], small(folder, waves=2))
    found, wave = arrived(domains, plan, {}, 0)
    assert [x.name for x in found] == plan.waves[0] and wave == 1
    gone = [x for x in domains if x.name not in plan.waves[1]]
    seen = {x.name: fingerprint([x]) for x in domains}
    assert arrived(gone, plan, seen, 1) == ([], 2)
    changed = array_domain(plan.waves[0][0], np.zeros(9, np.uint8))
    assert arrived([changed, *domains[1:0]], plan, seen, 2) == ([changed], 2)


def test_the_record_is_strict_json(folder, tmp_path):
    lived(Life(tmp_path / "life", small(folder)))
    (line,) = (tmp_path / "life" / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
