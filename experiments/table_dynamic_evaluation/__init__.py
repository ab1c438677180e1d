"""Dynamic evaluation of a byte-level language model, with and without a meta-learned start.

Krause et al., 2018 (arXiv:1709.07432) and 2019 (arXiv:1904.08378): a stream of text is scored
segment by segment, and the model takes one step on each after scoring it, by gradient descent
or by their RMS rule with a decay towards the parameters before the stream. Here the same small
transformer over bytes is walked along streams unlike its training text, static and by either
rule, from two initialisations: plainly trained, and trained for the score of dynamic evaluation
itself, by backpropagation through short walks (MAML, Finn et al., 2017). Both have read as many
windows of text. Rates and decays are tuned on other text of the stream, alike for all rows.

The published models are hundreds to thousands of times larger, were trained to the end, and met
test text of the kind that they were trained on. Ours have 0.13 million parameters and minutes of
training, on novels and other domains but no part of WikiText-2 or Shakespeare: expect a larger
reduction than the published ones, and no comparison but of the order of the rows. Below the table
stand the published reductions of the cross-entropy beside ours.

Expect RMS below SGD below static. The meta-learned start gains little: it was trained for SGD and
gains 0.006 and 0.013 bits under it; under RMS it gains nothing on WikiText-2 and loses 0.033 on
Shakespeare, and without adapting it is better on the one and worse on the other. A score is the
mean over a part of the stream (128 KiB of each on cpu), from its first byte that has a whole
context before it.

    python -m experiments.table_dynamic_evaluation     # Python's own library: no data is needed
    python -m experiments.table_dynamic_evaluation --train data/books data/text_domains \
        --streams data/wikitext2 data/tinyshakespeare.txt     # about twelve minutes on two cores
    python -m experiments.table_dynamic_evaluation --preset smoke
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.table_dynamic_evaluation.config import CHOSEN_BY, Config, preset
from experiments.table_dynamic_evaluation.data import (
    Text,
    find_text,
    plain_episodes,
    statistics_segments,
    stream_episodes,
    stretch_bytes,
)
from experiments.table_dynamic_evaluation.report import DYNAMIC, META, Report
from experiments.table_dynamic_evaluation.tuning import Setting, every_stream, tune
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.cli import command_line
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import check_groups, init_state, make_meta_step
from metaopt.self_improvement.drop_in import trainer
from metaopt.streams import dynamic_evaluation
from metaopt.streams.dynamic_evaluation import cut_segments, segment_loss, walk
from metaopt.training import types as trained
from metaopt.training.fingerprint import of_step
from metaopt.training.runs import open_run
from metaopt.types import Batch, Episode, Key, MetaGradFn, Params

PRETRAINING = "pretraining"
WalksFn = Callable[[Params, Params, Batch, np.ndarray], np.ndarray]
"""``(params, mean squares, segments [W, N, ...], settings [W, 2]) -> nats a byte [W, N]``."""


class Training(NamedTuple):
    """What a training differs in from the others; those of equal ``data`` read the same places."""

    name: str
    estimate: MetaGradFn
    sample: Callable[[Key], Episode]
    outer: OuterConfig
    num_steps: int
    data: int
    inner_rate: float = 0.0


class Experiment:
    """Trainings and walks that share a config, its text and its model."""

    def __init__(self, config: Config, text: Text, directory: Path):
        """``directory`` is where the trainings are kept."""
        self.config, self.text, self.directory = config, text, directory
        self.model = models.transformer(config.transformer())
        self.devices = parallel.default_devices()
        self.init_key, self.data_key = jax.random.split(jax.random.key(config.seed))
        rules = {"SGD": sgd_rule, "RMS": self._rms_rule}
        self.walks = {name: self._make_walks(rule) for name, rule in rules.items()}
        loss_fn = segment_loss(self.model)
        self.statistics = jax.jit(
            lambda params, segments: dynamic_evaluation.mean_squared_gradients(
                loss_fn, params, segments
            )
        )

    def plain(self, name: str, start: Params, outer: OuterConfig, num_steps: int) -> Params:
        """Trained further by next-token loss on windows that do not overlap."""
        estimate = meta_gradients.joint(learners.maml(), losses.next_token(self.model))
        text = self.text.train

        def sample(key):
            return plain_episodes(self.config, text, key)

        data = int(name != PRETRAINING)
        return self._train(Training(name, estimate, sample, outer, num_steps, data), start)

    def meta(self, name: str, start: Params, rate: float, length: int) -> Params:
        """Trained further for the score of walks by SGD at this rate."""
        loss_fn = segment_loss(self.model)
        estimate = dynamic_evaluation.online(learners.maml(), loss_fn, self.config.inner)

        def sample(key):
            return stream_episodes(self.config, self.text.train, key, length)

        steps = self.config.meta_steps
        outer = self.config.outer
        return self._train(Training(name, estimate, sample, outer, steps, 1, rate), start)

    def tune(
        self, rule: str, params: Params, length: int, decays: Sequence[float]
    ) -> tuple[list[Setting], np.ndarray]:
        """The best setting of a rule for each stream, and its nats a byte ``[streams]``."""
        segments = self.segments("valid", length)
        squares = self._mean_squares(params, length)
        rates = getattr(self.config, f"{rule.lower()}_rates")

        def scores(settings):
            found = self.walks[rule](params, squares, *every_stream(segments, settings))
            return found.mean(axis=1).reshape(-1, len(settings))

        return tune(scores, rates, decays)

    def test(
        self, rule: str, params: Params, length: int, settings: Sequence[Setting]
    ) -> np.ndarray:
        """Nats a byte of each segment of the test parts, ``[streams, N]``."""
        squares = self._mean_squares(params, length)
        return self.walks[rule](params, squares, self.segments("test", length), np.array(settings))

    def segments(self, part: str, length: int) -> Batch:
        """The segments of a part of every stream, ``[streams, N, ...]``, in whole blocks."""
        cut = [
            cut_segments(getattr(stream, part), length, self.config.context)
            for stream in self.text.streams
        ]
        count = len(cut[0].targets)
        if part == "test":
            count -= count % self.config.block
        return jax.tree.map(lambda *leaves: np.stack([leaf[:count] for leaf in leaves]), *cut)

    def _mean_squares(self, params: Params, length: int) -> Params:
        segments = statistics_segments(self.config, self.text.train, length)
        return self.statistics(params, segments)

    def _rms_rule(self, params: Params, squares: Params, setting) -> optax.GradientTransformation:
        rate, decay = setting
        return dynamic_evaluation.rms(params, rate, decay, squares, self.config.epsilon)

    def _make_walks(self, rule: Callable) -> WalksFn:
        loss_fn = segment_loss(self.model)

        def on_device(shared, walks):
            params, squares = shared
            segments, setting = jax.tree.map(lambda x: x[0], walks)
            optimizer = rule(params, squares, setting)
            return walk(loss_fn, optimizer, params, segments).losses[None]

        mapped = parallel.parallel_map(on_device, self.devices)

        def walks(params, squares, segments, settings):
            tasks, size = (segments, np.asarray(settings, np.float32)), len(self.devices)
            found = []
            for i in range(0, len(settings), size):  # one a device: whatever their number,
                some = jax.tree.map(lambda x, i=i: x[i : i + size], tasks)  # one compilation
                found.append(mapped((params, squares), some))
            return np.concatenate(found).astype(np.float64)

        return walks

    def _train(self, training: Training, start: Params) -> Params:
        config, learner = self.config, learners.maml()
        steps = training.num_steps
        outer = dataclasses.replace(
            training.outer, decay_steps=max(steps, training.outer.warmup_steps + 1)
        )
        outer_opt = outer_optimizer(outer)
        step = make_meta_step(
            training.estimate,
            outer_opt,
            tasks_at_a_time=config.tasks_at_a_time,
            axis_name=parallel.AXIS,
        )
        hparams = outer.hparams() | {"inner_learning_rate": training.inner_rate}
        key = jax.random.fold_in(self.data_key, training.data)
        state = init_state(key, start, learner, outer_opt, hparams)

        def sample(i):
            episodes = training.sample(jax.random.fold_in(key, i))
            return parallel.split_over_devices(episodes, len(self.devices))

        state = parallel.replicate(state, self.devices)
        step_fn = parallel.parallel_step(step, self.devices)
        fixed = command_line.as_saved(config) | {"training": training.name}
        run = trained.Training(
            name=training.name,
            state=state,
            step_fn=step_fn,
            sample=sample,
            tasks_per_step=config.tasks_per_step,
            tokens_per_task=stretch_bytes(config),
            fingerprint=of_step(fixed, step_fn, state, sample(0)),
        )
        length = trained.TrainConfig(num_steps=steps, log_every=max(1, steps // 100))
        state = trainer(config.improve)(run, length, self.directory).state
        return jax.device_get(state.meta_params["params"])


def sgd_rule(params: Params, squares: Params, setting) -> optax.GradientTransformation:
    """Gradient descent; the mean squares are not read."""
    del squares
    rate, decay = setting
    return dynamic_evaluation.sgd(params, rate, decay)


def choose_length(experiment: Experiment, params: Params) -> tuple[int, float]:
    """The segment length that plain SGD scores best with, and its rate, the mean over streams."""
    found = {}
    for length in experiment.config.segment_lengths:
        settings, scores = experiment.tune("SGD", params, length, (0.0,))
        rate = float(np.exp(np.mean(np.log([setting.rate for setting in settings]))))
        found[length] = (scores.mean(), rate)
        log(f"segments of {length}: {scores.mean():.4f} nats a byte by SGD at {rate:.3g}")
    length = min(found, key=lambda length: found[length][0])
    return length, found[length][1]


def add_rows(
    experiment: Experiment, report: Report, prefix: str, initialise: Callable, length: int
) -> None:
    """Static, SGD and RMS from one initialisation, whose training counts for the first."""
    began = time.monotonic()
    start = initialise()
    none = [Setting(0.0, 0.0)] * len(experiment.text.streams)
    static = experiment.test("SGD", start, length, none)
    report.add(f"{prefix}static", static, static, none, time.monotonic() - began)
    for rule in experiment.walks:
        began = time.monotonic()
        settings, _ = experiment.tune(rule, start, length, experiment.config.decays)
        found = experiment.test(rule, start, length, settings)
        seconds = time.monotonic() - began
        report.add(f"{prefix}{rule}{DYNAMIC}", found, static, settings, seconds)


def check_memory(config: Config) -> None:
    """Raises UserError where what the config asks for exceeds the memory of the device."""
    model = models.transformer(config.transformer())
    window = feasible.tokens(1, config.window)
    stretches = config.tasks_per_step * config.inner.num_steps
    most = max(stretches, config.statistics_segments)
    loss_fn, nothing = losses.next_token(model), feasible.tokens(0, 1)
    feasible.check([], model.init, loss_fn, window, nothing, most)


def run(config: Config) -> None:
    """Trains both initialisations, walks along the streams, and writes tables and figure."""
    parallel.set_up_backend()
    trainer(config.improve)  # or its memory is found wrong when rows are trained
    num_devices = len(parallel.default_devices())
    parallel.check_divides(config.tasks_per_step, num_devices)
    check_groups(config.tasks_per_step // num_devices, config.tasks_at_a_time)
    check_memory(config)
    text = find_text(config)
    place = open_run(
        config.root,
        "table_dynamic_evaluation",
        config.preset,
        command_line.as_saved(config),
        run_dir=config.run_dir,
    )
    experiment = Experiment(config, text, place.directory)
    params = experiment.model.init(experiment.init_key)
    params = experiment.plain(PRETRAINING, params, config.pretrain, config.pretrain_steps)
    length, rate = choose_length(experiment, params)
    command = command_line.command("table_dynamic_evaluation", config, preset, CHOSEN_BY)
    names = [stream.name for stream in text.streams]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    report = Report(place, config, command, names, length, size)
    inits = {
        "": lambda: experiment.plain("plain", params, config.outer, config.meta_steps),
        META: lambda: experiment.meta("meta-learned", params, rate, length),
    }
    for prefix, initialise in inits.items():
        add_rows(experiment, report, prefix, initialise, length)
    report.finish()
