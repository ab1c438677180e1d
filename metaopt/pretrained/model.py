"""A pretrained model: opened, and written for others."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from metaopt.adapted_file import read_about, read_adapted, save_adapted
from metaopt.errors import UserError
from metaopt.files import local_path
from metaopt.frozen import merge
from metaopt.models import TransformerConfig, transformer
from metaopt.models.adapters import AdapterConfig, merged, split
from metaopt.pretrained.gguf_file import read_gguf
from metaopt.pretrained.huggingface import (
    naming,
    read_folder,
    tokenizer_without_forms,
    write_folder,
)
from metaopt.pretrained.layout import DType
from metaopt.pytrees import digest_of
from metaopt.ranges import check_value
from metaopt.tasks.codecs import Codec
from metaopt.tasks.tokenizers import tokenizer
from metaopt.types import Model, Params


class Pretrained(NamedTuple):
    """A language model that was trained elsewhere.

    Attributes:
      config: its shape.
      model: the transformer of that config.
      params: its parameters.
      codec: text to its tokens and back; its tokens may be fewer than the model's.
      tokenizer: the JSON of its tokenizer, as it was read.
    """

    config: TransformerConfig
    model: Model
    params: Params
    codec: Codec
    tokenizer: str


def open_pretrained(path: Path | str, dtype: DType = "float32") -> Pretrained:
    """A model from a folder of Hugging Face or a GGUF file.

    Args:
      path: of the folder or file.
      dtype: of the parameters, and of the computation in the layers; softmax, norms and head are
        float32 in either.

    Raises:
      UserError: there is nothing there, a file is missing, damaged or cut short, a tensor is
        missing, not known or of another shape than the config says, the architecture or its
        tokenizer is not known, or a library that reads it is not installed.
    """
    path = local_path(path)
    check_value("dtype", dtype, DType)
    if path.is_dir():
        config, params, definition = read_folder(path, dtype)
    elif path.is_file():
        config, params, definition = read_gguf(path, dtype)
    else:
        raise UserError(f"{path} is not there: give a folder of Hugging Face or a GGUF file")
    if definition is None:
        raise UserError(
            f"{path} has no byte-level tokenizer that is known here: for a folder, put its "
            "tokenizer.json there; for a GGUF file, take the folder that it was made of"
        )
    with naming(path):
        codec = tokenizer(tokenizer_without_forms(definition), "the tokenizer")
        if codec.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {codec.vocab_size} tokens, and the model {config.vocab_size}"
            )
    if dtype == "bfloat16":
        config = dataclasses.replace(config, compute_dtype=dtype)
    return Pretrained(config, transformer(config), params, codec, definition)


def export(folder: Path | str, found: Pretrained, params: Params | None = None) -> None:
    """Writes a model as a folder of Hugging Face, in the dtype of its parameters.

    Args:
      folder: new folder.
      found: the model.
      params: parameters to write, such as adapted ones; its own if None. Products of low rank are
        added to their matrices.

    Raises:
      UserError: the folder is there already or cannot be written, or the library is not installed.
    """
    given = merged(found.params if params is None else params)
    write_folder(local_path(folder), found.config, given, found.tokenizer)


def save_adapter(path: Path | str, found: Pretrained, config: AdapterConfig, fast: Params) -> None:
    """Writes what of a model has adapted, alone, to a new npz file.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    about = {"adapter": dataclasses.asdict(config), "model": digest_of(found.params)}
    save_adapted(path, fast, about)


def lay_over(path: Path | str, found: Pretrained) -> Pretrained:
    """The model with what `save_adapter` wrote laid over it.

    Raises:
      UserError: it is no such file or a damaged one, or of another model.
    """
    about = read_about(path)
    if about.get("model") != digest_of(found.params):
        raise UserError(f"{path} was not adapted from this model: give the one that it was")
    try:
        config = AdapterConfig(**{k: _as_field(v) for k, v in about["adapter"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say what has adapted ({error}): adapt again") from None
    example = jax.eval_shape(lambda p: split(config, p, jax.random.key(0))[0], found.params)
    return found._replace(params=merge(found.params, read_adapted(path, example)))


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
