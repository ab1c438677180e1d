"""The config of `table_sinusoid` and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from metaopt.errors import UserError
from metaopt.optimizers.outer import OuterConfig
from metaopt.ranges import (
    Checked,
    Count,
    InnerSteps,
    Range,
    Rate,
    RateOr0,
    Seed,
    Seeds,
    Several,
    Steps,
)

CHOSEN_BY = ("preset", "protocol")
"""The flags that the defaults of all others depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Sinusoid regression: the published learners, and better ones beside them.

    Attributes:
      preset: smoke (tiny: a minute or two), cpu or gpu; the defaults of all the rest follow it.
      protocol: li, a table over the shots of the test (Li et al., 2017), or finn, curves
        over the inner steps of the test (Finn et al., 2017).
      rows: names of the rows to run; all if none.
      seeds: every row is trained once with each; cells are means over them.
      meta_steps: of each training.
      steps_per_call: meta-steps in one compiled call; a divisor of meta_steps.
      tasks_per_step: the meta-batch.
      num_support: shots of training.
      num_query: examples in a training task that the adapted model is judged by.
      test_shots: shots of the test, for finn one number.
      max_inner_steps: of the curves of finn.
      inner_rate: MAML's.
      first_rates: the published Meta-SGD draws the rate it starts from between these.
      learning_rate: of the outer Adam of the published rows.
      weight_std: deviation of the truncated normal from which the published rows draw weights;
        biases start at zero.
      better: the outer optimiser of the rows of 5 inner steps; its cosine ends with the
        training unless decay_steps says when.
      test_curves: sinusoids of the test.
      supports_per_curve: supports that each is met through.
      test_points: evenly spaced inputs on which it is judged.
      eval_seed: of the test.
      improve: train under the closed loop, which changes rates where that helps.
      root: where runs are written.
      run_dir: this directory instead, new or of the same config.
    """

    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    protocol: Literal["li", "finn"] = "li"
    rows: tuple[str, ...] = ()
    seeds: Seeds = (0, 1, 2)
    meta_steps: Steps = 60_000
    steps_per_call: Count = 1000
    tasks_per_step: Count = 4
    num_support: Count = 5
    num_query: Count = 10
    test_shots: Annotated[tuple[Count, ...], Several(different=True)] = (5, 10, 20)
    max_inner_steps: InnerSteps = 10
    inner_rate: Rate = 0.01
    first_rates: tuple[Rate, Rate] = (0.005, 0.1)
    learning_rate: RateOr0 = 1e-3
    weight_std: Annotated[float, Range(1e-12, 1e4)] = 0.01
    better: OuterConfig = dataclasses.field(
        default_factory=lambda: OuterConfig(
            learning_rate=1e-3, rates_learning_rate=1e-2, clip_norm=10.0, warmup_steps=100
        )
    )
    test_curves: Count = 1000
    supports_per_curve: Count = 10
    test_points: Annotated[int, Range(2, 10**6)] = 100  # 2 span the inputs
    eval_seed: Seed = 1234
    improve: bool = False
    root: str = "runs"
    run_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.meta_steps % self.steps_per_call:
            raise UserError(
                f"{self.meta_steps} meta-steps cannot be cut into calls of {self.steps_per_call}; "
                "make steps_per_call a divisor of meta_steps"
            )
        if self.protocol == "finn" and len(self.test_shots) > 1:
            raise UserError("the curves of finn are of one number of shots: give one test_shots")
        low, high = self.first_rates
        if low > high:
            raise UserError(f"first_rates {self.first_rates} must be the lower one and the higher")


def preset(flags: Mapping[str, str]) -> Config:
    """The defaults for ``--preset`` and ``--protocol``."""
    name, protocol = flags.get("preset", "cpu"), flags.get("protocol", "li")
    if protocol == "li":
        config = Config()
    elif protocol == "finn":
        config = Config(
            protocol="finn",
            meta_steps=70_000,
            tasks_per_step=25,
            num_support=10,
            test_shots=(10,),
            inner_rate=0.001,
            seeds=(0,),
        )
    else:
        raise UserError(f"unknown protocol {protocol!r}: choose li or finn")
    if name == "cpu":
        return config
    if name == "gpu":
        return dataclasses.replace(config, preset="gpu", seeds=(0, 1, 2, 3, 4))
    if name == "smoke":
        return dataclasses.replace(
            config,
            preset="smoke",
            seeds=(0,),
            meta_steps=20,
            steps_per_call=10,
            test_curves=16,
            supports_per_curve=2,
            better=dataclasses.replace(config.better, warmup_steps=2),
        )
    raise UserError(f"unknown preset {name!r}: choose smoke, cpu or gpu")
