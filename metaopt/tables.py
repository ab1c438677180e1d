"""Tables: result records (JSON lines) to Markdown, LaTeX and the terminal. Imports no JAX.

One record is one cell; everything that is shown is derived from the records. A cell
that was not run is a dash.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
DASH = "–"
LATEX = str.maketrans(
    {c: "\\" + c for c in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    | {"Δ": r"$\Delta$", "×": r"$\times$"}
)


class Table(NamedTuple):
    """Records of one table, arranged.

    Attributes:
      name: of the table.
      rows: names in the order in which they first came.
      columns: likewise.
      cells: ``(row, column) -> record``; the last record of a cell counts.
    """

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Record]


def arrange(records: Iterable[Record]) -> list[Table]:
    """One `Table` for each table name among the records, in the order they came."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record["table"], []).append(record)
    return [_arrange_one(name, found) for name, found in tables.items()]


def _arrange_one(name: str, records: Sequence[Record]) -> Table:
    rows = tuple(dict.fromkeys(record["row"] for record in records))
    columns = tuple(dict.fromkeys(record["column"] for record in records))
    return Table(name, rows, columns, {(r["row"], r["column"]): r for r in records})


def cell_text(record: Record | None, plus_minus: str = " ± ") -> str:
    """``mean ± half-width`` to the digits that the interval gives, or a dash."""
    if record is None or record["value"] is None:
        return DASH
    value, half = record["value"], record.get("ci95")
    if half is None or math.isnan(half):  # one task, or a figure that has none
        return _plain(value)
    digits = 4 if half < 0.00995 else 3 if half < 0.0995 else 2
    return f"{value:.{digits}f}{plus_minus}{half:.{digits}f}"


def _plain(value: float) -> str:
    """A number without an interval, to three digits after the point or three in all."""
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def best_rows(table: Table, column: str) -> set[str]:
    """The rows whose value in a column is the best among those that took part.

    Records may say ``"better": "higher"`` or ``"lower"``, and ``"limit": true`` for a
    bound that is no contender.
    """
    cells = {row: table.cells.get((row, column)) for row in table.rows}
    contenders = {
        row: cell
        for row, cell in cells.items()
        if cell and cell["value"] is not None and not cell.get("limit")
    }
    if len(contenders) < 2:
        return set()
    choose = max if next(iter(contenders.values())).get("better") == "higher" else min
    best = choose(cell["value"] for cell in contenders.values())
    return {row for row, cell in contenders.items() if cell["value"] == best}


def _row_texts(
    table: Table, row: str, columns: Sequence[str], bold: str, plus_minus: str = " ± "
) -> list[str]:
    """The cells of a row, in ``bold`` where the best of their column, the published beside."""
    texts = []
    for column in columns:
        cell = table.cells.get((row, column))
        text = cell_text(cell, plus_minus)
        text = bold.format(text) if row in best_rows(table, column) else text
        texts.append(text + _published(cell, plus_minus))
    return texts


def _published(cell: Record | None, plus_minus: str) -> str:
    """The number of the paper, in brackets."""
    if cell is None or cell.get("paper") is None:
        return ""
    half = cell.get("paper_ci95")
    return f" (paper {cell['paper']:g}{f'{plus_minus}{half:g}' if half else ''})"


def to_markdown(table: Table) -> str:
    """A Markdown table with the best of each column in bold and the units in the caption."""
    lines = [
        "| | " + " | ".join(table.columns) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for row in table.rows:
        texts = _row_texts(table, row, table.columns, "**{}**")
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", caption(table), ""])


def to_latex(table: Table) -> str:
    """A LaTeX ``tabular`` in booktabs style with the best of each column in bold."""
    lines = [
        r"\begin{tabular}{l" + "r" * len(table.columns) + "}",
        r"\toprule",
        " & ".join(["", *map(_escape, table.columns)]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        texts = _row_texts(table, row, table.columns, r"\textbf{{{}}}", plus_minus=r" $\pm$ ")
        texts = [text.replace(DASH, "--") for text in texts]
        lines.append(" & ".join([_escape(row), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def write(directory: Path, tables: Sequence[Table]) -> None:
    """Writes ``table.md`` and ``table.tex``, the tables one after the other."""
    (directory / "table.md").write_text("\n".join(map(to_markdown, tables)))
    (directory / "table.tex").write_text("\n".join(map(to_latex, tables)))


def to_rich(table: Table, width: int) -> list:
    """`rich.table.Table`s for a terminal ``width`` characters wide.

    Columns that do not fit beside the others go to a further table below.
    """
    from rich.table import Table as RichTable

    shown = []
    for columns in _column_groups(table, width):
        part = RichTable(title=table.name if not shown else None, title_justify="left")
        part.add_column("", no_wrap=True)
        for column in columns:
            part.add_column(column, justify="right", no_wrap=True)
        for row in table.rows:
            part.add_row(row, *_row_texts(table, row, columns, "[bold]{}[/bold]"))
        shown.append(part)
    shown[-1].caption = caption(table)
    return shown


def _column_groups(table: Table, width: int) -> list[list[str]]:
    """Columns in their order, as many at a time as fit, at least one."""
    border = 3
    groups, free = [], 0
    for column in table.columns:
        texts = [_row_texts(table, row, [column], "{}")[0] for row in table.rows]
        needed = max(map(len, [column, *texts])) + border
        if needed > free or not groups:
            groups.append([])
            free = width - max(map(len, table.rows)) - border - 1
        groups[-1].append(column)
        free -= needed
    return groups


def caption(table: Table) -> str:
    """Units, what the intervals are over, preset, device, seeds and the command.

    Records without intervals may say in ``over`` what their values are taken over.
    """
    records = list(table.cells.values())

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[key]) for r in records if r.get(key) is not None))

    over = all_of("over")
    if not over and any(record.get("ci95") is not None for record in records):
        over = f"95 % intervals over n = {all_of('n')} tasks"
    parts = [
        all_of("unit"),
        over,
        f"preset {all_of('preset')}, {all_of('device')}, {_seeds(table)}",
        f"`{all_of('command')}`",
    ]
    return "; ".join(part for part in parts if part)


def _seeds(table: Table) -> str:
    """Those of most rows, and those of rows that have others."""
    found: dict[str, set[int]] = {}
    for (row, _), record in table.cells.items():
        found.setdefault(row, set()).update(record.get("seeds", []))
    told = {row: ", ".join(map(str, sorted(seeds))) for row, seeds in found.items()}
    most, _ = collections.Counter(told.values()).most_common(1)[0]
    others = [f"{row}: {seeds}" for row, seeds in told.items() if seeds != most]
    return f"seed {most}" + (f" ({'; '.join(others)})" if others else "")


def _escape(text: str) -> str:
    return text.translate(LATEX)
