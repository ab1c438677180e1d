"""Watch trainings while they run: their losses, resources, alarms and decisions.

    metaopt watch runs/adapt_languages/cpu-20260101-120000
    metaopt watch RUN RUN ... --every 5
    metaopt watch RUN --once          # one view, as without a terminal

It reads the files that runs write, and may be started and stopped at any time. A training with a
monitor shows everything; one without shows what is in its ``metrics.jsonl``. It ends when every
run is finished, or with Ctrl-C.
"""

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from metaopt.cli.watch_runs import RunView, Training, open_view
from metaopt.console import printable
from metaopt.errors import UserError
from metaopt.files import matches
from metaopt.ranges import Checked, Range
from metaopt.reporting import assessed

BARS = "▁▂▃▄▅▆▇█"
CURVE = 24  # characters
PLAIN_WIDTH = 160
LEFT = ("training", "alarms", "loss curve")
COLUMNS = (
    *("training", "step", "loss", "loss curve", "held out", "tokens/s"),
    *("of peak", "memory", "alarms"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Watch trainings while they run.

    Attributes:
      runs: Directories of runs.
      every: Interval between views, in seconds.
      once: Print one view and exit.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    every: Annotated[float, Range(1e-3, 1e6)] = 1.0
    once: bool = False


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """A curve in ``width`` characters or fewer, each a mean; the lowest value is the lowest."""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    largest = max(map(abs, values), default=0.0) or 1.0  # or the sum of huge ones is too large
    values = [value / largest for value in values]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def view(runs: Sequence[RunView], width: int = PLAIN_WIDTH) -> Group:
    """What is shown of each run: trainings, their assessments, active alarms, last decisions."""
    parts = []
    for run in runs:
        directory, trainings = run.directory.resolve(), run.trainings
        name = printable(f"{directory.parent.name}/{directory.name}")
        title = Text(f"{name}  {run.state}", style="bold")
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in LEFT else "right")
        for name, training in trainings.items():
            table.add_row(*row(name, training, run.total, min(CURVE, max(4, width - 96))))
        parts += [table if trainings else title]
        parts += [
            note for name, training in trainings.items() for note in assessment(name, training)
        ]
        parts += [note for name, training in trainings.items() for note in alarms(name, training)]
        parts += [decision_note(decision) for decision in run.decisions]
    return Group(*parts)


def row(name: str, training: Training, total: int | None, width: int) -> list[Text]:
    """One training, in the order of `COLUMNS`; a dash for what is not known.

    Args:
      name: name of the training.
      training: its state.
      total: its length in steps, if it does not say so itself.
      width: width of the loss curve, in characters.
    """
    v = training.values
    total = v.get("num_steps") or total
    memory, step = v.get("device") or v.get("host"), v.get("step")
    cells = [
        name,
        f"{'-' if step is None else step}" + (f"/{total}" if total else ""),
        number(v.get("loss")),
        sparkline([loss for _, loss in training.curve], width),
        number(v.get("valid_loss")),
        number(v.get("tokens_per_second")),
        f"{v['utilisation']:.1%}" if v.get("utilisation") is not None else "-",
        decimal(int(memory)) if memory else "-",
        " ".join(v.get("active") or ()),
    ]
    styles = ["red" if i == 8 else "" for i in range(len(cells))]
    return [Text(printable(cell), style=style) for cell, style in zip(cells, styles, strict=True)]


def number(value: Any) -> str:
    """Four digits; a dash for what is not known."""
    if not matches(value, float):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def alarms(name: str, training: Training) -> list[Text]:
    """The messages of the active alarms."""
    active = training.values.get("active") or ()
    notes = [training.alarms[kind] for kind in active if kind in training.alarms]
    return [Text(printable(f"! {name}, {message}"), style="red") for message in notes]


def assessment(name: str, training: Training) -> list[Text]:
    """The latest assessment of a training under the loop, in a line; none of another training."""
    said = assessed.in_words(training.values)
    return [Text(printable(f"= {name}: {said}"))] if said else []


def decision_note(decision: dict[str, Any]) -> Text:
    """One decision in a line, as far as its fields are known."""
    changes = decision.get("changes") or decision.get("settings") or {}
    if "setting" in decision:
        changes = {decision["setting"]: [decision.get("from"), decision.get("to")]}
    pairs = []
    for setting, change in changes.items() if isinstance(changes, dict) else ():
        pair = change if isinstance(change, list) else [change]
        pairs.append(
            f"{setting} {' -> '.join(number(x) if matches(x, float) else str(x) for x in pair)}"
        )
    said = [str(decision.get("verdict", "decided")), *assessed.named_changes(pairs)]
    reason = f" ({decision['reason']})" if decision.get("reason") else ""
    name = f"{decision['name']}, " if "name" in decision else ""
    step = decision.get("step", "-")
    return Text(printable(f"> {name}step {step}: {', '.join(said)}{reason}"))


def run(config: Config, console: Console | None = None) -> None:
    """Shows the runs until they are finished; once, if that is asked or there is no terminal.

    Raises:
      UserError: there is nothing to watch, or a directory is not that of a run.
    """
    console = console or Console()
    if not config.runs:
        raise UserError(
            "give the directory of a run to watch, such as runs/EXPERIMENT/PRESET-TIME; "
            "python -m experiments.adapt_languages --preset smoke makes one"
        )
    runs = [open_view(directory) for directory in config.runs]
    if config.once or not console.is_terminal:
        for one in runs:
            one.update()
        if not console.is_terminal:
            console.width = max(console.width, PLAIN_WIDTH)
        console.print(view(runs, console.width))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            finished = all(one.state == "finished" for one in runs)  # before the last reading
            for one in runs:
                one.update()
            live.update(view(runs, console.width), refresh=True)
            if finished:
                return
            time.sleep(config.every)
