"""The page of a run."""

import html
import json
import re

import numpy as np
import pytest

from metaopt import cli
from metaopt.errors import UserError
from metaopt.reporting import page as pages
from metaopt.reporting.page import page

CELL = {"unit": "nats", "n": 4, "preset": "cpu", "device": "2-core CPU", "seeds": [0]}
EVIL = "<script>alert(1)</script>"


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """A run with everything that a page shows."""
    for name, value in (("old", 2.5), ("new", 1.5)):
        directory = tmp_path / "experiment" / name
        directory.mkdir(parents=True)
        cells = [
            {"table": "t", "row": "MAML", "column": "0 steps", "value": 3.0, "ci95": 0.1},
            {"table": "t", "row": "MAML", "column": "5 steps", "value": value, "ci95": 0.1},
            {"table": "t", "row": EVIL, "column": "5 steps", "value": 9.0, "ci95": 0.1},
            {"table": "t", "row": "MAML", "column": "Δ 5 steps", "value": 0.5, "ci95": 0.1},
            *(
                {"table": "t/domains", "row": f"d{i}", "column": "gain", "better": "higher"}
                | {"value": float(i), "ci95": 0.1}
                for i in range(6)
            ),
        ]
        write(directory / "results.jsonl", *(CELL | cell for cell in cells))
        (directory / "config.json").write_text(json.dumps({"width": 32}), encoding="utf-8")
    write(
        directory / "metrics.jsonl",
        *({"name": "MAML", "step": s, "loss": 3 / s, "valid_loss": 4 / s} for s in (1, 2, 3)),
        {"name": "MAML", "step": 4, "valid_loss": 1.0, "scores": {"class 3": 0.25}},
    )
    alarm = {"kind": "nan", "step": 3, "raised": True, "message": "loss is nan"}
    slow = {"kind": "slow", "step": 4, "raised": True, "message": f"it is {EVIL}"}
    write(
        directory / "monitor.jsonl",
        {"name": "MAML", "kind": "step", "step": 2, "loss": 2.0},
        {"name": "MAML", "kind": "step", "step": 3, "loss": 77.0},
        {"name": "MAML", "kind": "alarm", "step": 3, "alarm": alarm},
        {"name": "MAML", "kind": "forget", "step": 2},
        {"name": "MAML", "kind": "step", "step": 3, "loss": 1.0},
        {"name": "MAML", "kind": "alarm", "step": 4, "alarm": slow},
    )
    trial = {"settings": {"rate": 0.1}, "score": "loss", "loss": 1.25, "difference": -0.5}
    trial |= {"ci95": 0.125, "verdict": "better", "seconds": 2.0}
    write(
        directory / "decisions.jsonl",
        {"name": "MAML", "kind": "rollback", "step": 3, "verdict": "rolled back", "alarm": alarm}
        | {"reason": "examples 3 to 4 are left out", "seconds": 0.5},
        {"name": "MAML", "kind": "search", "step": 0, "verdict": "accepted", "trials": [trial]}
        | {"changes": {"rate": [0.01, 0.1]}, "reason": "better beyond noise", "seconds": 3.0},
        {"name": "MAML", "kind": "response", "step": 5, "verdict": "accepted", "alarm": slow}
        | {"changes": {"workers": [1, 2]}, "reason": "2 threads draw data", "seconds": 0.25},
    )
    (directory / "finished").touch()
    return directory


def text_of(found):
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", found)))


def test_it_shows_results_course_alarms_with_responses_and_evidence(run):
    found = page(run)
    text = " ".join(text_of(found).split())
    assert "experiment/new" in text and "finished" in text
    assert "MAML 3.00 ± 0.10 1.50 ± 0.10" in text and "<strong>1.50 ± 0.10</strong>" in found
    assert "gain d5 5.00 ± 0.10 d4 4.00 ± 0.10 d3 3.00 ± 0.10 d0 0.00 ± 0.10" in text
    assert "class 3 0.25" in text
    assert "nan raised loss is nan rolled back: examples 3 to 4 are left out" in text
    assert f"slow raised it is {EVIL} accepted: 2 threads draw data" in text
    assert "response, accepted: workers 1 to 2 2 threads draw data" in text
    assert "search, accepted: rate 0.01 to 0.1 better beyond noise" in text
    assert "rate 0.1 loss 1.25 -0.5 ± 0.125 better 2" in text and "cost: 3 s" in text
    assert '"width": 32' in text and found.count("data:image/png") == 1


ASSESSMENT = {
    **{"name": "MAML", "step": 5, "valid_loss": 1.0, "cost": 1.25},
    "groups": [
        {"group": name, "loss": {"mean": loss, "ci95": 0.5, "n": 4}, "improvement": None}
        | {"difference": {"mean": loss - 3.5, "ci95": None, "n": 12}}
        for name, loss in (("c", 6.0), (EVIL, 1.0), *((f"d{i}", 2.0 + i / 10) for i in range(12)))
    ],
    "strengths": [EVIL],
    "weaknesses": ["c"],
    "classes": {"accuracy": 0.75, "precision": 0.7, "recall": 0.6, "f1": 0.65}
    | {
        "per_class": {
            "cat": {"precision": 0.5, "recall": 0.25, "f1": 0.375, "support": 8}
            | {"best": {"threshold": 0.4, "precision": 0.6, "recall": 0.8, "f1": 0.7}}
        }
    },
    "rank": {"rank": 2, "n": 4},
}


def test_it_shows_what_a_training_says_of_itself(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**ASSESSMENT, "step": 4, "cost": 9.0, "rank": None}) + "\n")
        file.write(json.dumps(ASSESSMENT) + "\n")
    found = page(run)
    text = " ".join(text_of(found).split())
    assert "c 6 ± 0.5 – 2.5 weakness" in text and "strength" in text and "<script" not in found
    assert text.index("d0 2 ± 0.5") < text.index("c 6 ± 0.5")
    assert "d3 2.3" in text and "d4 2.4" not in text and "d5 2.5" not in text and "d11" in text
    assert "cat 0.5 0.25 0.375 8 0.4 0.6 0.8 0.7" in text and "mean 0.7 0.6 0.65" in text
    assert "cost 1.25; strengths" in text and "weaknesses c; accuracy 0.75" in text
    assert "rank 2 of 5 runs" in text and "class 3 0.25" in text


@pytest.mark.parametrize("key", ["groups", "strengths", "weaknesses", "classes", "rank", "cost"])
@pytest.mark.parametrize("bad", [3, "x", [4], [{"loss": 3}], {"per_class": {"a": [], "b": {}}}])
def test_an_assessment_that_is_damaged_stops_no_page(run, key, bad):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**ASSESSMENT, key: bad}) + "\n")
    assert "MAML" in page(run)


def test_past_runs_of_the_experiment_are_beside_it(run):
    assert "old 2.50 ± 0.10 9.00" in (text := " ".join(text_of(page(run)).split()))
    assert "new 1.50 ± 0.10 9.00" in text and "t, 5 steps" in text


def test_nothing_of_a_run_is_taken_for_html_and_nothing_is_fetched(run):
    found = page(run)
    assert "<script" not in found and html.escape(EVIL) in found
    assert not re.search(r'(src|href)="(?!data:)', found) and "http" not in found
    assert '<meta name="viewport"' in found


def test_what_was_rolled_back_is_not_in_the_course(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        pages.plots,
        "course",
        lambda lines, marks, title: seen.update({title: (lines, marks)}) or b"",
    )
    page(run)
    lines, marks = seen["MAML"]
    np.testing.assert_array_equal(lines["loss"], [[2, 2.0], [3, 1.0]])
    np.testing.assert_array_equal(lines["held out"], [[1, 4], [2, 2], [3, 4 / 3], [4, 1]])
    assert marks == [3, 0, 5]  # a response, too


def test_damaged_and_missing_files_do_not_stop_it(run, capsys):
    for name in ("metrics", "monitor", "decisions"):
        with (run / f"{name}.jsonl").open("ab") as file:
            file.write(b'\xff{"half": \n[1]\n{"name": 3, "step": "x", "alarm": 4, "trials": 5}\n')
    assert "MAML" in page(run)
    for name in ("metrics", "monitor", "decisions", "results"):
        (run / f"{name}.jsonl").unlink()
    assert "config.json" in page(run)
    (run / "config.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        page(run)


def test_the_command_writes_it_beside_the_run_or_where_asked(run, tmp_path, capsys):
    cli.main(["report", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text("utf-8") == page(run)
    cli.main(["report", str(run), "--to", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
    for args, words in (
        ([str(tmp_path / "nowhere")], "there is no run"),
        ([str(tmp_path)], "holds no run"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *args])
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
