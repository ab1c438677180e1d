"""The meta-step of torch.func, vmapped and handed whole to `torch.compile`."""

# pyright: reportMissingImports=false

import torch
from torch.func import grad_and_value, vmap

from benchmarks.peers.problems import Candidates, Data
from benchmarks.peers.torch_func import make_query_loss
from benchmarks.peers.torch_setup import MetaGradient, Setup
from benchmarks.peers.torch_setup import candidates as torch_candidates

PACKAGES = ("torch",)


def candidates(data: Data, threads: int) -> Candidates:
    """One compiled program."""
    return torch_candidates(data, threads, {"vmap, compiled": _compiled})


def _compiled(setup: Setup) -> MetaGradient:
    of_tasks = vmap(make_query_loss(setup), in_dims=(None, 0, 0, 0, 0))

    def mean_loss(params, *episodes):
        return of_tasks(params, *episodes).mean()

    compiled = torch.compile(grad_and_value(mean_loss))

    def meta_gradient() -> float:
        start = {name: value.detach() for name, value in setup.params.items()}
        grads, loss = compiled(start, *setup.support, *setup.query)
        for name, value in setup.params.items():
            value.grad = grads[name]
        return float(loss)

    return meta_gradient
