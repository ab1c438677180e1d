import json
import math
import random

import jax
import pytest
from tensorboardX.proto import event_pb2

from metaopt.files import read_json_lines
from metaopt.resources import MemoryUse
from metaopt.self_improvement.monitor import Alarms, Monitor, MonitorConfig

EVERY_STEP = MonitorConfig(seconds_between_lines=0.0)


def enough_memory():
    return MemoryUse(host=1 << 30, host_limit=4 << 30, device=1 << 30, device_limit=2 << 30)


def monitor(config=EVERY_STEP, **options):
    return Monitor(config, **{"tokens_per_step": 512, "read_memory": enough_memory} | options)


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

    m = monitor(MonitorConfig(memory_every=2), read_memory=read_memory)
    for step in range(1, 101):
        assert m.observe(step, {"loss": 1.0}) == []
    assert len(reads) == 50
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
        m.forget_after(100)
        assert m.active == ()
        assert [a for step in range(101, 130) for a in m.observe(step, {"loss": 2.0})] == []
        assert [a.kind for a in m.observe(130, {"loss": 90.0})] == ["divergence"]
    (note,) = lines(tmp_path, "forget")
    assert (note["step"], note["active"]) == (100, [])


def test_new_work_changes_the_rates(tmp_path):
    with monitor(directory=tmp_path, flops_per_step=1e9) as m:
        for step in range(1, 60):
            m.observe(step, {"step_seconds": 0.1})
        m.new_work(2048, 4e9)
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


def test_the_alarms_of_a_monitor_are_those_of_its_values():
    m, alone = monitor(), Alarms(EVERY_STEP)
    for step in range(1, 100):
        loss = 2.0 if step < 50 else 50.0
        assert m.observe(step, {"loss": loss}) == alone.update(step, {"loss": loss})
