"""A GGUF file: one file with config, tokenizer and weights, these quantised or not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from metaopt.errors import UserError
from metaopt.models import TransformerConfig
from metaopt.pretrained.architectures import GGUF_LAYOUTS, from_gguf
from metaopt.pretrained.huggingface import naming
from metaopt.pretrained.layout import DType, to_params
from metaopt.types import Params

_CONTROL = 3  # type of a token that stands for no text
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(digits: int) -> list[dict[str, Any]]:
    pattern = {"Regex": _SPLIT.replace("{1,DIGITS}", "" if digits == 1 else f"{{1,{digits}}}")}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [cut, _BYTES | {"use_regex": False}]


PRE_TOKENIZERS = {
    "gpt-2": [_BYTES],
    "smollm": [_DIGITS, _BYTES],
    "llama-bpe": _split(3),
    "qwen2": _split(1),
}
"""How text is cut before pairs are merged, by ``tokenizer.ggml.pre``."""


def read_gguf(path: Path, dtype: DType) -> tuple[TransformerConfig, Params, str | None]:
    """Config, dequantised parameters and the JSON of the tokenizer, None if it is of another kind.

    Raises:
      UserError: the file cannot be read, is cut short, or holds an architecture or a quantisation
        that is not known.
    """
    library = _library()
    with naming(path, "is no whole GGUF file", Exception):
        reader = library.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        with naming(path, f"tensor {name} cannot be dequantised", Exception):
            return library.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])

    with naming(path):
        config = from_gguf(fields, set(tensors))
        layout = GGUF_LAYOUTS[fields["general.architecture"]]
        params = to_params(config, layout, shapes, read, dtype)
    return config, params, tokenizer_of(fields)


def tokenizer_of(fields: dict[str, Any]) -> str | None:
    """The JSON, of the library ``tokenizers``, of byte pair encoding that a file describes."""
    pre = PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre is None:
        return None
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = [
        {
            "id": i,
            "content": token,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "post_processor": None,
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    return json.dumps(definition, ensure_ascii=False)


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError(
            "GGUF files need the library gguf: pip install 'metaopt[pretrained]'"
        ) from None
    return SimpleNamespace(GGUFReader=gguf.GGUFReader, dequantize=gguf.quants.dequantize)
