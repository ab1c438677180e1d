"""The meta-step with TorchOpt's differentiable SGD."""

# pyright: reportMissingImports=false

import torchopt
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.peers.problems import Candidates, Data
from benchmarks.peers.torch_setup import MetaGradient, Setup, task_by_task
from benchmarks.peers.torch_setup import candidates as torch_candidates

PACKAGES = ("torch", "torchopt")


def candidates(data: Data, threads: int) -> Candidates:
    """`torchopt.sgd` on all tasks at once, or `torchopt.MetaSGD` task after task."""
    return torch_candidates(data, threads, {"vmap of sgd": _vmapped, "MetaSGD": _meta_sgd})


def _meta_sgd(setup: Setup) -> MetaGradient:
    module, rate = setup.module, setup.sizes.inner_learning_rate
    inner = torchopt.MetaSGD(module, lr=rate)
    module_start = torchopt.extract_state_dict(module)
    inner_start = torchopt.extract_state_dict(inner)

    def query_loss(support_inputs, support_targets, query_inputs, query_targets) -> Tensor:
        torchopt.recover_state_dict(module, module_start)
        torchopt.recover_state_dict(inner, inner_start)
        for _ in range(setup.sizes.num_inner_steps):
            inner.step(setup.loss(module(support_inputs), support_targets))
        return setup.loss(module(query_inputs), query_targets)

    return task_by_task(setup, query_loss)


def _vmapped(setup: Setup) -> MetaGradient:
    inner = torchopt.sgd(lr=setup.sizes.inner_learning_rate)

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return setup.loss(functional_call(setup.module, params, (inputs,)), targets)

    def query_loss(params, support_inputs, support_targets, query_inputs, query_targets):
        state = inner.init(params)
        for _ in range(setup.sizes.num_inner_steps):
            grads = grad(loss)(params, support_inputs, support_targets)
            updates, state = inner.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(params, query_inputs, query_targets)

    of_tasks = vmap(query_loss, in_dims=(None, 0, 0, 0, 0))

    def meta_gradient() -> float:
        mean = of_tasks(setup.params, *setup.support, *setup.query).mean()
        mean.backward()
        return float(mean.detach())

    return meta_gradient
