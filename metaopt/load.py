"""A trained row, rebuilt from the directory of its run."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt import losses
from metaopt.errors import UserError
from metaopt.files import local_path, read_json_lines, read_text
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig, make_model, make_rows
from metaopt.reporting.results import step_column
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.loop import checkpoint_directory
from metaopt.types import Hparams, Learner, LossFn, MetaParams, Model


class Loaded(NamedTuple):
    """What a row of a run learned, and what it takes to use it.

    To adapt to a support of sequences::

        optimizer = found.learner.inner_opt(found.meta_params, found.hparams)
        start = found.learner.start(found.meta_params)
        adapted = adapt(found.loss_fn, optimizer, start, support, found.inner)

    Attributes:
      model: the model.
      loss_fn: next-token loss of the model, in nats a token.
      learner: what was meta-learned.
      inner: the inner loop that it was trained with.
      meta_params: what was learned.
      hparams: scalars of the end of the training, with the inner rate that the run's results
        name for the trained number of inner steps.
      config: languages, model and inner loop of the run.
    """

    model: Model
    loss_fn: LossFn
    learner: Learner
    inner: InnerLoop
    meta_params: MetaParams
    hparams: Hparams
    config: LanguageConfig


def load(run: Path | str, row: str, seed: int | None = None) -> Loaded:
    """Model, learner, meta-parameters and rates of a row of a finished run of `adapt_languages`.

    Only the directory of the run is read, and nothing in it is changed. Parts of one's own that
    the run was given as ``module:function`` are imported again.

    Args:
      run: directory of the run.
      row: name of the row, such as ``'MAML'``.
      seed: which of the run's seeds, if it has several; the first by default.

    Raises:
      UserError: the directory is not that of a finished run of `adapt_languages`, has no such
        row or seed, or its checkpoint is missing or damaged or of another model.
    """
    run = local_path(run)
    if not (run / "finished").is_file():
        raise UserError(f"{run} is not the directory of a finished run")
    saved = _read_config(run / "config.json")
    config = _as_config(saved)
    model = make_model(config)
    rows = {each.name: each.learner for each in make_rows(config, model)}
    if row not in rows:
        raise UserError(f"{run} has no row {row!r}; there are {', '.join(rows)}")
    learner = rows[row]
    seeds = list(saved.get("seeds") or [saved.get("comparison", {}).get("seed", 0)])
    if seed is not None and seed not in seeds:
        raise UserError(f"{run} has the seeds {', '.join(map(str, seeds))}, not {seed}")
    place = seeds.index(seed) if seed is not None else 0
    trained = run / f"seed-{seeds[place]}" if len(seeds) > 1 else run
    directory = checkpoint_directory(trained, row)
    if not directory.is_dir():
        raise UserError(f"{run} has no checkpoint of {row!r}: it was not trained in this run")
    with Checkpoints(directory, fingerprint=Fingerprint({}), read_only=True) as checkpoints:
        leaves = checkpoints.best_leaves()
    example = jax.eval_shape(lambda key: learner.init(model.init(key)), jax.random.key(0))
    hparams = {
        path.split("'")[1]: jnp.asarray(x) for path, x in leaves.items() if path[:8] == ".hparams"
    }
    rate = _rate(run, row, config.inner.num_steps, place)
    if rate is not None:
        hparams["inner_learning_rate"] = jnp.float32(rate)
    return Loaded(
        model=model,
        loss_fn=losses.next_token(model),
        learner=learner,
        inner=config.inner,
        meta_params=_meta_params(leaves, example, directory),
        hparams=hparams,
        config=config,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(read_text(path))
        is_config = {"tasks", "model"} <= saved.keys() and isinstance(saved["inner"], dict)
    except (ValueError, RecursionError, AttributeError, KeyError):
        is_config = False
    if not is_config:
        raise UserError(f"{path} is not the config of a run of adapt_languages")
    return saved


def _as_config(saved: dict[str, Any]) -> LanguageConfig:
    """A config from its JSON; fields that are not there have their defaults."""
    values = _fields_of(LanguageConfig, saved)
    values["inner"] = InnerLoop(**_fields_of(InnerLoop, saved["inner"]))
    return LanguageConfig(**values)


def _fields_of(config_type: type, saved: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_type)} & saved.keys()
    return {n: tuple(x) if isinstance(x := saved[n], list) else x for n in names}


def _rate(run: Path, row: str, num_steps: int, place: int) -> float | None:
    """The inner rate of a row in the results, after the trained number of steps."""
    column = step_column(num_steps)
    for record in read_json_lines(run / "results.jsonl"):
        if (record.get("row"), record.get("column")) == (row, column):
            rates = record.get("inner_learning_rate")
            return rates[place] if isinstance(rates, list) else rates
    return None


def _meta_params(leaves: dict[str, np.ndarray], example: MetaParams, directory: Path) -> MetaParams:
    """The saved meta-parameters in the structure of ``example``, whose leaves are shapes."""

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = f".meta_params{jax.tree_util.keystr(path)}"
        value = leaves.get(name)
        if value is None and 0 in like.shape:  # storage has no empty arrays
            return jnp.zeros(like.shape, like.dtype)
        if value is None or value.shape != like.shape:
            there = "missing" if value is None else f"of shape {list(value.shape)}"
            raise UserError(
                f"{name} is {there} in {directory} and {list(like.shape)} in the model and "
                "learner of the config"
            )
        return jnp.asarray(value, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, example)
