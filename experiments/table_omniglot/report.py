"""What `table_omniglot` writes: result records, the table with its protocol, and the curves."""

from typing import Any

import numpy as np
from rich.console import Console

from experiments.table_omniglot.config import Config, Setting, preset
from experiments.table_omniglot.rows import Row
from metaopt.files import write_json_lines, write_text
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.statistics import interval
from metaopt.training.runs import Run

UNIT = "% accuracy"
MODES = ("", ", non-transductive")
"""What follows the setting in the name of a column, in the order of the accuracies."""
SETTINGS = (Setting(5, 1), Setting(5, 5), Setting(20, 1), Setting(20, 5))
PUBLISHED = {
    "MAML": ((98.7, 99.9, 95.8, 98.9), "Finn et al., 2017, arXiv:1703.03400, table 1"),
    "FOMAML": ((98.3, 99.2, 89.4, 97.9), "Nichol et al., 2018, arXiv:1803.02999"),
    "Reptile": ((97.68, 99.48, 89.43, 97.12), "Nichol et al., 2018, arXiv:1803.02999"),
    "iMAML": ((99.16, 99.67, 94.46, 98.69), "Rajeswaran et al., 2019, arXiv:1909.04630"),
    "MAML++": ((99.47, 99.85, 97.65, 99.33), "Antoniou et al., 2019, arXiv:1810.09502"),
}
"""Percent in the order of `SETTINGS`, transductive, and where it stands."""


class Report:
    """Collects the rows of a run and keeps its files up to date after each of them."""

    def __init__(self, run: Run, config: Config, command: str):
        """``command`` makes the table again."""
        self._run, self._config = run, config
        self._records: list[dict[str, Any]] = []
        self._curves: dict[Setting, dict[str, np.ndarray]] = {}
        self._cell = cell_maker(
            table="omniglot",
            preset=config.preset,
            command=command,
            seeds=config.seeds,
            episodes=config.test_episodes,
        )

    def add(self, setting: Setting, row: Row, found: np.ndarray, seconds: float) -> None:
        """Adds a row, writes all files anew and prints where it ends.

        Args:
          setting: the column.
          row: which.
          found: shares correct, ``[seeds, E, steps + 1, 2]``, in both modes.
          seconds: that it took.
        """
        percent = 100 * found
        at_test = percent[:, :, row.tested]
        for mode, suffix in enumerate(MODES):
            published = {} if suffix else _published(row.name, setting)
            self._records.append(
                self._cell(
                    row.name,
                    setting.column + suffix,
                    _interval(at_test[..., mode]),
                    UNIT,
                    better="higher",
                    per_seed=at_test[..., mode].mean(axis=1).tolist(),
                    protocol=protocol(row, self._config),
                    seconds=round(seconds, 1),
                    **published,
                )
            )
        shown = self._config.max_inner_steps + 1
        self._curves.setdefault(setting, {})[row.name] = percent[:, :, :shown, 0]
        write_json_lines(self._run.results, self._records)
        self._draw()
        told = [f"{r['column']} {tables.cell_text(r)}" for r in self._records[-len(MODES) :]]
        line = f"{row.name}: {'; '.join(told)} ({seconds:.0f} s)"
        Console().print(line, markup=False, highlight=False)

    def finish(self) -> None:
        """Writes and prints the table, with the protocol of every number below it."""
        (table,) = tables.arrange(self._records)
        directory = self._run.directory
        notes = "".join(f"- {line}\n" for line in protocol_lines(self._records, self._config))
        write_text(directory / "table.md", f"{tables.to_markdown(table)}\n{notes}")
        write_text(directory / "table.tex", tables.to_latex(table))
        self._run.finish()
        console = Console()
        console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(notes, f"written to {directory}", markup=False, highlight=False)

    def _draw(self) -> None:
        """Transductive accuracy after 0, 1, 2 ... inner steps, a panel a setting."""
        figure = plots.new_figure(2.2 + 4.8 * len(self._curves), 4.4)
        panels = figure.subplots(1, len(self._curves), squeeze=False)[0]
        for axes, (setting, rows) in zip(panels, self._curves.items(), strict=True):
            for i, (name, percent) in enumerate(rows.items()):
                points = [_interval(percent[:, :, step]) for step in range(percent.shape[2])]
                mean, half = (np.array(x) for x in zip(*[p[:2] for p in points], strict=True))
                style = {"color": f"C{i}", "marker": plots.MARKERS[i % len(plots.MARKERS)]}
                axes.plot(np.arange(len(mean)), mean, label=name, markersize=4, **style)
                axes.fill_between(
                    np.arange(len(mean)), mean - half, mean + half, color=f"C{i}", alpha=0.12, lw=0
                )
            axes.set(xlabel="inner steps", ylabel=f"{UNIT}, transductive", title=setting.column)
            axes.grid(alpha=0.25)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="outside right center", frameon=False)
        plots.save(figure, self._run.directory / "curves.png")


def _interval(percent: np.ndarray):
    """Over episodes, of the mean over seeds; ``percent [seeds, E]``."""
    return interval(percent.mean(axis=0), np.arange(percent.shape[1]))


def _published(row: str, setting: Setting) -> dict[str, Any]:
    """The fields of a record that hold the published number; none where there is none."""
    if row not in PUBLISHED or setting not in SETTINGS:
        return {}
    values, source = PUBLISHED[row]
    return {"paper": values[SETTINGS.index(setting)], "source": source}


def protocol(row: Row, config: Config) -> str:
    """How a row was trained and tested, in words."""
    steps = row.inner.num_steps
    return (
        f"{steps} inner step{'s' if steps > 1 else ''} at {row.inner_rate:g}, "
        f"{row.tasks_per_step} tasks a meta-batch of {row.drawings[0]} support and "
        f"{row.drawings[1]} query drawings a character, {config.meta_steps} meta-steps"
        f"{_schedule(row)}, {config.filters} filters, tested after {row.tested}"
        + (f"; {row.note}" if row.note else "")
    )


def _schedule(row: Row) -> str:
    kind = "cosine from" if row.outer.decay_steps else "constant"
    name = {"adam": "Adam", "sgd": "gradient descent"}.get(row.outer.optimizer, row.outer.optimizer)
    return f" of {name}, {kind} {row.outer.learning_rate:g}"


def protocol_lines(records: list[dict[str, Any]], config: Config) -> list[str]:
    """One line a row and setting, and one on what is shorter than published."""
    lines = [
        f"{r['row']}, {r['column']}: {r['protocol']}"
        + (f"; {tables.cell_text(r)} beside {r['paper']:g} of {r['source']}" if r["paper"] else "")
        for r in records
        if not r["column"].endswith(MODES[1])
    ]
    full = preset({"preset": "gpu"})
    if (config.meta_steps, config.filters) != (full.meta_steps, full.filters):
        lines.append(
            f"The papers train for 50 000 to 100 000 meta-steps (MAML: {full.meta_steps}) at a "
            f"constant outer rate of {full.outer.learning_rate:g} (MAML++ with a cosine, Reptile "
            "with a step of 1 that falls to 0), with "
            f"{full.filters} filters and as many query as support drawings; preset gpu is that "
            "protocol."
        )
    lines.append(
        "Transductive: batch norm by the statistics of the query batch, as published. "
        "Non-transductive: the same adapted parameters, by the statistics of the support."
    )
    return lines
