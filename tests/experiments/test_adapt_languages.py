import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import metaopt
from experiments import adapt_languages, harness
from experiments.adapt_languages import Study, add_row
from metaopt import languages, learners
from metaopt.comparison import Row, RowResult
from metaopt.files import read_json_lines
from metaopt.statistics import interval
from metaopt.tasks.sources import text as text_sources
from metaopt.training.loop import Interrupted
from metaopt.training.runs import open_run
from metaopt.types import Episode

ROWS = ("joint pretraining", "Meta-SGD")
SIZES = "--num-support 2 --num-query 2 --length 8 --comparison.num-devices 2"
MARKOV = shlex.split(
    f"--preset smoke --tasks markov-symmetric --model bigram {SIZES} --vocab-size 4 "
    "--rows 'joint pretraining' Meta-SGD "
    "--inner.num-steps 2 --comparison.max-inner-steps 3 --comparison.meta-steps 6 "
    "--comparison.inner-rates 1 8"
)
TEXT = shlex.split(
    f"--preset smoke {SIZES} --tasks text --model bigram --rows MAML "
    "--inner.num-steps 1 --comparison.max-inner-steps 1 --comparison.pretrain-steps 0 "
    "--comparison.inner-rates 0.1 0.3"
)


def main(*args):
    harness.main("adapt_languages", adapt_languages.run, adapt_languages.presets, "", args)


def parse(*args):
    return harness.parse("adapt_languages", adapt_languages.presets, "", args)


def run_in(root, args):
    """The directory of a new run."""
    before = set(root.glob("adapt_languages/*"))
    main(*args, "--root", str(root))
    (directory,) = set(root.glob("adapt_languages/*")) - before
    return directory


def cells(directory):
    """The numbers of a run by row and column, without how long it took."""
    return {
        (r["row"], r["column"]): (r["value"], r["ci95"])
        for r in read_json_lines(directory / "results.jsonl")
    }


@pytest.fixture(scope="module")
def markov_run(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("runs"), MARKOV)


def test_a_run_leaves_config_results_table_picture_and_samples(markov_run):
    config = parse(*MARKOV, "--root", str(markov_run.parents[1]))
    saved = json.loads((markov_run / "config.json").read_text())
    assert saved == harness.as_saved(config)
    assert saved["inner"]["num_steps"] == 2 and "root" not in saved
    for record in read_json_lines(markov_run / "results.jsonl"):
        assert set(record) >= {"table", "row", "column", "value", "ci95", "unit", "n", "seeds"}
        assert set(record) >= {"paper", "source", "preset", "device", "versions", "commit"}
        assert (
            record["table"] == "adapt_languages/markov-symmetric" and record["unit"] == "nats/token"
        )
        assert record["n"] == 16 and ("seconds" in record or record["limit"])
        again = shlex.split(record["command"])
        assert again[:3] == ["python", "-m", "experiments.adapt_languages"]
        assert parse(*again[3:]) == config
    steps = [
        f"{line['name']} {line['step']}" for line in read_json_lines(markov_run / "metrics.jsonl")
    ]
    assert steps == [f"{row} {step}" for row in ROWS for step in range(1, 7)]
    assert imread(markov_run / "curves.png").std() > 0.01
    assert (markov_run / "table.tex").read_text().startswith(r"\begin{tabular}")
    samples = (markov_run / "samples.md").read_text()
    assert samples.startswith("Text of Meta-SGD for a new language")
    assert "Before adaptation" in samples and "After 2 steps of adaptation" in samples


def test_a_start_imports_nothing_that_only_an_end_needs():
    late = {"matplotlib", "scipy.stats", "tensorboardX", "torch", "tensorflow_datasets", "optuna"}
    program = f"import sys, experiments.adapt_languages; print(*({late!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == []


def test_each_phase_is_announced_before_it_begins(tmp_path, capsys):
    run_in(tmp_path, [*MARKOV, "--rows", "MAML"])
    lines = capsys.readouterr().err.splitlines()
    starts = ("preparing", "MAML: tuning", "MAML: training", "MAML: 0/6  compiling")
    starts += ("MAML: evaluating", "MAML: tuning", "MAML: 0 steps")
    left = iter(lines)
    for start in starts:  # in this order
        assert any(line.startswith(start) for line in left), start
    assert lines[0].startswith("preparing")


@pytest.mark.slow
def test_a_run_under_the_closed_loop_ends_in_the_same_files_and_says_what_it_tried(tmp_path):
    args = [*MARKOV, "--rows", "MAML", "--comparison.meta-steps", "1000", "--improve"]
    directory = run_in(tmp_path, [*args, "--comparison.tasks-per-step", "2"])
    assert ("MAML", "2 steps") in cells(directory)
    decisions = read_json_lines(directory / "decisions.jsonl")
    tried = {entry["setting"] for line in decisions for entry in line["trials"]}
    assert "outer_learning_rate" in tried and {line["name"] for line in decisions} == {"MAML"}


def test_the_limits_come_last_and_no_row_is_below_its_own(markov_run):
    lines = (markov_run / "table.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["", *ROWS, "Bayes: support", "Bayes: support + prefix"]
    found = cells(markov_run)
    for column in ("1 step", "2 steps"):
        support, prefix = (found[name, column][0] for name in names[-2:])
        assert prefix < support < min(found[row, column][0] for row in ROWS)
    assert found["Bayes: support", "0 steps"][0] == pytest.approx(np.log(4), rel=1e-5)
    assert "**" not in "".join(line for line in lines if "Bayes: " in line)


def test_differences_are_paired_and_gaps_are_to_the_limit(markov_run):
    found = cells(markov_run)
    assert (ROWS[0], "Δ 2 steps") not in found
    for row, column, other in [
        *(
            (row, f"Δ {n}", ROWS[0])
            for row in ("Meta-SGD", "Bayes: support")
            for n in ("1 step", "2 steps")
        ),
        *((row, "gap to Bayes", "Bayes: support") for row in ROWS),
    ]:
        plain = column.removeprefix("Δ ") if "Δ" in column else "2 steps"
        a, b = found[row, plain], found[other, plain]
        value, half = found[row, column]
        assert abs(value) == pytest.approx(abs(a[0] - b[0]), abs=1e-9)
        assert np.sign(value) == np.sign(b[0] - a[0] if "Δ" in column else a[0] - b[0])
        assert half < np.hypot(a[1], b[1])  # the differences vary less than the languages


def test_a_finished_run_is_not_taken_up_again(markov_run):
    config = parse(*MARKOV)
    saved, root = harness.as_saved(config), markov_run.parents[1]
    assert not open_run(root, "adapt_languages", "smoke", saved).resumed


def test_a_run_that_was_stopped_goes_on_to_the_same_results(markov_run, tmp_path, monkeypatch):
    """SIGTERM while the second row trains; the same command again."""
    asked = []

    def markov_with_a_signal(config):
        family = real(config)

        def sample(key, num_tasks):
            asked.append(key)
            if len(asked) == 6 + 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return family.train.sample(key, num_tasks)

        return family._replace(train=family.train._replace(sample=sample))

    real = languages.markov
    monkeypatch.setattr(languages, "markov", markov_with_a_signal)
    with pytest.raises(Interrupted) as stop:
        run_in(tmp_path, MARKOV)
    assert stop.value.code == 128 + signal.SIGTERM
    (directory,) = tmp_path.glob("adapt_languages/*")
    assert ("Meta-SGD", "0 steps") not in cells(directory) and (ROWS[0], "0 steps") in cells(
        directory
    )
    assert not (directory / "table.md").exists()
    before = read_json_lines(directory / "results.jsonl")
    trained = [
        x["step"] for x in read_json_lines(directory / "metrics.jsonl") if x["name"] == "Meta-SGD"
    ]
    assert 0 < len(trained) < 6

    main(*MARKOV, "--root", str(tmp_path))
    assert list(tmp_path.glob("adapt_languages/*")) == [directory]
    assert cells(directory) == cells(markov_run)
    after = read_json_lines(directory / "results.jsonl")
    assert after[: len(before)] == before  # with their seconds: the first row is not run again


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven domains, each of words of its own."""
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path / "data"))
    path = tmp_path / "some domains"
    path.mkdir()
    for i in range(7):
        rng = np.random.default_rng(i)
        words = [rng.choice(list(b"abcdefgh"), 5).tobytes()[::8] for _ in range(4)]
        (path / f"domain {i}.txt").write_bytes(b" ".join(rng.choice(words, 400)))
    return path


def test_text_is_measured_in_bits_a_byte(folder, tmp_path):
    directory = run_in(tmp_path, [*TEXT, "--folder", str(folder)])
    records = {(r["row"], r["column"]): r for r in read_json_lines(directory / "results.jsonl")}
    assert {r["unit"] for r in records.values()} == {"bits/byte"}
    assert {r["n"] for r in records.values()} == {3}
    assert set(records) == {("MAML", "0 steps"), ("MAML", "1 step")}  # no Bayes limit
    start = records["MAML", "0 steps"]["value"]
    assert 7 < start < 9  # 256 bytes, after hardly any training
    assert records["MAML", "1 step"]["value"] < start
    assert "for domain " in (directory / "samples.md").read_text()


def test_a_run_on_own_text_says_what_its_data_are(folder, tmp_path, capsys):
    (folder / "tiny.txt").write_bytes(b"too short")
    flags = ["--folder", str(folder), "--skip-small", "--test-domains", "domain 3.txt"]
    directory = run_in(tmp_path, [*TEXT, *flags])
    summary = (directory / "data.md").read_text()
    assert "| test | domain 3.txt | 2,399 |" in summary and summary.count("| test |") == 1
    assert "| left out: shorter than an episode of 36 bytes | tiny.txt | 9 |" in summary
    shown = capsys.readouterr().err
    assert "test: 1 domains, 2,399 bytes: domain 3.txt" in shown
    assert "left out as too short: 1 domains: tiny.txt" in shown
    assert {r["n"] for r in read_json_lines(directory / "results.jsonl")} == {1}


def test_folds_judge_every_domain_once_and_pool_them_over_kin(folder, tmp_path):
    (tmp_path / "kin").write_text("")
    (folder / "domain 6.txt").rename(folder / "six.txt")
    (folder / "domain 5.txt").rename(folder / "five.txt")
    (tmp_path / "kin").write_text("five.txt six.txt\n")
    sizes = "--num-folds 2 --num-valid-domains 1 --comparison.test-episodes 16"
    rows = ["--rows", "joint pretraining", "joint pretraining, equal operations", "MAML"]
    flags = [*TEXT, "--folder", str(folder), "--kin", str(tmp_path / "kin"), *sizes.split(), *rows]
    directory = run_in(tmp_path, flags)
    summary = (directory / "data.md").read_text()
    assert summary.count("| test |") == 7 and summary.count("| test | five.txt |") == 1
    found = read_json_lines(directory / "results.jsonl")
    in_table = [r for r in found if r["table"] == "adapt_languages/text"]
    records = {(r["row"], r["column"]): r for r in in_table}
    assert {r["n"] for r in records.values()} == {7}
    kept = {}
    for path in (directory / "rows").iterdir():
        with np.load(path) as arrays:
            kept[path.stem] = arrays["nats"] / np.log(2)
    _, joint, maml = (kept[name] for name in sorted(kept))
    assert maml.shape == (32, 2)
    gain = records["MAML", "Δ 1 step"]  # on the row that spends as much
    assert gain["value"] == pytest.approx((joint - maml)[:, 1].mean(), abs=1e-2)
    assert ("joint pretraining", "Δ 1 step") in records
    of_domains = {(r["row"], r["column"]): r for r in found if r["table"].endswith("/domains")}
    assert len({row for row, _ in of_domains}) == 7
    assert {column for _, column in of_domains} == {
        "joint pretraining, equal operations",
        "gain of joint pretraining",
        "gain of MAML",
    }
    gains = [r["value"] for (_, column), r in of_domains.items() if column == "gain of MAML"]
    assert np.mean(gains) == pytest.approx((joint - maml)[:, 1].mean(), abs=1e-2)
    assert (directory / "fold-1" / "checkpoints").is_dir()
    assert metaopt.load(directory, "MAML").row == "MAML"


def test_tokens_of_several_bytes_are_measured_in_bits_a_byte(folder, tmp_path):
    pytest.importorskip("tokenizers")
    directory = run_in(tmp_path, [*TEXT, "--folder", str(folder), "--tokenizer", "bpe:260"])
    config = parse(*TEXT, "--folder", str(folder), "--tokenizer", "bpe:260")
    with np.load(*(directory / "rows").iterdir()) as kept:
        nats = kept["nats"][:, 0]
    key = jax.random.split(jax.random.key(1234))[1]  # of the test episodes
    targets = languages.make_family(config).test.sample(key, len(nats)).query.targets
    codec = languages.make_codec(config)
    sizes = np.array([sum(len(codec.decode(s)) for s in episode) for episode in targets])
    assert (sizes > targets[0].size).any()  # of some tokens that are more than a byte
    bits = nats * targets[0].size / np.log(2) / sizes
    assert cells(directory)["MAML", "0 steps"][0] == pytest.approx(bits.mean(), abs=0.05)
    shutil.rmtree(folder)
    found = metaopt.load(directory)  # with the tokenizer that the run kept
    assert found.codec.vocab_size == 260 and found.codec.decode([256]) == codec.decode([256])


CIPHERS = shlex.split(
    f"--preset smoke --tasks ciphers {SIZES} --model bigram --rows 'joint pretraining' MAML "
    "--inner.num-steps 1 --comparison.max-inner-steps 1 --comparison.inner-rates 0.3 1 "
    "--comparison.test-episodes 12"
)


def test_ciphers_are_measured_between_the_unigram_entropy_and_the_plain_text(tmp_path):
    directory = run_in(tmp_path, CIPHERS)
    found = cells(directory)
    names = ["unigram entropy", "n-gram with the key", "frequency analysis", "hill climbing"]
    rows = [*dict.fromkeys(row for row, _ in found)]
    assert rows == ["joint pretraining", "MAML", *names, "plain text, same model"]
    assert found["unigram entropy", "cracked"][0] == pytest.approx(0, abs=1e-9)
    assert found["plain text, same model", "cracked"][0] == pytest.approx(100)
    unigram, plain = (found[name, "1 step"][0] for name in (names[0], rows[-1]))
    share = 100 * (unigram - found["MAML", "1 step"][0]) / (unigram - plain)
    assert found["MAML", "cracked"][0] == pytest.approx(share)
    assert found["hill climbing", "0 steps"][0] is None  # which needs a support
    assert found["n-gram with the key", "1 step"][0] < unigram
    assert "read with the key:" in (directory / "samples.md").read_text()


def test_only_the_default_table_is_followed_by_that_of_a_transformer():
    def shown(*args):
        return [(part.tasks, part.model) for part in adapt_languages.parts(parse(*args))]

    both = [("markov", "bigram"), ("markov-symmetric", "transformer")]
    assert shown() == shown("--comparison.seed", "3") == both
    assert shown("--no-then-transformer") == shown("--rows", "MAML") == both[:1]
    assert shown("--tasks", "markov-symmetric") == [("markov-symmetric", "bigram")]
    second = adapt_languages.parts(parse("--seeds", "1", "2", "--run-dir", "here"))[1]
    assert second.seeds == (1, 2) and second.run_dir == "here/transformer"
    assert second.rows == ("joint pretraining", "MAML")


def test_the_standard_library_gives_three_disjoint_splits(monkeypatch):
    monkeypatch.setattr(text_sources, "has_tfds", lambda: False)  # read in place
    config = parse("--tasks", "stdlib")
    family = adapt_languages.make_family(config)
    names = [split.task_names for split in (family.train, family.valid, family.test)]
    assert len(set().union(*names)) == sum(map(len, names))
    assert len(names[1]) == config.num_valid_domains and len(names[2]) == config.num_test_domains
    assert len(names[0]) > 8
    episode = family.test.sample(jax.random.key(0), 2)
    assert episode.query.inputs.shape == (2, config.num_query, config.length)


def test_help_names_every_preset_and_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr()
    assert not stop.value.code and not shown.err

    def flags(config, prefix="--"):
        for field in dataclasses.fields(config):
            name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
            yield from flags(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]

    for word in (*flags(adapt_languages.presets()), "{smoke,cpu,gpu}"):
        assert word in shown.out, word


def flags_of(line):
    return {word for word in shlex.split(line) if word.startswith("--")}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--preset gpu --tasks stdlib",
        "--preset smoke --model lstm --rows 'joint pretraining' Meta-SGD",
        '--tasks text --folder "it\'s $HOME" --model bigram --outer.weight-decay 1e-05',
        "--inner.no-unroll --inner.remat --inner.query-loss mean --comparison.inner-rates 0.5 1",
        "--tasks tfds:ag_news_subset:1.0.0 --root 'my runs' --run-dir mine --rows ANIL",
    ],
)
def test_the_command_of_a_config_gives_that_config(line):
    config = parse(*shlex.split(line))
    command = harness.command("adapt_languages", config, adapt_languages.presets)
    prefix = "python -m experiments.adapt_languages"
    assert command.startswith(prefix) and flags_of(command) == flags_of(line)
    assert parse(*shlex.split(command.removeprefix(prefix))) == config


WRONG = [
    ("--preset huge", "unknown preset 'huge': choose smoke, cpu or gpu"),
    (
        "--tasks novels",
        "unknown tasks 'novels': markov, markov-symmetric, ciphers, text, stdlib, tfds:NAME or",
    ),
    ("--tasks text", "needs --folder"),
    ("--tasks text --folder nowhere", "'nowhere' is no folder"),
    ("--tasks text --folder empty", "folder empty is empty"),
    ("--tasks text --folder nested", "nested/inner is not a file"),
    ("--tasks text --folder short", "domain 'a' has 9 bytes"),
    ("--tasks text --folder few", "few has 2 domains, too few"),
    ("--tasks text --folder few --test-domains c", "no domain 'c' in few: there is 'a', 'b'"),
    ("--num-folds 4", "num_folds is for tasks of text"),
    ("--tasks stdlib --num-folds 4 --tokenizer bpe:300", "num_folds takes one seed, and bytes"),
    ("--tasks stdlib --tokenizer nowhere.json", "nowhere.json"),
    ("--tasks stdlib --tokenizer bpe:100", "a tokenizer of 100 tokens: it takes at least 257"),
    ("--folder few", "--folder is for --tasks text or ciphers, not markov"),
    ("--tasks ciphers --folder few", "few has 2 books, too few for 3 to validate, 6 to test"),
    ("--model mamba", "unknown model 'mamba': choose one of bigram, rnn, gru"),
    ("--model transformer --num-heads 3", "not divisible by num_heads 3"),
    ("--model lstm --width 0", "--width is 0; it must be a whole number from 1 to 65536"),
    ("--rows MAML 'Meta SGD'", "no row 'Meta SGD'; there are random init, joint pretraining"),
    ("--inner.batching split --rows MAML", "4 support examples cannot be split into 5"),
    ("--inner.batching split --num-support 5 --rows MAML Reptile", "reptile: 13 support examples"),
    ("--comparison.max-inner-steps 4", "5 inner steps and evaluation only 4"),
    ("--comparison.tasks-per-step 6", "6 tasks does not divide by 4 devices"),
    ("--comparison.tasks-at-a-time 3", "cannot be taken 3 at a time"),
    ("--comparison.num-devices 5", "5 devices were asked for and 4 are here"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_before_anything_is_compiled_or_made(
    line, words, tmp_path, monkeypatch, capsys, caplog
):
    def too_late(*args, **kwargs):
        raise AssertionError("not refused")

    monkeypatch.setattr(harness, "open_run", too_late)
    monkeypatch.chdir(tmp_path)
    for name, domains in {"empty": [], "short": "abc", "few": "ab"}.items():
        (tmp_path / name).mkdir()
        for domain in domains:
            size = 9 if name == "short" else 9999
            (tmp_path / name / domain).write_bytes(b"a" * size)
    (tmp_path / "nested" / "inner").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    with jax.log_compiles(), pytest.raises(SystemExit) as stop:
        main(*shlex.split(line))
    *phases, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert error.startswith("error: ") and words in error
    assert all(phase.startswith(("preparing", "reading")) for phase in phases)
    assert "Compiling" not in caplog.text and set(tmp_path.rglob("*")) == before


def test_the_directory_of_another_config_is_left_alone(markov_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in markov_run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(*MARKOV, "--run-dir", str(markov_run), "--comparison.seed", "1")
    *phases, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert set(phases) <= {"preparing: data, models and their sizes"}
    assert "is a run of another config (comparison.seed: 0 saved, 1 now)" in error
    assert {path: path.stat().st_mtime_ns for path in markov_run.rglob("*")} == before


def test_a_row_of_several_seeds_is_their_mean_with_an_interval_over_tasks(tmp_path):
    config = parse(*MARKOV, "--comparison.max-inner-steps", "2", "--root", str(tmp_path))
    table = harness.TableRun(
        "adapt_languages",
        config,
        adapt_languages.presets,
        table="toy",
        unit="nats/token",
        seeds=(3, 5),
    )
    without_limits = dataclasses.replace(config, tasks="of_my_own:family")
    test = Episode(None, None, np.repeat(np.arange(8), 2))  # type: ignore[arg-type]
    comparison = SimpleNamespace(test=test)
    study = Study(table, without_limits, comparison)  # type: ignore[arg-type]
    curves = np.random.default_rng(0).uniform(1, 2, size=(2, 2, 16, 3))  # [row, seed, E, steps]
    for name, of_row in zip(("joint pretraining", "MAML"), curves, strict=True):
        row, rates = Row(name, learners.maml(), None), np.full(3, 0.1)
        results = [RowResult(row, {"params": {}}, {}, of_seed, rates, 1.0) for of_seed in of_row]
        add_row(study, name, results)
    records = {(r["row"], r["column"]): r for r in table.records}
    means = curves.mean(axis=1)[..., 1].reshape(2, 8, 2).mean(axis=2)  # over seeds, then episodes
    for record, values in [
        (records["MAML", "1 step"], means[1]),
        (records["MAML", "Δ 1 step"], means[0] - means[1]),  # paired
    ]:
        expected = interval(values, np.arange(8))
        assert (record["value"], record["ci95"]) == pytest.approx(expected[:2])
        assert record["seeds"] == [3, 5] and record["n"] == 8


def test_a_folder_that_changed_makes_another_run(folder):
    args = [*TEXT, "--folder", str(folder)]
    before = languages.digest(parse(*args))
    assert before == languages.digest(parse(*args)) and languages.digest(parse()) is None
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[::-1])
    assert languages.digest(parse(*args)) != before


def test_help_shows_the_defaults_of_the_chosen_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset", "gpu", "--tasks", "stdlib", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(default: 512)" in text and "(default: gpu)" in text
