"""What a meta-gradient costs: memory, operations and time of its exact forms side by side.

Kemaev et al., 2025 (mixed mode, MixFlow-MG); Griewank and Walther, 2000 (planned
recomputation); a transformer language model with Adam in the inner loop. Memory is what
the compiler plans, operations are counted on the program: both are the same in every
run. Times are medians of alternating rounds.

    python -m experiments.table_meta_gradients                    # 15 minutes, 2 cores
    python -m experiments.table_meta_gradients --preset smoke     # a minute, tiny sizes
    python -m experiments.table_meta_gradients --preset gpu       # 100 M parameters, bfloat16
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from experiments import harness
from experiments.table_meta_gradients import forms
from experiments.table_meta_gradients.forms import (
    FORMS,
    NAIVE,
    ON_HOST,
    PLANNED,
    ROUNDED,
    UNROLLED,
    Size,
)
from metaopt import losses, measure
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.ranges import Count, CountOr0, InnerSteps, Range, Seed, Several
from metaopt.rematerialization.plan import least_extra_steps, plan_for
from metaopt.reporting import plots
from metaopt.statistics import Interval
from metaopt.training.progress import Progress

MIB, GIGA = 2**20, 1e9
CHECKPOINT, QUICKEST = "per-step checkpoint", "mixed + saved, layers kept"

SHORT = Size(length=128, steps=4)
SMALL = Size(width=64, layers=2, length=64, steps=4)
WIDER = (Size(width=256, length=256, steps=2),)
SIZES = (
    Size(),
    Size(width=64, layers=8, length=512),
    SHORT,
    Size(length=512),
    Size(layers=8),
    Size(width=256),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(harness.RunConfig):
    """What a meta-gradient costs, in its exact forms side by side.

    Attributes:
      sizes: Sizes at which memory and operations are compared; the first ones are in the ratios.
      time_size: Size at which all forms are timed.
      utilisation_sizes: Sizes at which the fastest exact form is timed as well.
      exact_size: Size at which gradients are compared, in float64 and in float32.
      growth_steps: Numbers of inner steps for which recomputation is planned, at the first size.
      growth_budgets: Memory for each of them but the first, in units of the first's.
      offload: Whether to measure the form that keeps inner states in host memory. On a CPU,
        where host and device memory are one, it shows nothing.
      ratio_sizes: Number of the sizes that have rows among the ratios.
      rounds: Rounds of timing.
      seed: Seed of parameters and data.
    """

    sizes: Annotated[tuple[Size, ...], Several()] = SIZES
    time_size: Size = SHORT
    utilisation_sizes: tuple[Size, ...] = WIDER
    exact_size: Size = SMALL
    growth_steps: Annotated[tuple[InnerSteps, ...], Several(different=True)] = (8, 32, 128, 1024)
    growth_budgets: tuple[Annotated[float, Range(1, 1e6)], ...] = (1.25, 2.0, 3.0)
    offload: bool = False
    ratio_sizes: CountOr0 = 2
    rounds: Count = 9
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        if len(self.growth_budgets) != len(self.growth_steps) - 1:
            raise UserError(
                f"growth_budgets {self.growth_budgets} must be one for each of growth_steps "
                f"{self.growth_steps} but the first"
            )


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    if preset == "smoke":
        tiny = Size(width=32, layers=2, length=32, steps=4)
        return Config(
            preset="smoke",
            sizes=(tiny,),
            time_size=tiny,
            utilisation_sizes=(),
            exact_size=tiny,
            growth_steps=(4, 8),
            growth_budgets=(1.25,),
            ratio_sizes=1,
            rounds=2,
        )
    if preset == "gpu":
        large = Size(width=1024, layers=8, length=2048, steps=4, head_size=64)
        large = dataclasses.replace(large, compute_dtype="bfloat16")
        return Config(
            preset="gpu",
            sizes=(large,),
            time_size=dataclasses.replace(large, sequences=1),
            utilisation_sizes=(large,),
            offload=True,
            ratio_sizes=1,
        )
    return Config()


class Bench:
    """Programs of the table, each compiled once, and the table that they give numbers to."""

    def __init__(self, config: Config, table: harness.TableRun):
        self.config, self.table = config, table
        self._temps: dict[tuple[str, Size], int] = {}
        self.forms = {n: form for n, form in FORMS.items() if n != ON_HOST or config.offload}

    def add(self, part: str, row: str, column: str, value: float, unit: str, **more: Any) -> None:
        """Adds one number to a part of the table; ``rounds`` says of what it is the median."""
        if rounds := more.pop("rounds", None):
            more["over"] = f"medians over {rounds} rounds in turn"
        found = Interval(value, math.nan, 1)
        part = f"meta_gradients/{part}"
        self.table.add(row, column, found, table=part, unit=unit, limit=True, **more)

    def temp(self, form: str, size: Size) -> int:
        """Temporary bytes of a form, as the compiler plans them."""
        if (form, size) not in self._temps:
            function = forms.estimate(FORMS[form], size)
            compiled = measure.compile_for(function, *forms.shapes(size))
            self._temps[form, size] = measure.compiled_memory(compiled).temp
        return self._temps[form, size]

    def compile_all(self, programs: Sequence[tuple[str, Size]]) -> None:
        """Have `temp` of all of these ready, compiling on every core."""
        with (
            Progress("compile", total=len(programs), start=0) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for i, _ in enumerate(pool.map(lambda p: self.temp(*p), programs), start=1):
                progress.update(i)

    def smallest(self, size: Size) -> tuple[str, int]:
        """The exact form that takes the least memory, and its bytes."""
        exact = [name for name, form in self.forms.items() if form.exact and name != UNROLLED]
        return min(((name, self.temp(name, size)) for name in exact), key=lambda x: x[1])


def add_memory(bench: Bench) -> None:
    """Bytes and operations of every form at every size, and their ratios."""
    shown = [name for name in bench.forms if name != UNROLLED]  # which compiles for minutes
    bench.compile_all([(name, size) for size in bench.config.sizes for name in shown])
    for size in bench.config.sizes:
        for name in shown:
            bench.add("memory", name, str(size), bench.temp(name, size) / MIB, "MiB")
            matmul = operations(name, size).matmul / GIGA
            bench.add("operations", name, str(size), matmul, "GFLOP, matmul")
    for i, size in enumerate(bench.config.sizes[: bench.config.ratio_sizes]):
        best, least = bench.smallest(size)
        for name, label in [(NAIVE, NAIVE), (CHECKPOINT, "checkpoint")]:
            if name == CHECKPOINT and i > 0:
                continue
            ratio = bench.temp(name, size) / least
            bench.add("reference", f"{label}/best {size}", "ratio", ratio, "times", form=best)


def operations(name: str, size: Size) -> measure.Flops:
    """Operations of a form, with the extra evaluations of the plan if it has one."""
    extra = least_extra_steps(size.steps, 2) if name == PLANNED else 0
    return forms.flops(FORMS[name], size, extra)


def add_growth(bench: Bench) -> None:
    """Memory against the number of inner steps, planned within a budget and not planned."""
    config = bench.config
    sizes = [dataclasses.replace(config.sizes[0], steps=k) for k in config.growth_steps]
    others = [
        name
        for name in ("mixed mode", ROUNDED, ON_HOST, "mixed + saved gradients", CHECKPOINT)
        if name in bench.forms
    ]
    bench.compile_all([(name, size) for size in sizes for name in others])
    temps = [
        planned_bytes(bench, size, bench.temp(PLANNED, sizes[0]) * budget)
        for size, budget in zip(sizes, (1.001, *config.growth_budgets), strict=True)
    ]
    for size, temp in zip(sizes, temps, strict=True):
        for name in others:
            bench.add("growth", f"K = {size.steps}", name, bench.temp(name, size) / MIB, "MiB")
        if size != sizes[0]:
            name = f"K{size.steps}/K{sizes[0].steps}"
            bench.add("reference", name, "ratio", temp / temps[0], "times", form=PLANNED)
    memory = {"planned": temps} | {n: [bench.temp(n, size) for size in sizes] for n in others}
    steps = config.growth_steps
    plots.trajectories(
        bench.table.directory / "memory.png",
        {
            n: np.array([(k, temp / MIB) for k, temp in zip(steps, found, strict=True)])
            for n, found in memory.items()
        },
        x_label="inner steps",
        y_label="temporary memory, MiB",
        title=str(config.sizes[0]).rsplit(" ", 1)[0],
        y_scale="log",
        x_ticks=steps,
    )


def planned_bytes(bench: Bench, size: Size, budget: float) -> int:
    """Temporary bytes of the plan for a budget, which is added to the table."""

    def estimate(kept_states: int | None) -> Callable:
        return forms.estimate(FORMS[PLANNED], size, kept_states=kept_states)

    found = plan_for(estimate, size.steps, forms.shapes(size), budget)
    compiled = measure.compile_for(estimate(found.kept_states), *forms.shapes(size))
    temp = measure.compiled_memory(compiled).temp
    log(f"{size}: {found.describe()}; compiled {measure.human_bytes(temp)}")
    for column, value, unit in [
        ("kept states", found.kept_states, "states"),
        ("predicted", found.predicted_bytes / MIB, "MiB"),
        ("compiled", temp / MIB, "MiB"),
        ("prediction / compiled − 1", 100 * (found.predicted_bytes / temp - 1), "%"),
        ("extra evaluations a step", found.extra_steps / size.steps, "times"),
    ]:
        bench.add("growth", f"K = {size.steps}", column, value, unit)
    return temp


def time_forms(config: Config, size: Size, names: list[str]) -> dict[str, measure.Timing]:
    """Seconds of forms at a size, in alternating rounds."""
    args = forms.arguments(size, config.seed)
    programs = {n: measure.compile_for(forms.estimate(FORMS[n], size), *args) for n in names}
    calls = {name: lambda c=c: c(*args) for name, c in programs.items()}
    return measure.interleaved(calls, config.rounds)


def add_time(bench: Bench) -> None:
    """Times of every form, the share of the peak that they reach, and the ratio of the fastest."""
    config = bench.config
    dtype = config.time_size.compute_dtype
    peak = measure.matmul_peak(8192 if config.preset == "gpu" else 2048, dtype)
    timings = time_forms(config, config.time_size, list(bench.forms))
    exact = {name: timing for name, timing in timings.items() if FORMS[name].exact}
    best = min(exact, key=lambda name: exact[name].median)
    reached: dict[Size, float] = {}
    for name, timing in timings.items():
        rate = operations(name, config.time_size).matmul / timing.median
        ratios = np.array(timing.samples) / np.array(timings[NAIVE].samples)
        for column, value, unit in [
            ("time", 1e3 * timing.median, "ms"),
            ("time / naive", float(np.median(ratios)), "times"),
            ("memory", bench.temp(name, config.time_size) / MIB, "MiB"),
            ("speed", rate / GIGA, "GFLOP/s"),
            ("of the matmul peak", rate / peak, "times"),
        ]:
            bench.add("time", name, column, value, unit, rounds=config.rounds)
        if name == best:
            reached[config.time_size] = rate / peak
            ratio = float(np.median(ratios))
            row = "time best/naive"
            bench.add("reference", row, "ratio", ratio, "times", form=best, rounds=config.rounds)
    for size in config.utilisation_sizes:
        timing = time_forms(config, size, [best])[best]
        reached[size] = forms.flops(FORMS[best], size).matmul / timing.median / peak
    for size, value in reached.items():
        bench.add("utilisation", str(size), "of the matmul peak", value, "times", form=best)
    size = max(reached, key=lambda size: reached[size])
    more = {"form": best, "size": str(size), "peak": peak, "rounds": config.rounds}
    bench.add("reference", "utilisation", "ratio", reached[size], "times", **more)


def add_exactness(bench: Bench) -> None:
    """Relative error of forms against reverse mode, by precision: rounding, or more."""
    size, names = bench.config.exact_size, [NAIVE, CHECKPOINT, QUICKEST, PLANNED, ROUNDED]
    for precision in ("float64", "float32"):
        with jax.enable_x64(precision == "float64"):
            args = in_precision(forms.arguments(size, bench.config.seed), precision)
            found = {n: jax.jit(forms.estimate(FORMS[n], size))(*args)[0] for n in names}
            errors = {n: relative_error(found[n], found[NAIVE]) for n in names if n != NAIVE}
        for name, error in errors.items():
            bench.add("exactness", name, precision, error, "relative error")
        row = f"relative error {precision}"
        bench.add("reference", row, "ratio", errors[QUICKEST], "times", form=QUICKEST)


def in_precision(tree: Any, dtype: str) -> Any:
    """The tree with its float32 leaves in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, tree)


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm, in float64 on the host."""
    a, b = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def check(size: Size) -> None:
    """Raises UserError if a size cannot be computed."""
    model = forms.model_of(size, {})
    batch = feasible.tokens(size.sequences, size.length)
    feasible.check([], model.init, losses.next_token(model), batch, batch, num_episodes=1)


class Stage(NamedTuple):
    """A part of the table that is measured together.

    Attributes:
      row: row of one of its cells, by which a resumed run knows that it is done.
      column: column of that cell.
      add: what measures it.
    """

    row: str
    column: str
    add: Callable[[Bench], None]


def make_stages(config: Config) -> list[Stage]:
    """The stages of a run, in their order."""
    return [
        Stage(QUICKEST, "float32", add_exactness),
        Stage(NAIVE, str(config.sizes[0]), add_memory),
        Stage(f"K = {config.growth_steps[0]}", "compiled", add_growth),
        Stage(NAIVE, "time", add_time),
    ]


def run(config: Config) -> None:
    """Measures all, and writes the tables and the figure."""
    harness.begin()
    for size in {*config.sizes, config.time_size, config.exact_size, *config.utilisation_sizes}:
        check(size)
    table = harness.TableRun(
        "table_meta_gradients",
        config,
        presets,
        table="meta_gradients",
        unit="",
        seeds=[config.seed],
        episodes=1,
    )
    bench = Bench(config, table)
    stages = make_stages(config)
    for stage in table.pending(stages, lambda stage: stage.row, lambda stage: stage.column):
        stage.add(bench)
    table.finish()
