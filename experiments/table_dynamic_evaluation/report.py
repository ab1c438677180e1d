"""What `table_dynamic_evaluation` writes: records, two tables, and the losses along the streams."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from scipy import ndimage

from experiments.table_dynamic_evaluation.config import Config
from metaopt.console import printable
from metaopt.files import write_json_lines
from metaopt.losses import NATS_TO_BITS
from metaopt.reporting import plots, tables
from metaopt.reporting.results import cell_maker
from metaopt.statistics import Interval, interval
from metaopt.training.runs import Run

UNIT, PER_CENT = "bits/byte", "% of the static loss"
TABLE, PUBLISHED_TABLE = "dynamic_evaluation", "dynamic_evaluation/published"
COLUMN = "reduction, %"
DYNAMIC, META = " dynamic evaluation", "meta-learned initialisation, "
"""What the names of rows end and begin with; a meta-learned row is compared, block by block, with
the row of the same name without it."""
KRAUSE_2018 = "Krause et al., 2018, arXiv:1709.07432"
KRAUSE_2019 = "Krause et al., 2019, arXiv:1904.08378"


def reduction(static: float, dynamic: float, *, perplexity: bool = False) -> float:
    """The reduction of a cross-entropy against static evaluation, in per cent.

    Perplexities are turned into cross-entropies first, ``log p``.
    """
    if perplexity:
        static, dynamic = np.log(static), np.log(dynamic)
    return float(100 * (1 - dynamic / static))


PUBLISHED = {
    "Transformer-XL, 277 M, enwik8 (bytes of Wikipedia)": (0.993, 0.940, False, KRAUSE_2019),
    "Transformer-XL, 277 M, text8 (characters)": (1.085, 1.038, False, KRAUSE_2019),
    "Transformer-XL, 257 M, WikiText-103 (words)": (18.3, 16.4, True, KRAUSE_2019),
    "mLSTM, enwik8 (bytes of Wikipedia)": (1.24, 1.08, False, KRAUSE_2018),
    "mLSTM, text8 (characters)": (1.27, 1.19, False, KRAUSE_2018),
    "AWD-LSTM, WikiText-2 (words)": (65.8, 44.3, True, KRAUSE_2018),
    "AWD-LSTM, Penn Treebank (words)": (57.3, 51.1, True, KRAUSE_2018),
}
"""Static and dynamic score by the RMS rule: bits a symbol, or perplexities."""


class Report:
    """Collects the rows of a run and keeps its files up to date after each of them."""

    def __init__(
        self,
        run: Run,
        config: Config,
        command: str,
        streams: Sequence[str],
        length: int,
        num_params: int,
    ):
        """``length`` is that of a segment; ``num_params`` of the model, for the rows' names."""
        self._run, self._config, self._streams = run, config, streams
        self._length, self._size = length, f"{num_params / 1e6:.2g} M"
        self._records: list[dict[str, Any]] = []
        self._beside: list[dict[str, Any]] = []
        self._losses: dict[str, np.ndarray] = {}
        self._make_cell = cell_maker(
            table=TABLE, preset=config.preset, command=command, seeds=[config.seed], episodes=0
        )

    def add(
        self,
        row: str,
        losses: np.ndarray,
        static: np.ndarray,
        settings: Sequence[tuple[float, float]],
        seconds: float,
    ) -> None:
        """Adds a row, writes all files anew and prints where it ends.

        Args:
          row: its name.
          losses: nats a byte, ``[streams, N]``.
          static: those of static evaluation from the same parameters.
          settings: rate and decay, one a stream.
          seconds: that it took.
        """
        self._losses[row] = losses * NATS_TO_BITS
        for i, stream in enumerate(self._streams):
            more = {
                "learning_rate": float(settings[i][0]),
                "decay": float(settings[i][1]),
                "segment_length": self._length,
                "seconds": round(seconds, 1),
            }
            self._add_score(row, stream, i, more)
            if losses is not static:
                gain = 100 * (static[i] - losses[i]) / static[i].mean()
                self._add_reduction(row, stream, gain, more)
        write_json_lines(self._run.results, self._all())
        self._draw()
        shown = [f"{r['column']} {tables.cell_text(r)}" for r in self._records if r["row"] == row]
        line = printable(f"{row}: {', '.join(shown)} ({seconds:.0f} s)")
        Console().print(line, markup=False, highlight=False)

    def finish(self) -> None:
        """Writes and prints the tables."""
        found = tables.arrange(self._all())
        directory = self._run.directory
        tables.write(directory, found)
        self._run.finish()
        console = Console()
        for table in found:
            console.print(*tables.to_rich(table, console.width), sep="\n")
        console.print(f"written to {directory}", markup=False, highlight=False)

    def _add_score(self, row: str, stream: str, i: int, more: dict[str, Any]) -> None:
        """Bits a byte, and for a meta-learned start what it gains on the plain one."""
        own = self._losses[row][i]
        self._records.append(self._cell(TABLE, row, stream, own, UNIT, **more))
        if row.startswith(META):
            gain = self._losses[row.removeprefix(META)][i] - own
            column = f"gain, {stream}"
            self._records.append(
                self._cell(TABLE, row, column, gain, UNIT, better="higher", **more)
            )

    def _add_reduction(self, row: str, stream: str, gain: np.ndarray, more: dict[str, Any]) -> None:
        name = f"ours, {self._size}, {stream}: {row.removesuffix(DYNAMIC)}"
        record = self._cell(PUBLISHED_TABLE, name, COLUMN, gain, PER_CENT, better="higher", **more)
        self._beside.append(record)

    def _cell(self, table: str, row: str, column: str, values: np.ndarray, unit: str, **more):
        """A cell with its interval over blocks, of ``values [N]``."""
        size = self._config.block
        found = interval(values, np.arange(len(values)) // size)
        over = (
            f"95 % intervals over {found.n} blocks of {size} consecutive segments of "
            f"{self._length} bytes"
        )
        more |= {"table": table, "episodes": len(values), "over": over}
        return self._make_cell(row, column, found, unit, **more)

    def _published(self) -> list[dict[str, Any]]:
        """Rows that were not run here: a dash, and the published number."""
        nothing = Interval(float("nan"), float("nan"), 0)
        records = []
        for name, (static, dynamic, perplexity, source) in PUBLISHED.items():
            more = {
                "table": PUBLISHED_TABLE,
                "episodes": 0,
                "paper": round(reduction(static, dynamic, perplexity=perplexity), 1),
                "published": [static, dynamic],
                "source": source,
            }
            records.append(self._make_cell(name, COLUMN, nothing, PER_CENT, **more))
        return records

    def _all(self) -> list[dict[str, Any]]:
        return self._records + self._beside + self._published()

    def _draw(self) -> None:
        """Bits a byte along the streams, a moving mean over a twentieth of each."""
        figure = plots.new_figure(11.0, 4.4)
        axes_of = np.atleast_1d(figure.subplots(1, len(self._streams)))
        for i, (stream, axes) in enumerate(zip(self._streams, axes_of, strict=True)):
            for j, (row, losses) in enumerate(self._losses.items()):
                width = max(1, losses.shape[1] // 20)
                mean = ndimage.uniform_filter1d(losses[i], width, mode="nearest")
                kibibytes = np.arange(len(mean)) * self._length / 1024
                style = ":" if row.endswith("static") else "-"
                axes.plot(kibibytes, mean, label=row, color=f"C{j}", linestyle=style, linewidth=1.2)
            axes.set(xlabel="KiB of the stream", ylabel=UNIT, title=plots.label(stream))
            axes.grid(alpha=0.25)
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
        plots.save(figure, self._run.directory / "curves.png")
