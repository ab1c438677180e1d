import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.parallel import (
    AXIS,
    check_divides,
    default_devices,
    parallel_map,
    parallel_step,
    replicate,
    split_over_devices,
)


def test_devices_are_the_first_so_many():
    assert default_devices() == jax.devices()
    assert default_devices(2) == jax.devices()[:2]
    for too_many in (-1, 99):
        with pytest.raises(UserError, match=f"{too_many} devices were asked for and 4 are here"):
            default_devices(too_many)


@pytest.mark.parametrize(
    ("num_tasks", "num_devices", "choices"), [(10, 4, "8 or 12"), (3, 4, "4"), (5, 3, "3 or 6")]
)
def test_a_meta_batch_that_does_not_divide_is_refused_with_ones_that_do(
    num_tasks, num_devices, choices
):
    message = f"{num_tasks} tasks does not divide by {num_devices} devices; use {choices} tasks"
    with pytest.raises(UserError, match=message):
        check_divides(num_tasks, num_devices)
    with pytest.raises(UserError, match=message):
        split_over_devices({"x": np.zeros((num_tasks, 2))}, num_devices)


def test_split_keeps_the_order():
    x = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(split_over_devices(x, 3).reshape(6, 2), x)


def test_parallel_map_is_map_for_any_number_of_tasks_and_compiles_once_a_number():
    traces = []

    def scaled(scale, x):
        traces.append(None)
        return {"y": scale * x, "sum": x.sum(1)}

    devices = jax.devices()
    mapped = parallel_map(scaled, devices)
    x = np.arange(24, dtype=np.float32).reshape(12, 2)
    for num_tasks in (1, 4, 6, 7, 12):
        found = mapped(np.float32(2.0), x[:num_tasks])
        np.testing.assert_array_equal(found["y"], 2 * x[:num_tasks])
        np.testing.assert_array_equal(found["sum"], x[:num_tasks].sum(1))
    assert len(traces) == 3  # for 1, 2 and 3 tasks a device
    for scale in (jnp.float32(3.0), replicate(jnp.float32(3.0), devices), np.array(3.0, "f4")):
        np.testing.assert_array_equal(mapped(scale, jnp.asarray(x))["y"], 3 * x)
    assert len(traces) == 3  # wherever the arguments lie


def test_backend_gives_each_core_a_device_and_a_cache_and_keeps_what_is_set(tmp_path):
    program = """
import jax
from metaopt.parallel import default_devices, set_up_backend
set_up_backend()
print(len(default_devices()), jax.config.jax_compilation_cache_dir)
"""

    def run(**settings):
        unset = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
        environment = {k: v for k, v in os.environ.items() if k not in unset} | settings
        environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, text=True, capture_output=True
        ).stdout.split()

    cache = str(tmp_path / "metaopt" / "xla")
    assert run(XDG_CACHE_HOME=str(tmp_path)) == [str(os.cpu_count()), cache]
    kept = run(JAX_NUM_CPU_DEVICES="3", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert kept == ["3", str(tmp_path)]


def test_a_damaged_entry_of_the_compilation_cache_is_written_again(tmp_path):
    program = """
import pathlib, sys
import jax
from metaopt.parallel import set_up_backend
set_up_backend()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
for damage in (None, lambda data: data[:100], lambda data: data[:100] + b"x" + data[101:], None):
    [entry] = pathlib.Path(sys.argv[1]).glob("*sine*-cache") if damage else [None]
    if damage:
        entry.write_bytes(damage(entry.read_bytes()))
    jax.clear_caches()
    def sine(x):
        return jax.numpy.sin(x) + 1
    print(float(jax.jit(sine)(0.0)), file=sys.stderr)
"""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, env=environment, text=True, capture_output=True).stderr
    first, note, second, again, third, fourth = said.splitlines()
    assert {first, second, third, fourth} == {"1.0"}
    assert "is made again" in note and "is made again" in again


def test_a_step_on_several_cpu_devices_is_done_when_it_returns():
    """Else more than 32 computations dispatched behind it can deadlock its collective."""

    def step(state, x):
        hidden = x
        for _ in range(200):
            hidden = jnp.tanh(hidden @ state)
        return state + jax.lax.pmean(hidden, AXIS)[: len(state)], jnp.zeros(())

    devices = default_devices(2)
    state = replicate(jnp.eye(64), devices)
    run = parallel_step(step, devices)
    for _ in range(3):  # the first call compiles
        state, metric = run(state, jnp.ones((2, 4096, 64)))
        assert state.is_ready() and metric.is_ready()
