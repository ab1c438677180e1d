"""A trained row, rebuilt from the directory of its run."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt import losses
from metaopt.errors import UserError
from metaopt.files import local_path, read_json, read_json_lines
from metaopt.inner_loop import InnerLoop
from metaopt.languages import LanguageConfig, make_model, make_rows
from metaopt.ranges import field_types
from metaopt.reporting.results import step_column
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.host_leaves import place
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
    saved, config = _read_config(run / "config.json")
    model = make_model(config)
    rows = {each.name: each.learner for each in make_rows(config, model)}
    if row not in rows:
        raise UserError(f"{run} has no row {row!r}; there are {', '.join(rows)}")
    learner = rows[row]
    seeds = list(saved.get("seeds") or [saved.get("comparison", {}).get("seed", 0)])
    if seed is not None and seed not in seeds:
        raise UserError(f"{run} has the seeds {', '.join(map(str, seeds))}, not {seed}")
    index = seeds.index(seed) if seed is not None else 0
    trained = run / f"seed-{seeds[index]}" if len(seeds) > 1 else run
    directory = checkpoint_directory(trained, row)
    if not directory.is_dir():
        raise UserError(f"{run} has no checkpoint of {row!r}: it was not trained in this run")
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
    rate = _rate(run, row, config.inner.num_steps, index)
    if rate is not None:
        hparams["inner_learning_rate"] = jnp.float32(rate)
    return Loaded(
        model=model,
        loss_fn=losses.next_token(model),
        learner=learner,
        inner=config.inner,
        meta_params=meta_params,
        hparams=hparams,
        config=config,
    )


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
    return saved, LanguageConfig(**fields)


def _rate(run: Path, row: str, num_steps: int, index: int) -> float | None:
    """The inner rate of a row in the results, after the trained number of steps."""
    column = step_column(num_steps)
    for record in read_json_lines(run / "results.jsonl"):
        if (record.get("row"), record.get("column")) == (row, column):
            rates = record.get("inner_learning_rate")
            return rates[index] if isinstance(rates, list) else rates
    return None
