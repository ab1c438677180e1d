import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from metaopt.cli import watch
from metaopt.cli.watch_runs import POINTS, RunView, Tail, open_view
from metaopt.errors import UserError
from metaopt.files import append_json_line, write_json_lines
from metaopt.training.monitor import Monitor, MonitorConfig

DECISION = {
    **{"name": "loop", "step": 40, "verdict": "accepted", "reason": "better by 0.1 ± 0.02"},
    "changes": {"learning_rate": [0.1, 0.01], "optimizer": ["sgd", "adam"]},
}


@pytest.fixture
def run(tmp_path):
    """A run with one training under a monitor and one without, the last line half written."""
    directory = tmp_path / "adapt" / "cpu-1"
    directory.mkdir(parents=True)
    config = {"seed": 0, "inner": {"num_steps": 5}, "train": {"num_steps": 90}}
    config["train"]["checkpoint_every"] = 10
    (directory / "config.json").write_text(json.dumps(config))
    options = {"tokens_per_step": 512, "flops_per_step": 1e9, "peak_flops": 1e10}
    with Monitor(
        MonitorConfig(seconds_between_lines=0), directory=directory, name="loop", **options
    ) as monitor:
        for step in range(1, 51):
            loss = 100.0 if step > 48 else 3.0 - step / 50
            monitor.observe(step, {"loss": loss, "step_seconds": 0.5})
    for step in (10, 20):
        line = {"name": "MAML [x]", "step": step, "loss": 1.0, "tokens_per_second": 12345.6}
        append_json_line(directory / "metrics.jsonl", line)
    append_json_line(directory / "metrics.jsonl", {"name": "loop", "step": 40, "valid_loss": 2.7})
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"name": "MAML [x]", "st')
    append_json_line(directory / "decisions.jsonl", DECISION)
    return directory


def shown(config, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    watch.run(config, console)
    return console.file.getvalue()


def line_with(text, *parts):
    (line,) = [line for line in text.splitlines() if all(part in line for part in parts)]
    return line


def test_a_view_of_trainings_with_and_without_a_monitor(run):
    text = shown(watch.Config(runs=(run,)))
    watched = line_with(text, "loop", "50/90")
    for part in ("100", "2.7", "1024", "20.0%", "divergence", "█", "▁"):
        assert part in watched
    assert "running" in line_with(text, "adapt/cpu-1")
    assert "12,346" in line_with(text, "MAML [x]", "20/90")  # and no markup is read into it
    assert "step 49: the loss, 100, is above" in line_with(text, "! loop")
    decision = line_with(text, "> loop, step 40: accepted")
    assert "learning_rate 0.1 -> 0.01, optimizer sgd -> adam (better by 0.1 ± 0.02)" in decision


def test_an_assessment_is_a_line(run):
    line = {"name": "loop", "step": 45, "valid_loss": 2.5, "cost": 2.5, "strengths": ["a"]}
    line |= {"weaknesses": ["b", "c", "d", "e"], "classes": {"accuracy": 0.75, "f1": 0.5}}
    line |= {"rank": {"rank": 1, "n": 2}, "groups": []}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"name": "other", "step": 1, "cost": "x", "strengths": 3}) + "\n")
    append_json_line(run / "metrics.jsonl", line)
    text = shown(watch.Config(runs=(run,)))
    said = line_with(text, "= loop: cost 2.5; strengths a; weaknesses b, c, d and 1 more")
    assert "accuracy 0.75; macro F1 0.5; rank 1 of 3 runs" in said
    assert "= MAML" not in text and "= other" not in text


def test_several_runs_and_a_finished_one(run, tmp_path):
    other = tmp_path / "adapt" / "cpu-2"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "finished").write_text("")
    text = shown(watch.Config(runs=(run, other)))
    assert "finished" in line_with(text, "adapt/cpu-2") and "loop" in text


def test_on_a_terminal_it_goes_on_until_all_are_finished(run, monkeypatch):
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        append_json_line(run / "monitor.jsonl", {"name": "late", "step": 77, "loss": 1.0})
        (run / "finished").write_text("")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    text = shown(watch.Config(runs=(run,), every=0.25), force_terminal=True)
    assert waits == [0.25] and "late" in text
    assert shown(watch.Config(runs=(run,), once=True), force_terminal=True).count("late") == 1


def test_ctrl_c_leaves_without_an_error(run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert "loop" in shown(watch.Config(runs=(run,)), force_terminal=True)


def test_what_is_silent_is_called_so(run):
    for path in [run, *run.glob("*.jsonl")]:
        os.utime(path, (0, path.stat().st_mtime - 600))
    assert RunView(run).state == "silent for 10 min"


def test_what_was_taken_back_leaves_the_curve(tmp_path):
    with Monitor(
        MonitorConfig(seconds_between_lines=0), tokens_per_step=1, directory=tmp_path
    ) as monitor:
        for step in range(1, 31):
            monitor.observe(step, {"loss": 1.0 if step < 20 else 50.0})
        monitor.discard_after(19)
        view = open_view(tmp_path)
        view.update()
        training = view.trainings["train"]
        assert [step for step, _ in training.curve] == list(range(1, 20))
        assert training.values["active"] == [] and training.alarms


def test_a_file_is_read_on_and_a_new_one_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == ([{"step": 1}], True)
    assert tail.read() == ([], False)
    with open(path, "a") as file:
        file.write(': 2}\nnot JSON\n[3]\n{"step": 4}\n')
    assert tail.read() == ([{"step": 2}, {"step": 4}], False)
    write_json_lines(path, [{"step": 1}])  # a run that goes on rewrites its files
    assert tail.read() == ([{"step": 1}], True)


def test_a_view_starts_anew_with_its_files_and_is_bounded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, [{"name": "a", "step": i, "loss": 1.0} for i in range(POINTS + 50)])
    view = open_view(tmp_path)
    view.update()
    assert len(view.trainings["a"].curve) == POINTS
    write_json_lines(path, [{"name": "b", "step": 1, "loss": None}])
    view.update()
    assert list(view.trainings) == ["b"] and not view.trainings["b"].curve


@pytest.mark.parametrize(
    "decision, text",
    [
        ({"step": 3, "setting": "batch", "from": 16, "to": 32, "verdict": "accepted"}, "batch 16"),
        ({"step": 3, "settings": {"rate": 0.1}}, "step 3: decided, rate 0.1"),
        ({"verdict": "rolled back", "reason": "nan"}, "step -: rolled back (nan)"),
        ({"changes": "odd"}, "decided"),
        (
            {"kind": "response", "step": 8, "verdict": "accepted", "changes": {"workers": [1, 2]}}
            | {"reason": "starved: it waits; 2 threads draw data"},
            "step 8: accepted, workers 1 -> 2 (starved: it waits; 2 threads draw data)",
        ),
        (
            {"verdict": "accepted", "changes": {f"share of {x}": [1, 4] for x in "abcdef"}},
            "accepted, share of a 1 -> 4, share of b 1 -> 4, share of c 1 -> 4, "
            "share of d 1 -> 4, and 2 more",
        ),
    ],
)
def test_a_decision_in_words(decision, text):
    assert text in watch.decision_note(decision).plain


def test_sparklines():
    assert watch.sparkline([]) == "" and watch.sparkline([2.0]) == "▁"
    assert watch.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == watch.BARS
    assert watch.sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert watch.sparkline(range(1000)) == "".join(sorted(watch.sparkline(range(1000))))
    assert len(watch.sparkline(range(1000))) == watch.CURVE


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        watch.run(watch.Config(runs=(tmp_path,)))
    with pytest.raises(UserError, match="is not there"):
        watch.run(watch.Config(runs=(tmp_path / "absent",)))
    with pytest.raises(UserError, match="give the directory of a run to watch"):
        watch.run(watch.Config())
    with pytest.raises(UserError, match="every"):
        watch.run(watch.Config(runs=(tmp_path,), every=0.0))


def test_the_command_needs_no_jax(run):
    code = (
        "import sys; from metaopt.cli import main; main(['watch', *sys.argv[1:]]); "
        "sys.exit('jax was imported' if 'jax' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), "--once"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "50/90" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: /nowhere is not there")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(run, encoding):
    append_json_line(run / "metrics.jsonl", {"name": "π \x1b[2J \udcff", "step": 1, "loss": 1.0})
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LANG": "C", "LC_ALL": "C"}
    command = [sys.executable, "-m", "metaopt", "watch", str(run), "--once"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert "50/90" in shown and "\\x1b[2J \\udcff" in shown and "\x1b" not in shown


def test_what_is_no_number_or_too_large_is_passed_over(tmp_path):
    odd = [
        *({"step": "3"}, {"loss": [1]}, {"loss": 1e308}, {"loss": -1e308}, {"loss": 10**400}),
        *({"active": 3}, {"active": ["nan", 4]}, {"alarm": "nan"}, {"alarm": {"kind": 3}}),
        *({"device": "much"}, {"num_steps": -1.5}, {"utilisation": True}, {"kind": "forget"}),
    ]
    for line in odd:
        append_json_line(
            tmp_path / "monitor.jsonl", {"name": "loop", "step": 1, "loss": 2.0} | line
        )
    (tmp_path / "monitor.jsonl").open("ab").write(b'7\n\xff\n{"step": NaN}\n')
    write_json_lines(tmp_path / "decisions.jsonl", [{"changes": [1]}, {"reason": "\x1b[2J"}])
    assert line_with(shown(watch.Config(runs=(tmp_path,))), "loop", "▁")
