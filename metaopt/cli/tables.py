"""Gather results into tables.

    metaopt tables                      # Markdown, to the terminal
    metaopt tables --form latex
    metaopt tables --write              # renews the tables in README.md and docs/
    metaopt tables --keep RUN NAME      # commit-worthy files of a run
    metaopt tables --check              # is all there, and do the pages agree?

Results lie in ``experiments/results/EXPERIMENT/NAME/`` of a project, the current directory.
Every number comes from a ``results.jsonl``; nothing is typed by hand. A page has a table where
it says ``<!-- table: EXPERIMENT/NAME -->`` and, on a later line, ``<!-- end -->``.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from metaopt.errors import UserError
from metaopt.files import inside, local_path, one_line, read_text, write_bytes, write_text
from metaopt.ranges import Checked
from metaopt.reporting import tables

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
    """Gather results into tables.

    Attributes:
      form: Form of what is printed.
      write: Put the Markdown tables into README.md and docs/, between their markers.
      keep: A finished run and a name: its files go to the results.
      unfinished: Keep the rows that are done of a run that is not finished; others are dashes.
      check: Verify that every number has its config, command, seeds and versions, and that the
        tables in README.md and docs/ are those that the results give.
      project: Directory that holds experiments/results, README.md and docs/.
    """

    form: Literal["markdown", "latex"] = "markdown"
    write: bool = False
    keep: tuple[str, str] | None = None
    unfinished: bool = False
    check: bool = False
    project: Path = Path(".")


def run(config: Config) -> None:
    """Does what the config asks for.

    Raises:
      UserError: there are no results, or they are damaged or incomplete.
    """
    project = local_path(config.project)
    if config.keep:
        place = results_of(project)
        keep(place, local_path(config.keep[0]), config.keep[1], unfinished=config.unfinished)
        return
    paths = sorted(results_of(project).glob("*/*/results.jsonl"))
    if not paths:
        raise UserError(
            f"{results_of(project)} holds no results: run this in the project's directory, or "
            "name that with --project"
        )
    if config.check:
        check(project)
    elif config.write:
        for page in pages(project):
            write_text(page, with_tables(page, results_of(project)))
    else:
        show = tables.to_markdown if config.form == "markdown" else tables.to_latex
        for path in paths:
            for table in tables.arrange(tables.read_records(path)):
                print(f"{'###' if config.form == 'markdown' else '%'} {table.name}\n")
                print(show(table))


def results_of(project: Path) -> Path:
    """The directory of a project's results."""
    return project / "experiments" / "results"


def pages(project: Path) -> list[Path]:
    """The Markdown pages of a project, which may show tables."""
    found = [project / "README.md", *sorted((project / "docs").rglob("*.md"))]
    return [page for page in found if page.is_file()]


def check(project: Path) -> None:
    """Reads every result of a project again, and its pages.

    Raises:
      UserError: a config or a part of a record is missing, or a table of a page is not the one
        that the results give; the message names them all.
    """
    problems, count, results = [], 0, results_of(project)
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
    for page in pages(project):
        try:
            if with_tables(page, results) != read_text(page):
                problems.append(f"the tables of {page} are not those of the results: use --write")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    print(f"{count} cells with their configs and commands; the pages agree with them")


def keep(results: Path, run: Path, name: str, *, unfinished: bool = False) -> Path:
    """Copies what is worth keeping of a run to ``<results>/<experiment>/<name>``.

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
    target = inside(results, run.resolve().parent.name, name)
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


def with_tables(page: Path, results: Path) -> str:
    """The text of a page with the table of ``<!-- table: PATH NAME -->`` before ``<!-- end -->``.

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
            raise UserError(f"{page} asks {match[1]} for {name}, and there is none there")
        marker = match[0].split("\n", 1)[0]
        return f"{marker}\n{tables.to_markdown(chosen[0])}<!-- end -->"

    pattern = r"<!-- table: (\S+)(?: (\S+))? -->\n.*?<!-- end -->"
    return re.sub(pattern, table, read_text(page), flags=re.DOTALL)
