import dataclasses
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from overlaps import overlapping_labels

from experiments import harness, table_bayes_gap
from experiments.table_bayes_gap import BASE, SETTINGS, Config, Study, add_gap, add_scale, draw
from metaopt import losses, models
from metaopt.comparison import ComparisonConfig, RowResult
from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig, make_rows
from metaopt.reporting import tables
from metaopt.tasks.markov import MarkovConfig, bayes_loss, number_ngrams
from metaopt.training.loop import train
from metaopt.types import Batch, Episode

RUN = shlex.split(
    "--preset smoke --models 'bigram table' --tables.settings 1 3 0.3 1 2 3 0.5 1 "
    "--inner.num-steps 1 --tables.comparison.max-inner-steps 2 --tables.comparison.num-devices 1 "
    "--tables.comparison.inner-rates 0.5 1"
)


QUICK = {"xla_backend_optimization_level": 0}


def main(*args):
    harness.main("table_bayes_gap", table_bayes_gap.run, table_bayes_gap.presets, "", args)


def parse(*args):
    return harness.parse("table_bayes_gap", table_bayes_gap.presets, "", args)


def run_in(root):
    """The directory of the one run in ``root``."""
    main(*RUN, "--root", str(root))
    (directory,) = root.glob("table_bayes_gap/*")
    return directory


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"))


def random_episodes(languages, num_tasks):
    """Tokens of no language at all, for which the limits are defined as well."""
    sizes = (num_tasks, languages.num_support + languages.num_query, languages.length + 1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(languages.vocab_size, size=sizes))
    batch = Batch(tokens[..., :-1], tokens[..., 1:])
    support, query = (
        Batch(*(x[:, part] for x in batch))
        for part in (slice(languages.num_support), slice(languages.num_support, None))
    )
    return Episode(support, query, jnp.arange(num_tasks))


def make_study(model):
    """A study with nothing to train."""
    languages = MarkovConfig(order=2, vocab_size=3, num_support=2, num_query=2, length=9)
    comparison = SimpleNamespace(
        config=ComparisonConfig(max_inner_steps=6, test_episodes=6),
        inner=InnerLoop(num_steps=3),
        test=random_episodes(languages, 6),
        valid=random_episodes(languages, 6),
    )
    rows = make_rows(LanguageConfig(), models.bigram(3))
    return Study(model, languages, comparison, rows)  # type: ignore[arg-type]


def posterior_table(languages, support):
    """Logarithms of the posterior predictive, counted one transition at a time."""
    v, m, alpha = languages.vocab_size, languages.order, languages.concentration
    tokens = np.concatenate([support.inputs, support.targets[:, -1:]], axis=1)
    counts = np.full((v**m, v), alpha)
    for ngram in np.ravel(number_ngrams(languages, jnp.asarray(tokens), m + 1)):
        counts[ngram // v, ngram % v] += 1
    return np.log(counts / counts.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("order", [1, 3])
def test_the_learner_that_counts_is_the_limit_in_the_n_gram_table(order):
    languages = MarkovConfig(order=order, vocab_size=3, num_support=4, num_query=2, length=40)
    episodes = random_episodes(languages, 1)
    model = models.ngram(3, order)
    support, query = (jax.tree.map(lambda x: x[0], batch) for batch in episodes[:2])
    params = {"head": {"table": jnp.asarray(posterior_table(languages, support))}}
    found = jax.jit(losses.next_token(model), compiler_options=QUICK)(params, query)
    np.testing.assert_allclose(found, bayes_loss(languages, episodes)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "table", "use_prefix"),
    [("n-gram table", "bayes_gap", False), ("transformer", "bayes_gap_prefix", True)],
)
def test_gaps_are_paired_and_to_the_limit_that_reads_what_the_model_reads(
    tmp_path, model, table, use_prefix
):
    """A learner that is the same distance from its limit on every episode."""
    study = make_study(model)
    comparison, languages = study.comparison, study.languages
    limit = np.asarray(bayes_loss(languages, comparison.test, use_prefix=use_prefix))
    other = np.asarray(bayes_loss(languages, comparison.test, use_prefix=not use_prefix))
    assert abs((limit - other).mean()) > 0.01
    steps = comparison.config.max_inner_steps + 1
    curves = limit[:, None] + np.linspace(1.0, 0.0, steps)
    curves[:, -1] = np.inf  # diverged
    row = study.rows[0]
    result = RowResult(row, {"params": {}}, {}, curves, np.full(steps, 0.5), 1.0)
    line = {"name": row.name, "step": 30, "valid_loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    config = Config(run_dir=str(tmp_path / "run"))
    run = harness.TableRun(
        "table_bayes_gap", config, table_bayes_gap.presets, table="bayes_gap", unit="nats/token"
    )
    add_gap(run, study, result, tmp_path)
    add_scale(run, study)
    gap, *scale = run.records
    num_steps = comparison.inner.num_steps
    assert gap["value"] == pytest.approx(1 - num_steps / (steps - 1)) and gap["ci95"] < 1e-6
    assert gap["table"] == table and {record["table"] for record in scale} == {table}
    assert gap["gap_by_inner_steps"][num_steps] == gap["value"]
    assert gap["gap_by_inner_steps"][-1] is None
    valid = np.mean(bayes_loss(languages, comparison.valid, use_prefix=use_prefix))
    assert gap["gap_by_meta_steps"] == {"30": pytest.approx(2 - valid)}
    assert gap["n"] == len(limit) and gap["row"] == f"random init, {model}"
    uniform, of_limit = (record["value"] for record in scale)
    assert of_limit == pytest.approx(limit.mean())
    assert uniform + of_limit == pytest.approx(math.log(3)) and all(r["limit"] for r in scale)


def test_a_run_leaves_the_table_and_the_figure(finished_run):
    records = read_json_lines(finished_run / "results.jsonl")
    column = "order 2, 3 symbols, 0.5, 1x8"  # at order 1 the bigram table is the n-gram table
    names = ["Meta-SGD on Adagrad, bigram table", "gap of the uniform prediction"]
    names.append("loss of the limit itself")
    found = [(r["table"], r["row"], r["column"]) for r in records]
    assert found == [("bayes_gap", name, column) for name in names]
    assert list(records[0]["gap_by_meta_steps"]) == ["2", "4"]
    assert len(records[0]["gap_by_inner_steps"]) == 3
    again = shlex.split(records[0]["command"])
    assert parse(*again[3:]) == parse(*RUN, "--root", str(finished_run.parents[1]))
    assert column in (finished_run / "table.md").read_text()
    assert (finished_run / "table.tex").read_text().count(r"\begin{tabular}") == 1
    assert imread(finished_run / "curves.png").std() > 0.01


def test_a_run_that_lost_its_end_is_taken_up_and_gives_the_same_numbers(finished_run):
    before = read_json_lines(finished_run / "results.jsonl")
    (finished_run / "finished").unlink()
    assert run_in(finished_run.parents[1]) == finished_run
    after = read_json_lines(finished_run / "results.jsonl")
    assert [r | {"seconds": 0} for r in after] == [r | {"seconds": 0} for r in before]


def test_the_figure_shows_the_first_setting_and_all():
    shared = {"table": "bayes_gap_prefix", "learner": "MAML", "num_inner_steps": 1}
    records = [
        shared
        | {"row": f"MAML, {model}", "model": model, "column": column, "value": value}
        | {"gap_by_inner_steps": [0.5, value, None], "gap_by_meta_steps": {"10": 0.2, "20": value}}
        for model, column, value in [
            ("GRU", "a", -0.1),
            ("GRU", "b", None),
            ("transformer", "b", 3),
        ]
    ]
    figure = draw(records)
    by_inner, by_meta, by_setting = figure.axes

    def drawn(axes):
        return [
            [*map(list, line.get_data(orig=False))]
            for line in axes.lines
            if line.get_marker() != "None"
        ]

    nan = pytest.approx(math.nan, nan_ok=True)
    assert drawn(by_inner) == [[[0, 1, 2], [0.5, -0.1, nan]]]
    assert drawn(by_meta) == [[[10, 20], [0.2, -0.1]]]
    values, places = zip(*drawn(by_setting), strict=True)
    assert [*values] == [[-0.1], [nan], [3]] and np.allclose(np.round(places, 0), [[0], [1], [1]])
    assert [text.get_text() for text in by_setting.get_yticklabels()] == ["a", "b"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["MAML, GRU", "MAML, transformer"]


def test_no_label_of_the_committed_figure_is_over_another():
    results = Path(table_bayes_gap.__file__).parent / "results/table_bayes_gap/cpu/results.jsonl"
    records = [record for record in tables.read_records(results) if not record.get("limit")]
    assert len({record["column"] for record in records}) == len(SETTINGS)
    assert not overlapping_labels(draw(records))


def test_presets():
    config = Config()
    assert all(len(set(factors)) >= 2 for factors in zip(*SETTINGS, strict=True))
    assert config.tables.settings[0] == config.networks.settings[0] == BASE
    assert config.tables.comparison.test_episodes >= 600
    assert config.networks.comparison.test_episodes >= 600
    gpu = table_bayes_gap.presets("gpu")
    assert gpu.tables.settings == gpu.networks.settings and set(SETTINGS) < set(gpu.tables.settings)
    study = make_study("GRU")
    assert study.column == "order 2, 3 symbols, 0.3, 2x9"
    assert study.row_name(study.rows[0]) == "random init, GRU"


def test_the_learners_if_none_are_named():
    config = table_bayes_gap.presets("smoke")
    networks = dataclasses.replace(config.networks, learners=())
    config = dataclasses.replace(config, networks=networks)
    study = table_bayes_gap.make_study(config, "transformer", (1, 4, 0.3, 2), train)
    names = ["random init", "joint pretraining", "FOMAML", "MAML", "per-layer-per-step"]
    assert [row.name for row in study.rows] == [*names, "Meta-SGD", "Meta-SGD on Adagrad"]


WRONG = [
    ("--preset huge", "unknown preset 'huge'"),
    ("--tables.settings 1 1 0.3 4", "--tables.settings has an entry that"),
    ("--tables.settings 1 4 0.3 4 1 4 0.3 4", "all of them must be different"),
    ("--models transformer --num-heads 3", "num_heads"),
    ("--inner.batching split", "4 support examples cannot be split into 5"),
    ("--models 'bigram table' --tables.settings 1 4 0.3 4", "nothing to run for bigram table"),
    ("--networks.learners MALM", "no row 'MALM'"),
    (
        "--models 'n-gram table' --tables.comparison.max-inner-steps 4",
        "5 inner steps and evaluation only 4",
    ),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_before_anything_is_compiled_or_made(
    line, words, tmp_path, capsys, caplog
):
    with jax.log_compiles(), pytest.raises(SystemExit) as stop:
        main(*shlex.split(line), "--root", str(tmp_path))
    *phases, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: ") and words in error
    assert all(phase.startswith(("preparing", "reading")) for phase in phases)
    assert "Compiling" not in caplog.text


def test_no_models_at_all_is_refused():
    with pytest.raises(UserError, match="models"):
        Config(models=())
