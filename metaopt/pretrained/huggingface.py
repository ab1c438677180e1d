"""A folder of Hugging Face: ``config.json``, safetensors and ``tokenizer.json``, read and written.

Nothing in it is unpickled or run: weights are read from safetensors alone.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.files import inside, one_line, read_json, read_text, strict_json, write_text
from metaopt.models import TransformerConfig
from metaopt.pretrained.architectures import LAYOUTS, from_huggingface, to_huggingface
from metaopt.pretrained.layout import DType, Layout, to_params, to_tensors
from metaopt.types import Params

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIX = "transformer."  # of GPT-2's tensors, left out in some files


class Tensors(NamedTuple):
    """The tensors of one or more files.

    Attributes:
      shapes: of each, by name.
      read: ``name -> tensor``, read when it is called.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def read_folder(folder: Path, dtype: DType) -> tuple[TransformerConfig, Params, str | None]:
    """Config, parameters and the JSON of the tokenizer, None if there is none.

    Raises:
      UserError: the folder lacks a file, one is damaged, or the architecture is not known.
    """
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict):
        raise UserError(f"{folder} has no readable {CONFIG}: give a folder of Hugging Face")
    with naming(folder / CONFIG):
        config = from_huggingface(found)
    layout = LAYOUTS[found["model_type"]]
    with open_tensors(folder) as tensors, naming(folder):
        tensors = _usual(tensors, layout, config.tie_head)
        params = to_params(config, layout, tensors.shapes, tensors.read, dtype)
    definition = folder / TOKENIZER
    return config, params, read_text(definition) if definition.exists() else None


def write_folder(
    folder: Path, config: TransformerConfig, params: Params, tokenizer: str | None
) -> None:
    """Writes a model as a folder that `transformers` reads: all of it is there, or nothing.

    Raises:
      UserError: the folder is there already or cannot be written, or none of the architectures of
        Hugging Face is this one.
    """
    found = to_huggingface(config)
    if folder.exists():
        raise UserError(f"{folder} is there already: give another name, or move it away")
    tensors = to_tensors(config, LAYOUTS[found["model_type"]], params)
    save = _library().flax.save_file
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with one_line(folder, "written"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        dtype = str(next(iter(tensors.values())).dtype)
        write_text(unfinished / CONFIG, strict_json(found | {"torch_dtype": dtype}, str, 2) + "\n")
        if tokenizer is not None:
            write_text(unfinished / TOKENIZER, tokenizer)
        arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
        save(arrays, unfinished / WEIGHTS, metadata={"format": "pt"})
        unfinished.rename(folder)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """The tensors of a folder, in one file or in several that an index lists.

    Raises:
      UserError: there is no such file, or one is damaged.
    """
    files, library = _files(folder), _library()
    with contextlib.ExitStack() as stack:
        place: dict[str, Any] = {}
        for file in files:
            with naming(file, "is no whole file of safetensors", Exception):
                opened = stack.enter_context(library.safe_open(file, framework="flax"))
                place |= dict.fromkeys(opened.keys(), opened)
        shapes = {name: tuple(of.get_slice(name).get_shape()) for name, of in place.items()}
        yield Tensors(shapes, lambda name: np.asarray(place[name].get_tensor(name)))


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor a readable {INDEX}: other formats are not read, "
            "since they may run code"
        )
    files = [inside(folder, str(name)) for name in sorted(set(index["weight_map"].values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is missing, which {INDEX} lists: copy it there")
    return files


def _usual(tensors: Tensors, layout: Layout, is_tied: bool) -> Tensors:
    """The tensors by the names of the layout, without a second copy of a tied head."""
    begins = layout.names["embed"].startswith(_PREFIX)
    prefix = _PREFIX if begins and not any(n.startswith(_PREFIX) for n in tensors.shapes) else ""
    head = f"{layout.names['head']}.weight"
    shapes = {
        (name if name == head else prefix + name): shape
        for name, shape in tensors.shapes.items()
        if not (is_tied and name == head)
    }
    return Tensors(shapes, lambda name: tensors.read(name if name == head else name[len(prefix) :]))


@contextlib.contextmanager
def naming(
    path: Path, problem: str | None = None, errors: type[Exception] = UserError
) -> Iterator[None]:
    """Errors as a `UserError` that begins with a path."""
    try:
        yield
    except errors as error:
        what = f"{problem} ({' '.join(str(error).split())})" if problem else str(error)
        raise UserError(f"{path}: {what}") from None


def _library() -> Any:
    try:
        import safetensors
        import safetensors.flax
    except ImportError:
        raise UserError(
            "models of Hugging Face need the library safetensors: pip install 'metaopt[pretrained]'"
        ) from None
    return safetensors


def tokenizer_without_forms(definition: str) -> str:
    """A tokenizer's JSON without its NFC normaliser, so that every text is given back exactly.

    Text that is in that form already, as nearly all is, has the same tokens.
    """
    try:
        found = json.loads(definition)
    except ValueError:
        return definition  # what reads it says so
    if isinstance(found, dict) and (found.get("normalizer") or {}).get("type") == "NFC":
        return json.dumps(found | {"normalizer": None})
    return definition
