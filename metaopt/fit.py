"""One call that trains a learner: state, outer optimiser, devices, loop, validation, checkpoints.

    fitted = fit(Problem(family, model, loss_fn), learners.maml(), config=FitConfig(num_steps=500))

What runs the steps is an argument: `metaopt.training.loop.train`, or the closed loop of
`metaopt.self_improvement`, which this module does not import.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import parallel
from metaopt.diagnostics import feasible
from metaopt.eager import compile_once
from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.files import check_directory
from metaopt.frozen import prepared, unbound
from metaopt.indices import names_of
from metaopt.inner_loop import InnerLoop
from metaopt.meta_gradients import reverse
from metaopt.optimizers.outer import OuterConfig, at_update, outer_optimizer
from metaopt.outer_step import MetaStep, carry_of, check_groups, init_state, make_meta_step
from metaopt.pytrees import digest_of, is_key
from metaopt.ranges import Count, CountOr0, Seed, Steps, StepsOr0
from metaopt.statistics import task_means
from metaopt.training.fingerprint import Fingerprint, of_program
from metaopt.training.loop import train
from metaopt.training.types import (
    Evaluate,
    StepFn,
    TrainConfig,
    TrainFn,
    Training,
    Variant,
    Variants,
)
from metaopt.types import (
    Array,
    Episode,
    Estimator,
    Hparams,
    Key,
    Learner,
    LossFn,
    MetaGradFn,
    MetaParams,
    MetaState,
    Model,
    Params,
    PyTree,
    Setting,
    Settings,
    TaskFamily,
    WindowGradFn,
)

INNER_RATE = 0.1
"""``hparams['inner_learning_rate']`` if it is not given."""
EXECUTION: dict[str, Any] = {
    "unroll": False,
    "remat": False,
    "save_gradients": False,
    "kept_states": None,
    "kept_on": "device",
}
"""Fields of `InnerLoop` that change how it is computed and not what it is: the default form.

``kept_dtype`` is none of them: it rounds."""

StepKey = Callable[[Key, Any], Key]
"""``(key, step) -> key`` that the tasks of a step are drawn from; ``step`` may be traced."""


class Problem(NamedTuple):
    """What a learner is trained on.

    Attributes:
      family: the tasks.
      model: the model.
      loss_fn: loss that the inner loop steps on, in nats or as squared error. It judges too,
        unless there is an ``outer_loss``.
      outer_loss: loss of the query that the adapted model is judged by.
    """

    family: TaskFamily
    model: Model
    loss_fn: LossFn
    outer_loss: LossFn | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(TrainConfig):
    """Length of a training, its data, and how it is computed. Intervals are in meta-updates.

    Attributes:
      seed: seed of the initialisation and of the training episodes.
      num_steps: number of meta-updates.
      tasks_per_step: meta-batch, over all devices.
      annealing_steps: meta-updates over which the weights of ``query_loss='annealed'`` go to the
        last step; 0 is the whole training.
      valid_episodes: number of episodes that the best checkpoint is chosen on.
      eval_seed: seed of those; fixed, so that two trainings are comparable.
      num_devices: number of devices; 0 for all.
      tasks_at_a_time: tasks computed together on one device; 0 all by vmap, 1 one by one in a
        scan, between them groups.
      windows: W, windows that a document is cut into, for an estimator that carries documents on
        (`metaopt.types.WindowGradFn`), such as `metaopt.meta_gradients.streaming`. A meta-update
        takes one window of each of its documents, and the next continues with the same ones. What
        is carried is a part of the state, and so of its checkpoints: for each document what all
        parameters were moved by, the state of the inner optimiser and the context. It takes no
        ``eval_every`` unless ``evaluate`` is given.
      steps_per_call: meta-updates in one compiled call, in which the tasks are drawn too. For
        steps that take less time than a call; the sampler must be traceable.
      eval_every: interval between evaluations on the validation episodes; the best evaluated
        state is the result. 0 gives the last state.
    """

    seed: Seed = 0
    num_steps: Steps = 1000
    tasks_per_step: Count = 8
    annealing_steps: StepsOr0 = 0
    valid_episodes: Count = 64
    eval_seed: Seed = 1234
    num_devices: CountOr0 = 0
    tasks_at_a_time: CountOr0 = 0
    windows: Count = 1
    steps_per_call: Count = 1

    def __post_init__(self):
        super().__post_init__()
        if self.windows > 1 and self.steps_per_call > 1:
            raise UserError(
                f"windows={self.windows} of documents are taken one in a call, and steps_per_call "
                f"is {self.steps_per_call}: give 1"
            )


INNER, OUTER, CONFIG = InnerLoop(), OuterConfig(), FitConfig()


class Fitted(NamedTuple):
    """What a training gave.

    Attributes:
      state: best evaluated state, or the last one if none was evaluated.
      seconds: duration of the call.
      from_checkpoint: step of the checkpoint that the state was taken from, if nothing had to
        be trained; None otherwise.
    """

    state: MetaState
    seconds: float
    from_checkpoint: int | None = None

    @property
    def meta_params(self) -> MetaParams:
        """What was learned."""
        return self.state.meta_params

    @property
    def hparams(self) -> Hparams:
        """The scalars at the end: those of the start, unless a closed loop changed them."""
        return self.state.hparams


def fit(
    problem: Problem,
    learner: Learner,
    estimator: Estimator = reverse,
    *,
    inner: InnerLoop = INNER,
    outer: OuterConfig = OUTER,
    config: FitConfig = CONFIG,
    directory: Path | str | None = None,
    name: str = "fit",
    params: Params | None = None,
    state: MetaState | None = None,
    hparams: Hparams | None = None,
    key: Key | None = None,
    step_key: StepKey = jax.random.fold_in,
    valid: Episode | None = None,
    evaluate: Evaluate | None = None,
    train_fn: TrainFn = train,
) -> Fitted:
    """Trains a learner on the tasks of a problem.

    All that can be wrong is found before anything is compiled. In a directory the training is
    resumed from its latest checkpoint; a checkpoint of other data, another start, config or
    program is refused. What changes only how it is computed (devices, tasks at a time, steps per
    call, unrolling, rematerialisation) may change. The result then differs in the last digits.

    Args:
      problem: tasks, model and loss.
      learner: what is meta-learned.
      estimator: how its gradient is found.
      inner: the inner loop.
      outer: the outer optimiser. `OuterConfig.ending_at` gives it a cosine to the end.
      config: length, data, and how it is computed.
      directory: directory of the run; without one nothing is written.
      name: name of the training in files and messages.
      params: initial parameters; if not given, ``model.init`` on a key from ``config.seed``.
      state: state of an earlier training to start from in place of parameters, with its step,
        optimiser state, scalars and key. It is copied.
      hparams: scalars of the state beside those of the outer optimiser;
        ``{'inner_learning_rate': INNER_RATE}`` if not given.
      key: key of the training episodes and of the noise of every step; if not given, one from
        ``config.seed``.
      step_key: the key that the tasks of a step are drawn from.
      valid: validation episodes, ``[E, ...]``; if not given, and ``config.eval_every`` is not 0,
        they are drawn from the family.
      evaluate: ``state -> loss`` in place of the loss of adapted parameters on the validation
        episodes. What it reads is not part of the fingerprint.
      train_fn: what runs the steps.

    Returns:
      `Fitted`.

    Raises:
      UserError: sizes do not fit the devices, one another, the memory or the learner; the
        directory is of another training; and whatever the learner and the estimator refuse.
      Diverged, Interrupted: as for `metaopt.training.loop.train`.
    """
    began = time.monotonic()
    directory = None if directory is None else check_directory(directory)
    if config.windows > 1 and config.eval_every and evaluate is None:
        raise UserError(
            f"windows={config.windows} of documents have no query that a state could be judged "
            "by: give evaluate, or eval_every=0"
        )
    devices = check_devices(config.num_devices, config.tasks_per_step, config.tasks_at_a_time)
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    state = None if state is None else jax.tree.map(_off_devices, state)
    used = key if key is not None else data_key if state is None else state.key
    parts = _Parts(problem, learner, estimator, inner, outer, config)
    tasks = _Tasks(problem.family, config, devices, used, step_key)
    first = tasks.draw(0 if state is None else int(state.step))
    if valid is None and config.eval_every and evaluate is None:
        valid = validation_episodes(problem.family, config.eval_seed, config.valid_episodes)
    parts.check_memory(params, first, 0 if valid is None else len(valid.task))
    if state is None:
        params = compile_once(problem.model.init)(init_key) if params is None else params
        scalars = {"inner_learning_rate": INNER_RATE} if hparams is None else dict(hparams)
        start = init_state(used, params, learner, outer_optimizer(outer), outer.hparams() | scalars)
    else:
        scalars = {name: jnp.float32(value) for name, value in (hparams or {}).items()}
        start = jax.tree.map(jnp.copy, state._replace(hparams=state.hparams | scalars, key=used))
    start = parts.carrying(start, goes_on=state is not None and key is None)
    fingerprint = parts.fingerprint(start, first, valid)
    groups = ()
    if valid is not None and evaluate is None:
        evaluate = parts.evaluate(valid, devices)
        groups = names_of(np.unique(np.asarray(valid.task)), problem.family.valid.task_names)
    frozen = parts.frozen
    if frozen is not None and tasks.axis_name is not None:
        frozen = parallel.replicate(frozen, devices)  # once, for all variants
    training = Training(
        name=name,
        state=parallel.replicate(start, devices),
        step_fn=tasks.compile(parts.step(tasks.axis_name), frozen),
        sample=tasks.batches(first, int(start.step)),
        tasks_per_step=config.tasks_per_step,
        tokens_per_task=tokens_per_task(first),
        fingerprint=fingerprint,
        evaluate=evaluate,
        steps_per_call=config.steps_per_call,
        held_out=tasks.held_out if config.steps_per_call == config.windows == 1 else None,
        warmup_steps=outer.warmup_steps,
        groups=groups,
        task_names=problem.family.valid.task_names,
        variants=_variants(parts, tasks, start, first, frozen),
    )
    trained = train_fn(training, config, directory)
    return Fitted(trained.state, time.monotonic() - began, trained.from_checkpoint)


def check_devices(
    num_devices: int, tasks_per_step: int, tasks_at_a_time: int
) -> list[parallel.Device]:
    """The devices of a training, if its meta-batch divides by them and by its groups.

    Raises:
      UserError: it does not, or there are fewer devices.
    """
    devices = parallel.default_devices(num_devices)
    parallel.check_divides(tasks_per_step, len(devices))
    check_groups(tasks_per_step // len(devices), tasks_at_a_time)
    return devices


def validation_episodes(family: TaskFamily, eval_seed: int, number: int) -> Episode:
    """The episodes that rates and checkpoints are chosen on, ``[number, ...]``."""
    return family.valid.sample(jax.random.split(jax.random.key(eval_seed))[0], number)


def tokens_per_task(episodes: Episode) -> int:
    """The targets in the support and the query of one task: tokens, images or examples."""
    targets = jax.tree.leaves((episodes.support.targets, episodes.query.targets))
    return sum(math.prod(np.shape(leaf)[1:]) for leaf in targets)


class _Parts(NamedTuple):
    """What a training is made of."""

    problem: Problem
    learner: Learner
    estimator: Estimator
    inner: InnerLoop
    outer: OuterConfig
    config: FitConfig

    @property
    def annealing_steps(self) -> int:
        if self.inner.query_loss != "annealed":
            return 0
        return self.config.annealing_steps or self.config.num_steps

    @property
    def frozen(self) -> PyTree:
        """The arrays of losses that have such, which every step is given; None if none has."""
        arrays = unbound(self.problem.loss_fn)[1], unbound(self.problem.outer_loss)[1]
        return arrays if any(arrays) else None

    def estimate(self, inner: InnerLoop, frozen: PyTree = None) -> MetaGradFn:
        loss_fn, outer_loss = self.problem.loss_fn, self.problem.outer_loss
        if frozen is not None:
            losses = zip((loss_fn, outer_loss), frozen, strict=True)
            loss_fn, outer_loss = (unbound(loss)[0](arrays) for loss, arrays in losses)
        judges = {} if outer_loss is None else {"outer_loss": outer_loss}
        estimate = self.estimator(self.learner, loss_fn, inner, **judges)
        if self.config.windows > 1 and not isinstance(estimate, WindowGradFn):
            raise UserError(
                f"windows={self.config.windows} takes an estimator that carries documents on, "
                "such as metaopt.meta_gradients.streaming"
            )
        if self.frozen is None:
            return estimate

        def once(function: Callable) -> Callable:
            """What all that is frozen computes of an episode is computed before the function."""

            def of_episode(meta_params: MetaParams, hparams: Hparams, episode: Episode, other: Any):
                episode = episode._replace(
                    support=prepared(loss_fn, episode.support),
                    query=prepared(outer_loss or loss_fn, episode.query),
                )
                return function(meta_params, hparams, episode, other)

            return of_episode

        if isinstance(estimate, WindowGradFn):
            both = once(estimate.whole), once(estimate.go_on)
            return dataclasses.replace(estimate, whole=both[0], go_on=both[1])
        return once(estimate)

    def carrying(self, start: MetaState, goes_on: bool) -> MetaState:
        """The state with what is carried from window to window.

        Raises:
          UserError: it is within a document, and does not hold what is carried there.
        """
        config = self.config
        if config.windows == 1:
            return start._replace(carry=())
        estimate = self.estimate(self.inner, self.frozen)
        assert isinstance(estimate, WindowGradFn)
        carry = carry_of(estimate, start, config.tasks_per_step)
        if int(start.step) % config.windows == 0:
            return start._replace(carry=carry)
        forms = [jax.tree.map(lambda x: (jnp.shape(x), x.dtype), x) for x in (carry, start.carry)]
        if not goes_on or forms[0] != forms[1]:
            raise UserError(
                f"the state is of step {int(start.step)}, within a document of {config.windows} "
                "windows, and does not hold what is carried there: begin at a multiple of them"
            )
        return start

    def step(self, axis_name: str | None) -> Callable:
        """``(state, episodes) -> (state, metrics)``, or ``(state, episodes, frozen)``."""

        def make(frozen: PyTree = None) -> MetaStep:
            return make_meta_step(
                self.estimate(self.inner, frozen),
                outer_optimizer(self.outer),
                tasks_at_a_time=self.config.tasks_at_a_time,
                axis_name=axis_name,
                annealing_steps=self.annealing_steps,
                windows=self.config.windows,
            )

        if self.frozen is None:
            return make()
        return lambda state, episodes, frozen: make(frozen)(state, episodes)

    def check_memory(self, params: Params | None, first: Episode, num_valid: int) -> None:
        """Raises UserError where parameters, episodes or arrays of the loss are too large."""
        support, query = jax.tree.map(_one, (first.support, first.query))
        init = self.problem.model.init if params is None else lambda _: params
        if self.problem.outer_loss is not None:  # the inner loss may not take a query
            query = support
        number = max(self.config.tasks_per_step, num_valid)
        feasible.check([], init, self.problem.loss_fn, support, query, number)

    def evaluate(self, valid: Episode, devices: Sequence[parallel.Device]) -> Evaluate:
        """``state -> losses [tasks]`` after the inner steps of training, on validation episodes."""
        curves = make_curves(
            self.learner,
            self.problem.loss_fn,
            self.inner,
            self.inner.num_steps,
            devices,
            self.config.tasks_at_a_time,
            outer_loss=self.problem.outer_loss,
        )

        def losses(state: MetaState) -> np.ndarray:
            found = curves(state.meta_params, state.hparams, valid)
            return task_means(found[:, -1], np.asarray(valid.task))

        return losses

    def fingerprint(self, start: MetaState, first: Episode, valid: Episode | None) -> Fingerprint:
        """Of the estimate of one task, in its default form: it is traced, and not compiled."""
        hparams = dict(start.hparams)
        decisive = {
            "inner": {k: v for k, v in vars(self.inner).items() if k not in EXECUTION},
            "outer": self.outer,
            "hparams": {name: float(value) for name, value in hparams.items()},
            "tasks_per_step": self.config.tasks_per_step,
            "eval_every": self.config.eval_every,
            "annealing_steps": self.annealing_steps,
        }
        if self.config.windows > 1:
            decisive["windows"] = self.config.windows
        arrays = {
            "initial state": digest_of((start.step, start.meta_params, start.opt_state)),
            "random key": digest_of(start.key),
            "first tasks": digest_of(first),
        }
        if jax.tree.leaves(start.carry):
            arrays["what is carried"] = digest_of(start.carry)
        if valid is not None:
            arrays["validation tasks"] = digest_of(valid)
        if self.annealing_steps:
            hparams["query_annealing"] = jnp.float32(0)
        usual, frozen = dataclasses.replace(self.inner, **EXECUTION), self.frozen
        if frozen is not None:
            arrays["frozen parameters"] = digest_of(frozen)

        def estimated(frozen: PyTree, meta_params: MetaParams, hparams: Hparams, *args: Any):
            estimate = self.estimate(usual, frozen)
            if self.config.windows == 1:
                return estimate(meta_params, hparams, *args)
            assert isinstance(estimate, WindowGradFn)
            return estimate.go_on(
                meta_params, hparams, args[0], estimate.begin(meta_params, hparams)
            )

        task = jax.tree.map(_one, first)
        program = of_program(estimated, frozen, start.meta_params, hparams, task, start.key)
        execution = {name: getattr(self.inner, name) for name in EXECUTION}
        execution |= {n: getattr(self.config, n) for n in ("tasks_at_a_time", "steps_per_call")}
        return Fingerprint(decisive, arrays, {"loss, learner or estimator": program}, execution)


class _Tasks(NamedTuple):
    """The tasks of each step: drawn on the host, or in the call where that holds several."""

    family: TaskFamily
    config: FitConfig
    devices: Sequence[parallel.Device]
    key: Key
    step_key: StepKey

    @property
    def axis_name(self) -> str | None:
        """The axis that a step averages over."""
        return parallel.AXIS if len(self.devices) > 1 else None

    def draw(self, step: int) -> Episode:
        document, window = divmod(step, self.config.windows)
        drawn = self.family.train.sample(
            self.step_key(self.key, document), self.config.tasks_per_step
        )
        return drawn if self.config.windows == 1 else _window(drawn, window, self.config.windows)

    def held_out(self, i: int) -> Episode:
        """A batch of tasks of the validation split, ``[N, T, ...]``, the same for every i."""
        key = jax.random.fold_in(jax.random.key(self.config.eval_seed), i)
        drawn = self.family.valid.sample(key, self.config.tasks_per_step)
        return parallel.split_over_devices(drawn, len(self.devices))

    def batches(self, first: Episode, start: int) -> Callable[[int], Any]:
        """``step -> batch``: episodes ``[N, T, ...]``, or the keys of a call's tasks ``[N, m]``.

        A call that would pass the end of the training is cut short there, and after the end a
        batch is of one step.
        """
        number, last = len(self.devices), self.config.num_steps

        def episodes(step: int) -> Episode:
            drawn = first if step == start else self.draw(step)
            return parallel.split_over_devices(drawn, number)

        @functools.partial(jax.jit, static_argnames="size")
        def step_keys(step: Array, size: int) -> Key:
            keys = jax.vmap(lambda i: self.step_key(self.key, i))(step + jnp.arange(size))
            return jnp.broadcast_to(keys, (number, size))

        def keys(step: int) -> Key:
            size = min(self.config.steps_per_call, last - step) if step < last else 1
            return step_keys(jnp.asarray(step), size)

        return episodes if self.config.steps_per_call == 1 else keys

    def compile(self, step: Callable, frozen: PyTree) -> StepFn:
        """The compiled step, or several of them with their tasks drawn in between."""
        if self.config.steps_per_call > 1:
            step = self._several(step)
        if self.axis_name is None:
            return parallel.single_step(step, frozen)
        return parallel.parallel_step(step, self.devices, frozen)

    def _several(self, step: Callable) -> Callable:
        """``(state, keys [m]) -> (state, metrics)``: m steps, and the means of their metrics."""
        total = self.config.tasks_per_step
        size = total // len(self.devices)

        def sample(key: Key) -> Episode:
            episodes = self.family.train.sample(key, total)
            if self.axis_name is None:
                return episodes
            begin = jax.lax.axis_index(self.axis_name) * size
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), episodes)

        try:
            jax.eval_shape(lambda key: self.family.train.sample(key, total), self.key)
        except jax.errors.JAXTypeError as error:
            raise UserError(
                f"the tasks of {self.family.name} are drawn on the host, and steps_per_call="
                f"{self.config.steps_per_call} would draw them in a compiled call: give 1"
            ) from error

        def call(state: MetaState, keys: Key, *frozen: PyTree):
            state, metrics = jax.lax.scan(lambda s, k: step(s, sample(k), *frozen), state, keys)
            return state, jax.tree.map(lambda x: x.mean(0), metrics)

        return call


PRECISION = "default"
"""What leaves `jax.default_matmul_precision` as it is."""


def _variants(
    parts: _Parts, tasks: _Tasks, start: MetaState, first: Episode, frozen: PyTree
) -> Variants:
    """What a training could be changed in, but for what it rules out."""
    config, inner = parts.config, parts.inner
    settings: dict[str, Setting] = {"optimizer": parts.outer.optimizer}
    if tasks.devices[0].platform != "cpu":  # which has one precision
        settings["precision"] = PRECISION
    if config.steps_per_call == config.windows == 1 and not parts.annealing_steps:
        settings["tasks_per_step"] = config.tasks_per_step
    if parts.frozen is None:  # what is timed or weighed takes a state and a batch alone
        settings["tasks_at_a_time"] = config.tasks_at_a_time
        if not (inner.is_planned or inner.save_gradients):
            settings["remat"] = inner.remat

    # Not its arrays, which a train function may donate.
    begun, start = int(start.step), jax.eval_shape(lambda state: state, start)

    def make(chosen: Settings) -> Variant:
        return _variant(parts, tasks, begun, start, first, frozen, settings | dict(chosen))

    return Variants(settings, make, len(tasks.devices) * max(1, config.tasks_at_a_time))


def _variant(
    parts: _Parts,
    tasks: _Tasks,
    begun: int,
    start: MetaState,
    first: Episode,
    frozen: PyTree,
    settings: Settings,
) -> Variant:
    """A training with other settings, which goes on from any point of the one that it varies.

    Raises:
      UserError: they do not fit one another, the devices or the memory.
    """
    before, devices = parts.config, tasks.devices
    size = int(settings.get("tasks_per_step", before.tasks_per_step))
    together = int(settings.get("tasks_at_a_time", before.tasks_at_a_time))
    check_devices(len(devices), size, together)
    config = dataclasses.replace(before, tasks_per_step=size, tasks_at_a_time=together)
    inner = parts.inner
    if "remat" in settings:
        inner = dataclasses.replace(inner, remat=bool(settings["remat"]))
    longer = before.tasks_per_step / size  # in updates, which are of fewer tasks
    outer = parts.outer.varied(str(settings["optimizer"]), longer)
    parts, others = parts._replace(config=config, inner=inner, outer=outer), tasks
    if size != before.tasks_per_step:
        parts.check_memory(start.meta_params.get("params"), first, 0)
        key = jax.random.fold_in(tasks.key, size)  # other tasks than those of the steps before
        others = tasks._replace(config=config, key=key)

    def carry(state: MetaState, done: int, is_fresh: bool) -> MetaState:
        opt_state = state.opt_state
        if is_fresh:
            own = outer.hparams()
            new = {k: v for k, v in own.items() if k not in state.hparams}
            old = {k: v for k, v in state.hparams.items() if k in own or k in start.hparams}
            state = state._replace(hparams=old | parallel.replicate(new, devices))
            opt_state = outer_optimizer(outer)(state.hparams).init(state.meta_params)
        opt_state = at_update(opt_state, round(longer * begun + done / size))
        return state._replace(opt_state=parallel.replicate(opt_state, devices))

    step = _at_precision(parts.step(tasks.axis_name), str(settings.get("precision", PRECISION)))
    batch = others.batches(first, -1)
    return Variant(
        step_fn=others.compile(step, frozen),
        sample=lambda done: batch(begun + done // size),
        carry=carry,
    )


def _at_precision(step: Callable, precision: str) -> Callable:
    if precision == PRECISION:
        return step

    @functools.wraps(step)
    def at_precision(*args):
        with jax.default_matmul_precision(precision):
            return step(*args)

    return at_precision


def _window(documents: Episode, window: int, windows: int) -> Episode:
    """One of W windows of documents ``[T, ...]``, whose support and query are its two halves."""
    joined = jax.tree.map(
        lambda a, b: np.concatenate([a, b], axis=1), documents.support, documents.query
    )
    size, rest = divmod(joined.inputs.shape[1], 2 * windows)
    if rest:
        raise UserError(
            f"documents of {joined.inputs.shape[1]} chunks cannot be cut into {windows} windows, "
            "each of an even number of them"
        )
    begin = 2 * window * size
    support, query = (
        jax.tree.map(lambda x, i=i: x[:, i : i + size], joined) for i in (begin, begin + size)
    )
    return Episode(support, query, documents.task)


def _one(batched: Any) -> Any:
    """The shape and dtype of one entry of an array of several."""
    return jax.ShapeDtypeStruct(np.shape(batched)[1:], batched.dtype)


def _off_devices(leaf: Array) -> Array:
    """The same, to be placed anywhere: what is drawn from a key on a mesh would be on that mesh."""
    if is_key(leaf):
        data = jnp.asarray(jax.device_get(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jnp.asarray(jax.device_get(leaf))
