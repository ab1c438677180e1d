import dataclasses
import math
import random
import statistics

import numpy as np
import pytest

from metaopt.errors import UserError
from metaopt.self_improvement import monitor
from metaopt.self_improvement.monitor import Alarms, History, Latch, MonitorConfig

CONFIG = MonitorConfig()


def feed(alarms, steps, **series):
    """Every alarm of these steps; a value is a number or a function of the step."""
    found = []
    for step in steps:
        values = {k: v(step) if callable(v) else v for k, v in series.items()}
        found += alarms.update(step, values)
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
        alarms = Alarms(CONFIG)
        found = []
        for step, loss in enumerate(losses, start=1):
            seconds = rng.lognormvariate(0, 0.3)
            found += alarms.update(
                step,
                {
                    "loss": float(loss),
                    "grad_norm": rng.lognormvariate(0, 1),
                    "step_seconds": seconds,
                    "data_seconds": seconds * 0.4 * rng.random(),
                    "seconds_per_token": seconds,
                    "utilisation": 0.1 / seconds,
                    "memory_share": 0.5 + 0.2 * rng.random(),
                },
            )
        assert [a for a in found if a.kind != "plateau"] == []


def test_no_plateau_while_the_loss_improves_beyond_noise():
    for seed in range(5):
        rng = random.Random(seed)
        line = feed(
            Alarms(CONFIG), range(1500), loss=lambda s, r=rng: 5 - 2e-3 * s + r.gauss(0, 0.2)
        )
        assert line == []
        flat = feed(Alarms(CONFIG), range(1500), loss=lambda s, r=rng: 2 + r.gauss(0, 0.2))
        assert kinds(flat)[:1] == [("plateau", True)]


def test_a_plateau_ends_when_the_loss_falls_again():
    rng = random.Random(0)

    def falling(s):
        return (2 if s < 600 else 2 - 2e-3 * (s - 600)) + rng.gauss(0, 0.05)

    found = feed(Alarms(CONFIG), range(1200), loss=falling)
    assert kinds(found) == [("plateau", True), ("plateau", False)]
    assert found[0].step >= CONFIG.plateau_window and found[1].step > 600


def test_the_t_statistic_of_a_plateau_in_closed_form():
    before, after = [3.0, 1.0, 3.0, 1.0], [2.0, 0.0, 2.0, 0.0]
    reading = monitor.plateau(after[::-1] + before[::-1], CONFIG)
    assert reading.value == pytest.approx(1 / math.sqrt(1 / 4 + 1 / 4))
    assert reading.score == pytest.approx(CONFIG.plateau_errors / reading.value)
    assert monitor.plateau(before + after, CONFIG).score == math.inf  # it rose
    assert monitor.plateau([1.0] * 8, CONFIG).score == math.inf
    assert monitor.plateau([1.0] * 4 + [2.0] * 4, CONFIG).score == 0.0


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
    alarms, rng = Alarms(CONFIG), np.random.default_rng(seed)
    losses = enumerate(sgd_losses(fault, fault + 3, rng), start=1)
    first = next(a for s, x in losses for a in alarms.update(s, {"loss": x}) if a.kind != "plateau")
    assert first.kind == "divergence" and fault < first.step <= fault + 2
    assert first.value > first.limit


def test_a_slow_divergence_is_noticed_though_the_recent_past_follows_it():
    alarms = Alarms(CONFIG)
    found = feed(alarms, range(300), loss=lambda s: 2.0 * 1.003 ** max(0, s - 100))
    assert kinds(found) == [("divergence", True)]
    assert found[0].value == pytest.approx(3.0, rel=0.02)  # 1.5 times the best median


@pytest.mark.parametrize("name", ["loss", "grad_norm", "inner_loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_noticed_at_once_and_is_no_part_of_the_past(name, bad):
    alarms = Alarms(CONFIG)
    assert kinds(alarms.update(1, {"loss": 2.0, name: bad})) == [("nan", True)]
    assert alarms.active == ("nan",)
    found = feed(alarms, range(2, 20), loss=2.0)
    assert kinds(found) == [("nan", False)] and found[0].step == 1 + CONFIG.clear_looks


def test_one_outlier_is_no_divergence_and_two_are():
    alarms = Alarms(CONFIG)
    feed(alarms, range(50), loss=2.0)
    assert feed(alarms, [50, 51, 52], loss=lambda s: 4.0 if s == 51 else 2.0) == []
    assert kinds(feed(alarms, [53, 54], loss=4.0)) == [("divergence", True)]
    assert kinds(feed(alarms, range(55, 70), loss=2.0)) == [("divergence", False)]


def test_a_loss_of_zero_may_round():
    assert feed(Alarms(CONFIG), range(100), loss=lambda s: 0.0 if s < 50 else 1e-7) == []


def test_hysteresis():
    latch = Latch(looks=2, at_once=10, clear_share=0.8, clear_looks=3)
    scores = [1.1, 0.9, 1.1, 1.1, 0.9, 0.79, 0.7, 0.85, 0.7, 0.7, 0.7, 11.0]
    flips = [step for step, score in enumerate(scores) if latch.update(step, score)]
    assert flips == [3, 10, 11] and latch.raised_at == 11


@pytest.mark.parametrize("stall", [0.02, 5.0])
def test_a_stalled_loader_is_noticed_within_two_steps(stall):
    alarms = Alarms(CONFIG)

    def data(s):
        return stall if s >= 100 else 0.001

    found = feed(
        alarms,
        range(110),
        data_seconds=data,
        step_seconds=lambda s: 0.01 + data(s),
        seconds_per_token=lambda s: 0.01 + data(s),
    )
    (alarm,) = [a for a in found if a.kind == "starved"]
    assert alarm.step == (100 if stall > 1 else 101)
    assert alarm.value == pytest.approx(stall / (stall + 0.01))


def test_memory_pressure_is_noticed_at_the_first_reading_and_has_two_thresholds():
    alarms = Alarms(CONFIG)
    share = {**dict.fromkeys(range(10), 0.5), **dict.fromkeys(range(10, 20), 0.95)}
    found = feed(alarms, range(40), memory_share=lambda s: share.get(s, 0.75))
    assert kinds(found) == [("memory", True)] and found[0].step == 10
    assert kinds(feed(alarms, range(40, 50), memory_share=0.5)) == [("memory", False)]


def test_a_slow_down_is_against_the_best_there_was():
    alarms = Alarms(CONFIG)
    found = feed(alarms, range(400), seconds_per_token=lambda s: 1.0 if s < 100 else 1.6)
    assert kinds(found) == [("slow", True)] and 100 < found[0].step <= 100 + 2 * CONFIG.window
    assert found[0].limit == pytest.approx(1.5)

    # The first step compiles, and the machine may be busy for a moment.
    def seconds(s):
        return 100.0 if s == 0 else 5.0 if s % 50 == 0 else 1.0

    assert feed(Alarms(CONFIG), range(400), seconds_per_token=seconds) == []


def test_idle_devices():
    alarms = Alarms(CONFIG)
    assert kinds(feed(alarms, range(100), utilisation=0.005)) == [("idle", True)]
    assert kinds(feed(alarms, range(100, 300), utilisation=0.2)) == [("idle", False)]


def test_the_best_summary_is_the_lowest_median_of_a_window():
    history, rng = History(CONFIG), random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(300)]
    medians = []
    for step, value in enumerate(values):
        if history.push(step, value):
            window = values[max(0, step + 1 - CONFIG.window) : step + 1]
            medians.append(statistics.median(window))
            assert history.summaries[-1].spread == max(window) - medians[-1]
    assert history.best.median == min(medians)
    assert len(medians) == pytest.approx(300 / CONFIG.min_history, abs=1)


def test_what_is_remembered_is_bounded():
    history = History(CONFIG)
    for step in range(5000):
        history.push(step, float(step))
    assert len(history.values) == CONFIG.history
    assert len(history.summaries) == CONFIG.history / CONFIG.min_history
    assert history.best.median > 5000 - 1.1 * CONFIG.history - CONFIG.window


def test_after_a_roll_back_all_goes_on_as_if_nothing_had_been():
    def values(step, bad=False):
        rng = random.Random(step)
        return {
            "loss": (100.0 if bad else 2.0) + rng.gauss(0, 0.1),
            "step_seconds": 1.0 + (9 if bad else 0),
            "data_seconds": 9.0 if bad else 0.1,
            "seconds_per_token": 10.0 if bad else rng.lognormvariate(0, 0.1),
            "utilisation": 0.001 if bad else 0.1,
        }

    rolled_back, plain = Alarms(CONFIG), Alarms(CONFIG)
    for step in range(301):
        rolled_back.update(step, values(step))
        plain.update(step, values(step))
    wrong = [a.kind for s in range(301, 380) for a in rolled_back.update(s, values(s, bad=True))]
    assert set(wrong) == {"divergence", "slow", "starved", "idle"}
    rolled_back.forget_after(300)
    assert rolled_back.active == ()
    for step in range(301, 700):
        assert rolled_back.update(step, values(step)) == plain.update(step, values(step))


@pytest.mark.parametrize("good", range(20))
def test_a_roll_back_to_the_first_steps(good):
    losses = noisy_losses(0, "normal", 60)
    rolled_back, plain = History(CONFIG), History(CONFIG)
    for step in range(good + 12):
        rolled_back.push(step, losses[step] if step <= good else 99.0)
    rolled_back.forget_after(good)
    for step, loss in enumerate(losses):
        plain.push(step, loss)
        if step > good:
            rolled_back.push(step, loss)
        if step >= good:
            assert rolled_back.summaries == plain.summaries


def test_an_alarm_from_before_a_roll_back_stays():
    alarms = Alarms(CONFIG)
    feed(alarms, range(50), loss=2.0, memory_share=0.95)
    feed(alarms, range(50, 60), loss=50.0)
    assert set(alarms.active) == {"memory", "divergence"}
    alarms.forget_after(49)
    assert alarms.active == ("memory",)
    alarms.reset()
    assert alarms.active == ()


def test_other_work_has_other_times():
    alarms = Alarms(CONFIG)
    feed(alarms, range(100), seconds_per_token=1.0, loss=2.0)
    alarms.new_work()
    assert feed(alarms, range(100, 200), seconds_per_token=3.0) == []
    assert kinds(feed(alarms, [200, 201], loss=30.0)) == [("divergence", True)]


@pytest.mark.parametrize(
    "field, value",
    [
        ("window", 0),
        ("memory_share", 1.0),
        ("clear_share", 1.5),
        ("divergence_factor", 1.0),
        ("history", 100),
        ("slow_factor", math.nan),
    ],
)
def test_thresholds_that_make_no_sense(field, value):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(CONFIG, **{field: value})
