"""Language models that adapt: tasks, model and learners from the config of a run.

What `experiments.adapt_languages` trains is decided by a `LanguageConfig`, which a run keeps in
its ``config.json``: with it `metaopt.load` rebuilds model and learner anywhere. Tasks, a model
and rows of one's own are given as ``module:function``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from metaopt import learners, meta_gradients, models
from metaopt.comparison import ComparisonConfig, Row, check_settings, select
from metaopt.diagnostics import feasible
from metaopt.errors import UserError
from metaopt.inner_loop import InnerLoop
from metaopt.learners.maml import InnerOptimizer
from metaopt.losses import next_token
from metaopt.optimizers.inner import INNER_OPTIMIZERS, OptimizerName
from metaopt.parts import load_part, make_part
from metaopt.pretrained import Pretrained, open_pretrained
from metaopt.pretrained.packages import fetched
from metaopt.pytrees import digest_of
from metaopt.ranges import (
    Checked,
    Count,
    CountOr0,
    Heads,
    Layers,
    Length,
    Seed,
    Width,
    shared_fields,
)
from metaopt.tasks.ciphers import Alphabet, Cipher, CipherConfig, KeyLength, ciphers
from metaopt.tasks.ciphers import codec as cipher_codec
from metaopt.tasks.ciphers import digest as cipher_digest
from metaopt.tasks.codecs import Codec, letters
from metaopt.tasks.markov import Concentration, MarkovConfig, Order, Prior, Symbols, markov
from metaopt.tasks.sources.text import data_directory
from metaopt.tasks.text import OF_MODEL, TextConfig, text
from metaopt.tasks.text import digest as text_digest
from metaopt.tasks.text import make_codec as text_codec
from metaopt.types import Estimator, Learner, Model, TaskFamily

ModelName = Literal["bigram", "rnn", "gru", "lstm", "transformer", "pretrained"]
PRIORS: dict[str, Prior] = {"markov": "rows", "markov-symmetric": "symmetric"}
"""The prior of the languages by the name of the tasks."""
BASELINE = "joint pretraining"
"""The row that others are compared with; its meta-steps see the same tokens as theirs."""
EQUAL_OPERATIONS = "joint pretraining, equal operations"
"""The baseline of a run that has it: it spends as many counted operations as MAML does, and so
sees many more tokens."""
LAST_STEP = "MAML, last step"
"""MAML judged in training by the query loss after the last step alone."""
USUAL = "usual start"
"""The untrained row of a pretrained model, whose inner rate alone is tuned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig(Checked):
    """Languages, the model of them, and how it adapts.

    Attributes:
      tasks: markov, markov-symmetric, ciphers, text (with --folder), stdlib, tfds:NAME, or
        module:function of your own, which takes nothing and returns a `TaskFamily`.
      folder: Folder of text, one file a domain; for ciphers, of books.
      model: bigram, rnn, gru, lstm, transformer, pretrained, or module:function of your own, which
        takes what it needs of vocab_size, width, num_layers and num_heads, and returns a `Model`.
      pretrained: Folder of Hugging Face or GGUF file of the model pretrained; the one of metaopt
        model smollm2 if not given.
      adapter: What of the pretrained model adapts; the rest is frozen.
      width: Width of the recurrent and transformer models.
      num_layers: Number of layers of the recurrent and transformer models.
      num_heads: Number of heads of the transformer.
      compute_dtype: Dtype of the activations of the transformer, and of what is frozen of a
        pretrained one.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, tokens in a sequence.
      vocab_size: Vocabulary of the Markov languages and of tasks of your own; bytes have 256.
      order: Order of the Markov languages.
      concentration: Concentration of the Dirichlet prior of the Markov languages.
      prior_seed: Seed of what the languages of markov have in common.
      cipher: Cipher of the tasks of ciphers.
      key_length: Number of symbols of the key of the cipher vigenere.
      alphabet: Symbols of the tasks of ciphers.
      num_valid_domains: Number of domains of text held out for choosing rates and checkpoints.
      num_test_domains: Number of domains of text held out for the table.
      test_domains: Names of the domains of text held out for the table, instead of random ones.
      num_folds: Folds of the domains of text, each held out in turn; 0 for one split.
      kin: File of domains of text that are held out together, a group on a line.
      split_seed: Seed of the choice of held-out domains.
      skip_small: Leave out domains of text that are shorter than an episode.
      tokenizer: Tokens of text: bytes; bpe:SIZE, byte pair encoding trained on the training
        domains; or a JSON file of the library tokenizers. A pretrained model has its own.
      inner_optimizer: Optimiser of the inner loop, or module:function of your own, which takes
        the learning rate and returns an `optax.GradientTransformation`.
      inner: The inner loop.
      rows: Names of the rows to run, the main ones if none; or module:function of your own, which
        takes what it needs of model, inner_optimizer and num_steps, and returns a
        `metaopt.comparison.Row`.
    """

    tasks: str = "markov"
    folder: str | None = None
    model: ModelName | str = "bigram"
    pretrained: str | None = None
    adapter: models.AdapterConfig = dataclasses.field(default_factory=models.AdapterConfig)
    width: Width = 64
    num_layers: Layers = 2
    num_heads: Heads = 2
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    num_support: Count = 4
    num_query: Count = 8
    length: Length = 32
    vocab_size: Symbols = 16
    order: Order = 1
    concentration: Concentration = 0.3
    prior_seed: Seed = 0
    cipher: Cipher = "substitution"
    key_length: KeyLength = 5
    alphabet: Alphabet = "letters"
    num_valid_domains: Count = 8
    num_test_domains: Count = 10
    test_domains: tuple[str, ...] = ()
    num_folds: CountOr0 = 0
    kin: str | None = None
    split_seed: Seed = 0
    skip_small: bool = False
    tokenizer: str = "bytes"
    inner_optimizer: OptimizerName | str = "sgd"
    inner: InnerLoop = dataclasses.field(default_factory=InnerLoop)
    rows: tuple[str, ...] = ()


def is_text(tasks: str) -> bool:
    """Whether tasks of this name are domains of bytes."""
    return tasks in ("text", "stdlib") or tasks.startswith("tfds:")


def is_cipher(tasks: str) -> bool:
    """Whether tasks of this name are texts under ciphers."""
    return tasks == "ciphers"


def is_own(name: str) -> bool:
    """Whether a name is ``module:function``, and not ``tfds:NAME``."""
    return ":" in name and not name.startswith("tfds:")


def is_pretrained(config: LanguageConfig) -> bool:
    """Whether the model of a config was trained elsewhere, and a part of it adapts."""
    return config.model == "pretrained"


def is_markov(tasks: str) -> bool:
    """Whether tasks of this name are Markov languages."""
    return tasks in PRIORS


def markov_config(config: LanguageConfig) -> MarkovConfig:
    """The Markov languages of a config."""
    return MarkovConfig(prior=PRIORS[config.tasks], **shared_fields(MarkovConfig, config))


def cipher_config(config: LanguageConfig) -> CipherConfig:
    """The texts under ciphers of a config."""
    return CipherConfig(**shared_fields(CipherConfig, config))


def make_family(config: LanguageConfig, fold: int = 0) -> TaskFamily:
    """The task family of a config, and of its fold if it has several.

    Raises:
      UserError: there are no such tasks, or their folder is missing, or given and not read.
    """
    _check_tasks(config)
    if is_markov(config.tasks):
        return markov(markov_config(config))
    if is_cipher(config.tasks):
        return ciphers(cipher_config(config))
    if is_own(config.tasks):
        return make_part("--tasks", config.tasks, TaskFamily)
    codec = make_codec(config) if is_pretrained(config) else None
    return text(text_config(config, fold), codec)


def _check_tasks(config: LanguageConfig) -> None:
    tasks = config.tasks
    if is_pretrained(config) and not is_text(tasks):
        raise UserError(f"--model pretrained reads text, not {tasks}: give --tasks text or stdlib")
    if is_pretrained(config) and config.tokenizer != "bytes":
        raise UserError("--model pretrained has a tokenizer of its own: leave --tokenizer out")
    if config.pretrained is not None and not is_pretrained(config):
        raise UserError(f"--pretrained is for --model pretrained, not {config.model}")
    if config.folder is not None and tasks not in ("text", "ciphers"):
        raise UserError(
            f"--folder is for --tasks text or ciphers, not {tasks}: leave one of them out"
        )
    if tasks == "text" and config.folder is None:
        raise UserError("--tasks text needs --folder, with one file a domain")
    if not (is_markov(tasks) or is_cipher(tasks) or is_text(tasks) or is_own(tasks)):
        raise UserError(
            f"unknown tasks {tasks!r}: {', '.join(PRIORS)}, ciphers, text, stdlib, tfds:NAME or "
            "module:function of your own"
        )


def text_config(config: LanguageConfig, fold: int = 0) -> TextConfig:
    """The domains of text of a config, and of its fold if it has several."""
    source = config.folder if config.tasks == "text" else config.tasks
    found = TextConfig(source=str(source), fold=fold, **shared_fields(TextConfig, config))
    return dataclasses.replace(found, tokenizer=OF_MODEL) if is_pretrained(config) else found


def digest(config: LanguageConfig) -> str | None:
    """The digest of files that the tasks of a config are read from; None if there are none."""
    if is_cipher(config.tasks):
        return cipher_digest(cipher_config(config))
    if not is_text(config.tasks):
        return None
    found = text_digest(text_config(config))
    if is_pretrained(config):
        model = _open(config.pretrained, config.compute_dtype)
        read = model.params, np.frombuffer(model.tokenizer.encode(), np.uint8)
        found = f"{found or ''}-{digest_of(read)[:16]}"
    return found


@functools.lru_cache(maxsize=1)
def _open(path: str | None, dtype: Literal["float32", "bfloat16"]) -> Pretrained:
    """The pretrained model, which is read once for all that asks for it."""
    return open_pretrained(path or fetched("smollm2", data_directory(None)), dtype)


def pretrained_config(config: LanguageConfig) -> models.TransformerConfig | None:
    """The transformer of a config that was trained elsewhere; None for other models."""
    if not is_pretrained(config):
        return None
    return _open(config.pretrained, config.compute_dtype).config


def transformer_config(config: LanguageConfig) -> models.TransformerConfig | None:
    """The transformer of a config that is trained here; None for other models."""
    if config.model != "transformer" or is_pretrained(config):
        return None
    fields = shared_fields(models.TransformerConfig, config)
    return models.TransformerConfig(**{**fields, "vocab_size": make_codec(config).vocab_size})


def make_codec(config: LanguageConfig) -> Codec:
    """How the tokens of the tasks of a config are written as text."""
    if is_pretrained(config):
        return _open(config.pretrained, config.compute_dtype).codec
    if is_cipher(config.tasks):
        return cipher_codec(cipher_config(config))
    return text_codec(text_config(config)) if is_text(config.tasks) else letters(config.vocab_size)


def make_model(config: LanguageConfig) -> Model:
    """The model of a config, of the vocabulary of its tasks.

    Raises:
      UserError: there is no such model.
    """
    if is_pretrained(config):
        found = _open(config.pretrained, config.compute_dtype)
        return models.adapting(found.config, config.adapter, found.params)
    vocab_size = make_codec(config).vocab_size
    if is_own(config.model):
        sizes = {name: getattr(config, name) for name in ("width", "num_layers", "num_heads")}
        return make_part("--model", config.model, Model, {"vocab_size": vocab_size, **sizes})
    if config.model == "bigram":
        return models.bigram(vocab_size)
    transformer = transformer_config(config)
    if transformer is not None:
        return models.transformer(transformer)
    if config.model in ("rnn", "gru", "lstm"):
        return models.recurrent(vocab_size, config.width, config.model, config.num_layers)
    choices = ", ".join(get_args(ModelName))
    raise UserError(
        f"unknown model {config.model!r}: choose one of {choices}, or module:function of your own"
    )


def make_rows(config: LanguageConfig, model: Model) -> list[Row]:
    """The rows of a config, in the order of the table, those of one's own last.

    Raises:
      UserError: there is no row of a name.
    """
    optimizer = load_part(
        "--inner-optimizer", config.inner_optimizer, ("learning_rate",), INNER_OPTIMIZERS
    )
    steps = config.inner.num_steps
    arguments = {"model": model, "inner_optimizer": optimizer, "num_steps": steps}
    own = [make_part("--rows", name, Row, arguments) for name in config.rows if is_own(name)]
    named = [name for name in config.rows if not is_own(name)]
    known = _library_rows(config, model, optimizer)
    main = [row.name for row in known if row.name not in (EQUAL_OPERATIONS, LAST_STEP)]
    return [*([] if own and not named else select(known, named or main)), *own]


def _library_rows(config: LanguageConfig, model: Model, optimizer: InnerOptimizer) -> list[Row]:
    steps = config.inner.num_steps
    maml, reverse = learners.maml(optimizer), meta_gradients.reverse

    def row(name: str, learner: Learner, estimator: Estimator | None) -> Row:
        return Row(name, learner, estimator, optimizer)

    of_maml = row("MAML", maml, reverse)
    joint = row(BASELINE, maml, meta_gradients.joint)
    rows = [
        row(USUAL if is_pretrained(config) else "random init", maml, None),
        joint,
        joint._replace(name=EQUAL_OPERATIONS, spends_as=of_maml),
        row("Reptile", maml, meta_gradients.reptile),
        row("FOMAML", maml, meta_gradients.first_order),
        *([row("ANIL", learners.anil(model, optimizer), reverse)] if model.head else []),
        of_maml,
        of_maml._replace(
            name=LAST_STEP, inner=dataclasses.replace(config.inner, query_loss="last")
        ),
        row("per-layer-per-step", learners.per_layer_per_step(optimizer, num_steps=steps), reverse),
        row("Meta-SGD", learners.meta_sgd(optimizer, num_steps=steps), reverse),
    ]
    if is_markov(config.tasks):
        adagrad = INNER_OPTIMIZERS["adagrad"]
        learner = learners.meta_sgd(adagrad, num_steps=steps)
        rows.append(Row("Meta-SGD on Adagrad", learner, reverse, adagrad))
    return rows


def check(
    config: LanguageConfig, comparison: ComparisonConfig, rows: Sequence[Row], model: Model
) -> None:
    """Checks, before anything is compiled, that rows can be compared on the tasks of a config.

    Raises:
      UserError: there are no such tasks, or the settings do not fit one another, the devices or
        the memory, see `metaopt.comparison.check_settings` and
        `metaopt.diagnostics.feasible.check`.
    """
    _check_tasks(config)
    check_settings(config.inner, comparison)
    if is_markov(config.tasks):
        feasible.check_languages(markov_config(config), comparison.most_episodes)
    feasible.check(
        [(row.learner, row.estimator, config.inner) for row in rows],
        model.init,
        next_token(model),
        feasible.tokens(config.num_support, config.length),
        feasible.tokens(config.num_query, config.length),
        comparison.most_episodes,
    )
