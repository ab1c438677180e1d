"""A model that evolves with its data, beside one that trained once and one that had all at once.

The command ``metaopt evolve`` as an experiment. Domains of text arrive in waves, each a generation:
the model takes in what is new (`metaopt.streams.data.update_data`), trains by next-token prediction
and then by MAML, is judged on new, old and held-out domains, and is kept or rolled back. Two rows
stand beside the last generation, of as many training tokens as all generations together: `train
once` has seen the domains of the first wave alone, `all at once` all of them, in one training.

    python -m experiments.evolve                       # Python's own library, in five waves
    python -m experiments.evolve FOLDER --waves 5      # 40 domains: under 20 minutes on two cores
    python -m experiments.evolve FOLDER                # what is there; then whatever is added
    python -m experiments.evolve --preset smoke        # a minute, to see that all works

The same command goes on, after it was stopped and after files were added. ``metaopt score``,
``adapt`` and ``generate`` take its directory.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments import harness
from metaopt.cli import evolve
from metaopt.console import log
from metaopt.evolution import EvolveConfig, Life, check
from metaopt.ranges import shared_fields
from metaopt.training.runs import slug

ONCE, ALL = "train once", "all at once"
FIRST_KEY = 100  # beyond the numbers of attempts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvolveConfig, harness.ImprovedConfig):
    """A life, and what it is compared with.

    Attributes:
      compared: Train the rows `train once` and `all at once` too, if there are several generations.
    """

    compared: bool = True


def presets(preset: str = "cpu") -> Config:
    """The defaults for ``--preset``."""
    config = Config(preset=preset)  # type: ignore[arg-type]
    if preset == "smoke":
        small = {"width": 8, "num_layers": 1, "length": 16, "num_support": 4, "num_query": 4}
        data = dataclasses.replace(config.data, capacity=1024, arriving=32)
        short = {"steps": 6, "meta_steps": 3, "num_held_out": 3, "episodes": 2, "waves": 2}
        return dataclasses.replace(config, **small, **short, data=data)
    if preset == "gpu":
        large = {"width": 512, "num_layers": 6, "num_heads": 8, "length": 256}
        long = {"steps": 10_000, "meta_steps": 1000, "tasks_per_step": 32, "tasks_at_a_time": 4}
        data = dataclasses.replace(config.data, capacity=2**15, arriving=2**13)
        dtype = {"compute_dtype": "bfloat16"}
        return dataclasses.replace(config, **large, **long, **dtype, data=data)
    return config


def run(config: Config) -> None:
    """Lives on until nothing is new, trains what it is compared with, and writes the table."""
    train_fn = harness.begin(config)
    settings = EvolveConfig(**shared_fields(EvolveConfig, config))
    name = slug(f"{config.preset} {evolve.life_name(settings)}")
    place = Path(config.run_dir or Path(config.root, "evolve", name))
    check(settings, place)
    table = harness.TableRun(
        "evolve",
        config,
        presets,
        table=evolve.TABLE,
        unit=evolve.UNIT,
        rows=[],
        seeds=[config.seed],
        episodes=config.episodes,
        run_dir=place,
    )
    life = Life(table.directory, settings, train_fn)
    for generation in table.pending(evolve.live(life), evolve.row_name):
        log(evolve.in_words(generation))
        for column, found, fields in evolve.cells(generation):
            fields["seconds"] = generation["seconds"]
            table.add(evolve.row_name(generation), column, found, **fields)
    evolve.draw(table.directory, life.generations)
    if config.compared and len(life.generations) > 1:
        add_compared(table, life)
    table.finish(list(notes(table, life)))


def add_compared(table: harness.TableRun, life: Life) -> None:
    """The rows beside the generations, trained again if there are more generations since."""
    number = len(life.generations)
    for record in table.records:
        if record["row"] in (ONCE, ALL) and record["generations"] != number:
            table.discard(record["row"])
    trainings = sum(len(x["attempts"]) for x in life.generations)
    last = life.data(number)
    old = [name for name in last.names if name not in life.generations[-1]["new"]]
    groups = {"old": old, "new": life.generations[-1]["new"], "held-out": life.held_out}
    for name in table.pending((ONCE, ALL), str):
        data = life.data(1) if name == ONCE else last
        chances = dict.fromkeys(data.names, 1 / len(data.names))
        key = number, FIRST_KEY + (name == ALL)
        training = f"{name}, {number} generations"
        params = life.train(training, chances, data, None, key=key, times=trainings)
        judged = life.judge(params, last.names, last)
        for column, names in groups.items():
            fields = {"over": evolve.OVER, "generations": number}
            table.add(name, column, evolve.over_domains(judged.of(names)), **fields)
        table.keep(name, held_out=judged.of(life.held_out))


def notes(table: harness.TableRun, life: Life) -> Iterator[str]:
    """The last generation beside the rows that it is compared with, paired over domains."""
    kept = life.generations[-1]["domains"]
    held_out = [kept[name]["adapted"] for name in life.held_out]
    for row in (ONCE, ALL):
        if table.has(row):
            other = table.kept(row)["held_out"]
            found = evolve.over_domains(held_out - other)
            half = "" if np.isnan(found.ci95) else f" ± {found.ci95:.3f}"
            share = 100 * found.mean / other.mean()
            yield (
                f"held-out, the last generation minus {row}: {found.mean:+.3f}{half} "
                f"{evolve.UNIT}, {share:+.1f} %"
            )


if __name__ == "__main__":
    harness.main("evolve", run, presets, __doc__)
