"""A model that lives with the text of a folder: it trains, watches itself, and goes on.

    metaopt evolve FOLDER
    metaopt evolve FOLDER --waves 5     what is there arrives in five waves
    metaopt evolve                      Python's own library, in five waves
    metaopt evolve FOLDER --model PATH  a part of a pretrained model evolves

Each generation takes in what is new in the folder, without duplicates, trains by next-token
prediction and then by MAML, is judged on its new domains, on the old ones and on domains that are
held out for ever, and is kept if that was no harm. The same command goes on: after it was stopped,
and after files were added or changed. metaopt score, adapt and generate take the directory of the
life as they take a run's.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from metaopt import parallel
from metaopt.cli import command_line
from metaopt.console import log
from metaopt.evolution import EvolveConfig, Generation, Life, check
from metaopt.files import write_json_lines, write_text
from metaopt.reporting import plots, tables
from metaopt.reporting.page import PAGE, page
from metaopt.reporting.results import cell_maker
from metaopt.statistics import Interval, interval
from metaopt.training.loop import train
from metaopt.training.runs import as_json, open_run, slug

TABLE, UNIT = "evolve/text", "bits/byte"
OVER = "95 % intervals over domains"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvolveConfig):
    """A life and where it is.

    Attributes:
      life: Directory of the life, new or of the same flags; runs/evolve/ and the name of the folder
        if not given.
    """

    life: Path | None = None


def run(config: Config) -> None:
    """Lives on until nothing is new, and writes the table, the curve and the page.

    Raises:
      UserError: the folder or the directory cannot be used.
      Interrupted: after Ctrl-C or SIGTERM; the same command goes on.
    """
    parallel.set_up_backend()
    place = config.life or Path("runs", "evolve", life_name(config))
    log("preparing: the folder, the model and what is held out")
    check(config, place)
    settings = as_json(config)
    del settings["life"]
    with open_run(place.parent, "evolve", "cpu", settings, run_dir=place) as opened:
        life = Life(place, config, train)
        for generation in live(life):
            log(in_words(generation))
        make = cell_maker(
            table=TABLE,
            preset="cpu",
            command=" ".join(["metaopt evolve", *command_line.changed_flags(config, Config())]),
            seeds=[config.seed],
            episodes=config.episodes,
        )
        records = [
            make(row_name(x), column, found, **({"unit": UNIT} | fields))
            for x in life.generations
            for column, found, fields in cells(x)
        ]
        write_json_lines(opened.results, records)
        arranged = tables.arrange(records)
        draw(place, life.generations)
        tables.write(place, arranged, [])
        opened.finish()
        write_text(place / PAGE, page(place))
    console = Console()
    for table in arranged:
        console.print(*tables.to_rich(table, console.width), sep="\n")
    console.print(f"written to {place}", markup=False, highlight=False)


def life_name(config: EvolveConfig) -> str:
    """The name of the directory of a life, by its folder."""
    source = "stdlib" if config.folder is None else Path(config.folder).resolve().name
    return slug(source if config.model is None else f"{source} {config.model.name}")


def live(life: Life) -> Iterator[Generation]:
    """The generations that were lived, and then new ones until nothing is new."""
    yield from list(life.generations)
    while (generation := life.next()) is not None:
        yield generation


def row_name(generation: Generation) -> str:
    """The row of a generation."""
    return f"generation {generation['generation']}"


def in_words(generation: Generation) -> str:
    """A generation in one line."""
    means = {group: _said(found) for group, found in generation["means"].items() if found}
    came = f"{len(generation['new'])} new domains"
    duplicates = sum(x["equal"] + x["near"] for x in generation["arrived"].values())
    if duplicates:
        came += f", {duplicates} duplicates thrown away"
    told = [came, *(f"{group} {said}" for group, said in means.items())]
    if generation["forgetting"]:
        told.append(f"forgetting {_said(generation['forgetting'])}")
    told.append(f"{generation['tokens']:,} tokens, {generation['seconds']:.0f} s")
    verdict = f"{generation['verdict']}: {generation['reason']}"
    return f"{row_name(generation)}: {', '.join(told)}; {verdict}"


def cells(generation: Generation) -> Iterator[tuple[str, Interval, dict[str, Any]]]:
    """The cells of a generation: column, number and further fields of the record."""
    over = {"over": OVER}
    for group, found in generation["means"].items():
        yield group, _interval(found), over
    yield "forgetting", _interval(generation["forgetting"]), over
    yield "held-out change", _interval(generation["held_out_change"]), over
    yield "new before", _interval(generation["new_before"]), over | {"limit": True}
    start = generation["start_means"]["held-out"]
    yield "held-out, not adapted", _interval(start), over
    tokens = {"unit": "million tokens", "limit": True}
    yield "tokens", Interval(generation["tokens"] / 1e6, float("nan"), 1), tokens


def draw(directory: Path, generations: list[Generation]) -> None:
    """Draws the losses by generation, from the second on."""
    if len(generations) < 2:
        return
    points = {}
    for group in generations[0]["means"]:
        found = [(x["generation"], (x["means"][group] or {}).get("mean")) for x in generations]
        points[group] = np.array([(n, np.nan if v is None else v) for n, v in found], np.float64)
    plots.trajectories(
        directory / "curves.png",
        points,
        x_label="generation",
        y_label="bits a byte, adapted",
        title="A model that evolves with its data",
    )


def over_domains(values: np.ndarray) -> Interval:
    """A mean over domains; NaN, which tables show as a dash, over none."""
    return interval(values) if len(values) else _interval(None)


def _interval(found: Mapping[str, Any] | None) -> Interval:
    """An interval of a record; NaN for none, which tables show as a dash."""
    if found is None:
        return Interval(float("nan"), float("nan"), 0)
    numbers = (float("nan") if found[k] is None else found[k] for k in ("mean", "ci95"))
    return Interval(*numbers, n=found["n"], method=found["method"])


def _said(found: Mapping[str, Any]) -> str:
    half = found["ci95"]
    return f"{found['mean']:.3f}" + (f" ± {half:.3f}" if half is not None else "")
