import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as benchmarks
from experiments import table_meta_gradients, table_peers

SMOKE = table_peers.presets("smoke")


def test_compilations_are_counted():
    double = jax.jit(lambda x: 2 * x)
    arrays = [jnp.ones(3), jnp.ones(4)]
    first, second = (lambda x=x: double(x) for x in arrays)
    assert benchmarks.count_compilations(first, second, second) == 2
    assert benchmarks.count_compilations(first, second) == 0


def test_a_step_of_ours_and_of_plain_jax_has_the_same_products_however_many_a_call():
    config = dataclasses.replace(SMOKE, problems=("sinusoid",), peers=("jax_plain",), threads=1)
    with jax.numpy_rank_promotion("allow"):
        rows = list(benchmarks.programs_of_peers(config))
    assert [row[1] for row in rows] == ["ours"] * 3 + [table_peers.JAX["jax_plain"]]
    matmul = {row[2]: float(row[4]) for row in rows}
    reverse = [count for form, count in matmul.items() if form.startswith("reverse")]
    assert len(reverse) == 2 and {*reverse} == {matmul["vmap"]}
    assert all(float(row[3]) > 0 and row[-2:] == ("1", "0") for row in rows)


def test_times_are_in_ms_and_beside_ours(monkeypatch):
    def measured(seconds):
        return table_peers.Measured("vmap, 1 thread", {}, 9.0, [seconds], [seconds] * 3)

    found = {"ours": measured(0.5), "torch_func": measured(2.0)}, {"higher": "no such operation"}
    monkeypatch.setattr(table_peers, "measure", lambda *_: found)
    ours, theirs, failed = benchmarks.times_of_peers(
        dataclasses.replace(SMOKE, problems=("sinusoid",))
    )
    assert ours[3:] == ("500.000", "500.000", "9.0", "1.000")
    assert theirs == (
        "sinusoid",
        "torch.func",
        "vmap, 1 thread",
        *("2000.000",) * 2,
        "9.0",
        "4.000",
    )
    assert failed[:3] == ("sinusoid", "higher", "no such operation")


def test_peers_that_are_not_installed_are_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax" or None)
    seen = []
    for name in ("programs_of_forms", "programs_of_peers", "times_of_forms", "times_of_peers"):
        monkeypatch.setattr(benchmarks, name, lambda config: seen.append(config) or iter(()))
    benchmarks.main(["--preset", "smoke", "--only", "noisy"])
    forms, peers = seen
    assert forms == table_meta_gradients.presets("smoke") and peers.peers == tuple(table_peers.JAX)
    said = "".join(capsys.readouterr())  # the line is of the log, the tables are the output
    assert "higher is left out: higher is not installed" in said and "noisy" in said


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmarks.main(["--only", "some"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
