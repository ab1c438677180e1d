"""The trainings that `table_self_improvement` starts badly."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from experiments.table_self_improvement.config import Config, LanguageModel
from metaopt import learners, losses, meta_gradients, models, parallel
from metaopt.errors import UserError
from metaopt.evaluate import make_curves
from metaopt.files import local_path
from metaopt.indices import check_range
from metaopt.inner_loop import InnerLoop
from metaopt.npz import Form, read_npz
from metaopt.optimizers.outer import OuterConfig, outer_optimizer
from metaopt.outer_step import MetaStep, make_meta_step
from metaopt.self_improvement.builders import (
    constant,
    cosine,
    default_settings,
    meta_training,
    plain_training,
)
from metaopt.self_improvement.workload import Choice, Scale, Setting, Space, Workload
from metaopt.tasks.markov import MarkovConfig, bayes_loss, markov
from metaopt.tasks.sources import text as text_sources
from metaopt.tasks.sources.text_checks import check_text
from metaopt.types import Array, Batch, LossFn, MetaState, Model

RATE = Scale(low=1e-6, high=100.0)
DECAY = Scale(low=1e-6, high=100.0)
BATCH = Scale(
    low=1,
    high=1024,
    factor=4.0,
    integer=True,
    score="efficiency",
    coupled={"outer_learning_rate": 0.5},  # Adam's noise goes with the root of the batch
)


class Problem(NamedTuple):
    """A training and its test.

    Attributes:
      workload: the training.
      settings: those that nothing was done about yet.
      test: ``state -> losses [E]`` on what neither training nor tuning sees.
      loss_fn: of the model.
      pure_step: the step on one device, not compiled; of plain training alone.
      pure_loss: ``state -> scalar``, held out, likewise.
    """

    workload: Workload
    settings: dict[str, Setting]
    test: Callable[[MetaState], np.ndarray]
    loss_fn: LossFn
    pure_step: MetaStep | None = None
    pure_loss: Callable[[MetaState], jax.Array] | None = None


class Text:
    """Sequences of bytes from all domains of a text; the ends of the domains are held out."""

    def __init__(self, folder: str | None, length: int, seed: int):
        """Reads the domains; raises UserError where one is too short."""
        found = text_sources.folder_domains(Path(folder)) if folder else None
        domains = found or text_sources.stdlib_domains()
        check_text(domains)
        self.length, self.seed = length, seed
        self.domains = [
            text_sources.array_domain(domain.name, domain.read(0, domain.size))
            for domain in domains
        ]
        shortest = min(domain.size for domain in self.domains)
        if shortest // 20 <= length + 1:
            raise UserError(
                f"a domain of {shortest} bytes is too short for sequences of {length}: "
                "a twentieth of it is held out; remove it or lower lm.length"
            )

    def draw(
        self, part: tuple[float, float], key: int, number: int, chances: np.ndarray | None = None
    ) -> Batch:
        """Sequences from between two fractions of each domain, int32 ``[number, L]``.

        The chances of the domains are float64 ``[D]``; equal ones if not given.
        """
        indices, rng = self._chosen(key, number, chances)
        return self._windows(part, indices, rng)

    def of_each(self, part: tuple[float, float], key: int, number: int) -> Batch:
        """As `draw`, a number of sequences of each domain in turn, int32 ``[D * number, L]``."""
        indices = np.repeat(np.arange(len(self.domains)), number)
        return self._windows(part, indices, np.random.default_rng((self.seed, key)))

    def _windows(
        self, part: tuple[float, float], indices: np.ndarray, rng: np.random.Generator
    ) -> Batch:
        drawn = []
        for index in indices:
            domain = self.domains[index]
            low, high = (int(fraction * domain.size) for fraction in part)
            drawn.append(
                text_sources.draw_window(rng, domain, self.length + 1, low=low, high=high - 1)
            )
        tokens = np.stack(drawn).astype(np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:])  # type: ignore[arg-type]

    def names(self, key: int, number: int) -> list[str]:
        """The domain of each sequence that `draw` gives."""
        return [self.domains[index].name for index in self._chosen(key, number)[0]]

    def _chosen(
        self, key: int, number: int, chances: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.random.Generator]:
        """Which domains the sequences are of, and what draws their places."""
        rng = np.random.default_rng((self.seed, key))
        if chances is not None:
            return rng.choice(len(self.domains), size=number, p=chances), rng
        return rng.integers(len(self.domains), size=number), rng


def transformer(lm: LanguageModel, **how) -> Model:
    """The byte transformer of a config."""
    shape = models.TransformerConfig(
        vocab_size=256, width=lm.width, num_layers=lm.num_layers, num_heads=lm.num_heads, **how
    )
    return models.transformer(shape)


def language_model(
    config: Config, num_examples: int | None = None, *, optimizers: Sequence[Setting] = ()
) -> Problem:
    """The language model, for a number of examples or that of the config.

    Where optimisers are given, they are something to choose from.
    """
    lm = config.lm
    text, model = Text(config.folder, lm.length, config.seed), transformer(lm)
    loss_fn = losses.next_token(model)
    held_out = text.draw((0.9, 0.95), 1, lm.num_held_out)
    test = text.draw((0.95, 1.0), 2, lm.num_test)
    space: Space = {"outer_learning_rate": RATE, "weight_decay": DECAY, "batch_size": BATCH}
    if optimizers:
        space = {**space, "optimizer": Choice(values=tuple(optimizers))}
    workload = plain_training(
        "language model",
        task={"kind": "language model", "data": config.folder or "stdlib", "width": lm.width}
        | {"layers": lm.num_layers, "length": lm.length},
        model=model,
        loss_fn=loss_fn,
        draw=lambda position, number: text.draw((0.0, 0.9), 3 + position, number),
        held_out=held_out,
        groups=text.names(1, lm.num_held_out),
        num_examples=num_examples or lm.num_examples,
        tokens_per_example=lm.length,
        space=space,
        seed=config.seed,
        num_devices=1,  # or a batch of 1 could not be tried
    )
    settings = default_settings(batch_size=lm.batches[0], microbatch=0, weight_decay=0.01)
    return Problem(
        workload,
        settings,
        per_example(loss_fn, test),
        loss_fn,
        make_meta_step(
            meta_gradients.joint(learners.maml(), loss_fn), outer_optimizer(OuterConfig())
        ),
        lambda state: loss_fn(state.meta_params["params"], held_out),
    )


def bigram_table(config: Config, batch_size: int, length: int, num_steps: int) -> Problem:
    """A table of the next byte given the last, which learns all that it can in some 60 steps."""
    lm, model = config.lm, models.bigram(256)
    text, loss_fn = Text(config.folder, length, config.seed), losses.next_token(model)
    workload = plain_training(
        "bigram table",
        task={"kind": "bigram", "data": config.folder or "stdlib"},
        model=model,
        loss_fn=loss_fn,
        draw=lambda position, number: text.draw((0.0, 0.9), 3 + position, number),
        held_out=text.draw((0.9, 0.95), 1, lm.num_held_out),
        num_examples=batch_size * num_steps,
        tokens_per_example=length,
        space={"outer_learning_rate": RATE},
        schedule=constant,
        seed=config.seed,
        num_devices=1,
    )
    settings = default_settings(batch_size=batch_size, microbatch=0, outer_learning_rate=0.1)
    test = per_example(loss_fn, text.draw((0.95, 1.0), 2, lm.num_test))
    return Problem(workload, settings, test, loss_fn)


def per_example(loss_fn, examples: Batch, at_a_time: int = 1):
    """``state -> losses [E / at_a_time]``."""
    groups = jax.tree.map(lambda x: x.reshape(-1, at_a_time, *x.shape[1:]), examples)
    mapped = parallel.parallel_map(
        lambda params, batches: jax.lax.map(lambda b: loss_fn(params, b), batches, batch_size=64),
        parallel.default_devices(),
    )
    return lambda state: mapped(state.meta_params["params"], groups)


class Languages(NamedTuple):
    """MAML on Markov languages, and the loss of the best possible learner on its test."""

    problem: Problem
    limit: np.ndarray


def markov_languages(config: Config) -> Languages:
    """MAML of a bigram table, its inner and outer rates to be found."""
    sizes, shape = config.markov, MarkovConfig(num_query=8)
    family, model, inner = markov(shape), models.bigram(shape.vocab_size), InnerLoop(num_steps=5)
    inner = dataclasses.replace(inner, num_steps=sizes.num_inner_steps)
    learner, loss_fn = learners.maml(), losses.next_token(model)
    keys = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(3)]
    held_out = family.valid.sample(keys[0], sizes.num_held_out)
    test = family.test.sample(keys[1], sizes.num_test)
    curves = make_curves(learner, loss_fn, inner, inner.num_steps, parallel.default_devices())

    def losses_on(episodes):
        return lambda state: curves(state.meta_params, state.hparams, episodes)[:, -1]

    workload = meta_training(
        "MAML on Markov languages",
        task={"kind": "markov", "order": shape.order, "vocab": shape.vocab_size},
        params=model.init(keys[2]),
        learner=learner,
        estimate=lambda settings: meta_gradients.reverse(learner, loss_fn, inner),
        sample=lambda settings, position: family.train.sample(
            jax.random.fold_in(keys[2], position), sizes.tasks_per_step
        ),
        evaluate=losses_on(held_out),
        examples_per_step=lambda settings: sizes.tasks_per_step,
        num_examples=sizes.num_examples,
        tokens_per_example=(shape.num_support + shape.num_query) * shape.length,
        space={"inner_learning_rate": RATE, "outer_learning_rate": RATE},
        seed=config.seed,
    )
    settings = default_settings(inner_learning_rate=1.0, outer_learning_rate=0.01)
    limit = np.asarray(bayes_loss(shape, test))
    return Languages(Problem(workload, settings, losses_on(test), loss_fn), limit)


def read_mnist(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Images, float32 ``[N, 28, 28, 1]`` in [0, 1], and labels, int32 ``[N]``, by split.

    Raises:
      UserError: the file of the config is missing or no npz file of this form, has fewer images
        than the config asks for, or a label that is no digit.
    """
    path, sizes = config.mnist.path, config.mnist
    if path is None:
        raise UserError("no MNIST: give --mnist.path, an npz file with x_train ...")
    forms = {f"x_{split}": Form(np.uint8, (split, 28, 28)) for split in SPLITS}
    forms |= {f"y_{split}": Form(np.integer, (split,)) for split in SPLITS}
    found = read_npz(local_path(path), forms)
    labels = {split: found[f"y_{split}"] for split in SPLITS}
    for split in SPLITS:
        check_range(f"y_{split} of {path}", labels[split], 10)
    num_train, num_test = (len(labels[split]) for split in SPLITS)
    if num_train < sizes.num_train + NUM_HELD_OUT or num_test < 100 or num_test % 100:
        raise UserError(
            f"{path} has {num_train} images to train on and {num_test} to test on: "
            f"mnist.num_train {sizes.num_train} needs {sizes.num_train + NUM_HELD_OUT}, and the "
            "test a multiple of 100"
        )
    images = {split: found[f"x_{split}"][..., None] / np.float32(255) for split in SPLITS}
    return images, {split: labels[split].astype(np.int32) for split in SPLITS}


def logits_of(model: Model, inputs: Array, at_a_time: int) -> Callable[[MetaState], np.ndarray]:
    """``state -> logits [E, C]`` of inputs ``[E, ...]``, computed some at a time."""
    groups = inputs.reshape(-1, at_a_time, *inputs.shape[1:])
    apply = jax.jit(lambda params: jax.lax.map(lambda x: model.apply(params, x), groups))

    def logits(state: MetaState) -> np.ndarray:
        found = np.asarray(apply(state.meta_params["params"]))
        return found.reshape(len(inputs), -1)

    return logits


class Digits(NamedTuple):
    """MNIST: the training, and what its accuracy is measured on."""

    problem: Problem
    predict: Callable[[MetaState], np.ndarray]
    labels: np.ndarray


def mnist(config: Config, schedule: str) -> Digits:
    """The image classifier, with a rate that is ``fixed`` or ``cosine``.

    Its batch norm takes the statistics of the batch, in the test of 100 images at a time.

    Raises:
      UserError: as `read_mnist` does.
    """
    sizes = config.mnist
    images, labels = read_mnist(config)
    model = models.conv((28, 28, 1), 10, filters=sizes.filters)
    loss_fn = losses.classification(model)
    held_out = Batch(images["train"][-NUM_HELD_OUT:], labels["train"][-NUM_HELD_OUT:])
    test = Batch(images["test"], labels["test"])

    def draw(position: int, number: int) -> Batch:
        epoch, at = divmod(position, sizes.num_train)
        order = np.random.default_rng((config.seed, epoch)).permutation(sizes.num_train)
        chosen = order[np.arange(at, at + number) % sizes.num_train]
        return Batch(images["train"][chosen], labels["train"][chosen])

    workload = plain_training(
        "MNIST",
        task={"kind": "mnist", "filters": sizes.filters},
        model=model,
        loss_fn=loss_fn,
        draw=draw,
        held_out=held_out,
        num_examples=sizes.num_epochs * sizes.num_train // sizes.batch_size * sizes.batch_size,
        tokens_per_example=1,
        space={"outer_learning_rate": RATE},
        schedule=cosine if schedule == "cosine" else constant,
        examples_at_a_time=50,
        seed=config.seed,
        num_devices=1,
    )
    settings = default_settings(optimizer="sgd", batch_size=sizes.batch_size, microbatch=0)
    test_logits, logits = (logits_of(model, x.inputs, n) for x, n in ((test, 100), (held_out, 50)))

    def predict(state: MetaState) -> np.ndarray:
        return test_logits(state).argmax(-1)

    def predictions(state: MetaState) -> tuple[np.ndarray, np.ndarray]:
        return special.softmax(logits(state), axis=-1), labels["train"][-NUM_HELD_OUT:]

    def scores(state: MetaState) -> dict[str, float]:
        return {"test_accuracy": float(np.mean(predict(state) == labels["test"]))}

    workload = workload._replace(scores=scores, predictions=predictions)
    problem = Problem(workload, settings, per_example(loss_fn, test, 100), loss_fn)
    return Digits(problem, predict, labels["test"])


SPLITS = ("train", "test")
NUM_HELD_OUT = 1000
