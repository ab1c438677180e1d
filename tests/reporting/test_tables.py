import io
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from metaopt.reporting.tables import (
    arrange,
    best_rows,
    cell_text,
    to_latex,
    to_markdown,
    to_rich,
    write,
)


def cell(row, column, value, ci95=None, table="text", **more):
    record = {"table": table, "row": row, "column": column, "value": value, "ci95": ci95}
    record |= {"unit": "bits/byte", "n": 24, "preset": "cpu", "device": "2-core CPU"}
    return record | {"seeds": [0], "command": "python -m experiments.x"} | more


RECORDS = [
    cell("Joint & fine-tuned", "1 step", 3.0, 0.2),
    cell("MAML", "1 step", 9.0, 0.2),
    cell("MAML", "1 step", 2.5, 0.021, seeds=[1]),  # run again: the last one counts
    cell("Bayes limit", "1 step", 1.25, limit=True),
    cell("Joint & fine-tuned", "5_steps", 2.0, 0.004),
    cell("MAML", "5_steps", None),
    cell("MAML", "accuracy", 0.5, table="other", better="higher", unit="%"),
    cell("ANIL", "accuracy", 0.75, table="other", better="higher", unit="%"),
]
TEXT, OTHER = arrange(RECORDS)
CAPTION = (
    "bits/byte; 95 % intervals over n = 24 tasks; preset cpu, 2-core CPU, seed 0 (MAML: 0, 1); "
    "`python -m experiments.x`"
)


def test_rows_and_columns_stay_in_the_order_they_came():
    assert (TEXT.name, OTHER.name) == ("text", "other")
    assert TEXT.rows == ("Joint & fine-tuned", "MAML", "Bayes limit")
    assert TEXT.columns == ("1 step", "5_steps")


def test_markdown():
    assert to_markdown(TEXT) == "\n".join(
        [
            "| | 1 step | 5_steps |",
            "|---|---:|---:|",
            "| Joint & fine-tuned | 3.00 ± 0.20 | 2.0000 ± 0.0040 |",
            "| MAML | **2.500 ± 0.021** | – |",
            "| Bayes limit | 1.250 | – |",
            "",
            CAPTION,
            "",
        ]
    )


def test_the_published_number_stands_beside_ours():
    found = [cell("MAML", "5-shot", 1.164, 0.06, paper=1.13, paper_ci95=0.18)]
    found += [cell("ours", "5-shot", 0.24, 0.01), cell("iMAML", "5-shot", None, paper=99.5)]
    (table,) = arrange(found)
    lines = to_markdown(table).splitlines()
    assert lines[2] == "| MAML | 1.164 ± 0.060 (paper 1.13 ± 0.18) |"
    assert lines[3] == "| ours | **0.240 ± 0.010** |" and lines[4] == "| iMAML | – (paper 99.5) |"


def test_a_table_without_intervals_does_not_speak_of_them():
    (plain,) = arrange([cell("a", "c", 1.0)])
    assert "seed 0" in to_markdown(plain) and "interval" not in to_markdown(plain)
    (timed,) = arrange([cell("a", "c", 1.0, over="medians over rounds")])
    assert "medians over rounds; preset cpu" in to_markdown(timed)


def test_latex():
    assert to_latex(TEXT).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & 1 step & 5\_steps \\",
        r"\midrule",
        r"Joint \& fine-tuned & 3.00 $\pm$ 0.20 & 2.0000 $\pm$ 0.0040 \\",
        r"MAML & \textbf{2.500 $\pm$ 0.021} & -- \\",
        r"Bayes limit & 1.250 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_terminal_shows_the_same_cells():
    def shown(width):
        console = Console(width=width, file=io.StringIO(), record=True)
        parts = to_rich(TEXT, width)
        console.print(*parts, sep="\n")
        return len(parts), console.export_text()

    for width, parts in ((100, 1), (50, len(TEXT.columns))):
        count, text = shown(width)
        assert count == parts and "…" not in text
        for expected in ("Joint & fine-tuned", "2.500 ± 0.021", "5_steps", "–"):
            assert expected in text


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_cut_beside_a_long_name(width):
    name = "ours, on a stream of some length: meta-learned initialisation, SGD dynamic evaluation"
    more: dict[str, Any] = {"paper": 12.5, "paper_ci95": 0.25}
    (table,) = arrange([cell(name, f"{i} steps", 3.25, 0.2, **more) for i in (1, 5)])
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(*to_rich(table, width), sep="\n")
    text = console.export_text()
    assert text.count("3.25 ± 0.20 (paper 12.5 ± 0.25)") == 2 and "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (1.23456, None, "1.235"),
        (1.23456, float("nan"), "1.235"),
        (0.00012345, None, "1.2e-04"),
        (0.0, None, "0"),
        (8.0, None, "8"),
        (98.765, None, "98.8"),
        (2568.43, None, "2568"),
        (1.23456, 0.0099, "1.2346 ± 0.0099"),
        (1.23456, 0.00996, "1.235 ± 0.010"),
        (1.23456, 0.1, "1.23 ± 0.10"),
    ],
)
def test_a_cell_has_as_many_digits_as_its_interval_gives(value, half, text):
    assert cell_text(cell("row", "column", value, half)) == text


def test_the_best_is_the_highest_where_that_is_better_and_ties_share_it():
    assert best_rows(OTHER, "accuracy") == {"ANIL"}
    (tied,) = arrange([cell(row, "c", value) for row, value in [("a", 1), ("b", 2), ("c", 1)]])
    assert best_rows(tied, "c") == {"a", "c"}
    assert best_rows(TEXT, "5_steps") == set()  # one contender is no contest


@pytest.mark.parametrize(("half", "best"), [(0.24, {"a"}), (0.26, set())])
def test_a_row_is_best_only_if_its_interval_meets_no_other(half, best):
    cells = [cell("a", "c", 1.0, 0.25), cell("b", "c", 1.5, half), cell("far", "c", 9.0, 0.1)]
    (table,) = arrange([*cells, cell("limit", "c", 0.9, 0.1, limit=True)])
    assert best_rows(table, "c") == best


ODD = st.text(st.characters(), max_size=8) | st.lists(
    st.sampled_from(["|", "\\", "`", "\n", "\r", "\x1b[2J", "[/bold]", "[red]", "&", "%", "$", "{"])
    | st.sampled_from(["<!-- end -->", "\u2028", "\udcff", "[", "*", "a", " ", "#", "nan"]),
    max_size=5,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(ODD, ODD, ODD, ODD)
def test_no_name_breaks_a_table(tmp_path_factory, row, column, text, command):
    more = {"unit": text, "over": text, "device": text, "command": command}
    (table,) = arrange(
        [cell(row, column, 1.0, table=text, **more), cell("b", "d", 2.0, table=text)]
    )
    markdown = to_markdown(table)
    assert "<!--" not in markdown and markdown.replace("\n", "").isprintable()
    lines = markdown.removesuffix("\n").split("\n")
    size = len(table.rows), len(table.columns)
    assert len(lines) == 2 + size[0] + 2
    for line in lines[: 2 + size[0]]:
        unescaped = re.sub(r"\\.", "", line)
        assert line.startswith("|") and line.endswith("|") and unescaped.count("|") == 2 + size[1]

    latex = to_latex(table)
    inside = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(inside) == size[0] and latex.replace("\n", "").isprintable()
    for line in inside:
        bare = re.sub(r"\\[a-z]+\{\}|\\.", "", line.removesuffix(r" \\"))
        assert bare.count("&") == size[1] and not {"%", "#", "_"} & set(bare)
        assert not line.startswith(("[", "*"))  # the argument of the end of the row before

    console = Console(width=200, file=io.StringIO())
    console.print(*to_rich(table, 200), sep="\n")
    directory = tmp_path_factory.mktemp("tables", numbered=True)
    write(directory, [table])
    assert (directory / "table.md").read_text(encoding="utf-8") == markdown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_no_table(value):
    records = [
        cell("a", "c", value, 0.1),
        cell("b", "c", 1.0, value, paper=value),
        cell("d", "c", 2),
    ]
    records += [cell("e", "c", 1.5, paper=1.25, paper_ci95=value)]
    (table,) = arrange(records)
    for text in (to_markdown(table), to_latex(table)):
        assert not re.search(r"\b(nan|inf)", text, re.IGNORECASE)
    assert best_rows(table, "c") == {"b"} and cell_text(table.cells["a", "c"]) == "–"
