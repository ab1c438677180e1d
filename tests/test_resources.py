import os
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil
import pytest

from metaopt import measure, parallel, resources
from metaopt.resources import MemoryUse, cgroup_limit

TREE = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32), "b": jnp.ones(64)}


def test_memory_of_this_process():
    use = resources.memory_use()
    assert use.host == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert 0 < use.host < use.host_limit <= psutil.virtual_memory().total
    ballast = bytearray(os.urandom(1)) * (64 << 20)
    assert resources.memory_use().host - use.host > 0.9 * len(ballast)


def test_the_fullest_device_counts():
    class Device:
        process_index = 0

        def __init__(self, *stats):
            self.stats = dict(zip(("bytes_in_use", "bytes_limit"), stats, strict=False)) or None

        def memory_stats(self):
            return self.stats

    devices = [Device(), Device(90, 1000), Device(50, 100), Device(7)]
    use = resources.memory_use(devices)
    assert (use.device, use.device_limit, use.share) == (50, 100, 0.5)
    assert resources.memory_use(devices[:1]).device is None


def test_the_share_is_the_larger_one():
    assert MemoryUse(1, 4).share == 0.25
    assert MemoryUse(1, 4, 3, 4).share == 0.75
    assert MemoryUse(3, 4, 1, 4).share == 0.75


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_lowest_limit_of_the_control_groups_holds(tmp_path):
    write(tmp_path / "memory.max", "8000\n")
    write(tmp_path / "outer" / "memory.max", "5000\n")
    write(tmp_path / "outer" / "inner" / "memory.max", "max\n")
    assert cgroup_limit("0::/outer/inner\n", tmp_path) == 5000
    assert cgroup_limit("0::/\n", tmp_path) == 8000
    assert cgroup_limit("0::/seen/from/outside\n", tmp_path) == 8000


def test_control_groups_of_version_1(tmp_path):
    write(tmp_path / "memory" / "job" / "memory.limit_in_bytes", "3000\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")  # none
    text = "9:cpu:/job\n4:memory:/job\n0::/\n"
    assert cgroup_limit(text, tmp_path) == 3000
    assert cgroup_limit("4:memory:/\n", tmp_path) is None
    assert cgroup_limit("9:cpu:/job\n", tmp_path) is None
    assert cgroup_limit("", tmp_path) is None


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="control groups of Linux")
def test_the_limit_is_that_of_the_control_group_where_it_is_lower(tmp_path):
    total = psutil.virtual_memory().total
    for name, limit in (("none", "max"), ("higher", str(2 * total)), ("lower", str(1 << 20))):
        write(tmp_path / name / "memory.max", limit)  # of version 2, and of version 1
        write(tmp_path / name / "memory" / "memory.limit_in_bytes", limit)
        expected = 1 << 20 if name == "lower" else total
        assert resources.host_limit(tmp_path / name) == expected


def test_the_peak_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype: calls.append(dtype) or 7.0)
    resources.peak_flops.cache_clear()
    try:
        assert resources.peak_flops() == resources.peak_flops() == 7.0  # the cores are shared
        assert len(calls) == 1
    finally:
        resources.peak_flops.cache_clear()


def test_the_time_of_a_collective():
    devices = parallel.default_devices()
    assert resources.collective_seconds(TREE, devices[:1]) == 0.0
    assert 0.0 <= resources.collective_seconds(TREE, devices[:2], rounds=2) < 1.0


def test_what_is_timed_is_the_mean_over_the_devices_so_many_times():
    devices = parallel.default_devices()[:2]
    program = resources.means_program({"x": jnp.zeros(3)}, 4, devices)
    # Device d adds d, and the mean is taken, 4 times; the next call goes on from there.
    assert program()["x"].tolist() == [4 * 0.5] * 3
    assert program()["x"].tolist() == [8 * 0.5] * 3
