"""Examine a meta-gradient: is it right, what does it cost, and where does it break?

    metaopt doctor --estimator mixed_mode
    metaopt doctor --model mlp --learner maml --estimator first_order
    metaopt doctor --inner-optimizer radam      # NaN, and from which step on
    metaopt doctor --estimator truncated --options window=1
    metaopt doctor --problem my_module:my_problem --estimator mixed_mode
    metaopt doctor --estimator my_module:my_estimator

The estimator is compared with reverse mode and with finite differences of the objective,
in float64, which shows how exact it is, and in float32, which shows what it costs.

``module:function`` names a function in a module of your own that can be imported from here.
That of ``--problem`` takes no arguments and returns a `metaopt.diagnostics.doctor.Problem`; that of
``--estimator`` takes ``(learner, loss_fn, inner_loop)`` as those of `metaopt.meta_gradients`.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from metaopt import learners, losses, measure, meta_gradients, models, parallel
from metaopt.diagnostics import feasible
from metaopt.diagnostics.doctor import Estimator, Problem, Report, examine, to_float64
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners.maml import InnerOptimizer
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    Heads,
    Layers,
    Length,
    Range,
    RateOr0,
    Seed,
    Width,
)
from metaopt.tasks.markov import MarkovConfig, Symbols, markov
from metaopt.tasks.sinusoid import SinusoidConfig, sinusoid
from metaopt.types import Batch, Learner, Model

EstimatorName = Literal[
    "reverse",
    "mixed_mode",
    "first_order",
    "reptile",
    "joint",
    "truncated",
    "implicit",
    "evolution",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Examine a meta-gradient.

    Attributes:
      estimator: of the meta-gradient, the one that is examined; one of metaopt's, or
        ``module:function`` of your own.
      options: of the estimator, such as ``window=1``.
      learner: what is meta-learned.
      model: on one Markov language, or one sinusoid for ``mlp``.
      inner_optimizer: one of optax, by name.
      inner_learning_rate: of the inner optimiser.
      inner: the inner loop. An annealed query loss is examined half way, or where the hparams
        of ``problem`` say.
      problem: ``module:function`` of your own, in place of the model, learner, inner
        optimiser and their sizes.
      width: of the model.
      num_layers: of the model.
      num_heads: of the transformer.
      vocab_size: of the language.
      num_support: sequences or points in the support.
      num_query: sequences or points in the query.
      length: tokens in a sequence.
      directions: along which the gradient is compared with finite differences.
      rounds: timed calls of each, in turns; 0 times nothing.
      seed: of the parameters, the episode and the directions.
    """

    estimator: EstimatorName | str = "mixed_mode"
    options: tuple[str, ...] = ()
    learner: Literal["maml", "anil", "meta_sgd", "per_layer_per_step"] = "meta_sgd"
    model: Literal["mlp", "bigram", "gru", "lstm", "transformer"] = "transformer"
    inner_optimizer: str = "adam"
    inner_learning_rate: RateOr0 = 0.01
    inner: InnerLoop = InnerLoop(num_steps=5, unroll=False, remat=True)  # noqa: RUF009
    problem: str | None = None
    width: Width = 32
    num_layers: Layers = 1
    num_heads: Heads = 2
    vocab_size: Symbols = 16
    num_support: Count = 4
    num_query: Count = 4
    length: Length = 16
    directions: Annotated[int, Range(1, 1000)] = 4
    rounds: CountOr0 = 10
    seed: Seed = 0


def make_estimator(config: Config) -> Estimator:
    """The estimator with its options.

    Raises:
      UserError: there is no such estimator, or it has no such option, or one of another type.
    """
    if config.estimator in get_args(EstimatorName):
        estimator = getattr(meta_gradients, config.estimator)
    elif ":" in config.estimator:
        estimator = load_function("--estimator", config.estimator, num_arguments=3)
    else:
        raise UserError(
            f"no estimator {config.estimator!r}: choose {', '.join(get_args(EstimatorName))}, or "
            "module:function of your own"
        )
    hints = typing.get_type_hints(estimator)
    known = [
        name
        for name in list(inspect.signature(estimator).parameters)[3:]
        if get_origin(hints.get(name)) is not Callable  # which no text can be
    ]
    options = {}
    for option in config.options:
        name, _, text = option.partition("=")
        if name not in known:
            choices = ", ".join(known) or "no options"
            raise UserError(f"{config.estimator} has no option {name!r}; it takes {choices}")
        try:
            options[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            if not text.isidentifier():
                raise UserError(f"--options takes name=value, not {option!r}") from None
            options[name] = text
        if not is_of(hint := hints.get(name, Any), options[name]):
            wanted = inspect.formatannotation(hint)
            raise UserError(f"{config.estimator} takes {name} as {wanted}, not {text!r}")
    return functools.partial(estimator, **options) if options else estimator


def is_of(hint: Any, value: Any) -> bool:
    """Whether a value written in a command line is of the type of a parameter."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (typing.Union, types.UnionType):
        return any(is_of(each, value) for each in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def make_optimizer(name: str) -> InnerOptimizer:
    """An inner optimiser by name: those of the other experiments, or one of optax.

    Raises:
      UserError: optax has no optimiser of this name that takes a learning rate first.
    """
    found = INNER_OPTIMIZERS.get(name) or getattr(optax, name, None)
    try:
        if callable(found) and isinstance(found(0.1), optax.GradientTransformation):
            return cast(InnerOptimizer, found)
    except (TypeError, AttributeError):  # it takes something else
        pass
    raise UserError(
        f"unknown inner optimizer {name!r}: give one of optax that takes a learning rate, "
        "such as sgd, adam or radam"
    )


def make_learner(config: Config, model: Model) -> Learner:
    """The learner of a config."""
    optimizer, steps = make_optimizer(config.inner_optimizer), config.inner.num_steps
    if config.learner == "anil":
        return learners.anil(model, optimizer)
    if config.learner == "meta_sgd":
        return learners.meta_sgd(optimizer, num_steps=steps)
    if config.learner == "per_layer_per_step":
        return learners.per_layer_per_step(optimizer, num_steps=steps)
    return learners.maml(optimizer)


def make_model(config: Config) -> Model:
    """The model of a config."""
    if config.model == "mlp":
        return models.mlp(1, 1, (config.width,) * config.num_layers)
    if config.model == "bigram":
        return models.bigram(config.vocab_size)
    if config.model != "transformer":
        return models.recurrent(config.vocab_size, config.width, config.model, config.num_layers)
    names = ("vocab_size", "width", "num_layers", "num_heads")
    sizes = {name: getattr(config, name) for name in names}
    return models.transformer(models.TransformerConfig(**sizes))


def make_problem(config: Config) -> Problem:
    """One episode, and the model and learner of a config at random parameters."""
    model = make_model(config)
    if config.model == "mlp":
        family = sinusoid(
            SinusoidConfig(num_support=config.num_support, num_query=config.num_query)
        )
        loss = losses.regression(model)
    else:
        names = ("num_support", "num_query", "vocab_size", "length")
        family = markov(MarkovConfig(**{name: getattr(config, name) for name in names}))
        loss = losses.next_token(model)
    params_key, episode_key = jax.random.split(jax.random.key(config.seed))
    episode = jax.tree.map(
        lambda x: x[0], jax.jit(family.train.sample, static_argnums=1)(episode_key, 1)
    )
    hparams = {"inner_learning_rate": config.inner_learning_rate}
    params = jax.jit(model.init)(params_key)
    return Problem(make_learner(config, model), loss, params, episode, hparams)


def check_memory(config: Config) -> None:
    """Raises UserError where the episode or the model exceeds the memory of the device."""
    model = make_model(config)
    largest = max(config.num_support, config.num_query)
    if config.model == "mlp":
        points: Any = jax.ShapeDtypeStruct((largest, 1), "float32")
        batch, loss = Batch(points, points), losses.regression(model)
    else:
        batch, loss = feasible.tokens(largest, config.length), losses.next_token(model)
    feasible.check([], model.init, loss, batch, batch, num_episodes=1)


def load_problem(name: str) -> Problem:
    """Calls the user's own ``module:function``.

    Raises:
      UserError: there is no such module or function, or it returns something else.
    """
    problem = load_function("--problem", name, num_arguments=0)()
    if not isinstance(problem, Problem):
        raise UserError(
            f"{name} must return a metaopt.diagnostics.doctor.Problem, not {type(problem)}"
        )
    return problem


def load_function(flag: str, name: str, num_arguments: int) -> Callable[..., Any]:
    """The function ``module:function`` of the user's own, by import.

    Raises:
      UserError: there is none that can be called with so many arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{flag} takes module:function, not {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module is there, and misses another one
        raise UserError(f"no module {module_name!r} can be imported from here") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"the module {module_name!r} has no function {function_name!r}")
    try:
        inspect.signature(function).bind(*range(num_arguments))
    except (TypeError, ValueError):  # ValueError: of what is written in C and has no signature
        raise UserError(f"{name} must be a function of {num_arguments} arguments") from None
    return function


def run(config: Config) -> tuple[Report, Report]:
    """Examines in float64 and in float32, prints both, and returns both."""
    parallel.set_up_backend()
    estimator = make_estimator(config)
    if config.problem is None:
        check_memory(config)
    problem = load_problem(config.problem) if config.problem else make_problem(config)
    if config.inner.query_loss == "annealed":
        problem = problem._replace(hparams={"query_annealing": 0.5, **problem.hparams})

    def report(problem: Problem, rounds: int) -> Report:
        learner, loss_fn, params, episode, hparams = problem
        return examine(
            estimator,
            learner,
            loss_fn,
            config.inner,
            params,
            hparams,
            episode,
            jax.random.key(config.seed),
            directions=config.directions,
            rounds=rounds,
        )

    with jax.enable_x64(True):
        parts = {name: to_float64(getattr(problem, name)) for name in ("params", "episode")}
        exact = report(problem._replace(**parts), rounds=0)
    quick = report(problem, config.rounds)
    show(exact, quick)
    return exact, quick


def show(exact: Report, quick: Report) -> None:
    """Prints a table of the two reports, and what they mean in words."""
    console = Console()
    table = Table(title=f"{exact.names[0]} against {exact.names[1]}", title_justify="left")
    for column in ("", exact.dtype, quick.dtype):
        table.add_column(column, justify="right" if column else "left")
    for (label, left), (_, right) in zip(rows(exact), rows(quick), strict=True):
        table.add_row(label, left, right)
    console.print(table)
    for report in (exact, quick):
        console.print(f"[bold]{report.dtype}[/bold]")
        for line in report.describe():
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def rows(report: Report) -> list[tuple[str, str]]:
    """Label and value of each row of the table."""
    found: list[tuple[str, Any]] = []
    for name, part in {"": report.agreement, **report.parts}.items():
        label = f" of {name}" if name else ""
        found += [(f"cosine{label}", f"{part.cosine:.6f}"), (f"error{label}", f"{part.error:.1e}")]
    for of in get_args(Literal["estimator", "reference", "uncertainty"]):
        label = "of finite differences" if of == "uncertainty" else "from finite differences"
        name = {"estimator": report.names[0], "reference": report.names[1]}.get(of, of)
        found.append((f"{name} {label}", f"{np.max(report.errors(of)):.1e}"))
    for name, cost in zip(report.names, (report.estimator, report.reference), strict=True):
        found.append((f"memory of {name}", measure.human_bytes(cost.temp)))
        timing = cost.seconds
        text = "–" if timing is None else f"{timing.median * 1e3:.3g} ms"
        found.append((f"time of {name}", text))
    return found
