"""The types that the whole library shares, and the letters for its shapes.

Shape legend, used in docstrings and as suffixes of names (``tokens_TxSxL``):

    N  devices                        S  support examples or sequences
    T  tasks on one device            Q  query examples or sequences
    G  tasks computed at a time       L  tokens in a sequence
    K  inner steps                    V  vocabulary, or classes
    D  width of a model               H  heads

Losses are float32 scalars in nats a token (language models), mean squared error
(regression) or nats (classification). Keys are typed (`jax.random.key`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax

Array = jax.Array
PyTree = Any
Key = jax.Array
Params = PyTree
"""Parameters of a model: any pytree of floating-point arrays; here, nested dicts of float32."""

MetaParams = dict[str, PyTree]
"""What is meta-learned, by name: ``params``, where the inner loop starts (unless that is fixed),
and what a learner adds."""

Hparams = Mapping[str, Any]
"""Scalars that may change while a run goes on, kept in the state and never in a closure."""

Metrics = dict[str, Array]

Setting = float | int | str | bool
"""What may be changed in a training: a number, a word or a switch."""

Settings = Mapping[str, Setting]


class Batch(NamedTuple):
    """Inputs and what is to be predicted from them, examples first.

    For a language model both are int32 ``[S, L]`` and ``targets`` is ``inputs``
    one token later, or -100 where none is to be scored; for regression they are float32
    ``[S, D_in]`` and ``[S, D_out]``; for classification float32
    ``[S, height, width, channels]`` and int32 ``[S]``.
    """

    inputs: Array
    targets: Array


class Episode(NamedTuple):
    """One task as a learner sees it (or T of them, with a leading axis T).

    Attributes:
      support: what the inner loop adapts on.
      query: what the adapted model is judged by; disjoint from the support.
      task: int32 scalar that names the task (the domain, for text), so that
        intervals can be taken over tasks rather than over episodes; 0 if there is one task.
    """

    support: Batch
    query: Batch
    task: Array = cast(Array, np.int32(0))


class TaskSplit(NamedTuple):
    """One split (train, validation or test) of a task family.

    Attributes:
      sample: ``(key, num_tasks) -> Episode`` with a leading axis ``[num_tasks]``.
        Pure: the same key gives the same episodes. Tasks are drawn without
        replacement while there are enough of them, so that ``num_tasks`` a
        multiple of the number of domains holds each domain equally often.
      task_names: the names that ``Episode.task`` indexes; empty where every
        episode is a new task.
    """

    sample: Callable[[Key, int], Episode]
    task_names: tuple[str, ...] = ()


class TaskFamily(NamedTuple):
    """A distribution over tasks, in three disjoint splits."""

    name: str
    train: TaskSplit
    valid: TaskSplit
    test: TaskSplit


class Model(NamedTuple):
    """A model as two pure functions.

    Attributes:
      init: ``key -> params``, nested plain dicts of float32 arrays.
      apply: ``(params, inputs) -> outputs``. For language models int32
        ``[S, L]`` to float32 logits ``[S, L, V]``, where ``logits[:, t]`` sees
        ``inputs[:, :t + 1]`` only.
      head: the names of the top-level entries of ``params`` that are the head,
        which is what ANIL adapts. Empty where there is none (a tied head).
      frozen: parameters that nothing moves, of a model that adapts in part; None of others. Then
        ``init`` gives those that adapt, and ``apply`` takes all: `metaopt.frozen.whole`.
      trunk: ``(frozen, inputs) -> floats``: what comes before all that adapts, to be computed once
        and not in each step. ``apply`` takes the result in place of inputs. None if there is none.
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, Array], Array]
    head: tuple[str, ...] = ("head",)
    frozen: Params | None = None
    trunk: Callable[[Params, Array], Array] | None = None


class Stateful(NamedTuple):
    """A language model that reads on: what it keeps of the tokens so far is its context.

    Attributes:
      init: ``key -> params``.
      start: ``(number of sequences, dtype) -> context``, before any token; the dtype is that of
        the parameters, float32 if not given.
      read: ``(params, context, tokens [S, B]) -> (logits [S, B, V], context)``. The logits are
        those that the model gives for all tokens so far at once, as far as it reaches.
    """

    init: Callable[[Key], Params]
    start: Callable[..., PyTree]
    read: Callable[[Params, Any, Array], tuple[Array, Any]]


LossFn = Callable[[Params, Batch], Array]
"""``(params, batch) -> float32 scalar``, the mean over the batch."""

InnerGradFn = Callable[[LossFn], Callable[[Params, Batch], tuple[Array, Params]]]
"""Turns a loss into ``(params, batch) -> (loss, gradient)``; `jax.value_and_grad` is one."""


def unchanged_loss(meta_params: MetaParams, loss_fn: LossFn) -> LossFn:
    """The inner loss of a learner that learns none: the loss that it is given."""
    del meta_params
    return loss_fn


class Learner(NamedTuple):
    """What is meta-learned. It enters the inner loop in three places.

    These are its start, its optimiser and its loss: ``start``, ``inner_opt``, ``inner_loss``.

    Attributes:
      init: ``params -> meta_params``; the meta-parameters that start at ``params``.
      start: ``meta_params -> params``; where the inner loop starts.
      inner_opt: ``(meta_params, hparams) -> optax.GradientTransformation``; how
        it steps. ``hparams['inner_learning_rate']`` is a float32 scalar.
      learned: the names of the meta-parameters beside ``'params'``.
      adapted: the top-level entries of ``params`` that the inner loop moves; None for all.
      inner_loss: ``(meta_params, loss_fn) -> loss``; what it descends. It may read
        meta-parameters: a weight decay, weights on the data.
      learns_start: whether ``'params'`` is one of the meta-parameters; False if the start is fixed.
    """

    init: Callable[[Params], MetaParams]
    start: Callable[[MetaParams], Params]
    inner_opt: Callable[[MetaParams, Hparams], optax.GradientTransformation]
    learned: tuple[str, ...] = ()
    adapted: tuple[str, ...] | None = None
    inner_loss: Callable[[MetaParams, LossFn], LossFn] = unchanged_loss
    learns_start: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all meta-parameters."""
        return ("params", *self.learned) if self.learns_start else self.learned


MetaGradFn = Callable[[MetaParams, Hparams, Episode, Key], tuple[MetaParams, Metrics]]
"""An estimator bound to a learner and a loss: one episode to (meta-gradient, metrics).

The key is for estimators that draw noise. Every estimator reports the metrics
``loss`` (scalar: the outer loss on the query after adaptation, or what takes its place) and
``inner_losses`` (``[K]``: the inner loss on the support before each step; ``[0]`` if
there is no inner loop).
"""


@dataclasses.dataclass(frozen=True)
class WindowGradFn:
    """An estimator's function that can also go on in the middle of a long document.

    Called, it is a `MetaGradFn`: the episode is a whole document. Else the episode is a window of
    one, and what is carried from window to window is kept by whoever calls it.

    Attributes:
      whole: ``(meta_params, hparams, episode, key) -> (meta-gradient, metrics)``.
      begin: ``(meta_params, hparams) -> carry``, before the first window.
      go_on: ``(meta_params, hparams, episode, carry) -> (meta-gradient, metrics, carry)``; the
        gradient does not go through what is carried.
    """

    whole: MetaGradFn
    begin: Callable[[MetaParams, Hparams], PyTree]
    go_on: Callable[[MetaParams, Hparams, Episode, PyTree], tuple[MetaParams, Metrics, PyTree]]

    def __call__(
        self, meta_params: MetaParams, hparams: Hparams, episode: Episode, key: Key
    ) -> tuple[MetaParams, Metrics]:
        """The meta-gradient of one whole document."""
        return self.whole(meta_params, hparams, episode, key)


Estimator = Callable[..., MetaGradFn]
"""``(learner, loss_fn, inner_loop, *, outer_loss=None) -> estimate``.

The inner loop, a `metaopt.inner_loop.InnerLoop`, descends ``loss_fn`` (as the learner changes it,
`Learner.inner_loss`); the adapted parameters are judged by ``outer_loss``, or by ``loss_fn`` if it
is None. An estimator of one's own may leave ``outer_loss`` out.
"""


class MetaState(NamedTuple):
    """Everything that a meta-training run carries from step to step.

    Attributes:
      step: int32 scalar, meta-updates done; also the position in the data, since
        the episodes of a step are drawn from ``fold_in(key, step)``.
      meta_params: what is meta-learned.
      opt_state: the outer optax state.
      hparams: float32 scalars that may change between steps without a recompile.
      key: typed key from which the randomness of every step is derived.
      carry: what each of the tasks of a step ``[T, ...]`` hands to the next step, where documents
        are longer than a step (`WindowGradFn`); empty elsewhere.
    """

    step: Array
    meta_params: MetaParams
    opt_state: optax.OptState
    hparams: dict[str, Array]
    key: Key
    carry: PyTree = ()
