"""Tables: result records (JSON lines) to Markdown, LaTeX and the terminal. Imports no JAX.

One record is one cell; everything that is shown is derived from the records. A cell
that was not run is a dash.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from metaopt.console import printable
from metaopt.files import read_json_lines, write_text

Record = dict[str, Any]
DASH = "–"
LATEX = str.maketrans(
    {c: "\\" + c for c in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    | {"Δ": r"$\Delta$", "×": r"$\times$"}
)
MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|"})


class RecordFields(TypedDict):
    """What tables read of a record; it may have other fields."""

    table: str
    row: str
    column: str
    value: float | None
    ci95: NotRequired[float | None]
    paper: NotRequired[float | None]
    paper_ci95: NotRequired[float | None]
    better: NotRequired[str]
    limit: NotRequired[bool]
    unit: NotRequired[str]
    over: NotRequired[str]
    n: NotRequired[int | None]
    preset: NotRequired[str]
    device: NotRequired[str]
    seeds: NotRequired[list[int]]
    command: NotRequired[str]


class Table(NamedTuple):
    """Records of one table, arranged.

    Attributes:
      name: Name of the table.
      rows: Names of rows in the order in which they first came.
      columns: Names of columns, likewise.
      cells: ``(row, column) -> record``; the last record of a cell counts.
    """

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Record]


def read_records(path: Path | str) -> list[Record]:
    """The records of a ``results.jsonl``; none where there is no file.

    Raises:
      UserError: a line is no record, or holds NaN or inf.
    """
    return read_json_lines(path, RecordFields)


def arrange(records: Iterable[Record]) -> list[Table]:
    """One `Table` for each table name among the records, in the order they came.

    Line breaks and control characters in names and other texts are escaped.
    """
    tables: dict[str, list[Record]] = {}
    for record in records:
        record = {k: printable(v) if isinstance(v, str) else v for k, v in record.items()}
        tables.setdefault(record["table"], []).append(record)
    return [
        Table(
            name,
            rows=tuple(dict.fromkeys(r["row"] for r in found)),
            columns=tuple(dict.fromkeys(r["column"] for r in found)),
            cells={(r["row"], r["column"]): r for r in found},
        )
        for name, found in tables.items()
    ]


def cell_text(record: Record | None, plus_minus: str = " ± ") -> str:
    """``mean ± half-width`` to the digits that the interval gives, or a dash."""
    if record is None or not _is_finite(record["value"]):
        return DASH
    value, half = record["value"], record.get("ci95")
    if half is None or not _is_finite(half):  # one task, or a figure that has none
        return _plain(value)
    digits = 4 if half < 0.00995 else 3 if half < 0.0995 else 2
    return f"{value:.{digits}f}{plus_minus}{half:.{digits}f}"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: float) -> str:
    """A number without an interval, to three digits after the point or three in all."""
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def best_rows(table: Table, column: str) -> set[str]:
    """The row that is best in a column beyond noise, and those of the same value; often none.

    Its interval must not meet that of any other row that took part. Records may say
    ``"better": "higher"`` or ``"lower"``, and ``"limit": true`` for a bound that is no contender.
    """
    cells = {row: table.cells.get((row, column)) for row in table.rows}
    contenders = {
        row: cell
        for row, cell in cells.items()
        if cell and _is_finite(cell["value"]) and not cell.get("limit")
    }
    if len(contenders) < 2:
        return set()
    choose = max if next(iter(contenders.values())).get("better") == "higher" else min
    best = choose(contenders.values(), key=lambda cell: cell["value"])

    def is_apart(cell: Record) -> bool:
        halves = (record.get("ci95") for record in (cell, best))
        noise = sum(half for half in halves if half is not None and math.isfinite(half))
        return cell["value"] == best["value"] or abs(cell["value"] - best["value"]) > noise

    if not all(map(is_apart, contenders.values())):
        return set()
    return {row for row, cell in contenders.items() if cell["value"] == best["value"]}


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
    if cell is None or not _is_finite(cell.get("paper")):
        return ""
    half = cell.get("paper_ci95") or math.nan
    return f" (paper {cell['paper']:g}{f'{plus_minus}{half:g}' if _is_finite(half) else ''})"


def to_markdown(table: Table) -> str:
    """A Markdown table with the best of each column in bold and the units in the caption."""
    lines = [
        "| | " + " | ".join(c.translate(MARKDOWN) for c in table.columns) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for row in table.rows:
        texts = _row_texts(table, row, table.columns, "**{}**")
        lines.append(f"| {row.translate(MARKDOWN)} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", caption(table), ""]).replace("<!--", "&lt;!--")


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


def write(
    directory: Path,
    tables: Sequence[Table],
    notes: Sequence[str] = (),
    titles: Mapping[str, str] | None = None,
) -> None:
    """Writes ``table.md`` and ``table.tex``, the tables one after the other.

    Args:
      directory: Directory of both files.
      tables: Tables in their order.
      notes: Lines below the tables, in Markdown.
      titles: Headings by the name of a table; its name by default, if there are several.
    """
    names = {table.name: table.name for table in tables} if len(tables) > 1 else {}
    headings = {name: printable(title) for name, title in (names | dict(titles or {})).items()}
    markdown, latex = [], []
    for table in tables:
        heading = headings.get(table.name)
        markdown.append((f"### {heading}\n\n" if heading else "") + to_markdown(table))
        latex.append((f"% {heading}\n" if heading else "") + to_latex(table))
    markdown += ["".join(f"- {line}\n" for line in notes)] if notes else []
    write_text(directory / "table.md", "\n".join(markdown))
    write_text(directory / "table.tex", "\n".join(latex))


def to_rich(table: Table, width: int) -> list:
    """`rich.table.Table`s for a terminal ``width`` characters wide.

    Columns that do not fit beside the others go to a further table below, and names of rows that
    leave too little room go on in the next line: no number is cut.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = []
    for columns in _column_groups(table, width):
        title = Text(table.name) if not shown else None
        part = RichTable(title=title, title_justify="left", show_edge=False)
        part.add_column("", overflow="fold")
        for column in columns:
            part.add_column(Text(column), justify="right", no_wrap=True)
        for row in table.rows:
            part.add_row(Text(row), *_row_texts(table, row, columns, "[bold]{}[/bold]"))
        shown.append(part)
    shown[-1].caption = Text(caption(table))
    return shown


def _column_groups(table: Table, width: int) -> list[list[str]]:
    """Columns in their order, as many at a time as fit, at least one."""
    border = 3
    names = min(max(map(len, table.rows)), width // 2)
    groups, free = [], 0
    for column in table.columns:
        texts = [_row_texts(table, row, [column], "{}")[0] for row in table.rows]
        needed = max(map(len, [column, *texts])) + border
        if needed > free or not groups:
            groups.append([])
            free = width - names - border + 1  # no edges
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
        _code(all_of("command")),
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


def _code(text: str) -> str:
    """As code in Markdown: between more backticks than follow one another in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def _escape(text: str) -> str:
    """For LaTeX, in which a bracket after the end of a row would be its argument."""
    escaped = text.translate(LATEX)
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped
