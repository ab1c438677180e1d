"""A trained row, rebuilt from the directory of its run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import losses
from metaopt.comparison import random_init
from metaopt.errors import UserError
from metaopt.files import local_path, read_json, read_json_lines
from metaopt.inner_loop import InnerLoop
from metaopt.languages import (
    LanguageConfig,
    make_codec,
    make_model,
    make_rows,
    pretrained_config,
)
from metaopt.loaded import Loaded
from metaopt.models import AdapterConfig
from metaopt.ranges import field_types
from metaopt.reporting.results import step_column
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.host_leaves import place
from metaopt.training.loop import checkpoint_directory
from metaopt.types import Learner, MetaParams, Model

TOKENIZER = "tokenizer.json"
"""File of a run with its tokenizer, if its tokens are not bytes."""
GENERATIONS, LANGUAGES = "generations.jsonl", "languages.json"
"""Files of a life of `metaopt.evolution`: what it lived, and its `LanguageConfig`."""


def load(run: Path | str, row: str | None = None, seed: int | None = None) -> Loaded:
    """Model, learner, meta-parameters and rates of a row of a finished run of `adapt_languages`.

    Of a life of `metaopt.evolution` it is the model that the life has kept, as the row ``'MAML'``.

    Only the directory of the run is read, wherever it lies, and nothing in it is changed. The
    data that it was trained on need not be there. A pretrained model that it adapted is opened
    again, and parts of one's own that it was given as ``module:function`` are imported again.

    Args:
      run: directory of the run.
      row: name of the row, such as ``'MAML'``; if not given, the trained row with the lowest loss
        after the trained number of steps in the run's results. A row that is not trained, such
        as ``'random init'``, is what it was at the start.
      seed: which of the run's seeds, if it has several; the first by default. Of a run with folds
        it is the row of the first fold.

    Raises:
      UserError: the directory is not that of a finished run of `adapt_languages`, has no such
        row or seed, or its checkpoint is missing or damaged or of another model.
    """
    run = local_path(run)
    if (run / LANGUAGES).is_file():
        return _load_life(run, row, seed)
    _check_finished(run)
    saved, config = _read_config(run / "config.json")
    model = make_model(config)
    rows = {each.name: each for each in make_rows(config, model)}
    if row is None:
        row = best_row(run, [name for name, each in rows.items() if each.estimator], config)
    if row not in rows:
        raise UserError(f"{run} has no row {row!r}; there are {', '.join(rows)}")
    seeds = list(saved.get("seeds") or [saved.get("comparison", {}).get("seed", 0)])
    if seed is not None and seed not in seeds:
        raise UserError(f"{run} has the seeds {', '.join(map(str, seeds))}, not {seed}")
    index = seeds.index(seed) if seed is not None else 0
    learner = rows[row].learner
    if rows[row].estimator is None:
        meta_params, hparams = learner.init(random_init(model, seeds[index])), {}
    else:
        folder = "fold-0" if config.num_folds else f"seed-{seeds[index]}"
        trained = run / folder if config.num_folds or len(seeds) > 1 else run
        meta_params, hparams = read_learned(checkpoint_directory(trained, row), learner, model)
    rate = _rate(run, row, config.inner.num_steps, index)
    if rate is not None:
        hparams["inner_learning_rate"] = jnp.float32(rate)
    elif "inner_learning_rate" not in hparams:
        raise UserError(f"{run / 'results.jsonl'} has no inner rate of {row!r}: put it back whole")
    return Loaded(
        row=row,
        seed=seeds[index],
        model=model,
        loss_fn=losses.next_token(model),
        learner=learner,
        inner=config.inner,
        meta_params=meta_params,
        hparams=hparams,
        config=config,
        codec=make_codec(config),
        pretrained=pretrained_config(config),
    )


def _load_life(life: Path, row: str | None, seed: int | None) -> Loaded:
    """The model that a life has kept."""
    _, config = _read_config(life / LANGUAGES)
    model = make_model(config)
    (found,) = make_rows(config, model)
    if row not in (None, found.name) or seed is not None:
        raise UserError(f"{life} is a life, which keeps one model: leave row and seed out")
    generations = read_json_lines(life / GENERATIONS)
    kept = generations[-1].get("kept") if generations else None
    if not (isinstance(kept, dict) and isinstance(kept.get("training"), str)):
        raise UserError(f"{life} has kept no model yet: run metaopt evolve again, which goes on")
    directory = checkpoint_directory(life, kept["training"])
    meta_params, hparams = read_learned(directory, found.learner, model)
    hparams["inner_learning_rate"] = jnp.float32(kept["inner_learning_rate"])
    return Loaded(
        row=found.name,
        seed=0,
        model=model,
        loss_fn=losses.next_token(model),
        learner=found.learner,
        inner=config.inner,
        meta_params=meta_params,
        hparams=hparams,
        config=config,
        codec=make_codec(config),
        pretrained=pretrained_config(config),
    )


def best_row(run: Path, names: Sequence[str], config: LanguageConfig) -> str:
    """The row of these with the lowest loss after the trained number of steps.

    Raises:
      UserError: the results have no loss of any of them, or the same of several.
    """
    found = {name: _cell(run, name, config.inner.num_steps).get("value") for name in names}
    values = {name: x for name, x in found.items() if isinstance(x, float | int)}
    best = [name for name, x in values.items() if x == min(values.values())]
    if len(best) != 1:
        raise UserError(
            f"the results of {run} do not say which row is best: name one of {', '.join(names)}"
        )
    return best[0]


def _check_finished(run: Path) -> None:
    if not run.is_dir():
        raise UserError(
            f"there is no run {run}: give its directory, such as runs/adapt_languages/cpu-TIME"
        )
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not the directory of a run: it has no config.json")
    if not (run / "finished").is_file():
        raise UserError(
            f"{run} is not the directory of a finished run: run its command again, which resumes"
        )


def read_learned(
    directory: Path, learner: Learner, model: Model
) -> tuple[MetaParams, dict[str, Any]]:
    """The meta-parameters and scalars of the best checkpoint of a training.

    Args:
      directory: of its checkpoints.
      learner: what was learned.
      model: whose parameters they are.

    Raises:
      UserError: it is missing or damaged, or of another model or learner.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is missing: a run is copied with its checkpoints")
    with Checkpoints(directory, fingerprint=Fingerprint({}), read_only=True) as checkpoints:
        leaves = checkpoints.best_leaves()
    example = jax.eval_shape(lambda key: learner.init(model.init(key)), jax.random.key(0))
    try:
        meta_params = place(leaves, example, ".meta_params")
    except ValueError as error:
        raise UserError(f"{directory}: {error} in the model and learner of the config") from None
    hparams = {
        path.split("'")[1]: jnp.asarray(x) for path, x in leaves.items() if path[:8] == ".hparams"
    }
    return meta_params, hparams


def _read_config(path: Path) -> tuple[dict[str, Any], LanguageConfig]:
    """The JSON of a config, and the config; fields that are not there have their defaults."""

    def fields_of(config_type: type, saved: dict[str, Any]) -> dict[str, Any]:
        names = field_types(config_type).keys() & saved.keys()
        return {n: tuple(x) if isinstance(x := saved[n], list) else x for n in names}

    saved = read_json(path)
    is_config = isinstance(saved, dict) and {"tasks", "model"} <= saved.keys()
    if not (is_config and isinstance(saved.get("inner"), dict)):
        raise UserError(f"{path} is not the config of a run of adapt_languages")
    fields = fields_of(LanguageConfig, saved)
    fields["inner"] = InnerLoop(**fields_of(InnerLoop, saved["inner"]))
    if "adapter" in fields:
        fields["adapter"] = AdapterConfig(**fields_of(AdapterConfig, saved["adapter"]))
    if "tokenizer" in fields and fields["tokenizer"] != "bytes":
        fields["tokenizer"] = str(path.with_name(TOKENIZER))
    return saved, LanguageConfig(**fields)


def _rate(run: Path, row: str, num_steps: int, index: int) -> float | None:
    """The inner rate of a row in the results, after the trained number of steps."""
    rates = _cell(run, row, num_steps).get("inner_learning_rate")
    return rates[index] if isinstance(rates, list) else rates


def _cell(run: Path, row: str, num_steps: int) -> dict[str, Any]:
    """The record of a row after a number of steps; empty if there is none."""
    column = step_column(num_steps)
    for record in read_json_lines(run / "results.jsonl"):
        if (record.get("row"), record.get("column")) == (row, column):
            return record
    return {}
