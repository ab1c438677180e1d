"""One library in a process of its own.

    python -m benchmarks.peers.worker --peer torch_func --problem lm --data DIR --threads 2

prints ``ready {json}`` with the seconds that a step takes in each of its forms. With ``--form`` it
is ready at the end of the first call in that form, and then prints, for every line ``go`` that it
reads, the seconds that one more meta-step took.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from benchmarks.peers.problems import Candidates, Peer, load
from metaopt.errors import UserError

MODULES = {
    "ours": "ours",
    "torch_func": "torch_func",
    "torchopt": "torchopt_peer",
    "higher": "higher_peer",
    "torch_compile": "torch_compile",
    "jax_plain": "jax_plain",
    "jax_optax": "jax_optax",
}
PROBE_SECONDS, PROBE_STEPS = 2.0, 20


def import_peer(name: str) -> ModuleType:
    """The module of a peer.

    Raises:
      UserError: what it needs is not installed.
    """
    try:
        return importlib.import_module(f"benchmarks.peers.{MODULES[name]}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} needs {error.name}, which is not installed: pip install -e '.[peers]'"
        ) from error


def keep_to_cores(count: int) -> None:
    """Confines this process to its first ``count`` cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def one_device_a_thread(count: int) -> None:
    """Gives JAX, which is not imported yet, a CPU device for each thread and nothing else."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}


def probe(candidates: Candidates) -> dict[str, float]:
    """The seconds of a step in each form."""
    return {name: _quickest_step(build()) for name, build in candidates.items()}


def _quickest_step(peer: Peer) -> float:
    """The quickest of a few steps."""
    peer.first()
    best, began = float("inf"), time.perf_counter()
    for _ in range(PROBE_STEPS):
        best = min(best, seconds_of_a_step(peer))
        if time.perf_counter() - began > PROBE_SECONDS:
            break
    return best


def seconds_of_a_step(peer: Peer) -> float:
    """Wall-clock time of one meta-step: forward, backward and the outer update.

    If a call does several, it is the time of the call divided by their number.
    """
    began = time.perf_counter()
    peer.step()
    return (time.perf_counter() - began) / peer.steps_per_call


def main() -> None:
    """Speaks the protocol on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=sorted(MODULES), required=True)
    parser.add_argument("--problem", required=True, help="a folder of --data")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--form", help="one of its forms; all are probed if it is not given")
    args = parser.parse_args()
    keep_to_cores(args.threads)
    one_device_a_thread(args.threads)
    data = load(args.data / args.problem)
    module = import_peer(args.peer)
    candidates = module.candidates(data, args.threads)
    if args.form is None:
        print("ready", json.dumps(probe(candidates)), flush=True)
        return
    peer = candidates[args.form]()
    loss, grad_norm = peer.first()
    versions = {name: importlib.metadata.version(name) for name in module.PACKAGES}
    report = {"loss": loss, "grad_norm": grad_norm, "versions": versions}
    print("ready", json.dumps(report), flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            print(seconds_of_a_step(peer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
