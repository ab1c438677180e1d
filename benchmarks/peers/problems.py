"""The problems that every peer is given, and the files that hold them: no JAX, no torch."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from metaopt.errors import UserError
from metaopt.npz import Form, read_npz
from metaopt.ranges import (
    Checked,
    Count,
    Heads,
    ImageSize,
    InnerSteps,
    Layers,
    Length,
    RateOr0,
    Width,
)

VOCAB_SIZE = 256
NUM_CLASSES = 5
Name = Literal["sinusoid", "lm", "omniglot"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Checked):
    """A problem and its sizes: K inner SGD steps on each of T tasks, then one outer Adam step.

    Attributes:
      name: ``sinusoid``, an MLP with two hidden layers of ``width``, ReLU; ``lm``, a
        transformer over bytes of that width; ``omniglot``, the conv net with that many
        filters, 5 ways, and batch norm by each batch's own statistics.
      num_tasks: T, tasks of a meta-step.
      num_support: S, points, sequences or images in the support.
      num_query: Q, points, sequences or images in the query.
      width: Width of the model.
      inner_learning_rate: Rate of the inner SGD.
      outer_learning_rate: Rate of the outer Adam.
      num_inner_steps: K, inner steps.
      num_layers: Number of layers of the transformer.
      num_heads: Number of heads of the transformer.
      length: L, tokens in a sequence.
      image_size: height and width of an image, of one channel.
    """

    name: Name
    num_tasks: Count
    num_support: Count
    num_query: Count
    width: Width
    inner_learning_rate: RateOr0
    outer_learning_rate: RateOr0 = 1e-3
    num_inner_steps: InnerSteps = 5
    num_layers: Layers = 4
    num_heads: Heads = 4
    length: Length = 64
    image_size: ImageSize = 28


REFERENCE = {
    "sinusoid": Sizes(
        name="sinusoid",
        num_tasks=25,
        num_support=10,
        num_query=10,
        width=40,
        inner_learning_rate=0.01,
    ),
    "lm": Sizes(
        name="lm", num_tasks=8, num_support=4, num_query=4, width=128, inner_learning_rate=0.03
    ),
    "omniglot": Sizes(
        name="omniglot",
        num_tasks=32,
        num_support=NUM_CLASSES,
        num_query=15 * NUM_CLASSES,
        width=64,
        inner_learning_rate=0.1,
    ),
}
SMALLER = {
    "sinusoid": {"num_tasks": 4, "width": 8},
    "lm": {"num_tasks": 2, "num_support": 1, "num_query": 2, "width": 8, "num_layers": 1}
    | {"num_heads": 2, "length": 8},
    "omniglot": {"num_tasks": 2, "num_query": 10, "width": 4},
}
SMOKE = {
    name: dataclasses.replace(sizes, num_inner_steps=2, **SMALLER[name])
    for name, sizes in REFERENCE.items()
}


class Peer(NamedTuple):
    """A library that is ready to compute meta-steps of one problem.

    Attributes:
      first: does the first call; the meta-loss before its first step and the norm of its gradient.
      step: does one more, and returns when it is done.
      steps_per_call: number of meta-steps that each of these calls does.
      program: what a call compiles and its arguments, if it is one program of JAX.
    """

    first: Callable[[], tuple[float, float]]
    step: Callable[[], Any]
    steps_per_call: int = 1
    program: tuple[Callable, tuple] | None = None


Candidates = dict[str, Callable[[], Peer]]
"""The forms that a library offers, by name: each makes a `Peer` at the initial parameters."""


class Data(NamedTuple):
    """A problem with the numbers that all peers start from.

    Attributes:
      sizes: what it is, and how large.
      params: flat, names joined by ``/``: ``{'layer_0/kernel': float32 array}``.
      support: ``(inputs, targets)``, each ``[T, S, ...]``.
      query: ``(inputs, targets)``, each ``[T, Q, ...]``.
    """

    sizes: Sizes
    params: dict[str, np.ndarray]
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]


def save(directory: Path, data: Data) -> None:
    """Writes ``problem.json``, ``params.npz`` and ``episodes.npz``."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(data.sizes))
    (directory / "problem.json").write_text(text, encoding="utf-8")
    np.savez(directory / "params.npz", **data.params)  # type: ignore[arg-type]
    arrays = dict(zip(EPISODE, (*data.support, *data.query), strict=True))
    np.savez(directory / "episodes.npz", **arrays)  # type: ignore[arg-type]


EPISODE = ("support_inputs", "support_targets", "query_inputs", "query_targets")


def load(directory: Path) -> Data:
    """What `save` wrote.

    Raises:
      UserError: there is none.
    """
    if not (directory / "problem.json").exists():
        raise UserError(f"{directory} holds no problem; write one with `problems.save`")
    sizes = Sizes(**json.loads((directory / "problem.json").read_text(encoding="utf-8")))
    params = read_npz(directory / "params.npz")
    episodes = read_npz(directory / "episodes.npz", {name: Form(np.number) for name in EPISODE})
    arrays = [episodes[name] for name in EPISODE]
    return Data(sizes, params, (arrays[0], arrays[1]), (arrays[2], arrays[3]))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts of arrays as one, names joined by ``/``."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: np.asarray(value)}
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return tree
