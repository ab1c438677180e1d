import shlex

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from overlaps import overlapping_labels

from experiments import harness, table_linear
from metaopt.comparison import Comparison
from metaopt.errors import Diverged
from metaopt.files import read_json_lines
from metaopt.reporting import plots, tables
from metaopt.tasks.linear import bayes_loss, linear

RUN = shlex.split("--preset smoke --rows 'joint pretraining' 'Meta-SGD, rates for each step'")
ROWS = ["joint pretraining", "Meta-SGD, rates for each step"]
STEPS = ["0 steps", "1 step", "2 steps", "5 steps", "10 steps"]


def main(*args):
    harness.main("table_linear", table_linear.run, table_linear.presets, "", args)


def run_in(root):
    """The directory of the one run in ``root``."""
    main(*RUN, "--root", str(root))
    (directory,) = root.glob("table_linear/*")
    return directory


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"))


def test_rows_and_columns_and_the_closed_form_below_them(smoke_run):
    (table,) = tables.arrange(tables.read_records(smoke_run / "results.jsonl"))
    assert table.rows == (*ROWS, "closed form")
    assert table.columns == (*STEPS, "above the closed form")
    limit = table.cells["closed form", "5 steps"]["value"]
    for row in ROWS:
        loss = table.cells[row, "5 steps"]["value"]
        assert loss > limit
        excess = table.cells[row, "above the closed form"]["value"]
        np.testing.assert_allclose(excess, loss - limit, rtol=1e-9)
    assert "after 5 inner steps" in (smoke_run / "table.md").read_text(encoding="utf-8")


def test_the_closed_form_is_that_of_the_test_episodes(smoke_run):
    config = harness.parse("table_linear", table_linear.presets, "", RUN)
    key = jax.random.split(jax.random.key(config.comparison.eval_seed))[1]
    test = linear(config.tasks).test.sample(key, config.comparison.test_episodes)
    records = tables.read_records(smoke_run / "results.jsonl")
    found = {record["value"] for record in records if record["row"] == "closed form"}
    np.testing.assert_allclose(list(found), float(bayes_loss(config.tasks, test).mean()), rtol=1e-6)


def test_a_stopped_run_resumes_after_its_last_row(smoke_run, tmp_path, monkeypatch):
    trained, run = [], Comparison.run

    def stops(self, row, *args, **kwargs):
        trained.append(row.name)
        if trained == ROWS:
            raise Diverged("stopped")
        return run(self, row, *args, **kwargs)

    monkeypatch.setattr(Comparison, "run", stops)
    with pytest.raises(SystemExit):
        run_in(tmp_path)
    (directory,) = tmp_path.glob("table_linear/*")
    first = read_json_lines(directory / "results.jsonl")
    assert {record["row"] for record in first} == {ROWS[0]}
    assert run_in(tmp_path) == directory and trained == [*ROWS, ROWS[1]]
    found, expected = (read_json_lines(d / "results.jsonl") for d in (directory, smoke_run))
    assert found[: len(first)] == first
    assert [r["value"] for r in found] == [r["value"] for r in expected]


def test_no_text_of_the_figure_is_over_another(smoke_run, monkeypatch):
    assert imread(smoke_run / "curves.png").std() > 0.01
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    (smoke_run / "finished").unlink()
    run_in(smoke_run.parents[1])
    assert save and overlapping_labels(figures[0]) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset huge", "unknown preset 'huge'"),
        ("--rows Nobody", "no row 'Nobody'; there are random init"),
        ("--comparison.max-inner-steps 2", "5 inner steps"),
        ("--tasks.dim 60000 --comparison.test-episodes 1000000", "are needed"),
    ],
)
def test_wrong_input_is_one_line_before_a_run_is_made(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(*shlex.split(flags), "--root", str(tmp_path))
    *phases, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and words in error
    assert set(phases) <= {"preparing: data, models and their sizes"}
    assert not list(tmp_path.iterdir())
