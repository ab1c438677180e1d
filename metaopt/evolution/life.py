"""The life of a model: what is new comes in, the model trains, and is kept if that was no harm.

A generation takes in what has arrived (`metaopt.streams.data.update_data`), trains by next-token
prediction and then by MAML on new domains and old ones, and is judged beside the generation before
on text that none of them trained on: of its new domains, of the old ones, and of domains that are
held out for ever. If it is worse it trains again, more carefully, and if that is worse too, the
model before is kept. All that it reads is in the directory of the life before it trains, so that a
life that was killed goes on to the same numbers, whatever has happened to the folder meanwhile.
"""

import dataclasses
import functools
import io
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import numpy as np

from metaopt import learners
from metaopt.console import log
from metaopt.diagnostics import feasible
from metaopt.errors import Diverged, UserError
from metaopt.evaluate import make_curves, tuned_rates
from metaopt.evolution.arrivals import Plan, arrived, domains_of, make_plan
from metaopt.evolution.config import EvolveConfig
from metaopt.files import (
    append_json_line,
    as_record,
    check_directory,
    matches,
    read_json,
    read_json_lines,
    strict_json,
    write_bytes,
    write_text,
)
from metaopt.fit import FitConfig, Problem, check_devices, fit
from metaopt.languages import make_codec, make_model
from metaopt.load import GENERATIONS, LANGUAGES, read_learned
from metaopt.losses import NATS_TO_BITS, next_token
from metaopt.meta_gradients import joint, reverse
from metaopt.npz import read_npz
from metaopt.optimizers.inner import INNER_OPTIMIZERS
from metaopt.statistics import Interval, interval
from metaopt.streams import data as streams
from metaopt.streams.data import DataState, TakenIn
from metaopt.streams.duplicates import windows
from metaopt.tasks.sources.text import Domain, fingerprint
from metaopt.tasks.sources.text_checks import check_readable
from metaopt.tasks.tokenizers import bytes_of
from metaopt.training.loop import checkpoint_directory, train
from metaopt.training.runs import as_json, differences, lock_directory
from metaopt.training.types import TrainFn
from metaopt.types import Episode, Estimator, Key, MetaParams, Params, TaskFamily

__all__ = ["GENERATIONS", "LANGUAGES", "Generation", "Life", "check"]

PLAN, HELD_OUT, BARRED = "plan.json", "held-out.npz", "held-out-windows.npz"
GROUPS = ("old", "new", "held-out")
CAREFUL = (1.0, 0.5)
"""Factors on the outer rates and on the share of new domains, of the first attempt and the next."""
MOST_TUNED = 64
"""Episodes that the inner rate of a generation is chosen on."""


class Losses(TypedDict):
    """Losses of a domain in bits a byte: before it is adapted to, and after the inner steps."""

    start: float
    adapted: float


class Kept(TypedDict):
    """The model that a generation ends with.

    Attributes:
      generation: number of the generation that trained it.
      training: name of its training, whose checkpoints hold it.
      inner_learning_rate: its inner rate.
    """

    generation: int
    training: str
    inner_learning_rate: float


class Attempt(TypedDict):
    """A training in a generation.

    Attributes:
      training: its name.
      rate: outer rate of next-token prediction.
      new_share: share of the tasks that were of new domains.
      change, old_change: change of the loss of all that was seen, and of what is old, against the
        model before, bits a byte; None without one, or if it diverged.
      reason: why it is kept or not, with the threshold.
      is_kept: whether it is.
    """

    training: str
    rate: float
    new_share: float
    change: dict[str, Any] | None
    old_change: dict[str, Any] | None
    reason: str
    is_kept: bool


class Generation(TypedDict):
    """A line of ``generations.jsonl``.

    Attributes:
      generation: its number, from 1 on.
      arrived: what became of the domains that came in, in passages, by name.
      new: names of the new domains.
      tokens: tokens that were trained on, of all attempts.
      seconds: duration.
      attempts: the trainings.
      verdict: kept, rolled back, or not trained.
      reason: why.
      kept: the model after it.
      domains: losses of that model by domain.
      means: mean adapted loss of the domains of each group, with its interval over domains.
      start_means: the same before the inner steps.
      new_before: mean adapted loss of the new domains of the model before; None without one.
      held_out_change: change of the held-out loss against the generation before.
      forgetting: adapted loss on old domains less the least that any generation had.
    """

    generation: int
    arrived: dict[str, dict[str, int]]
    new: list[str]
    tokens: int
    seconds: float
    attempts: list[Attempt]
    verdict: Literal["kept", "rolled back", "not trained"]
    reason: str
    kept: Kept
    domains: dict[str, Losses]
    means: dict[str, dict[str, Any] | None]
    start_means: dict[str, dict[str, Any] | None]
    new_before: dict[str, Any] | None
    held_out_change: dict[str, Any] | None
    forgetting: dict[str, Any] | None


class Arrived(NamedTuple):
    """The data of a generation.

    Attributes:
      state: all of them.
      new: names of domains with passages that came in now.
      taken_in: what became of what came.
    """

    state: DataState
    new: list[str]
    taken_in: dict[str, TakenIn]


class ArrivalsRecord(TypedDict):
    """What a generation took in, as its file has it.

    Attributes:
      names: names of all domains so far.
      seen: fingerprints of the files that came in, by name.
      wave: number of waves that have come.
      taken_in: what became of what came, by name.
    """

    names: list[str]
    seen: dict[str, str]
    wave: int
    taken_in: dict[str, dict[str, int]]


class SavedPlan(NamedTuple):
    """The plan of a life, as its file has it.

    Attributes:
      held_out, waves: see `metaopt.evolution.arrivals.Plan`.
      judged: names of held-out domains that are long enough to be judged on.
      config: of the life.
    """

    held_out: list[str]
    waves: list[list[str]]
    judged: list[str]
    config: dict[str, Any]


class Judged(NamedTuple):
    """A model on the domains that it is judged on.

    Attributes:
      inner_rate: its inner rate, chosen on seen domains.
      losses: bits a byte of each domain, before and after the inner steps, means over episodes.
    """

    inner_rate: float
    losses: dict[str, Losses]

    def of(self, names: Sequence[str], when: Literal["start", "adapted"] = "adapted") -> np.ndarray:
        """The losses of domains ``[D]``."""
        return np.array([self.losses[name][when] for name in names])


def check(config: EvolveConfig, directory: Path) -> None:
    """Checks a life that has not begun, before anything is compiled or written.

    Args:
      config: of the life.
      directory: of the life; one that has begun is not checked.

    Raises:
      UserError: the folder or the model cannot be used; no domain, or none that is held out, holds
        an episode; or the sizes do not fit one another, the devices or the memory.
    """
    if (directory / PLAN).exists():
        return
    domains = domains_of(config)
    plan = make_plan([domain.name for domain in domains], config)
    check_readable(domains)
    check_devices(config.num_devices, config.tasks_per_step, config.tasks_at_a_time)
    languages = config.languages
    if config.model is None:  # whose tokens are bytes
        least = 2 * config.passages_needed * streams.SEQUENCES * (config.length + 1)
        for held_out, needed in ((True, least), (False, 2 * least)):
            sizes = [x.size for x in domains if (x.name in plan.held_out) == held_out]
            if max(sizes) < needed:
                which = "that is held out" if held_out else "to train on"
                raise UserError(
                    f"no domain {which} has the {needed:,} bytes of an episode: lower length, "
                    "num_support or num_query, or give longer files"
                )
    model, learner = make_model(languages), learners.maml(INNER_OPTIMIZERS[config.inner_optimizer])
    estimators = [joint, *([reverse] if config.meta_steps else [])]
    feasible.check(
        [(learner, estimator, config.inner) for estimator in estimators],
        model.init,
        next_token(model),
        feasible.tokens(config.num_support, config.length),
        feasible.tokens(config.num_query, config.length),
        max(config.tasks_per_step, config.episodes * len(domains)),
    )


class Life:
    """A model in a directory, which lives one generation after another.

    Attributes:
      directory: of the life.
      config: what decides it.
      generations: those that were lived.
    """

    def __init__(self, directory: Path | str, config: EvolveConfig, train_fn: TrainFn = train):
        """Begins a life, or takes it up.

        Args:
          directory: directory of the life, which is empty or of this config.
          config: what decides it.
          train_fn: what runs the steps: `metaopt.training.loop.train` or what takes its place.

        Raises:
          UserError: the folder, the model or the directory cannot be used.
        """
        self.directory, self.config = check_directory(directory), config
        self._train_fn, languages = train_fn, config.languages
        self._devices = check_devices(
            config.num_devices, config.tasks_per_step, config.tasks_at_a_time
        )
        self._model, self._codec = make_model(languages), make_codec(languages)
        self._learner = learners.maml(INNER_OPTIMIZERS[config.inner_optimizer])
        self._loss_fn = next_token(self._model)
        with lock_directory(self.directory):
            self._plan = self._begin()
        self._held_out = streams.read(self.directory / HELD_OUT, self._plan.judged)
        self._barred = read_npz(self.directory / BARRED)["windows"]
        self.generations: list[Generation] = read_json_lines(  # type: ignore[assignment]
            self.directory / GENERATIONS, Generation
        )

    def next(self) -> Generation | None:
        """Lives one more generation; None if there is nothing new.

        No other process may live in the directory meanwhile.

        Raises:
          UserError: a file of the folder, or of the life, cannot be used.
          Interrupted: after Ctrl-C or SIGTERM, with everything saved.
        """
        with lock_directory(self.directory):
            return self._live(len(self.generations) + 1)

    def _live(self, number: int) -> Generation | None:
        began, found = time.monotonic(), self._arrive(number)
        if found is None:
            return None
        before = self._kept_params()
        seen = found.state.names
        old = [name for name in seen if name not in found.new]
        previous = None
        if before is not None:
            previous = self.judge(before, seen, found.state)
        attempts: list[Attempt] = []
        judged, kept = previous, None
        if previous is not None:
            kept = self._kept.copy()
            kept["inner_learning_rate"] = previous.inner_rate
        for i in range(len(CAREFUL) if found.new else 0):
            attempt, after = self._attempt(number, i, found, before, previous)
            attempts.append(attempt)
            log(f"{attempt['training']}: {attempt['reason']}")
            if attempt["is_kept"] and after is not None:
                judged = after
                kept = Kept(
                    generation=number,
                    training=attempt["training"],
                    inner_learning_rate=after.inner_rate,
                )
                break
        if judged is None or kept is None:
            raise UserError("the first generation diverged: lower outer.learning_rate")
        verdict, reason = "not trained", "nothing of what came in was new"
        if attempts:
            reason = attempts[-1]["reason"]
            verdict = "kept" if attempts[-1]["is_kept"] else "rolled back"
        record = Generation(
            generation=number,
            arrived={name: x._asdict() for name, x in found.taken_in.items()},
            new=found.new,
            tokens=len(attempts) * self._tokens(),
            seconds=round(time.monotonic() - began, 1),
            attempts=attempts,
            verdict=verdict,  # type: ignore[typeddict-item]
            reason=reason,
            kept=kept,
            domains=judged.losses,
            **self._compared(judged, previous, old, found.new),  # type: ignore[typeddict-item]
        )
        record = as_record(record)
        append_json_line(self.directory / GENERATIONS, record)
        self.generations.append(record)
        return record

    def judge(
        self,
        params: MetaParams,
        seen: Sequence[str],
        state: DataState,
        inner_rate: float | None = None,
    ) -> Judged:
        """The losses of a model on seen domains and on those held out.

        Args:
          params: the model, as what MAML learned.
          seen: names of domains of the data.
          state: the data.
          inner_rate: inner rate; if not given it is chosen, on other sequences of seen domains.
        """
        names = [*seen, *self.held_out]
        log(f"judging on {len(names)} domains")
        if inner_rate is None:
            size = -(-MOST_TUNED // len(seen))
            episodes = self._episodes(seen, state, min(size, self.config.episodes), "tuning")
            rates = self.config.inner_rates
            if len(rates) == 1:
                inner_rate = rates[0]
            else:
                found = tuned_rates(self._curves, params, {}, rates, episodes)
                inner_rate = float(found[-1])
        episodes = self._episodes(names, state, self.config.episodes, "judging")
        hparams = {"inner_learning_rate": np.float32(inner_rate)}
        nats = self._curves(params, hparams, episodes)[:, [0, -1]]
        bits = nats * self._scales(episodes)[:, None]
        means = bits.reshape(len(names), -1, 2).mean(axis=1).tolist()
        losses = {
            name: Losses(start=start, adapted=adapted)
            for name, (start, adapted) in zip(names, means, strict=True)
        }
        return Judged(inner_rate, losses)

    def train(
        self,
        name: str,
        chances: Mapping[str, float],
        state: DataState,
        start: Params | None,
        *,
        key: Sequence[int],
        factor: float = 1.0,
        times: int = 1,
    ) -> MetaParams:
        """Next-token prediction and then MAML, on domains of the data.

        Args:
          name: of the training.
          chances: chances of the domains, which sum to one.
          state: the data.
          start: parameters to start from; None for new ones.
          key: numbers that the tasks are drawn by, beside the seed.
          factor: factor on the outer rates.
          times: factor on the numbers of steps.

        Returns:
          What was learned.

        Raises:
          Diverged: a loss is NaN or inf, or far too large.
        """
        config = self.config
        groups = {n: state.sequences(n, valid=False) for n in chances}
        sizes = config.num_support, config.num_query
        split = streams.episodes(groups, np.array([*chances.values()]), *sizes)
        problem = Problem(TaskFamily("generation", split, split, split), self._model, self._loss_fn)

        def fitted(name: str, estimator: Estimator, rate: float, steps: int, start: Params | None):
            warmup_steps = min(config.outer.warmup_steps, steps // 10)
            outer = dataclasses.replace(
                config.outer, learning_rate=factor * rate, warmup_steps=warmup_steps
            )
            return fit(
                problem,
                self._learner,
                estimator,
                inner=config.inner,
                outer=outer.ending_at(steps),
                config=self._fit_config(steps),
                directory=self.directory,
                name=name,
                params=start,
                hparams={"inner_learning_rate": config.inner_rate},
                key=self._key(*key, int(estimator is reverse)),
                train_fn=self._train_fn,
            ).meta_params

        steps, meta_steps = times * config.steps, times * config.meta_steps
        if not meta_steps:
            return fitted(name, joint, config.outer.learning_rate, steps, start)
        found = fitted(f"{name}, next tokens", joint, config.outer.learning_rate, steps, start)
        return fitted(name, reverse, config.meta_rate, meta_steps, self._learner.start(found))

    def _fit_config(self, steps: int) -> FitConfig:
        return FitConfig(
            seed=self.config.seed,
            num_steps=steps,
            log_every=max(1, steps // 20),
            checkpoint_every=max(1, steps // 3),
            keep_last=1,
            num_devices=self.config.num_devices,
            tasks_per_step=self.config.tasks_per_step,
            tasks_at_a_time=self.config.tasks_at_a_time,
        )

    def _key(self, *numbers: int) -> Key:
        """The key of what is drawn once: each of these numbers makes another."""
        key = jax.random.key(self.config.seed)
        return functools.reduce(jax.random.fold_in, numbers, key)

    def data(self, generation: int) -> DataState:
        """The data of a generation.

        Raises:
          UserError: its file is missing or damaged.
        """
        names = self._arrivals(generation)["names"]
        return streams.read(self._data_path(generation, "npz"), names)

    def _arrivals(self, generation: int) -> ArrivalsRecord:
        path = self._data_path(generation, "json")
        found = read_json(path)
        if not matches(found, ArrivalsRecord):
            raise UserError(f"{path} is missing or damaged: put it back, or start a new life")
        return found

    @functools.cached_property
    def _curves(self) -> Callable[..., np.ndarray]:
        inner, config = self.config.inner, self.config
        together = config.tasks_at_a_time
        return make_curves(
            self._learner, self._loss_fn, inner, inner.num_steps, self._devices, together
        )

    @property
    def held_out(self) -> list[str]:
        """Names of the domains that are held out and long enough to be judged on."""
        return self._plan.judged

    @property
    def _kept(self) -> Kept:
        return self.generations[-1]["kept"]

    def _begin(self) -> SavedPlan:
        """The plan of the life; when it begins, what is held out is stored beside it."""
        path = self.directory / PLAN
        if not path.exists():
            domains = domains_of(self.config)
            plan = make_plan([domain.name for domain in domains], self.config)
            log(f"held out for ever: {', '.join(plan.held_out)}")
            texts = self._tokens_of([x for x in domains if x.name in plan.held_out])
            most = 4 * self.config.data.valid_passages
            whole = {"valid_share": 1.0, "valid_passages": most, "capacity": 1}
            state, _ = streams.update_data(
                DataState.empty(self.config.length),
                {name: streams.cut(x, self.config.length) for name, x in texts.items()},
                self._key(0),
                dataclasses.replace(self.config.data, **whole),
                generation=0,
                num_sequences=self.config.sequences_needed,
            )
            if not state.names:
                raise UserError("every held-out domain is shorter than an episode: lower the sizes")
            write_text(self.directory / LANGUAGES, strict_json(as_json(self.config.languages), str))
            streams.save(state, self.directory / HELD_OUT)
            packed = io.BytesIO()
            barred = np.unique(np.concatenate([windows(x) for x in texts.values()]))
            np.savez_compressed(packed, allow_pickle=False, windows=barred)
            write_bytes(self.directory / BARRED, packed.getvalue())
            saved = SavedPlan(plan.held_out, plan.waves, list(state.names), as_json(self.config))
            write_text(path, strict_json(saved._asdict(), str, indent=2) + "\n")
        found = read_json(path)
        if not matches(found, SavedPlan):
            raise UserError(f"{path} is damaged: put it back, or start a new life")
        if changed := differences(found["config"], as_json(self.config)):
            raise UserError(
                f"{self.directory} is a life of another config ({changed}); go back to that config "
                "or give a new directory"
            )
        return SavedPlan(**found)

    def _tokens_of(self, domains: Sequence[Domain]) -> dict[str, np.ndarray]:
        """The tokens of domains by name."""
        note = check_readable(domains)
        if note is not None:
            log(f"note: {note}")
        return {x.name: self._codec.encode(x.read(0, x.size).tobytes()) for x in domains}

    def _data_path(self, generation: int, kind: str) -> Path:
        return self.directory / "data" / f"generation-{generation:04d}.{kind}"

    def _arrive(self, number: int) -> Arrived | None:
        """The data of a generation, which are written before anything is trained on them."""
        path = self._data_path(number, "json")
        if not path.exists():
            before = self._arrivals(number - 1) if number > 1 else None
            seen, wave = (before["seen"], before["wave"]) if before else ({}, 0)
            plan = Plan(self._plan.held_out, self._plan.waves)
            domains, wave = arrived(domains_of(self.config), plan, seen, wave)
            if not domains:
                return None
            log(f"generation {number}: {len(domains)} domains come in")
            texts = self._tokens_of(domains)
            state, taken_in = streams.update_data(
                self.data(number - 1) if number > 1 else DataState.empty(self.config.length),
                {name: streams.cut(x, self.config.length) for name, x in texts.items()},
                self._key(number),
                self.config.data,
                generation=number,
                num_sequences=self.config.sequences_needed,
                barred=self._barred,
            )
            if not state.names:
                raise UserError("no domain that came in holds an episode: give longer files")
            path.parent.mkdir(exist_ok=True)
            streams.save(state, self._data_path(number, "npz"))
            record = ArrivalsRecord(
                names=list(state.names),
                seen=seen | {domain.name: fingerprint([domain]) for domain in domains},
                wave=wave,
                taken_in={name: x._asdict() for name, x in taken_in.items()},
            )
            write_text(path, strict_json(record, str) + "\n")
            self._forget_data(number)
        found = self._arrivals(number)["taken_in"]
        taken_in = {name: TakenIn(**x) for name, x in found.items()}
        new = [name for name, x in taken_in.items() if x.kept]
        return Arrived(self.data(number), new, taken_in)

    def _forget_data(self, number: int) -> None:
        """Deletes the data of generations before the last, but for the first: it is in the last."""
        for i in range(2, number - 1):
            self._data_path(i, "npz").unlink(missing_ok=True)

    def _attempt(
        self,
        number: int,
        i: int,
        found: Arrived,
        before: MetaParams | None,
        previous: Judged | None,
    ) -> tuple[Attempt, Judged | None]:
        """One training of a generation, and what it gave beside the model before."""
        config, seen, factor = self.config, found.state.names, CAREFUL[i]
        old = [name for name in seen if name not in found.new]
        new_share = factor * config.new_share if old else 1.0
        chances = {name: new_share / len(found.new) for name in found.new}
        chances |= {name: (1 - new_share) / len(old) for name in old}
        name = f"generation {number}" + ("" if factor == 1 else ", carefully")
        start = None if before is None else self._learner.start(before)
        attempt = Attempt(
            training=name,
            rate=factor * config.outer.learning_rate,
            new_share=new_share,
            change=None,
            old_change=None,
            reason="the first generation is kept",
            is_kept=True,
        )
        try:
            key = (number, i)
            params = self.train(name, chances, found.state, start, key=key, factor=factor)
        except Diverged as error:
            return attempt | {"reason": str(error), "is_kept": False}, None  # type: ignore
        judged = self.judge(params, seen, found.state)
        if previous is None:
            return attempt, judged
        change = _change(previous, judged, seen)
        old_change = _change(previous, judged, old) if old else None
        reason, is_kept = self._decide(previous, judged, seen, old)
        numbers = {"change": change, "old_change": old_change}
        return attempt | numbers | {"reason": reason, "is_kept": is_kept}, judged  # type: ignore

    def _decide(
        self, before: Judged, after: Judged, seen: Sequence[str], old: Sequence[str]
    ) -> tuple[str, bool]:
        """Whether a training is kept, and why, in words."""
        fall = float(np.mean(before.of(seen) - after.of(seen)))
        said = f"on all that was seen the loss {'fell' if fall > 0 else 'rose'} by {abs(fall):.3f}"
        if not fall > 0:
            return said, False
        if not old:
            return said, True
        limit = self.config.most_forgetting * float(np.mean(before.of(old)))
        change = float(np.mean(after.of(old) - before.of(old)))
        said += f"; on old domains it changed by {change:+.3f} (limit {limit:+.3f})"
        return said, change <= limit

    def _compared(
        self, judged: Judged, previous: Judged | None, old: list[str], new: list[str]
    ) -> dict[str, Any]:
        """The numbers of a generation over groups of domains."""
        groups = dict(zip(GROUPS, (old, new, self.held_out), strict=True))
        found: dict[str, Any] = {
            "means": {group: _mean(judged.of(names)) for group, names in groups.items()},
            "start_means": {n: _mean(judged.of(names, "start")) for n, names in groups.items()},
            "new_before": None if previous is None else _mean(previous.of(new)),
            "held_out_change": None,
            "forgetting": None,
        }
        if previous is not None:
            found["held_out_change"] = _change(previous, judged, self.held_out)
        if self.generations and old:
            past = [x["domains"] for x in self.generations]
            best = [min(x[name]["adapted"] for x in past if name in x) for name in old]
            found["forgetting"] = _mean(judged.of(old) - np.array(best))
        return found

    def _kept_params(self) -> MetaParams | None:
        """What the life has learned so far; None before its first generation."""
        if not self.generations:
            return None
        directory = checkpoint_directory(self.directory, self._kept["training"])
        return read_learned(directory, self._learner, self._model)[0]

    def _tokens(self, times: int = 1) -> int:
        """The tokens that a training sees."""
        config = self.config
        steps = times * (config.steps + config.meta_steps)
        return steps * config.tasks_per_step * config.num_sequences * config.length

    def _episodes(
        self, names: Sequence[str], state: DataState, number: int, purpose: str
    ) -> Episode:
        """Episodes of each domain, the same in every generation, ``[D * number, ...]``."""
        sizes = self.config.num_support, self.config.num_query
        key = self._key(zlib.crc32(purpose.encode()))

        def of(i: int, name: str) -> Episode:
            source = state if name in state.names else self._held_out
            sequences = source.sequences(name, valid=True)
            half = len(sequences) // (2 * streams.SEQUENCES) * streams.SEQUENCES
            part = sequences[:half] if purpose == "tuning" else sequences[half:]
            split = streams.episodes({name: part}, None, *sizes)
            name_key = jax.random.fold_in(key, zlib.crc32(name.encode(errors="backslashreplace")))
            return split.sample(name_key, number)._replace(task=np.full(number, i, np.int32))

        return jax.tree.map(lambda *x: np.concatenate(x), *(of(i, n) for i, n in enumerate(names)))

    def _scales(self, episodes: Episode) -> np.ndarray:
        """What nats a token of each episode are multiplied by for bits a byte, ``[E]``."""
        targets = np.asarray(episodes.query.targets)
        num_bytes = self._token_bytes[targets].sum(axis=(1, 2))
        return NATS_TO_BITS * targets[0].size / num_bytes

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return bytes_of(self._codec)


def _mean(values: np.ndarray) -> dict[str, Any] | None:
    """A mean over domains with its interval; None over none."""
    return _as_dict(interval(values)) if len(values) else None


def _change(before: Judged, after: Judged, names: Sequence[str]) -> dict[str, Any]:
    return _as_dict(interval(after.of(names) - before.of(names)))


def _as_dict(found: Interval) -> dict[str, Any]:
    return found._asdict()
