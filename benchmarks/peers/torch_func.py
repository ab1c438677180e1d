"""The meta-step with torch.func: `functional_call`, `grad`, and `vmap` over tasks."""

# pyright: reportMissingImports=false

import functools

from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.peers.problems import Candidates, Data
from benchmarks.peers.torch_setup import MetaGradient, Setup, task_by_task
from benchmarks.peers.torch_setup import candidates as torch_candidates

PACKAGES = ("torch",)


def candidates(data: Data, threads: int) -> Candidates:
    """All tasks at once by `vmap`, or one after the other."""
    return torch_candidates(data, threads, {"vmap": _vmapped, "loop": _looped})


def _vmapped(setup: Setup) -> MetaGradient:
    of_tasks = vmap(make_query_loss(setup), in_dims=(None, 0, 0, 0, 0))

    def meta_gradient() -> float:
        loss = of_tasks(setup.params, *setup.support, *setup.query).mean()
        loss.backward()
        return float(loss.detach())

    return meta_gradient


def _looped(setup: Setup) -> MetaGradient:
    return task_by_task(setup, functools.partial(make_query_loss(setup), setup.params))


def make_query_loss(setup: Setup):
    """``(params, support x, y, query x, y) -> scalar``, after K steps of SGD."""

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return setup.loss(functional_call(setup.module, params, (inputs,)), targets)

    def query_loss(params, support_inputs, support_targets, query_inputs, query_targets):
        rate = setup.sizes.inner_learning_rate
        for _ in range(setup.sizes.num_inner_steps):
            grads = grad(loss)(params, support_inputs, support_targets)
            params = {name: value - rate * grads[name] for name, value in params.items()}
        return loss(params, query_inputs, query_targets)

    return query_loss
