import importlib.util
import shlex
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.peers import host, jax_models, ours, problems, worker
from experiments import harness, table_peers
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.types import Batch

NAMES = tuple(problems.SMOKE)


def main(*args, run=table_peers.run):
    harness.main("table_peers", run, table_peers.presets, "", list(args))


def test_without_a_library_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main("--preset", "smoke", "--root", str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert "torch_func needs torch" in line and "pip install -e '.[peers]'" in line


def test_a_worker_without_its_library_says_so(monkeypatch):
    monkeypatch.setitem(worker.MODULES, "torch_func", "needs_nothing_that_is_there")
    with pytest.raises(UserError, match=r"torch_func needs .*'\.\[peers\]'"):
        worker.import_peer("torch_func")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"ready_seconds": 0.0}, "ready_seconds"),
        ({"problems": ()}, "problems is"),
    ],
)
def test_settings_that_cannot_be_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        table_peers.Config(**args)


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_comes_back_from_its_files(tmp_path, name):
    data = ours.make_data(problems.SMOKE[name])
    problems.save(tmp_path, data)
    again = problems.load(tmp_path)
    assert again.sizes == data.sizes and set(again.params) == set(data.params)
    pairs = zip(
        [*data.params.values(), *data.support, *data.query],
        [*(again.params[path] for path in data.params), *again.support, *again.query],
        strict=True,
    )
    assert all((a == b).all() and a.dtype == b.dtype for a, b in pairs)
    sizes = data.sizes
    assert data.support[0].shape[:2] == (sizes.num_tasks, sizes.num_support)
    assert data.query[1].shape[:2] == (sizes.num_tasks, sizes.num_query)
    assert problems.flatten(problems.unflatten(data.params)).keys() == data.params.keys()


def test_forms_are_probed_by_their_steps_and_a_call_may_hold_several(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock.now)

    def form(seconds, steps_per_call=1):
        def step():
            clock.now += seconds

        return lambda: problems.Peer(lambda: (0.0, 0.0), step, steps_per_call)

    found = worker.probe({"slow": form(3.0), "fast": form(1.0), "several": form(5.0, 10)})
    assert found == {"slow": 3.0, "fast": 1.0, "several": 0.5}


def test_the_fastest_form_may_be_one_of_one_thread(monkeypatch, tmp_path):
    fake_worker(
        monkeypatch,
        "import json, sys\nthreads = sys.argv[sys.argv.index('--threads') + 1]\n"
        "seconds = {'1': {'vmap': 1.0, 'loop': 3.0}, '2': {'vmap': 2.0, 'loop': 1.5}}[threads]\n"
        "print('ready', json.dumps(seconds))",
    )
    found = host.fastest_form("torch_func", "lm", tmp_path, 2, limit=30.0)
    assert found == ("vmap", 1) and str(found) == "vmap, 1 thread"


def test_our_worker_steps_when_it_is_told_to_and_the_run_writes_the_row(tmp_path):
    args = ["--preset", "smoke", "--problems", "sinusoid", "--threads", "1", "--rounds", "2"]
    args += ["--root"]
    main(*args, str(tmp_path), "--peers")  # none beside ours
    (directory,) = (tmp_path / "table_peers").iterdir()
    records = read_json_lines(directory / "results.jsonl")
    time, alone, cold, ratio, jax_ratio = records
    assert (time["row"], time["column"], time["unit"], time["n"]) == ("sinusoid", "ours", "ms", 2)
    assert (alone["table"], alone["unit"], alone["form"]) == ("peers/alone", "ms", time["form"])
    assert (cold["table"], cold["unit"]) == ("peers/cold_start", "s")
    assert alone["value"] > 0 and cold["value"] > 1e-3 * alone["value"]
    assert "steps a call" in time["form"] and jax_ratio["column"] == table_peers.JAX_RATIO
    assert 0 < time["quartiles"][0] <= time["value"] <= time["quartiles"][1]
    assert time["loss"] > 0 and time["grad_norm"] > 0 and "jaxlib" in time["versions"]
    assert ratio["column"] == table_peers.RATIO and ratio["value"] is None  # with no peer, no ratio
    assert "sinusoid" in (directory / "table.md").read_text()
    again = shlex.split(time["command"])
    configs = []
    main(*again[3:], run=configs.append)
    assert (configs[0].preset, configs[0].rounds) == ("smoke", 2)


def test_a_worker_that_ends_gives_its_reason(tmp_path):
    with pytest.raises(host.WorkerFailed, match="holds no problem"):
        host.Worker("ours", "sinusoid", tmp_path, 1, limit=60.0)


def fake_worker(monkeypatch, body):
    """Makes workers of a process that runs ``body``."""
    start = subprocess.Popen

    def popen(command, **options):
        return start([sys.executable, "-c", body, *command[3:]], **options)

    monkeypatch.setattr(host.subprocess, "Popen", popen)


def test_a_worker_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    fake_worker(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(host.WorkerFailed, match=r"no answer within 0\.3 s"):
        host.Worker("ours", "sinusoid", tmp_path, 1, limit=0.3)


def test_the_first_step_of_a_turn_is_not_counted(monkeypatch, tmp_path):
    body = (
        "import sys\nprint('a line of a library')\nprint('ready {}', flush=True)\n"
        "for n, line in enumerate(sys.stdin): print(float(n), flush=True)"
    )
    fake_worker(monkeypatch, body)
    with host.Worker("ours", "sinusoid", tmp_path, 1, limit=30.0) as made:
        assert [made.steps(0.0) for _ in range(3)] == [[1.0], [3.0], [5.0]]
        assert made.steps(0.05)[:2] == [7.0, 8.0]
        assert set(host.take_turns({"ours": made}, 2, 0.0)) == {"ours"}
        assert made.cold_start > 0


def test_a_peer_that_disagrees_is_an_error():
    right = {"loss": 2.0, "grad_norm": 1.0}
    host.check_agreement("lm", {"ours": right, "higher": {"loss": 2.0005, "grad_norm": 1.0005}})
    for wrong in ({"loss": 2.01}, {"grad_norm": 0.99}, {"loss": float("nan")}):
        with pytest.raises(UserError, match="higher computes another function on lm"):
            host.check_agreement("lm", {"ours": right, "higher": right | wrong})


def test_the_ratio_is_of_the_fastest_peer_round_by_round_and_a_failure_has_no_number(tmp_path):
    said = {"loss": 1.0, "grad_norm": 1.0, "versions": {"torch": "2"}}
    config = table_peers.Config(run_dir=str(tmp_path / "run"))
    table = harness.TableRun("table_peers", config, table_peers.presets, table="peers", unit="ms")
    times = {"ours": [1.0, 2.0, 4.0], "torch_func": [9.0] * 3, "torchopt": [3.0, 8.0, 8.0]}
    times |= {"jax_plain": [2.0] * 3}
    measured = {
        peer: table_peers.Measured("vmap, 1 thread", said, 9.0, [0.5, 0.7], turns)
        for peer, turns in times.items()
    }
    failures = {"higher": "no such operation"}
    table_peers.add_row(table, "lm", measured, failures, 2)
    found = {record["column"]: record for record in table.records if record["table"] == "peers"}
    plain = table_peers.JAX["jax_plain"]
    ratios = [table_peers.RATIO, table_peers.JAX_RATIO]
    assert list(found) == ["ours", "torch.func", "torchopt", "higher", plain, *ratios]
    assert found[table_peers.JAX_RATIO]["value"] == 1.0  # the median of 2, 1 and 0.5
    alone = {r["column"]: r["value"] for r in table.records if r["table"] == "peers/alone"}
    assert alone == dict.fromkeys(["ours", "torch.func", "torchopt", plain], 600)
    assert found["ours"]["value"] == 2000 and found["torchopt"]["quartiles"] == [5500, 8000]
    assert found["higher"]["value"] is None and found["higher"]["note"] == "no such operation"
    assert found[table_peers.RATIO]["value"] == 3.0  # the median of 3, 4 and 2
    assert found["ours"]["versions"]["torch"] == "2" and "jax" in found["ours"]["versions"]


def said_first(peer, data):
    """What each form of a library says of its first step."""
    with jax.numpy_rank_promotion("allow"):  # JAX as its users write it
        firsts = {
            form: make().first()
            for form, make in worker.import_peer(peer).candidates(data, 1).items()
        }
    return {f"{peer}, {form}": {"loss": f[0], "grad_norm": f[1]} for form, f in firsts.items()}


@pytest.mark.parametrize(
    "peers", [("jax_plain", "jax_optax"), ("torch_func", "torchopt", "higher")]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "omniglot")) for n in NAMES]
)
def test_every_form_computes_the_loss_and_gradient_of_ours(name, peers):
    data = ours.make_data(problems.SMOKE[name])
    installed = [peer for peer in peers if table_peers.missing(peer) is None]
    if not installed:
        pytest.skip(f"none of {', '.join(peers)} is installed")
    reports = said_first("ours", data)
    reports["ours"] = next(iter(reports.values()))
    for peer in installed:
        reports |= said_first(peer, data)
    host.check_agreement(name, reports)


def test_a_call_of_several_steps_does_what_as_many_calls_do():
    data = ours.make_data(problems.SMOKE["sinusoid"])
    built = {}
    for number in (1, 3):
        setting = ours.Setting(ours.REVERSE, tasks_at_a_time=0, unroll=True, steps_per_call=number)
        built[number] = ours._build(data, setting, 1)
    single, several = built[1], built[3]
    assert several.first() == pytest.approx(single.first(), rel=1e-5)
    for _ in range(2):
        single.step()
    assert several.steps_per_call == 3
    assert said(several.step()) == pytest.approx(said(single.step()), rel=1e-4)


def said(metrics):
    return float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_jax_model_has_the_gradient_of_ours_in_every_parameter(name):
    data = ours.make_data(problems.SMOKE[name])
    x, y = (jax.numpy.asarray(array[0]) for array in data.query)
    params = jax.tree.map(jax.numpy.asarray, problems.unflatten(data.params))
    with jax.numpy_rank_promotion("allow"):
        found = jax.jit(jax.grad(jax_models.make_loss(data.sizes)))(params, x, y)
    expected = jax.jit(jax.grad(ours.make_problem(data.sizes).loss_fn))(params, Batch(x, y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_torch_model_has_the_gradient_of_ours_in_every_parameter(name):
    """Norms may agree by chance: after one step of the plain loss every entry must."""
    torch = pytest.importorskip("torch")
    from benchmarks.peers import torch_models

    data = ours.make_data(problems.SMOKE[name])
    sizes = data.sizes
    module = torch_models.make_module(sizes, data.params)
    inputs, targets = torch_models.as_tensors(sizes, data.query)
    torch_models.make_loss(sizes)(module(inputs[0]), targets[0]).backward()
    loss = ours.make_problem(sizes).loss_fn
    batch = Batch(*(array[0] for array in data.query))
    params = jax.tree.map(jax.numpy.asarray, problems.unflatten(data.params))
    grads = problems.flatten(jax.device_get(jax.grad(loss)(params, batch)))
    expected = dict(torch_models.as_torch(path, value) for path, value in grads.items())
    for path, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-3, atol=1e-5)
