"""What the PyTorch peers share: model, episodes and outer Adam."""

# pyright: reportMissingImports=false

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers.problems import Candidates, Data, Peer, Sizes
from benchmarks.peers.torch_models import as_tensors, make_loss, make_module


class Setup(NamedTuple):
    """A problem in torch.

    Attributes:
      sizes: what it is, and how large.
      module: the model, whose parameters are the meta-parameters.
      params: these by name.
      loss: ``(outputs, targets) -> scalar``.
      support: ``(inputs, targets)``, ``[T, S, ...]``.
      query: ``(inputs, targets)``, each ``[T, Q, ...]``.
    """

    sizes: Sizes
    module: nn.Module
    params: dict[str, nn.Parameter]
    loss: Callable[[Tensor, Tensor], Tensor]
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


MetaGradient = Callable[[], float]
"""The mean query loss after adaptation; adds its gradient to ``.grad`` of the parameters."""
Form = Callable[[Setup], MetaGradient]


def candidates(data: Data, threads: int, forms: dict[str, Form]) -> Candidates:
    """Every form on these threads."""
    return {name: functools.partial(_build, data, form, threads) for name, form in forms.items()}


def _build(data: Data, form: Form, threads: int) -> Peer:
    torch.set_num_threads(threads)
    sizes = data.sizes
    module = make_module(sizes, data.params)
    params = dict(module.named_parameters())
    support, query = as_tensors(sizes, data.support), as_tensors(sizes, data.query)
    outer = torch.optim.Adam(params.values(), lr=sizes.outer_learning_rate)
    meta_gradient = form(Setup(sizes, module, params, make_loss(sizes), support, query))

    def step() -> float:
        outer.zero_grad()
        loss = meta_gradient()
        outer.step()
        return loss

    def first() -> tuple[float, float]:
        loss = step()  # the gradient outlives the update
        grads = [p.grad for p in params.values() if p.grad is not None]
        return loss, float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))

    return Peer(first, step)


def task_by_task(setup: Setup, query_loss: Callable[..., Tensor]) -> MetaGradient:
    """The mean over tasks of ``query_loss(support x, y, query x, y)``, one after the other.

    Each task is differentiated before the next begins, so one graph is alive at a time.
    """
    episodes = list(zip(*setup.support, *setup.query, strict=True))

    def meta_gradient() -> float:
        total = 0.0
        for episode in episodes:
            loss = query_loss(*episode) / len(episodes)
            loss.backward()
            total += float(loss.detach())
        return total

    return meta_gradient
