"""Whatever a file of a run holds: a result, or one line that says which file and what to do."""

import io
import json
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from metaopt.cli import tables, watch
from metaopt.errors import UserError
from metaopt.files import Line, keep_json_lines
from metaopt.self_improvement.records import RunLog
from metaopt.training.runs import open_run

RECORD = {
    **{"table": "a/first", "row": "MAML", "column": "5 steps", "value": 2.5, "ci95": 0.1},
    **{"unit": "nats", "n": 3, "seeds": [0], "preset": "cpu", "device": "CPU", "paper": 1.5},
    **{"versions": {"jax": "0.10"}, "command": "python -m experiments.x", "better": "lower"},
}
ASSESSED = {
    **{"name": "loop", "step": 4, "tokens": 64, "seconds": 1.5, "flops": None, "valid_loss": 2.5},
    **{"loss": {"mean": 2.5, "ci95": None, "n": 1}, "improvement": None, "per_second": 0.5},
    **{"per_flop": None, "per_cost": 1.0},
}
TRIED = {
    **{"setting": "rate", "settings": {"rate": 0.2}, "direction": 1, "score": "loss", "loss": 2.0},
    **{"difference": -0.5, "ci95": 0.1, "seconds": 0.5, "examples": 3, "error": ""},
}
DECISION = {
    **{"name": "loop", "kind": "search", "step": 4, "examples": 8, "phase": 0},
    **{"verdict": "accepted", "changes": {"rate": [0.1, 0.2]}, "reason": "better", "seconds": 1.0},
    **{"trials": [TRIED | {"verdict": "better", "accepted": True}]},
    **{"trial_examples": 4, "left_out": None, "size": 2, "gained": 1},
}
METRICS = {"name": "MAML", "step": 3, "loss": 1.5, "tokens_per_second": 10.0, "grad_norm": [0.5]}
MONITOR = {
    **{"kind": "step", "name": "loop", "num_steps": 9, "step": 4, "loss": 1.5, "device": 1024},
    **{"utilisation": 0.25, "active": ["nan"], "alarm": {"kind": "nan", "message": "it is nan"}},
}
FILES = {
    "results.jsonl": [RECORD, RECORD | {"row": "ANIL"}],
    "metrics.jsonl": [METRICS, ASSESSED, METRICS | {"step": 4}],
    "monitor.jsonl": [MONITOR, MONITOR | {"kind": "forget", "step": 2}],
    "decisions.jsonl": [DECISION, DECISION | {"settings": {"rate": 0.5}}],
    "config.json": [{"seed": 0, "train": {"num_steps": 90, "checkpoint_every": 9}}],
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\x1b[31m", "a|b\n", "[/red]", "../../x", "\udcff", 1e308, -1e308, 10**310]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def damaged(draw):
    """A file of a run, and its lines with one value changed or with other bytes."""
    name = draw(st.sampled_from(sorted(FILES)))
    lines = [dict(line) for line in FILES[name]]
    line = draw(st.sampled_from(lines))
    how = draw(st.sampled_from(["a value", "no value", "bytes", "cut", "another line"]))
    if how == "a value":
        line[draw(st.sampled_from(sorted(line)))] = draw(VALUES)
    elif how == "no value":
        line.pop(draw(st.sampled_from(sorted(line))))
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    at = draw(st.integers(0, len(data)))
    if how == "bytes":
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    elif how == "cut":
        data = data[:at]
    elif how == "another line":
        odd = ["NaN", "[1]", "7", '{"step": 1e999}', "[" * 5000, '{"a":' * 80 + "1" + "}" * 80]
        data = draw(st.sampled_from(odd)).encode() + b"\n" + data
    return name, data


def resume(run):
    """Takes up what the lines of a training say, from a checkpoint after all of them."""
    notes = {"examples": 8, "losses": [], "ledger": [], "alarms": [], "settings": {}}
    notes |= {"num_decisions": 2, "num_assessments": 1}
    restored = types.SimpleNamespace(notes=notes, state=None)
    checkpoints = types.SimpleNamespace(restore_latest=lambda example: restored)
    workload = types.SimpleNamespace(
        name="loop", tokens_per_example=8, evaluation_examples=0.0, all_axes={}
    )
    log = RunLog(workload, run, checkpoints, {})  # type: ignore[arg-type]
    snapshot, _ = log.resume(None)  # type: ignore[arg-type]
    assert str([log.ledger(snapshot), log.assessed_at, snapshot])


def one_line_or_result(call):
    try:
        call()
    except UserError as error:
        assert str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(damaged())
def test_a_damaged_file_gives_a_result_or_one_line(tmp_path_factory, file):
    name, data = file
    project = tmp_path_factory.mktemp("project")
    results = tables.results_of(project)
    run = results / "a" / "cpu"
    run.mkdir(parents=True)
    for other, lines in FILES.items():
        (run / other).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / name).write_bytes(data)

    console = Console(file=io.StringIO(), width=200)
    watch.run(watch.Config(runs=(run,), once=True), console)  # it passes over what it cannot read
    shown = console.file.getvalue()
    assert shown.replace("\n", "").isprintable()

    readme = project / "README.md"
    readme.write_text("<!-- table: a/cpu -->\n<!-- end -->\n")
    one_line_or_result(lambda: tables.check(project))
    one_line_or_result(lambda: tables.with_tables(readme, results))

    one_line_or_result(lambda: resume(run))
    for lines in ("metrics.jsonl", "monitor.jsonl"):
        one_line_or_result(lambda lines=lines: keep_json_lines(run / lines, lambda x: True, Line))
    one_line_or_result(lambda: open_run(results, "a", "cpu", FILES["config.json"][0], run_dir=run))


@pytest.mark.parametrize("name", sorted({*FILES} - {"config.json"}))
def test_a_file_that_is_whole_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in FILES[name]))
    keep_json_lines(path, lambda line: True, None if name == "results.jsonl" else Line)
    assert [json.loads(line) for line in path.read_text().splitlines()] == FILES[name]


def test_a_run_whose_files_are_whole_is_taken_up(tmp_path):
    for name, lines in FILES.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    resume(tmp_path)
