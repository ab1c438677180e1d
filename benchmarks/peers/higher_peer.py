"""The meta-step with higher: a differentiable inner loop, task after task."""

# pyright: reportMissingImports=false

import higher
import torch
from torch import Tensor

from benchmarks.peers.problems import Candidates, Data
from benchmarks.peers.torch_setup import MetaGradient, Setup, task_by_task
from benchmarks.peers.torch_setup import candidates as torch_candidates

PACKAGES = ("torch", "higher")


def candidates(data: Data, threads: int) -> Candidates:
    """`higher.innerloop_ctx`, which knows one task at a time."""
    return torch_candidates(data, threads, {"innerloop_ctx": _looped})


def _looped(setup: Setup) -> MetaGradient:
    inner = torch.optim.SGD(setup.params.values(), lr=setup.sizes.inner_learning_rate)

    def query_loss(support_inputs, support_targets, query_inputs, query_targets) -> Tensor:
        with higher.innerloop_ctx(setup.module, inner, copy_initial_weights=False) as (
            module,
            steps,
        ):
            for _ in range(setup.sizes.num_inner_steps):
                steps.step(setup.loss(module(support_inputs), support_targets))
            return setup.loss(module(query_inputs), query_targets)

    return task_by_task(setup, query_loss)
