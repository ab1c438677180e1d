import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.errors import UserError
from metaopt.files import read_json_lines
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.loop import (
    Diverged,
    Interrupted,
    TrainConfig,
    Training,
    checkpoint_directory,
    prefetch,
    train,
)
from metaopt.training.progress import Progress
from metaopt.types import MetaState

CONFIG = TrainConfig(num_steps=10, log_every=1, checkpoint_every=3, keep_last=2)
OUTER_OPT: Any = optax.adam(0.1)
FINGERPRINT = Fingerprint({"seed": 0})
NOTHING, INNER, QUERY, GRADIENT, EXPLOSION, PARAMS = range(6)
traces = []


def initial_state(breaks: int = NOTHING, breaks_at: int = 0) -> MetaState:
    params = jnp.arange(4.0)
    return MetaState(
        step=jnp.int32(0),
        meta_params={"params": params},
        opt_state=OUTER_OPT.init({"params": params}),
        hparams={"breaks": jnp.float32(breaks), "breaks_at": jnp.float32(breaks_at)},
        key=jax.random.key(0),
    )


def noisy_update(state: MetaState, target):
    """Adam on a quadratic with noise from the state's key; breaks at a step when asked to."""
    traces.append(None)
    params, nan = state.meta_params["params"], jnp.nan
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), params.shape)
    gradient = {"params": params - target + 0.1 * noise}
    updates, opt_state = OUTER_OPT.update(gradient, state.opt_state)
    params = params + updates["params"]

    def broken(what, value, bad):
        now = state.step + 1 == state.hparams["breaks_at"]
        return jnp.where(now & (state.hparams["breaks"] == what), bad, value)

    loss = 0.5 * jnp.sum((params - target) ** 2)
    metrics = {
        "loss": broken(EXPLOSION, broken(QUERY, loss, nan), 1e6),
        "inner_losses": broken(INNER, loss * jnp.ones(4), jnp.array([1.0, 1.0, nan, nan])),
        "grad_norm": broken(GRADIENT, optax.global_norm(gradient), jnp.inf),
    }
    meta_params = {"params": broken(PARAMS, params, nan)}
    return MetaState(state.step + 1, meta_params, opt_state, state.hparams, state.key), metrics


noisy_step = jax.jit(noisy_update, donate_argnums=0)


def sample(step: int):
    return jnp.asarray(np.random.default_rng(step).normal(size=4), jnp.float32)


def run(directory, state=None, sample=sample, config=CONFIG, step_fn=noisy_step, **options: Any):
    training = Training(
        name="quadratic",
        state=initial_state() if state is None else state,
        step_fn=step_fn,
        sample=sample,
        tasks_per_step=2,
        tokens_per_task=8,
        fingerprint=options.pop("fingerprint", FINGERPRINT),
        **options,
    )
    return train(training, config, directory).state


def as_bytes(state: MetaState):
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def open_checkpoints(directory) -> Checkpoints:
    return Checkpoints(checkpoint_directory(directory, "quadratic"), fingerprint=FINGERPRINT)


def saved_steps(directory):
    with open_checkpoints(directory) as checkpoints:
        return checkpoints.steps


def logged_steps(directory, key="loss"):
    return [line["step"] for line in read_json_lines(directory / "metrics.jsonl") if key in line]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The end of a run of 10 steps that was never stopped."""
    return as_bytes(run(tmp_path_factory.mktemp("straight")))


def test_a_run_logs_checkpoints_and_is_traced_once(tmp_path):
    traces.clear()
    state = run(tmp_path, step_fn=jax.jit(lambda *args: noisy_update(*args), donate_argnums=0))
    assert int(state.step) == 10 and len(traces) == 1
    assert saved_steps(tmp_path) == [9, 10]
    assert logged_steps(tmp_path) == list(range(1, 11))
    line = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    assert line["name"] == "quadratic" and len(line["inner_losses"]) == 4
    assert line["tokens_per_second"] == pytest.approx(8 * line["tasks_per_second"])
    assert list((tmp_path / "tensorboard" / "quadratic").glob("events*"))


def test_resuming_is_bitwise_the_straight_run(tmp_path, straight):
    run(tmp_path, config=dataclasses.replace(CONFIG, num_steps=5))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # lines beyond the checkpoint
        file.write('{"name": "quadratic", "step": 6, "loss": 1.0}\n{"name": "quad')
    assert as_bytes(run(tmp_path)) == straight
    assert logged_steps(tmp_path) == list(range(1, 11))


def test_a_run_that_is_at_its_end_returns_at_once(tmp_path, straight):
    run(tmp_path)

    def none(step):
        raise AssertionError(f"asked for the data of step {step}")

    assert as_bytes(run(tmp_path, sample=none)) == straight


def test_sigterm_in_a_process_saves_and_another_goes_on(tmp_path, straight):
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    deadline = time.monotonic() + 60
    while len(logged_steps(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        run(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM after step" in stderr and "same command again" in stderr
    stopped_at = saved_steps(tmp_path)[-1]
    assert 4 <= stopped_at < 10 and stopped_at == logged_steps(tmp_path)[-1]
    assert as_bytes(run(tmp_path)) == straight
    assert logged_steps(tmp_path) == list(range(1, 11))


def test_ctrl_c_finishes_the_step_and_a_second_one_leaves_at_once(tmp_path, straight):
    before = signal.getsignal(signal.SIGINT)

    def evaluate_and_press(times: int):
        def evaluate(state):
            for _ in range(times if int(state.step) == 4 else 0):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.3)  # sooner, it would be taken for the first once more
            return 0.0

        return evaluate

    config = dataclasses.replace(CONFIG, eval_every=2)
    with pytest.raises(Interrupted) as stop:
        run(tmp_path, config=config, evaluate=evaluate_and_press(1))
    assert stop.value.code == 130
    assert saved_steps(tmp_path)[-1] == 5
    assert signal.getsignal(signal.SIGINT) is before
    assert as_bytes(run(tmp_path)) == straight

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice", config=config, evaluate=evaluate_and_press(2))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (INNER, "at step 8, in inner step 3 of 4: the support loss before it is nan"),
        (QUERY, "at step 8, in the query loss: it is nan"),
        (EXPLOSION, "at step 8, in the query loss: 1e+06 is above the limit of"),
        (GRADIENT, "at step 8, in the outer update: the norm of the meta-gradient is inf"),
    ],
)
def test_divergence_is_located_and_what_was_saved_stays(tmp_path, what, message):
    with pytest.raises(Diverged) as error:
        run(tmp_path, state=initial_state(what, breaks_at=8))
    assert message in str(error.value) and "learning rate" in str(error.value)
    assert saved_steps(tmp_path) == [3, 6]
    assert logged_steps(tmp_path) == list(range(1, 8))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(Diverged, match="at step 9, in the outer update"):
        run(tmp_path, state=initial_state(PARAMS, breaks_at=9))
    assert saved_steps(tmp_path) == [3, 6]


def test_divergence_is_measured_against_the_first_loss_of_the_whole_run(tmp_path):
    run(tmp_path, config=dataclasses.replace(CONFIG, num_steps=5))
    first = read_json_lines(tmp_path / "metrics.jsonl")[0]["loss"]
    with pytest.raises(Diverged, match=f"limit of {5 * first:.4g}"):
        run(tmp_path, sample=lambda step: sample(step) + 100.0 * (step >= 5))


def test_the_best_evaluated_state_is_kept(tmp_path):
    losses = {2: 0.5, 4: 0.1, 6: 0.3, 8: float("nan"), 10: 0.4}
    config = dataclasses.replace(CONFIG, eval_every=2, checkpoint_every=100, keep_last=1)
    run(tmp_path, config=config, evaluate=lambda state: losses[int(state.step)])
    assert saved_steps(tmp_path) == [4, 10]
    with open_checkpoints(tmp_path) as checkpoints:
        best = checkpoints.restore_best(initial_state())
    assert best is not None and int(best.state.step) == 4
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    logged = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    assert logged == losses | {8: None}
    (curves,) = (tmp_path / "tensorboard" / "quadratic").glob("events*")
    written = curves.read_bytes()
    assert written.count(b"loss/validation") == 4 and written.count(b"loss/train") == 10


def test_another_config_is_refused(tmp_path):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="seed: 0 saved, 1 now"):
        run(tmp_path, fingerprint=Fingerprint({"seed": 1}))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_what_the_sampler_raises_comes_out(tmp_path):
    def failing(step):
        if step == 7:
            raise OSError("disk gone")
        return sample(step)

    with pytest.raises(OSError, match="disk gone"):
        run(tmp_path, sample=failing)
    assert saved_steps(tmp_path) == [3, 6]


def test_prefetch_keeps_the_order_and_looks_ahead_in_one_other_thread():
    threads, sampled = set(), []

    def sample(step):
        threads.add(threading.current_thread())
        sampled.append(step)
        return step * step

    stream = prefetch(sample, range(6), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(sampled) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sampled == [0, 1, 2]
    assert list(stream) == [1, 4, 9, 16, 25]
    assert len(threads) == 1 and threading.current_thread() not in threads


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_prefetch_gives_the_same_from_any_number_of_threads(workers):
    def sample(step):
        time.sleep(0.01 * (step % 3))  # later ones are done first
        if step == 20:
            raise OSError("disk gone")
        return np.random.default_rng(step).normal(size=4)

    stream, found = prefetch(sample, range(30), 2 * workers, workers), []
    with pytest.raises(OSError, match="disk gone"):
        found.extend(stream)
    del found[20:]
    for batch in prefetch(sample, range(20), 2 * workers, workers):
        found.append(batch)
    expected = np.stack([sample(step) for step in range(20)])
    assert np.stack(found[-20:]).tobytes() == expected.tobytes()


def test_prefetch_raises_in_its_place():
    def sample(step):
        if step == 3:
            raise OSError("disk gone")
        return step

    stream = prefetch(sample, range(30), 16, 8)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_prefetch_draws_in_parallel():
    meet = threading.Barrier(4, timeout=10)
    assert list(prefetch(lambda step: (meet.wait(), step)[1], range(8), 8, 4)) == list(range(8))


@pytest.mark.parametrize("field", ["num_steps", "log_every", "checkpoint_every", "keep_last"])
def test_a_config_that_makes_no_sense_is_refused(field):
    with pytest.raises(UserError, match=f"{field} is 0"):
        dataclasses.replace(CONFIG, **{field: 0})


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with Progress("evaluate", total=3) as progress:
        for i in range(3):
            progress.update(i + 1, loss=0.5, tasks_per_second=2.0)
    assert capsys.readouterr().err == "evaluate: 3/3  loss 0.5  tasks/s 2\n"


def test_the_time_left_is_told_from_steps_and_not_from_compiling(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("train", total=100) as progress:
        for i, seconds in enumerate((50, 1, 1, 10)):
            clock[0] += seconds
            progress.update(i + 1)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "train: 1/100"
    assert second == "train: 4/100  384 s left"  # 12 s for three steps


def _slowly(step):
    time.sleep(0.2)
    return sample(step)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sample=_slowly)
