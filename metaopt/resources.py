"""What the machine has and what is used of it: memory, peak FLOP/s, time of a collective."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil

from metaopt import measure, parallel

CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # what a cgroup of version 1 without a limit says is above this


class MemoryUse(NamedTuple):
    """Bytes in use and their limits; None for devices that do not tell, such as CPUs.

    Attributes:
      host: resident memory of this process.
      host_limit: what the machine or, where lower, the control group allows it.
      device: of the fullest device of this process.
      device_limit: of that device.
    """

    host: int
    host_limit: int
    device: int | None = None
    device_limit: int | None = None

    @property
    def share(self) -> float:
        """The larger of the shares that are in use of the host's and the device's limit."""
        device = self.device / self.device_limit if self.device and self.device_limit else 0.0
        return max(self.host / self.host_limit, device)


def memory_use(devices: Sequence[Any] | None = None) -> MemoryUse:
    """What is in use now, of these devices or of those of this process; a few microseconds."""
    host = _process(os.getpid()).memory_info().rss
    devices = _own_devices() if devices is None else devices
    found = [stats for device in devices if (stats := device.memory_stats())]
    shares = [(s["bytes_in_use"], s["bytes_limit"]) for s in found if s.get("bytes_limit")]
    fullest = max(shares, key=lambda s: s[0] / s[1], default=(None, None))
    return MemoryUse(host, host_limit(), *fullest)


def peak_memory(devices: Sequence[Any] | None = None) -> int:
    """The most bytes in use since the process began: of a device if they tell, else of the host.

    ``devices`` are those of this process if not given; the one that used the most counts. The
    host's peak is that of all that the process did, also before this run.
    """
    devices = _own_devices() if devices is None else devices
    found = [stats for device in devices if (stats := device.memory_stats())]
    if peaks := [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]:
        return max(peaks)
    now = _process(os.getpid()).memory_info()
    try:
        import resource
    except ImportError:  # Windows, whose memory_info has the peak
        return getattr(now, "peak_wset", now.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(now.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@functools.cache
def host_limit(root: Path = CGROUPS) -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if lower.

    ``root`` is where control groups are mounted.
    """
    try:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # not Linux
        membership = ""
    return min(psutil.virtual_memory().total, cgroup_limit(membership, root) or NO_LIMIT)


def cgroup_limit(membership: str, root: Path = CGROUPS) -> int | None:
    """The lowest memory limit of a control group and all above it, in bytes.

    Args:
      membership: the text of ``/proc/self/cgroup``; version 1 and 2 are understood.
      root: where control groups are mounted.

    Returns:
      None where there is no limit.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        inner = base / group.strip("/")
        limits += [_limit(folder / name) for folder in (inner, *inner.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(path: Path) -> int | None:
    try:
        limit = int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such group seen from here, or "max"
        return None
    return limit if limit < NO_LIMIT else None


@functools.cache
def peak_flops(dtype: Any = jnp.float32) -> float:
    """FLOP/s of all devices together, measured once a process on a large matrix product.

    The devices of a CPU share its cores, so that its peak is that of one of them.
    """
    devices = parallel.default_devices()
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return count * measure.matmul_peak(dtype=dtype)


def collective_seconds(tree: Any, devices: Sequence[Any] | None = None, rounds: int = 5) -> float:
    """Seconds that the mean of such a tree over the devices takes, as in every step.

    Measured as the difference between many means in one program and one, so that the
    time of starting a program is not in it.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s with the shapes and dtypes of the gradients.
      devices: all of them by default.
      rounds: of which the quickest counts.

    Returns:
      0.0 on one device.
    """
    devices = parallel.default_devices() if devices is None else devices
    if len(devices) == 1:
        return 0.0
    extra = 10
    programs = {
        "one": means_program(tree, 1, devices),
        "many": means_program(tree, 1 + extra, devices),
    }
    timings = measure.interleaved(programs, rounds)
    return max(0.0, min(timings["many"].samples) - min(timings["one"].samples)) / extra


def means_program(tree: Any, count: int, devices: Sequence[Any]) -> Callable[[], Any]:
    """A call that takes ``count`` means of the tree over the devices, one after another.

    Device d adds d before each, from zeros at the first call; the next call continues from there.
    """

    def step(grads, index):
        def mean(carry, _):  # differs from device to device, or there is nothing to send
            own = jax.tree.map(lambda x: x + index[0].astype(x.dtype), carry)
            return jax.lax.pmean(own, parallel.AXIS), None

        return jax.lax.scan(mean, grads, length=count)[0], ()

    program = parallel.parallel_step(step, devices)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    grads = parallel.replicate(zeros, devices)
    index = jnp.arange(len(devices))[:, None]

    def run():
        nonlocal grads  # donated
        grads, _ = program(grads, index)
        return grads

    return run


@functools.cache
def _process(_pid: int) -> psutil.Process:
    """Of this process; by its number, since a fork is another one."""
    return psutil.Process()


@functools.cache
def _own_devices() -> list[Any]:
    return [d for d in parallel.default_devices() if d.process_index == jax.process_index()]
