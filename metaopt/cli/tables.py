"""Gather the committed results into tables.

    python -m metaopt.cli.tables                      # Markdown, to the terminal
    python -m metaopt.cli.tables --form latex
    python -m metaopt.cli.tables --write-readme       # renews the tables in README.md
    python -m metaopt.cli.tables --keep RUN NAME      # commit-worthy files of a run
    python -m metaopt.cli.tables --check              # is all there, and does README.md agree?

Every number comes from a ``results.jsonl``; nothing is typed by hand.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from metaopt.cli import command_line
from metaopt.errors import UserError
from metaopt.files import (
    inside,
    local_path,
    one_line,
    read_text,
    write_bytes,
    write_text,
)
from metaopt.ranges import Checked
from metaopt.reporting import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
NEEDED = ("table", "row", "column", "unit", "command", "preset", "seeds", "device", "versions")
KEPT = (
    "config.json",
    "results.jsonl",
    "table.md",
    "table.tex",
    "samples.md",
    "curves.png",
    "mnist.png",
    "memory.png",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Gather the committed results into tables.

    Attributes:
      form: of what is printed.
      write_readme: put the Markdown tables into README.md, between their markers.
      keep: a finished run and a name; its files go to experiments/results.
      unfinished: keep the rows that are done of a run that is not finished; others are dashes.
      check: verify that every number has its config, command, seeds and versions, and that the
        tables in README.md are those that the results give.
    """

    form: Literal["markdown", "latex"] = "markdown"
    write_readme: bool = False
    keep: tuple[str, str] | None = None
    unfinished: bool = False
    check: bool = False


def run(config: Config) -> None:
    """Does what the config asks for."""
    readme = ROOT / "README.md"
    if config.keep:
        keep(local_path(config.keep[0]), config.keep[1], unfinished=config.unfinished)
    elif config.check:
        check(RESULTS, readme)
    elif config.write_readme:
        write_text(readme, with_tables(read_text(readme)))
    else:
        show = tables.to_markdown if config.form == "markdown" else tables.to_latex
        for path in sorted(RESULTS.glob("*/*/results.jsonl")):
            for table in tables.arrange(tables.read_records(path)):
                print(f"{'###' if config.form == 'markdown' else '%'} {table.name}\n")
                print(show(table))


def check(results: Path, readme: Path) -> None:
    """Reads every committed result again, and README.md.

    Raises:
      UserError: a config or a part of a record is missing, or a table of README.md is not
        the one that the results give; the message names them all.
    """
    problems, count = [], 0
    for path in sorted(results.glob("*/*/results.jsonl")):
        if not (path.parent / "config.json").exists():
            problems.append(f"{path.parent} has no config.json")
        try:
            records = tables.read_records(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for record in records:
            count += 1
            missing = [name for name in NEEDED if not record.get(name)]
            if missing:
                cell = f"{record['row']}, {record['column']}"
                problems.append(f"{path}: {cell} lacks {', '.join(missing)}")
    text = read_text(readme)
    try:
        if with_tables(text, results) != text:
            problems.append("the tables of README.md are not those of the results: --write-readme")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    print(f"{count} cells with their configs and commands; README.md agrees with them")


def keep(run: Path, name: str, *, unfinished: bool = False) -> Path:
    """Copies what is worth keeping of a run to ``results/<experiment>/<name>``.

    Raises:
      UserError: the run is not finished, and is not said to be; it has no results or damaged
        ones; or the name is none of a folder.
    """
    if not unfinished and not (run / "finished").exists():
        raise UserError(
            f"{run} is not a finished run: let the command finish first, or keep what is done "
            "with --unfinished"
        )
    records = tables.read_records(run / "results.jsonl")
    if not records:
        raise UserError(f"{run} has no results to keep")
    target = inside(RESULTS, run.resolve().parent.name, name)
    with one_line(target, "written"):
        target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run / file).exists():
            with one_line(run / file, "read"):
                data = (run / file).read_bytes()
            write_bytes(inside(target, file), data)
    if unfinished:  # a run may write its tables at its end
        tables.write(target, tables.arrange(records))
    return target


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The text with the table of ``<!-- table: PATH NAME -->`` put before ``<!-- end -->``.

    PATH is relative to ``results``; without NAME it is the first table there.

    Raises:
      UserError: there are no results at a path, it leads out of ``results``, or no such table.
    """

    def table(match: re.Match) -> str:
        folder = inside(results, *match[1].split("/"))
        found = tables.arrange(tables.read_records(folder / "results.jsonl"))
        chosen = [t for t in found if match[2] in (None, t.name)]
        if not chosen:
            name = match[2] or "results"
            raise UserError(f"README.md asks {match[1]} for {name}, and there is none there")
        marker = match[0].split("\n", 1)[0]
        return f"{marker}\n{tables.to_markdown(chosen[0])}<!-- end -->"

    pattern = r"<!-- table: (\S+)(?: (\S+))? -->\n.*?<!-- end -->"
    return re.sub(pattern, table, text, flags=re.DOTALL)


if __name__ == "__main__":
    command_line.main("tables", run, Config, lambda _: Config(), (), __doc__ or "")
