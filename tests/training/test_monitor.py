import dataclasses
import json
import math
import random
import statistics

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.resources import MemoryUse
from metaopt.training.monitor import (
    CLEAR_CHECKS,
    HISTORY,
    MEMORY_INTERVAL,
    MIN_HISTORY,
    PLATEAU_WINDOW,
    WINDOW,
    History,
    Latch,
    Monitor,
    MonitorConfig,
    plateau,
)

CONFIG = MonitorConfig()
EVERY_STEP = MonitorConfig(seconds_between_lines=0.0)


def enough_memory():
    return MemoryUse(host=1 << 30, host_limit=4 << 30, device=1 << 30, device_limit=2 << 30)


def monitor(config=EVERY_STEP, **options):
    return Monitor(config, **{"tokens_per_step": 512, "read_memory": enough_memory} | options)


def silent(config=CONFIG, **options):
    """One that writes nothing; a step is one token."""
    return monitor(config, tokens_per_step=1, **options)


def lines(directory, kind="step"):
    return [x for x in read_json_lines(directory / "monitor.jsonl") if x["kind"] == kind]


def test_rates_follow_from_the_time_of_a_step(tmp_path):
    with monitor(flops_per_step=1e9, peak_flops=1e10, directory=tmp_path, num_steps=7) as m:
        m.observe(1, {"loss": 2.0, "step_seconds": 0.5, "collective_seconds": 0.1})
        m.observe(2, {"loss": 1.0})
    first, second = lines(tmp_path)
    assert first["tokens_per_second"] == 1024 and first["flops_per_second"] == 2e9
    assert first["utilisation"] == pytest.approx(0.2) and first["collective_seconds"] == 0.1
    assert (first["name"], first["step"], first["steps"], first["num_steps"]) == ("train", 1, 1, 7)
    assert (first["host"], first["device"], first["memory_share"]) == (1 << 30, 1 << 30, 0.5)
    assert second["loss"] == 1.0 and "tokens_per_second" not in second


def test_what_is_not_known_is_left_out(tmp_path):
    with monitor(directory=tmp_path) as m:
        assert m.observe(1, {}) == []
        assert m.observe(2, {"step_seconds": 0.1}) == []
        assert m.observe(3, {"data_seconds": 0.1}) == []
        assert m.observe(4, {"step_seconds": 0.0}) == []
    assert all("utilisation" not in line and "loss" not in line for line in lines(tmp_path))


def test_a_line_is_the_mean_over_its_steps(tmp_path):
    with monitor(MonitorConfig(seconds_between_lines=1e9), directory=tmp_path) as m:
        for step in range(1, 5):
            m.observe(step, {"loss": float(step), "step_seconds": 0.1 * step})
        assert lines(tmp_path) == []  # it is not time yet
    (line,) = lines(tmp_path)
    assert (line["step"], line["steps"], line["loss"]) == (4, 4, 2.5)
    assert line["tokens_per_second"] == pytest.approx(4 * 512 / 1.0)  # tokens by seconds


def test_an_alarm_is_written_at_once_and_as_json(tmp_path):
    with monitor(MonitorConfig(seconds_between_lines=1e9), directory=tmp_path) as m:
        m.observe(1, {"loss": 2.0})
        (alarm,) = m.observe(2, {"loss": 1.0, "grad_norm": math.nan})
        assert alarm.kind == "nan" and m.active == ("nan",)
        text = (tmp_path / "monitor.jsonl").read_text()
    step, written = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert (step["loss"], step["grad_norm"], step["active"]) == (1.5, None, ["nan"])
    assert written["alarm"]["message"] == "grad_norm is nan" and written["alarm"]["value"] is None
    assert lines(tmp_path) == [step]  # nothing is left to write at the end


def test_memory_is_read_every_so_many_steps_and_pressure_is_noticed():
    used = {"device": 1 << 20}
    reads = []

    def read_memory():
        reads.append(1)
        return MemoryUse(host=1, host_limit=100, device=used["device"], device_limit=1 << 24)

    m = monitor(read_memory=read_memory)
    for step in range(1, 101):
        assert m.observe(step, {"loss": 1.0}) == []
    assert len(reads) == 100 / MEMORY_INTERVAL
    used["device"] = int(0.95 * (1 << 24))
    found = [(a.kind, a.step) for step in (101, 102) for a in m.observe(step, {"loss": 1.0})]
    assert found == [("memory", 101)]


def test_faults_are_noticed_within_two_steps():
    def observe(step, **fault):
        values = {"loss": 2 + random.Random(step).gauss(0, 0.1), "step_seconds": 0.01}
        return m.observe(step, values | {"data_seconds": 0.001} | fault)

    faults = {
        "nan": {"grad_norm": math.inf},
        "divergence": {"loss": 2000.0},
        "starved": {"data_seconds": 3.0, "step_seconds": 3.01},
    }
    for kind, fault in faults.items():
        m = monitor()
        assert [a for step in range(1, 300) for a in observe(step)] == []
        assert kind in [a.kind for step in (300, 301) for a in observe(step, **fault)]


def test_a_roll_back_is_noted_and_the_loss_is_judged_by_the_good_past(tmp_path):
    with monitor(directory=tmp_path) as m:
        for step in range(1, 101):
            m.observe(step, {"loss": 2.0})
        raised = [a.kind for step in range(101, 110) for a in m.observe(step, {"loss": 90.0})]
        assert raised == ["divergence"]
        m.discard_after(100)
        assert m.active == ()
        assert [a for step in range(101, 130) for a in m.observe(step, {"loss": 2.0})] == []
        assert [a.kind for a in m.observe(130, {"loss": 90.0})] == ["divergence"]
    (note,) = lines(tmp_path, "forget")
    assert (note["step"], note["active"]) == (100, [])


def test_other_work_changes_the_rates(tmp_path):
    with monitor(directory=tmp_path, flops_per_step=1e9) as m:
        for step in range(1, 60):
            m.observe(step, {"step_seconds": 0.1})
        m.reset_speed(2048, 4e9)
        found = [a for step in range(60, 120) for a in m.observe(step, {"step_seconds": 0.5})]
    assert found == [] and lines(tmp_path)[-1]["tokens_per_second"] == pytest.approx(4096)
    assert lines(tmp_path)[-1]["flops_per_second"] == pytest.approx(8e9)


def test_going_on_drops_what_came_later(tmp_path):
    for name in ("a", "b"):
        with monitor(directory=tmp_path, name=name) as m:
            for step in range(1, 6):
                m.observe(step, {"loss": 1.0})
    with monitor(directory=tmp_path, name="a", start=3) as m:
        m.observe(4, {"loss": 2.0})
    found = [(x["name"], x["step"], x["loss"]) for x in lines(tmp_path)]
    kept = [("a", s, 1.0) for s in (1, 2, 3)] + [("b", s, 1.0) for s in range(1, 6)]
    assert sorted(found) == sorted([*kept, ("a", 4, 2.0)])


def test_nothing_is_kept_that_grows_with_the_run():
    def size(value, seen):
        if id(value) in seen or not hasattr(value, "__dict__"):
            values = value.values() if isinstance(value, dict) else value
            is_container = isinstance(value, (dict, list, tuple)) or hasattr(value, "maxlen")
            return sum(1 + size(x, seen) for x in values) if is_container else 0
        seen.add(id(value))
        return size(vars(value), seen)

    m, sizes = monitor(MonitorConfig(seconds_between_lines=1e9)), []
    for step in range(1, 4001):
        m.observe(step, {"loss": 2.0 + step % 7, "step_seconds": 0.01, "data_seconds": 0.001})
        if step in (1000, 4000):
            sizes.append(size(m, set()))
    assert sizes[0] == sizes[1] > 1000


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with monitor(directory=tmp_path) as m:
        assert [a.kind for a in m.observe(1, {"loss": math.nan})] == ["nan"]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same(tmp_path):
    with monitor(directory=tmp_path, name="Meta-SGD") as m:
        m.observe(1, {"loss": 2.5, "grad_norm": math.nan})
    (path,) = (tmp_path / "tensorboard" / "meta-sgd-monitor").iterdir()
    points = {}
    for event in events(path.read_bytes()):
        points |= {value.tag: value.simple_value for value in event.summary.value}
    assert points["monitor/loss"] == 2.5 and points["alarm/nan"] == 1.0
    assert "monitor/grad_norm" not in points


def events(data):
    """TFRecords: 8 bytes of length and 4 of check sum, the record, 4 of check sum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def feed(alarms, steps, **series):
    """Every alarm of these steps; a value is a number or a function of the step."""
    found = []
    for step in steps:
        values = {k: v(step) if callable(v) else v for k, v in series.items()}
        found += alarms.observe(step, values)
    return found


def kinds(found):
    return [(alarm.kind, alarm.raised) for alarm in found]


def noisy_losses(seed, scale, num_steps=1000):
    """A power law with noise of several kinds, among them heavy tails."""
    rng = np.random.default_rng(seed)
    clean = 1.5 + 4.0 * np.arange(1, num_steps + 1) ** -0.5
    noise = {
        "normal": 1 + 0.1 * rng.standard_normal(num_steps),
        "log-normal": np.exp(0.4 * rng.standard_normal(num_steps)),
        "few outliers": 1 + 0.5 * (rng.random(num_steps) < 0.01),
        "none": np.ones(num_steps),
    }[scale]
    return clean * noise


@pytest.mark.parametrize("noise", ["normal", "log-normal", "few outliers", "none"])
def test_a_normal_noisy_run_raises_nothing(noise):
    for seed in range(10):
        losses = noisy_losses(seed, noise)
        rng = random.Random(seed)
        share = 0.5
        alarms = silent(read_memory=lambda: MemoryUse(round(1000 * share), 1000))  # noqa: B023
        found = []
        for step, loss in enumerate(losses, start=1):
            seconds = rng.lognormvariate(0, 0.3)
            values = {
                "loss": float(loss),
                "grad_norm": rng.lognormvariate(0, 1),
                "step_seconds": seconds,
                "data_seconds": seconds * 0.4 * rng.random(),
                "utilisation": 0.1 / seconds,
            }
            share = 0.5 + 0.2 * rng.random()
            found += alarms.observe(step, values)
        assert [a for a in found if a.kind != "plateau"] == []


def test_no_plateau_while_the_loss_improves_beyond_noise():
    for seed in range(5):
        rng = random.Random(seed)
        line = feed(silent(), range(1500), loss=lambda s, r=rng: 5 - 2e-3 * s + r.gauss(0, 0.2))
        assert line == []
        flat = feed(silent(), range(1500), loss=lambda s, r=rng: 2 + r.gauss(0, 0.2))
        assert kinds(flat)[:1] == [("plateau", True)]


def test_a_plateau_ends_when_the_loss_falls_again():
    rng = random.Random(0)

    def falling(s):
        return (2 if s < 600 else 2 - 2e-3 * (s - 600)) + rng.gauss(0, 0.05)

    found = feed(silent(), range(1200), loss=falling)
    assert kinds(found) == [("plateau", True), ("plateau", False)]
    assert found[0].step >= PLATEAU_WINDOW and found[1].step > 600


def test_the_t_statistic_of_a_plateau_in_closed_form():
    before, after = [3.0, 1.0, 3.0, 1.0], [2.0, 0.0, 2.0, 0.0]
    reading = plateau(after[::-1] + before[::-1], CONFIG)
    assert reading.value == pytest.approx(1 / math.sqrt(1 / 4 + 1 / 4))
    assert reading.score == pytest.approx(CONFIG.plateau_errors / reading.value)
    assert plateau(before + after, CONFIG).score == math.inf  # it rose
    assert plateau([1.0] * 8, CONFIG).score == math.inf
    assert plateau([1.0] * 4 + [2.0] * 4, CONFIG).score == 0.0


def sgd_losses(fault, num_steps, rng, rate=0.05, factor=1000.0):
    """Minibatch losses of linear regression by SGD; the rate is ``factor`` times from ``fault``."""
    w, target = np.zeros(8), rng.standard_normal(8)
    for step in range(1, num_steps + 1):
        x = rng.standard_normal((16, 8))
        error = x @ (w - target) + 0.3 * rng.standard_normal(16)
        yield float((error**2).mean())
        w = w - rate * (factor if step >= fault else 1.0) * 2 * x.T @ error / 16


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fault", [4, 50, 700])
def test_a_rate_a_thousand_times_too_large_is_noticed_within_two_steps(seed, fault):
    alarms, rng = silent(), np.random.default_rng(seed)
    losses = enumerate(sgd_losses(fault, fault + 3, rng), start=1)
    first = next(
        a for s, x in losses for a in alarms.observe(s, {"loss": x}) if a.kind != "plateau"
    )
    assert first.kind == "divergence" and fault < first.step <= fault + 2
    assert first.value > first.limit


def test_a_slow_divergence_is_noticed_though_the_recent_past_follows_it():
    alarms = silent()
    found = feed(alarms, range(300), loss=lambda s: 2.0 * 1.003 ** max(0, s - 100))
    assert kinds(found) == [("divergence", True)]
    assert found[0].value == pytest.approx(3.0, rel=0.02)  # 1.5 times the best median


@pytest.mark.parametrize("name", ["loss", "grad_norm", "inner_loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_noticed_at_once_and_is_no_part_of_the_past(name, bad):
    alarms = silent()
    assert kinds(alarms.observe(1, {"loss": 2.0, name: bad})) == [("nan", True)]
    assert alarms.active == ("nan",)
    found = feed(alarms, range(2, 20), loss=2.0)
    assert kinds(found) == [("nan", False)] and found[0].step == 1 + CLEAR_CHECKS


def test_one_outlier_is_no_divergence_and_two_are():
    alarms = silent()
    feed(alarms, range(50), loss=2.0)
    assert feed(alarms, [50, 51, 52], loss=lambda s: 4.0 if s == 51 else 2.0) == []
    assert kinds(feed(alarms, [53, 54], loss=4.0)) == [("divergence", True)]
    assert kinds(feed(alarms, range(55, 70), loss=2.0)) == [("divergence", False)]


def test_a_loss_of_zero_may_round():
    assert feed(silent(), range(100), loss=lambda s: 0.0 if s < 50 else 1e-7) == []


def test_hysteresis():
    latch, cleared = Latch("divergence"), [0.7] * CLEAR_CHECKS
    scores = [1.1, 0.9, 1.1, 1.1, 0.9, 0.79, *cleared[2:], 0.85, *cleared, 11.0]
    flips = [step for step, score in enumerate(scores) if latch.update(step, score)]
    assert flips == [3, len(scores) - 2, len(scores) - 1] and latch.raised_at == len(scores) - 1


@pytest.mark.parametrize("stall", [0.02, 5.0])
def test_a_stalled_loader_is_noticed_within_two_steps(stall):
    alarms = silent()

    def data(s):
        return stall if s >= 100 else 0.001

    found = feed(
        alarms,
        range(110),
        data_seconds=data,
        step_seconds=lambda s: 0.01 + data(s),
    )
    (alarm,) = [a for a in found if a.kind == "starved"]
    assert alarm.step == 101
    assert alarm.value == pytest.approx(stall / (stall + 0.01))


def test_memory_pressure_is_noticed_at_the_first_reading_and_has_two_thresholds():
    shares = iter([0.5] * 10 + [0.95] * 10 + [0.75] * 20 + [0.5] * 10)
    alarms = silent(read_memory=lambda: MemoryUse(round(100 * next(shares)), 100))
    found = feed(alarms, range(40 * MEMORY_INTERVAL))
    assert kinds(found) == [("memory", True)] and found[0].step == 10 * MEMORY_INTERVAL
    rest = range(40 * MEMORY_INTERVAL, 50 * MEMORY_INTERVAL)
    assert kinds(feed(alarms, rest)) == [("memory", False)]


def test_a_slow_down_is_against_the_best_there_was():
    alarms = silent()
    found = feed(alarms, range(400), step_seconds=lambda s: 1.0 if s < 100 else 1.6)
    assert kinds(found) == [("slow", True)] and 100 < found[0].step <= 100 + 2 * WINDOW
    assert found[0].limit == pytest.approx(1.5)

    # The first step compiles, and the machine may be busy for a moment.
    def seconds(s):
        return 100.0 if s == 0 else 5.0 if s % 50 == 0 else 1.0

    assert feed(silent(), range(400), step_seconds=seconds) == []


def test_idle_devices():
    alarms = silent()
    assert kinds(feed(alarms, range(100), utilisation=0.005)) == [("idle", True)]
    assert kinds(feed(alarms, range(100, 300), utilisation=0.2)) == [("idle", False)]


def test_the_best_summary_is_the_lowest_median_of_a_window():
    history, rng = History(), random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(300)]
    medians = []
    for step, value in enumerate(values):
        if history.push(step, value):
            window = values[max(0, step + 1 - WINDOW) : step + 1]
            medians.append(statistics.median(window))
            assert history.summaries[-1].spread == max(window) - medians[-1]
    assert history.best.median == min(medians)
    assert len(medians) == pytest.approx(300 / MIN_HISTORY, abs=1)


def test_what_is_remembered_is_bounded():
    history = History()
    for step in range(5000):
        history.push(step, float(step))
    assert len(history.values) == HISTORY
    assert len(history.summaries) == HISTORY / MIN_HISTORY
    assert history.best.median > 5000 - 1.1 * HISTORY - WINDOW


def test_after_a_roll_back_all_goes_on_as_if_nothing_had_been():
    def values(step, bad=False):
        rng = random.Random(step)
        return {
            "loss": (100.0 if bad else 2.0) + rng.gauss(0, 0.1),
            "step_seconds": 10.0 if bad else rng.lognormvariate(0, 0.1),
            "data_seconds": 9.0 if bad else 0.1,
            "utilisation": 0.001 if bad else 0.1,
        }

    rolled_back, plain = silent(), silent()
    for step in range(301):
        rolled_back.observe(step, values(step))
        plain.observe(step, values(step))
    wrong = [a.kind for s in range(301, 380) for a in rolled_back.observe(s, values(s, bad=True))]
    assert set(wrong) == {"divergence", "slow", "starved"}  # idle, since it waits
    rolled_back.discard_after(300)
    assert rolled_back.active == ()
    for step in range(301, 700):
        assert rolled_back.observe(step, values(step)) == plain.observe(step, values(step))


@pytest.mark.parametrize("good", range(20))
def test_a_roll_back_to_the_first_steps(good):
    losses = noisy_losses(0, "normal", 60)
    rolled_back, plain = History(), History()
    for step in range(good + 12):
        rolled_back.push(step, losses[step] if step <= good else 99.0)
    rolled_back.discard_after(good)
    for step, loss in enumerate(losses):
        plain.push(step, loss)
        if step > good:
            rolled_back.push(step, loss)
        if step >= good:
            assert rolled_back.summaries == plain.summaries


def test_an_alarm_from_before_a_roll_back_stays():
    alarms = silent(read_memory=lambda: MemoryUse(95, 100))
    feed(alarms, range(50), loss=2.0)
    feed(alarms, range(50, 60), loss=50.0)
    assert set(alarms.active) == {"memory", "divergence"}
    alarms.discard_after(49)
    assert alarms.active == ("memory",)


def test_other_work_has_other_times():
    alarms = silent()
    feed(alarms, range(100), step_seconds=1.0, loss=2.0)
    alarms.reset_speed(1)
    assert feed(alarms, range(100, 200), step_seconds=3.0) == []
    assert kinds(feed(alarms, [200, 201], loss=30.0)) == [("divergence", True)]


@pytest.mark.parametrize(
    "field, value",
    [
        ("memory_share", 1.0),
        ("starved_share", 1.5),
        ("divergence_factor", 1.0),
        ("plateau_errors", 0.0),
        ("slow_factor", math.nan),
        ("seconds_between_lines", -1.0),
    ],
)
def test_thresholds_that_make_no_sense(field, value):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_one_batch_that_is_waited_for_is_no_alarm():
    def data(s):
        return 5.0 if s == 100 else 0.001

    found = feed(silent(), range(150), data_seconds=data, step_seconds=lambda s: 0.03 + data(s))
    assert found == []
