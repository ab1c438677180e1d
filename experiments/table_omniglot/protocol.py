"""What `table_omniglot` trains and tests: its config, presets, rows, and what was published."""

import dataclasses
import functools
import math
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import optax

from experiments import harness
from metaopt import learners, meta_gradients
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.models.conv import is_normalisation
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    ImageSize,
    InnerSteps,
    NotNegative,
    Positive,
    Range,
    Rate,
    Seed,
    Seeds,
    Several,
    Steps,
    Width,
)
from metaopt.reporting.results import Published
from metaopt.types import Array, Estimator, Learner, Model

FewShotName = Literal["5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"]


class FewShot(NamedTuple):
    """Number of characters to tell apart, and of drawings of each to learn from."""

    ways: int
    shots: int

    @classmethod
    def parse(cls, name: FewShotName) -> "FewShot":
        """``'5-way-1-shot'`` as ``FewShot(5, 1)``."""
        ways, _, shots, _ = name.split("-")
        return cls(int(ways), int(shots))

    @property
    def column(self) -> str:
        """Name of its column in the table."""
        return f"{self.ways}-way {self.shots}-shot"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reptile(Checked):
    """How the row Reptile is trained and tested; by default for a few thousand meta-steps.

    Attributes:
      adam: Inner steps by Adam without momentum, as published, or by gradient descent.
      inner_rate: Inner learning rate, for Adam about 0.001; with 20 ways half of it.
      num_steps: Inner steps of training, each on other drawings; with 20 ways twice as many.
      drawings: Drawings of a character in an episode of training.
      tasks_per_step: Meta-batch.
      tested: Inner steps of the test.
    """

    adam: bool = False
    inner_rate: Rate = 0.5
    num_steps: InnerSteps = 10
    drawings: Annotated[int, Range(2, 10**6)] = 20
    tasks_per_step: Count = 10
    tested: InnerSteps = 5

    def __post_init__(self):
        super().__post_init__()
        if 5 * self.drawings % self.num_steps:
            raise UserError(
                f"reptile: 5 ways of {self.drawings} drawings cannot be cut into {self.num_steps} "
                "batches of equal size; change drawings or num_steps"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Checked):
    """How the row iMAML is trained and tested.

    The curvature of the support loss is far above the published regularisation of 2: five steps of
    conjugate gradients then end six times as far from a solution as zero is, and the system is not
    even positive definite. The released code of the paper does not solve that system, but
    ``2 w + H w / 12 = g``, which a damping of 22 gives up to a factor; its inner steps have no
    proximal term, so a weak one is nearer to it than the published.

    Attributes:
      regularization: λ of the proximal term, in training and test.
      damping: What is added to λ in the linear system.
      solver_steps: Steps of conjugate gradients.
      inner_rate: Inner learning rate.
      num_steps: Inner steps.
      tasks_per_step: Meta-batch.
    """

    regularization: Positive = 0.1
    damping: NotNegative = 24.0
    solver_steps: Count = 5
    inner_rate: Rate = 0.4
    num_steps: InnerSteps = 4
    tasks_per_step: Count = 32


OUTER = OuterConfig(learning_rate=5e-3, rates_learning_rate=1e-2, clip_norm=10.0, warmup_steps=50)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.TrainedConfig):
    """Few-shot classification of Omniglot's characters: MAML, its relatives and MAML++.

    Attributes:
      rows: Names of the rows to run; the seven main ones if none.
      source: tfds:omniglot, or a folder of npz files.
      image_size: Height and width, in pixels.
      num_train_characters: Number of characters for training.
      num_valid_characters: Number of characters kept for validation, which is not used; the rest
        is for the test.
      settings: Columns of the table.
      seeds: Seeds that every row is trained with; cells are means over them.
      filters: Number of filters of every layer.
      meta_steps: Length of each training.
      outer: Outer optimiser of all rows but Reptile.
      cosine: Outer rate that falls to zero over the training in all rows; MAML++ and its part of
        that name have a cosine in any case.
      query_shots: Query drawings of a character in training; 0 for as many as shots, which is
        what Finn et al. do and what the test does.
      tasks_per_step: Meta-batch; 0 for that of Finn et al., 32 tasks of 5 ways and 16 of 20.
      plus_plus_tasks: Meta-batch of MAML++ and its parts.
      reptile: Training and test of Reptile.
      implicit: Training and test of iMAML.
      unroll: Inner steps laid out one after the other, faster to run and slower to compile.
      tasks_at_a_time: Tasks computed together on one device; 0 all by vmap, 1 one by one in a scan.
      num_devices: Number of devices; 0 for all.
      max_inner_steps: Number of inner steps in the figure.
      test_episodes: Test episodes of each column.
      eval_seed: Seed of the test.
      checkpoint_every: Interval between checkpoints, in meta-steps.
    """

    source: str = "tfds:omniglot"
    image_size: ImageSize = 28
    num_train_characters: Count = 1100
    num_valid_characters: Count = 100
    settings: Annotated[tuple[FewShotName, ...], Several(different=True)] = ("5-way-1-shot",)
    seeds: Seeds = (0,)
    filters: Width = 32
    meta_steps: Steps = 4000
    outer: OuterConfig = OUTER
    cosine: bool = True
    query_shots: CountOr0 = 3
    tasks_per_step: CountOr0 = 0
    plus_plus_tasks: Count = 16
    reptile: Reptile = Reptile()
    implicit: Implicit = Implicit()
    unroll: bool = True
    tasks_at_a_time: CountOr0 = 1
    num_devices: CountOr0 = 0
    max_inner_steps: Annotated[int, Range(5, 10**5)] = 10  # rows are judged after up to 5
    test_episodes: Count = 1000
    eval_seed: Seed = 1234
    checkpoint_every: Steps = 500


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        preset="gpu",
        settings=("5-way-1-shot", "5-way-5-shot", "20-way-1-shot", "20-way-5-shot"),
        filters=64,
        meta_steps=60_000,
        outer=OuterConfig(learning_rate=1e-3, rates_learning_rate=1e-3, clip_norm=math.inf),
        cosine=False,
        query_shots=0,
        plus_plus_tasks=8,
        reptile=Reptile(
            adam=True, inner_rate=1e-3, num_steps=5, drawings=10, tasks_per_step=5, tested=50
        ),
        implicit=Implicit(regularization=2.0, damping=22.0, inner_rate=0.1, num_steps=16),
        tasks_at_a_time=0,
        checkpoint_every=5000,
    ),
    "smoke": Config(
        preset="smoke",
        rows=("MAML", "MAML++"),
        filters=4,
        meta_steps=6,
        tasks_per_step=4,
        plus_plus_tasks=4,
        reptile=Reptile(tasks_per_step=4),
        implicit=Implicit(num_steps=2, tasks_per_step=4),
        unroll=False,
        test_episodes=16,
    ),
}


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    return PRESETS[preset]


FEW_SHOT = (FewShot(5, 1), FewShot(5, 5), FewShot(20, 1), FewShot(20, 5))
PUBLISHED = {
    "MAML": ((98.7, 99.9, 95.8, 98.9), "Finn et al., 2017, arXiv:1703.03400, table 1"),
    "FOMAML": ((98.3, 99.2, 89.4, 97.9), "Nichol et al., 2018, arXiv:1803.02999"),
    "Reptile": ((97.68, 99.48, 89.43, 97.12), "Nichol et al., 2018, arXiv:1803.02999"),
    "iMAML": ((99.16, 99.67, 94.46, 98.69), "Rajeswaran et al., 2019, arXiv:1909.04630"),
    "MAML++": ((99.47, 99.85, 97.65, 99.33), "Antoniou et al., 2019, arXiv:1810.09502"),
}
"""Per cent correct in the order of `FEW_SHOT`, transductive, and the source."""


def published(row: str, few_shot: FewShot) -> Published | None:
    """The published number of a cell, if there is one."""
    if row not in PUBLISHED or few_shot not in FEW_SHOT:
        return None
    values, source = PUBLISHED[row]
    return Published(values[FEW_SHOT.index(few_shot)], source)


class OmniglotRow(NamedTuple):
    """A learner, how it is trained, and how it is judged.

    Attributes:
      name: Name in the table.
      learner: What is meta-learned.
      inner: Inner loop of training.
      inner_rate: Inner learning rate, or what learned rates are factors of.
      tasks_per_step: Meta-batch.
      outer: Outer optimiser.
      estimator: How the meta-gradient is found.
      tested: Inner steps of the test.
      drawings: Support and query drawings of a character in training.
      judged: Learner of the test, if its inner problem is another one.
      first_order_steps: Number of first meta-steps that leave second derivatives out.
      annealing_steps: Meta-steps over which the weight of the query losses goes to the last one.
      note: How its training differs from that of the other rows.
    """

    name: str
    learner: Learner
    inner: InnerLoop
    inner_rate: float
    tasks_per_step: int
    outer: OuterConfig
    estimator: Estimator
    tested: int
    drawings: tuple[int, int]
    judged: Learner | None = None
    first_order_steps: int = 0
    annealing_steps: int = 0
    note: str = ""

    def phases(self, meta_steps: int) -> list[tuple[Estimator, int]]:
        """Estimators with the meta-step up to which each is used, in order."""
        rest = [(self.estimator, meta_steps)]
        steps = self.first_order_steps
        return [(meta_gradients.first_order, steps), *rest] if steps else rest

    @property
    def hparams(self) -> dict[str, Array]:
        """The scalar that the inner loop reads."""
        return {"inner_learning_rate": jnp.float32(self.inner_rate)}

    def protocol(self, config: Config) -> str:
        """How it is trained and tested, in words."""
        steps, (support, query) = self.inner.num_steps, self.drawings
        optimizer = {"adam": "Adam", "sgd": "gradient descent"}.get(
            self.outer.optimizer, self.outer.optimizer
        )
        schedule = "cosine from" if self.outer.decay_steps else "constant"
        return (
            f"{steps} inner step{'s' if steps > 1 else ''} at {self.inner_rate:g}, "
            f"{self.tasks_per_step} tasks a meta-batch of {support} support and {query} query "
            f"drawings a character, {config.meta_steps} meta-steps of {optimizer}, {schedule} "
            f"{self.outer.learning_rate:g}, {config.filters} filters, tested after {self.tested}"
            + (f"; {self.note}" if self.note else "")
        )


class Parts(NamedTuple):
    """The parts of MAML++, each a switch on MAML with 5 inner steps at 0.1.

    Attributes:
      multi_step_loss: Query loss after every step, with weights that go from equal to all on the
        last step over the first tenth of the training.
      per_step_rates: Learned inner rate for each layer and step.
      per_step_normalisation: Scale and bias of batch norm for each step, learned in the outer
        loop alone.
      order_annealing: No second derivatives in the first tenth of the training (the paper: the
        first third, and none for Omniglot in its released code).
      cosine: Outer rate that falls by a cosine, to a hundredth if it does not in other rows.

    References:
      Antoniou et al., 2019, "How to train your MAML", section 4.
    """

    multi_step_loss: bool = False
    per_step_rates: bool = False
    per_step_normalisation: bool = False
    order_annealing: bool = False
    cosine: bool = False


ALL_PARTS = Parts(True, True, True, True, True)
ABLATIONS = {
    "MAML, 5 steps": Parts(),
    "MAML, 5 steps + multi-step loss": Parts(multi_step_loss=True),
    "MAML, 5 steps + per-step rates": Parts(per_step_rates=True),
    "MAML, 5 steps + per-step normalisation": Parts(per_step_normalisation=True),
    "MAML, 5 steps + order annealing": Parts(order_annealing=True),
    "MAML, 5 steps + cosine": Parts(cosine=True),
}


def make_rows(config: Config, few_shot: FewShot, model: Model) -> list[OmniglotRow]:
    """The rows that ``config.rows`` names, or the seven main ones.

    Raises:
      UserError: it names one that does not exist.
    """
    main = [*baselines(config, few_shot, model), mamlpp("MAML++", config, few_shot, ALL_PARTS)]
    ablations = [mamlpp(name, config, few_shot, parts) for name, parts in ABLATIONS.items()]
    return harness.select(main + ablations, config.rows or [row.name for row in main])


def baselines(config: Config, few_shot: FewShot, model: Model) -> list[OmniglotRow]:
    """MAML by the protocol of Finn et al., and five learners beside it."""
    few_ways = few_shot.ways < 20
    maml = OmniglotRow(
        "MAML",
        learners.maml(),
        InnerLoop(num_steps=1 if few_ways else 5, unroll=config.unroll),
        0.4 if few_ways else 0.1,
        config.tasks_per_step or (32 if few_ways else 16),
        _outer(config, config.cosine),
        meta_gradients.reverse,
        tested=3 if few_ways else 5,
        drawings=(few_shot.shots, config.query_shots or few_shot.shots),
    )
    meta_sgd = maml._replace(
        name="Meta-SGD",
        learner=learners.meta_sgd(),
        inner=InnerLoop(num_steps=1, unroll=config.unroll),
        inner_rate=0.4,
        tested=1,
    )
    return [
        maml,
        maml._replace(name="FOMAML", estimator=meta_gradients.first_order),
        _reptile(maml, config, few_ways),
        maml._replace(name="ANIL", learner=learners.anil(model)),
        meta_sgd,
        _implicit(maml, config),
    ]


def _reptile(maml: OmniglotRow, config: Config, few_ways: bool) -> OmniglotRow:
    """Each meta-step goes to the mean of the adapted parameters, and less far by a cosine.

    As published, but for the cosine (there a straight line); Adam starts afresh in every task, and
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
        learner=learners.maml(adam) if how.adam else learners.maml(),
        inner=InnerLoop(num_steps=num_steps, batching="split", unroll=maml.inner.unroll),
        inner_rate=rate,
        tasks_per_step=how.tasks_per_step,
        outer=outer,
        estimator=meta_gradients.reptile,
        tested=how.tested,
        drawings=(how.drawings - 1, 1),
        note=f"inner steps of {'Adam' if how.adam else 'gradient descent'}, each on other drawings",
    )


def _implicit(maml: OmniglotRow, config: Config) -> OmniglotRow:
    """Trained and tested on the inner problem with the proximal term."""
    how = config.implicit
    estimator = functools.partial(
        meta_gradients.implicit,
        regularization=how.regularization,
        damping=how.damping,
        num_solver_steps=how.solver_steps,
    )
    return maml._replace(
        name="iMAML",
        inner=InnerLoop(num_steps=how.num_steps, unroll=config.unroll),
        inner_rate=how.inner_rate,
        tasks_per_step=how.tasks_per_step,
        estimator=estimator,
        tested=min(how.num_steps, config.max_inner_steps),
        judged=meta_gradients.proximal(learners.maml(), how.regularization),
        note=f"λ = {how.regularization:g}, damping {how.damping:g}, "
        f"{how.solver_steps} steps of conjugate gradients",
    )


def mamlpp(name: str, config: Config, few_shot: FewShot, parts: Parts) -> OmniglotRow:
    """MAML with 5 inner steps at 0.1 and some parts of MAML++."""
    query_loss = "annealed" if parts.multi_step_loss else "last"
    inner = InnerLoop(num_steps=5, query_loss=query_loss, unroll=config.unroll)

    learner = learners.maml()
    if parts.per_step_rates:
        learner = learners.per_layer_per_step(num_steps=inner.num_steps)
    if parts.per_step_normalisation:
        learner = learners.per_step_parameters(learner, is_normalisation, num_steps=inner.num_steps)
    outer = _outer(config, config.cosine or parts.cosine)
    if parts.cosine and not config.cosine:
        outer = dataclasses.replace(outer, final_fraction=0.01)
    return OmniglotRow(
        name,
        learner,
        inner,
        0.1,
        config.plus_plus_tasks,
        outer,
        meta_gradients.reverse,
        tested=inner.num_steps,
        drawings=(few_shot.shots, config.query_shots or few_shot.shots),
        first_order_steps=config.meta_steps // 10 if parts.order_annealing else 0,
        annealing_steps=max(1, config.meta_steps // 10) if parts.multi_step_loss else 0,
    )


def _outer(config: Config, cosine: bool) -> OuterConfig:
    return config.outer.ending_at(config.meta_steps) if cosine else config.outer
