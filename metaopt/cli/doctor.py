"""Examine a meta-gradient: is it right, what does it cost, and where does it break?

    metaopt doctor --estimator mixed_mode
    metaopt doctor --model mlp --learner maml --estimator first_order
    metaopt doctor --inner-optimizer radam      # NaN, and from which step on
    metaopt doctor --estimator truncated --options window=1
    metaopt doctor --estimator my_module:my_estimator --learner my_module:my_learner
    metaopt doctor --problem my_module:my_problem --inner-optimizer my_module:my_optimizer

The estimator is compared with reverse mode and with finite differences of the objective,
in float64, which shows how exact it is, and in float32, which shows what it costs.

``module:function`` names a function of your own in a module that can be imported from the
current directory. Each returns what metaopt's own functions of that kind return: an estimator
takes (learner, loss_fn, inner_loop), an optimiser the learning rate, a learner what it needs of
model, inner_optimizer and num_steps, a problem nothing: it returns a metaopt.Problem.
"""

import ast
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from metaopt import languages, learners, losses, measure, meta_gradients, models, parallel
from metaopt.diagnostics import feasible
from metaopt.diagnostics.doctor import Report, examine, to_dtype
from metaopt.errors import UserError
from metaopt.files import matches
from metaopt.fit import Problem
from metaopt.inner_loop import InnerLoop
from metaopt.learners.maml import InnerOptimizer
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.parts import can_be_called, load_part, make_part
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
    shared_fields,
)
from metaopt.tasks.markov import Symbols
from metaopt.tasks.sinusoid import SinusoidConfig, sinusoid
from metaopt.types import Estimator, Learner

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
LearnerName = Literal["maml", "anil", "meta_sgd", "per_layer_per_step"]
ModelName = Literal["mlp", languages.ModelName]
TAKES = ("learner", "loss_fn", "inner_loop")
ESTIMATORS = {name: getattr(meta_gradients, name) for name in get_args(EstimatorName)}
LEARNERS = {name: getattr(learners, name) for name in get_args(LearnerName)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Examine a meta-gradient.

    Attributes:
      estimator: Estimator of the meta-gradient, which is examined.
      options: Options of the estimator, such as ``window=1``.
      learner: What is meta-learned.
      model: Model of one Markov language; of one sinusoid for ``mlp``.
      inner_optimizer: Optimiser of the inner loop; any of optax by its name too.
      inner_learning_rate: Rate of the inner optimiser.
      inner: The inner loop. An annealed query loss is examined half way, unless ``hparams`` says
        where.
      hparams: Scalars that a learner of your own reads, such as ``decay=0.1``.
      problem: Tasks, model and loss of your own, in place of ``model`` and the sizes.
      width: Width of the model.
      num_layers: Number of layers of the model.
      num_heads: Number of heads of the transformer.
      vocab_size: Number of symbols of the language.
      num_support: Sequences or points in the support.
      num_query: Sequences or points in the query.
      length: Tokens in a sequence.
      directions: Number of directions along which the gradient is compared with finite
        differences.
      rounds: Timed calls of each, alternating; 0 times nothing.
      seed: Seed of the parameters, the episode and the directions.
    """

    estimator: EstimatorName | str = "mixed_mode"
    options: tuple[str, ...] = ()
    learner: LearnerName | str = "meta_sgd"
    model: ModelName | str = "transformer"
    inner_optimizer: str = "adam"
    inner_learning_rate: RateOr0 = 0.01
    inner: InnerLoop = InnerLoop(num_steps=5, unroll=False, remat=True)  # noqa: RUF009
    hparams: tuple[str, ...] = ()
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
    estimator = load_part("--estimator", config.estimator, TAKES, ESTIMATORS)
    hints = typing.get_type_hints(estimator)
    known = [
        name
        for name in list(inspect.signature(estimator).parameters)[len(TAKES) :]
        if name != "outer_loss" and get_origin(hints.get(name)) is not Callable
    ]
    options = _values("--options", config.options)
    for name, value in options.items():
        if name not in known:
            choices = ", ".join(known) or "no options"
            raise UserError(f"{config.estimator} has no option {name!r}; it takes {choices}")
        if not matches(value, hint := hints.get(name, Any)):
            wanted = inspect.formatannotation(hint)
            raise UserError(f"{config.estimator} takes {name} as {wanted}, not {value!r}")
    return functools.partial(estimator, **options) if options else estimator


def _values(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The values of ``name=value``: Python literals, or else words."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            if not text.isidentifier():
                raise UserError(f"{flag} takes name=value, not {pair!r}") from None
            found[name] = text
    return found


def make_optimizer(name: str) -> InnerOptimizer:
    """An inner optimiser: by name, metaopt's or else optax's, or one's own.

    Raises:
      UserError: there is none of this name that takes a learning rate.
    """
    of_optax = {name: getattr(optax, name)} if hasattr(optax, name) else {}
    known = {**of_optax, **INNER_OPTIMIZERS}
    optimizer = load_part("--inner-optimizer", name, ("learning_rate",), known)
    try:
        made = optimizer(0.1)
    except (TypeError, AttributeError):
        if name not in known:
            raise  # a bug of the user's own
        made = None  # it takes something else than a rate
    if isinstance(made, optax.GradientTransformation):
        return optimizer
    raise UserError(
        f"--inner-optimizer {name} must take a learning rate and return an "
        "optax.GradientTransformation, as sgd, adam and radam do"
    )


def make_learner(config: Config, problem: Problem) -> Learner:
    """The learner of a config."""
    arguments = {
        "model": problem.model,
        "inner_optimizer": make_optimizer(config.inner_optimizer),
        "num_steps": config.inner.num_steps,
    }
    return make_part("--learner", config.learner, Learner, arguments, LEARNERS)


def make_problem(config: Config) -> Problem:
    """Tasks, model and loss of a config.

    Raises:
      UserError: there is no such problem or model, or an episode or the model exceeds the memory
        of the device.
    """
    if config.problem:
        return make_part("--problem", config.problem, Problem)
    if config.model == "mlp":
        model = models.mlp(1, 1, (config.width,) * config.num_layers)
        sizes = SinusoidConfig(num_support=config.num_support, num_query=config.num_query)
        problem = Problem(sinusoid(sizes), model, losses.regression(model))
    else:
        shared = shared_fields(languages.LanguageConfig, config)
        language = languages.LanguageConfig(**shared)
        model = languages.make_model(language)
        problem = Problem(languages.make_family(language), model, losses.next_token(model))
    support, query, _ = jax.eval_shape(
        lambda key: jax.tree.map(lambda x: x[0], problem.family.train.sample(key, 1)),
        jax.random.key(0),
    )
    feasible.check([], model.init, problem.loss_fn, support, query, num_episodes=1)
    return problem


def make_hparams(config: Config) -> dict[str, float]:
    """The scalars that learner and objective read.

    Raises:
      UserError: a value is not a finite number.
    """
    hparams = {"inner_learning_rate": config.inner_learning_rate}
    if config.inner.query_loss == "annealed":
        hparams["query_annealing"] = 0.5
    for name, value in _values("--hparams", config.hparams).items():
        if not matches(value, float):
            raise UserError(f"--hparams {name} must be a finite number, not {value!r}")
        hparams[name] = value
    return hparams


def run(config: Config) -> tuple[Report, Report]:
    """Examines in float64 and in float32, prints both, and returns both."""
    parallel.set_up_backend()
    estimator, problem = make_estimator(config), make_problem(config)
    learner, hparams = make_learner(config, problem), make_hparams(config)
    if problem.outer_loss and not can_be_called(estimator, *TAKES, outer_loss=None):
        raise UserError(
            f"{config.problem} has an outer loss: {config.estimator} must take outer_loss by name"
        )
    params_key, episode_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(problem.model.init)(params_key)
    episode = jax.tree.map(lambda x: x[0], problem.family.train.sample(episode_key, 1))

    def report(params: Any, episode: Any, rounds: int) -> Report:
        return examine(
            estimator,
            learner,
            problem.loss_fn,
            config.inner,
            params,
            hparams,
            episode,
            jax.random.key(config.seed),
            outer_loss=problem.outer_loss,
            directions=config.directions,
            rounds=rounds,
        )

    with jax.enable_x64(True):
        exact = report(to_dtype(params, jnp.float64), to_dtype(episode, jnp.float64), rounds=0)
    quick = report(params, episode, config.rounds)
    show(exact, quick)
    return exact, quick


def show(exact: Report, quick: Report) -> None:
    """Prints a table of the two reports, and what they mean in words."""
    console = Console()
    table = Table(
        title=f"{exact.estimator.name} against {exact.reference.name}", title_justify="left"
    )
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
    found: list[tuple[str, str]] = []
    for name, part in {"": report.agreement, **report.parts}.items():
        label = f" of {name}" if name else ""
        found += [(f"cosine{label}", f"{part.cosine:.6f}"), (f"error{label}", f"{part.error:.1e}")]
    both = report.estimator, report.reference
    found += [(f"{e.name} from finite differences", f"{report.error(e):.1e}") for e in both]
    found.append(("uncertainty of finite differences", f"{report.uncertainty:.1e}"))
    for each in both:
        found.append((f"memory of {each.name}", measure.human_bytes(each.temp)))
        seconds = "–" if each.seconds is None else f"{each.seconds.median * 1e3:.3g} ms"
        found.append((f"time of {each.name}", seconds))
    return found
