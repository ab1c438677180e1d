"""A run as one page of HTML, which needs nothing beside it and fetches nothing. Imports no JAX.

What is in the page comes from the files of the run: results, losses, alarms, decisions with their
evidence, figures and config. Lines that are damaged are left out: a page is no reason to stop.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.console import printable
from metaopt.errors import UserError
from metaopt.files import matches, parse_record, read_json
from metaopt.reporting import assessed, plots, tables

PAGE = "report.html"
"""File of a run with its page."""
MOST_POINTS = 600
"""Points of a curve that are drawn."""
MOST_PAST = 12
"""Past runs that are compared with, the latest."""
EXTREMES = 5
"""Domains that are named on either side."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 66rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; min-width: 4rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; }
p.note, figcaption { font-size: .85rem; opacity: .8; overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def page(directory: Path) -> str:
    """The page of a run, finished or not.

    Args:
      directory: of the run.

    Raises:
      UserError: its results are damaged, or it holds no run.
    """
    lines = {name: _lines(directory / f"{name}.jsonl") for name in ("metrics", "monitor")}
    decisions = _lines(directory / "decisions.jsonl")
    records = tables.read_records(directory / "results.jsonl")
    config = directory / "config.json"
    if not (config.is_file() or any(lines.values())):
        raise UserError(f"{directory} holds no run: give a directory such as runs/EXPERIMENT/NAME")
    here = directory.resolve()
    name = f"{here.parent.name}/{here.name}"
    state = ""
    if config.is_file():  # a training alone does not say when it is finished
        state = "finished" if (directory / "finished").exists() else "not finished"
    arranged = tables.arrange(records)
    parts = [
        f"<h1>{_text(name)}</h1>",
        f"<p>{_text(_about(records, state))}</p>",
        *_section("Results", _results(arranged)),
        *_section("Generations", _generations(_lines(directory / "generations.jsonl"))),
        *_section("Strengths and weaknesses", _extremes(arranged, lines["metrics"])),
        *_section("Course", _course(lines["metrics"], lines["monitor"], decisions)),
        *_section("Alarms and responses", _alarms(lines["monitor"], decisions)),
        *_section("Decisions", _decisions(decisions)),
        *_section("Past runs", _past(directory, arranged)),
        *_section("Figures", _figures(directory)),
        *_section("Config", [_folded("config.json", _json(config))] if config.is_file() else []),
    ]
    head = f'<meta charset="utf-8"><title>{_text(name)}</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )


def to_html(table: tables.Table) -> str:
    """A table of results, with the best of each column in bold."""
    rows = [
        [_text(row), *(_strong(text, row in best) for text, best in cells)]
        for row in table.rows
        for cells in [
            [
                (tables.cell_text(table.cells.get((row, column))), tables.best_rows(table, column))
                for column in table.columns
            ]
        ]
    ]
    return _table(["", *map(_text, table.columns)], rows)


def _strong(text: str, is_best: bool) -> str:
    return f"<strong>{_text(text)}</strong>" if is_best else _text(text)


def _about(records: Sequence[tables.Record], state: str) -> str:
    """State, device, versions and command."""

    def first(key: str) -> str:
        return next((str(r[key]) for r in records if r.get(key)), "")

    versions = next((r["versions"] for r in records if isinstance(r.get("versions"), dict)), {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "; ".join(x for x in (state, first("device"), told, first("command")) if x)


def _results(arranged: Sequence[tables.Table]) -> list[str]:
    found = []
    for table in arranged:
        found += [f"<h3>{_text(table.name)}</h3>", to_html(table)]
        about = re.sub("`+([^`]+)`+", r"<code>\1</code>", _text(tables.caption(table)))
        found.append(f'<p class="note">{about}</p>')
    return found


def _extremes(arranged: Sequence[tables.Table], metrics: Sequence[Mapping]) -> list[str]:
    """The domains that are best and worst by each column, and the assessments."""
    found = []
    for table in (t for t in arranged if t.name.endswith("/domains")):
        rows = []
        for column in table.columns:
            cells = [table.cells[row, column] for row in table.rows if (row, column) in table.cells]
            known = [cell for cell in cells if cell["value"] is not None]
            known.sort(key=lambda cell: cell["value"])
            if known and known[0].get("better") == "higher":
                known.reverse()
            count = min(EXTREMES, len(known) // 2)
            sides = (known[:count], known[len(known) - count :][::-1]) if count else (known, [])
            rows.append([_text(column), *("<br>".join(map(_domain, side)) for side in sides)])
        found.append(_table(["", "best", "worst"], rows, wraps=True))
    return [*found, *_assessments(metrics)]


def _assessments(metrics: Sequence[Mapping]) -> list[str]:
    """Of each training, its latest assessment and its latest scores."""
    scores = {
        str(x.get("name", "")): x["scores"] for x in metrics if isinstance(x.get("scores"), dict)
    }
    latest, found = assessed.latest(metrics), []
    for name in latest | scores:
        found.append(f"<h3>{_text(name)}</h3>")
        if line := latest.get(name):
            for headings, *rows in filter(None, (assessed.groups(line), assessed.classes(line))):
                found.append(_table(headings, [[_text(cell) for cell in row] for row in rows]))
            found.append(f'<p class="note">{_text(assessed.in_words(line))}</p>')
        if of_training := scores.get(name):
            rows = [[_text(key), _number(value)] for key, value in of_training.items()]
            found.append(_table(["", "latest"], rows))
    return found


def _generations(lived: Sequence[Mapping]) -> list[str]:
    """The life so far: what came in, what was thrown away, what was decided, and its domains."""
    lived = [x for x in lived if isinstance(x.get("arrived"), dict) and "kept" in x]
    if not lived:
        return []
    rows = []
    for x in lived:
        counts = [y for y in x["arrived"].values() if isinstance(y, dict)]
        kinds = ("offered", "equal", "near", "kept")
        sums = (sum(y[kind] for y in counts if matches(y.get(kind), int)) for kind in kinds)
        names = ", ".join(map(str, x["arrived"]))
        means = x["means"] if isinstance(x.get("means"), dict) else {}
        losses = (_mean(found) for found in (x.get("new_before"), means.get("new"), _lost(x)))
        told = [x.get("generation"), names, *sums]
        decided = f"{x.get('verdict')}: {x.get('reason')}"
        rows.append([*map(_text, told), *map(_number, losses), _text(decided)])
    headings = ["", "what came in", "passages", "equal", "near duplicates", "kept"]
    headings += ["loss on it before training", "and after", "change on old domains", "decision"]
    return [_table(headings, rows, wraps=True), *_domains_then_and_now(lived)]


def _mean(found: Any) -> Any:
    """The mean of an interval of a record."""
    return found.get("mean") if isinstance(found, dict) else None


def _lost(generation: Mapping) -> Any:
    """The change of the loss on old domains by the last training of a generation."""
    attempts = generation.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else None
    return last.get("old_change") if isinstance(last, dict) else None


def _domains_then_and_now(lived: Sequence[Mapping]) -> list[str]:
    """The adapted loss of each domain when it was first judged on, and now; the worst first."""
    first: dict[str, tuple[Any, Any]] = {}
    now: dict[str, Any] = {}
    for x in lived:
        domains = x["domains"] if isinstance(x.get("domains"), dict) else {}
        now = {n: f.get("adapted") for n, f in domains.items() if isinstance(f, dict)}
        for name, loss in now.items():
            first.setdefault(name, (x.get("generation"), loss))
    known = [n for n in now if matches(now[n], float) and matches(first[n][1], float)]
    rows = [
        [_text(n), _text(first[n][0]), _number(first[n][1]), _number(now[n])]
        for n in sorted(known, key=lambda n: -now[n])
    ]
    table = _table(["domain", "since generation", "loss then", "loss now"], rows)
    return [f"<details><summary>domains, weakest first</summary>{table}</details>"]


def _domain(cell: tables.Record) -> str:
    return f"{_text(cell['row'])} {_text(tables.cell_text(cell))}"


def _course(metrics: Sequence, monitor: Sequence, decisions: Sequence) -> list[str]:
    """The losses of each training, with what was decided on the way."""
    found = []
    for name in dict.fromkeys(str(x.get("name", "")) for x in [*metrics, *monitor]):
        logged, watched = (
            [x for x in lines if str(x.get("name", "")) == name] for lines in (metrics, monitor)
        )
        loss = _points(watched, "loss")
        lines = {
            "loss": loss if len(loss) else _points(logged, "loss"),
            "held out": _points(logged, "valid_loss"),
        }
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if not lines:
            continue
        marks = [
            x["step"]
            for x in decisions
            if str(x.get("name", "")) == name
            and x.get("verdict") != "kept"
            and matches(x.get("step"), int)
        ]
        drawn = plots.course(lines, marks, title=name)
        note = "dotted lines: changes and rollbacks" if marks else ""
        found.append(_image(drawn, f"losses of {name}", note))
    return found


def _points(lines: Iterable[Mapping], key: str) -> np.ndarray:
    """The values ``[n, 2]`` of a key by step, thinned; after a rollback those that hold."""
    found: dict[int, float] = {}
    for line in lines:
        step, value = line.get("step"), line.get(key)
        if not isinstance(step, int):
            continue
        if line.get("kind") == "forget":
            found = {s: v for s, v in found.items() if s <= step}
        elif isinstance(value, int | float):  # finite, as all numbers of JSON lines are
            found[step] = float(value)
    points = np.array(sorted(found.items()), np.float64).reshape(-1, 2)
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def _alarms(monitor: Sequence[Mapping], decisions: Sequence[Mapping]) -> list[str]:
    responses = {}
    for decision in decisions:
        if isinstance(alarm := decision.get("alarm"), dict):
            key = str(decision.get("name", "")), alarm.get("kind"), alarm.get("step")
            responses[key] = f"{decision.get('verdict')}: {decision.get('reason', '')}"
    rows = []
    for line in monitor:
        if not isinstance(alarm := line.get("alarm"), dict):
            continue
        kind, step, name = alarm.get("kind"), alarm.get("step"), str(line.get("name", ""))
        said = responses.get((name, kind, step), "none" if alarm.get("raised") else "")
        told = [name, step, kind, "raised" if alarm.get("raised") else "over"]
        rows.append([_text(x) for x in (*told, alarm.get("message", ""), said)])
    headings = ["training", "step", "alarm", "", "what was seen", "response"]
    return [_table(headings, rows, wraps=True)] if rows else []


def _decisions(decisions: Sequence[Mapping]) -> list[str]:
    found = []
    for one in decisions:
        changes = one["changes"] if isinstance(one.get("changes"), dict) else {}
        pairs = [f"{name} {_pair(pair)}" for name, pair in changes.items()]
        told = ", ".join(assessed.named_changes(pairs))
        spent = f"{one['seconds']:.3g} s" if matches(one.get("seconds"), float) else ""
        head = f"{one.get('name', '')}, step {one.get('step')}: {one.get('kind', 'decision')}, "
        head += f"{one.get('verdict', '')}" + (f": {told}" if told else "")
        inside = f"<p>{_text(one.get('reason', ''))}</p>" + _evidence(one)
        inside += f'<p class="note">cost: {_text(spent)}</p>' if spent else ""
        found.append(f"<details><summary>{_text(head)}</summary>{inside}</details>")
    return found


def _evidence(decision: Mapping) -> str:
    """The trials or timings behind a decision."""
    trials, timings = (
        [x for x in given if isinstance(x, dict)] if isinstance(given, list) else []
        for given in (decision.get("trials"), decision.get("timings"))
    )
    shown = ""
    if trials:
        rows = [
            [
                _text(_settings(x.get("settings"))),
                _text(x.get("score")),
                _number(x.get("loss")),
                f"{_number(x.get('difference'))} ± {_number(x.get('ci95'))}",
                _text(x.get("error") or x.get("verdict")),
                _number(x.get("seconds")),
            ]
            for x in trials
        ]
        headings = ["tried", "by", "loss", "difference to no change", "verdict", "seconds"]
        shown += _table(headings, rows)
    if timings:
        rows = [
            [
                _text(_settings(x.get("settings"))),
                _number(x.get("seconds")),
                _number(x.get("bytes")),
                _text(x.get("reason") or x.get("verdict")),
            ]
            for x in timings
        ]
        shown += _table(["options", "seconds a step", "bytes", "verdict"], rows)
    return shown


def _settings(settings: Any) -> str:
    given = settings.items() if isinstance(settings, dict) else ()
    return ", ".join(f"{name} {_short(value)}" for name, value in given)


def _pair(change: Any) -> str:
    return " to ".join(map(_short, change)) if isinstance(change, list) else _short(change)


def _past(directory: Path, arranged: Sequence[tables.Table]) -> list[str]:
    """The first table's last column of losses, in this run and in others of its experiment."""
    if not arranged:
        return []
    table, found = arranged[0], {}
    shown = [c for c in table.columns if not c.startswith("Δ")]
    column = shown[-1] if shown else table.columns[-1]
    for other in sorted(directory.resolve().parent.iterdir()):
        try:
            records = tables.read_records(other / "results.jsonl")
        except (UserError, OSError):
            continue
        of_table = {t.name: t for t in tables.arrange(records)}.get(table.name)
        if of_table is not None:
            found[other.name] = of_table
    latest = dict(list(found.items())[-MOST_PAST:])
    if len(latest) < 2:
        return []
    rows = [
        [_text(name), *(_text(tables.cell_text(t.cells.get((r, column)))) for r in table.rows)]
        for name, t in latest.items()
    ]
    about = _text(f"{table.name}, {column}; runs of other configs are among them")
    return [_table(["run", *map(_text, table.rows)], rows), f'<p class="note">{about}</p>']


def _figures(directory: Path) -> list[str]:
    return [
        _image(path.read_bytes(), path.stem, path.name) for path in sorted(directory.glob("*.png"))
    ]


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"<h2>{title}</h2>", *parts] if parts else []


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, wraps: bool = False) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    kind = ' class="text"' if wraps else ""
    return f'<div class="wide"><table{kind}><tr>{head}</tr>\n{body}</table></div>'


def _image(data: bytes, alternative: str, note: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    caption = f"<figcaption>{_text(note)}</figcaption>" if note else ""
    return f'<figure><img alt="{_text(alternative)}" src="{source}">{caption}</figure>'


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{html.escape(text)}</pre></details>"


def _json(path: Path) -> str:
    return json.dumps(read_json(path), indent=2)


def _text(value: Any) -> str:
    return html.escape(printable("" if value is None else str(value)))


def _number(value: Any) -> str:
    return f"{value:.4g}" if matches(value, float) else tables.DASH


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that can be read."""
    found = []
    try:
        data = path.read_bytes()
    except OSError:
        return []
    for line in data.split(b"\n"):
        try:
            found.append(parse_record(line))
        except ValueError:
            continue
    return found
