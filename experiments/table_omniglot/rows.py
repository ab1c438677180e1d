"""The rows of `table_omniglot`: learners, how they are trained, and what was published."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import optax

from experiments.table_omniglot.config import Config, Setting
from metaopt import learners, meta_gradients
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models.conv import is_normalisation
from metaopt.optimizers.outer import OuterConfig
from metaopt.types import Estimator, Learner, Model

REGULARIZATION, SOLVER_STEPS = 2.0, 5  # of iMAML, as published


class Row(NamedTuple):
    """A learner, how it is trained, and how it is judged.

    Attributes:
      name: as it stands in the table.
      learner: what is meta-learned, for a model.
      inner: the inner loop of training.
      inner_rate: its learning rate, or what learned rates are factors of.
      tasks_per_step: the meta-batch.
      outer: the outer optimiser.
      estimator: how the meta-gradient is found.
      tested: inner steps of the test.
      drawings: support and query drawings of a character in training.
      judged: the learner of the test, where its inner problem is another one.
      first_order_steps: so many first meta-steps leave second derivatives out.
      annealing_steps: meta-steps over which the weight of the query losses goes to the last one.
      note: of how it is trained, where that is not as in the other rows.
    """

    name: str
    learner: Callable[[Model], Learner]
    inner: InnerLoop
    inner_rate: float
    tasks_per_step: int
    outer: OuterConfig
    estimator: Estimator
    tested: int
    drawings: tuple[int, int]
    judged: Callable[[Model], Learner] | None = None
    first_order_steps: int = 0
    annealing_steps: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of MAML++, each a switch on MAML with 5 inner steps at 0.1.

    Attributes:
      multi_step_loss: the query loss after every step, with weights that go from equal to all
        on the last step over the first tenth of the training.
      per_step_rates: a learned inner rate for each layer and step.
      per_step_normalisation: a scale and bias of batch norm for each step, learned in the
        outer loop alone.
      order_annealing: no second derivatives in the first tenth of the training (the paper: the
        first third, and none for Omniglot in its released code).
      cosine: the outer rate falls by a cosine, to a hundredth where it does not in other rows.

    References:
      Antoniou et al., 2019, "How to train your MAML", section 4.
    """

    multi_step_loss: bool = False
    per_step_rates: bool = False
    per_step_normalisation: bool = False
    order_annealing: bool = False
    cosine: bool = False


def make_rows(config: Config, setting: Setting) -> list[Row]:
    """The rows that ``config.rows`` names, or the seven main ones.

    Raises:
      UserError: it names one that is not there.
    """
    main = [*relatives(config, setting), plus_plus("MAML++", config, setting, ALL_PARTS)]
    ablations = [plus_plus(name, config, setting, parts) for name, parts in ABLATIONS.items()]
    rows = main + ablations
    unknown = set(config.rows) - {row.name for row in rows}
    if unknown:
        names = ", ".join(row.name for row in rows)
        raise UserError(f"no row {sorted(unknown)[0]!r}; there are {names}")
    return [row for row in rows if row.name in config.rows] if config.rows else main


def relatives(config: Config, setting: Setting) -> list[Row]:
    """MAML by the protocol of Finn et al., and five learners beside it."""
    few_ways = setting.ways < 20
    maml = Row(
        "MAML",
        lambda _: learners.maml(),
        InnerLoop(num_steps=1 if few_ways else 5, unroll=config.unroll),
        0.4 if few_ways else 0.1,
        config.tasks_per_step or (32 if few_ways else 16),
        _outer(config, config.cosine),
        meta_gradients.reverse,
        tested=3 if few_ways else 5,
        drawings=(setting.shots, config.query_shots or setting.shots),
    )
    meta_sgd = maml._replace(
        name="Meta-SGD",
        learner=lambda _: learners.meta_sgd(),
        inner=InnerLoop(num_steps=1, unroll=config.unroll),
        inner_rate=0.4,
        tested=1,
    )
    return [
        maml,
        maml._replace(name="FOMAML", estimator=meta_gradients.first_order),
        _reptile(maml, config, few_ways),
        maml._replace(name="ANIL", learner=learners.anil),
        meta_sgd,
        _implicit(maml, config),
    ]


def _reptile(maml: Row, config: Config, few_ways: bool) -> Row:
    """Each meta-step goes to the mean of the adapted parameters, and less far by a cosine.

    As published, but for the cosine (there a straight line); Adam begins anew in every task, and
    the test has the whole support in each step. In preset cpu the inner steps are of gradient
    descent at a large rate, with which it learns more in each meta-step.
    """
    how, scale = config.reptile, 1 if few_ways else 2
    rate, num_steps = how.inner_rate / scale, how.num_steps * scale
    adam = functools.partial(optax.adam, b1=0.0)
    outer = OuterConfig(
        optimizer="sgd",
        learning_rate=rate * num_steps,  # of the mean gradient on the way there
        clip_norm=math.inf,
        decay_steps=config.meta_steps,
    )
    return maml._replace(
        name="Reptile",
        learner=lambda _: learners.maml(adam) if how.adam else learners.maml(),
        inner=InnerLoop(num_steps=num_steps, batching="split", unroll=maml.inner.unroll),
        inner_rate=rate,
        tasks_per_step=how.tasks_per_step,
        outer=outer,
        estimator=meta_gradients.reptile,
        tested=how.tested,
        drawings=(how.drawings - 1, 1),
        note=f"inner steps of {'Adam' if how.adam else 'gradient descent'}, each on other drawings",
    )


def _implicit(maml: Row, config: Config) -> Row:
    """Trained and tested on the inner problem with the proximal term."""
    estimator = functools.partial(
        meta_gradients.implicit, regularization=REGULARIZATION, num_solver_steps=SOLVER_STEPS
    )
    return maml._replace(
        name="iMAML",
        inner=InnerLoop(num_steps=config.implicit_steps, unroll=config.unroll),
        inner_rate=0.1,
        tasks_per_step=config.implicit_tasks,
        estimator=estimator,
        tested=min(config.implicit_steps, config.max_inner_steps),
        judged=lambda _: meta_gradients.proximal(learners.maml(), REGULARIZATION),
    )


def plus_plus(name: str, config: Config, setting: Setting, parts: Parts) -> Row:
    """MAML with 5 inner steps at 0.1 and some parts of MAML++."""
    query_loss = "annealed" if parts.multi_step_loss else "last"
    inner = InnerLoop(num_steps=5, query_loss=query_loss, unroll=config.unroll)

    def learner(_: Model) -> Learner:
        made = learners.maml()
        if parts.per_step_rates:
            made = learners.per_layer_per_step(num_steps=inner.num_steps)
        if parts.per_step_normalisation:
            made = learners.per_step_parameters(made, is_normalisation, num_steps=inner.num_steps)
        return made

    outer = _outer(config, config.cosine or parts.cosine)
    if parts.cosine and not config.cosine:
        outer = dataclasses.replace(outer, final_fraction=0.01)
    return Row(
        name,
        learner,
        inner,
        0.1,
        config.plus_plus_tasks,
        outer,
        meta_gradients.reverse,
        tested=inner.num_steps,
        drawings=(setting.shots, config.query_shots or setting.shots),
        first_order_steps=config.meta_steps // 10 if parts.order_annealing else 0,
        annealing_steps=max(1, config.meta_steps // 10) if parts.multi_step_loss else 0,
    )


def _outer(config: Config, cosine: bool) -> OuterConfig:
    """The outer optimiser, its cosine ending with the training unless it says when."""
    end = max(config.meta_steps, config.outer.warmup_steps + 1)
    decay_steps = config.outer.decay_steps or (end if cosine else 0)
    return dataclasses.replace(config.outer, decay_steps=decay_steps)


ALL_PARTS = Parts(**{field.name: True for field in dataclasses.fields(Parts)})
ABLATIONS = {
    "MAML, 5 steps": Parts(),
    "MAML, 5 steps + multi-step loss": Parts(multi_step_loss=True),
    "MAML, 5 steps + per-step rates": Parts(per_step_rates=True),
    "MAML, 5 steps + per-step normalisation": Parts(per_step_normalisation=True),
    "MAML, 5 steps + order annealing": Parts(order_annealing=True),
    "MAML, 5 steps + cosine": Parts(cosine=True),
}
