"""Tokens longer than a byte: byte-level tokenizers of the library ``tokenizers``.

A tokenizer is a JSON file of that library, or byte pair encoding that is trained here (Sennrich et
al., 2016). Every token of a byte-level tokenizer stands for some bytes, so any text of UTF-8 is
encoded and decoded exactly, and a loss in nats a token becomes bits a byte by dividing by the bytes
that the tokens stand for.
"""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metaopt.errors import UserError
from metaopt.tasks.codecs import Codec

if TYPE_CHECKING:
    import tokenizers

SMALLEST = 257
"""Fewest tokens of a trained tokenizer: the bytes, and one that stands for two."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Byte pair encoding trained on texts, as the JSON of the library; always the same for them.

    Args:
      texts: texts, such as those of the training domains.
      vocab_size: V; fewer tokens are learned where the texts have too few different pairs.

    Raises:
      UserError: ``tokenizers`` is not installed, or ``vocab_size`` below `SMALLEST`.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"a tokenizer of {vocab_size} tokens: it takes at least {SMALLEST}")
    library = _library()
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(_characters()),
        show_progress=False,
        special_tokens=[],
    )
    trained.train_from_iterator(texts, trainer)
    return trained.to_str()


def tokenizer(definition: str, name: str) -> Codec:
    """The codec of a byte-level tokenizer.

    Args:
      definition: JSON of the library, as `train_bpe` returns it.
      name: what the tokens are, in words.

    Raises:
      UserError: ``tokenizers`` is not installed, the JSON is not its, or not of a byte-level
        tokenizer that leaves a text as it is.
    """
    try:
        found = json.loads(definition)
        built = _library().Tokenizer.from_str(definition)
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{name} is no JSON of the library tokenizers: {error}") from None
    if not _is_byte_level(found) or found.get("normalizer"):
        raise UserError(
            f"{name} is not byte-level, or changes a text before it cuts it: take bytes, bpe:SIZE "
            "or one like GPT-2's"
        )
    built.no_padding()
    built.no_truncation()
    built.encode_special_tokens = True  # marks that are written out in a text are text
    of_token = _bytes_of_tokens(built)

    def encode(data: bytes) -> np.ndarray:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} takes UTF-8, and byte {error.start} is none") from None
        tokens = np.array(built.encode(text, add_special_tokens=False).ids, np.int32)
        if decode(tokens) != data:
            raise UserError(f"{name} does not give this text back: take bytes or bpe:SIZE")
        return tokens

    def decode(tokens: Sequence[int] | np.ndarray) -> bytes:
        return b"".join(of_token[int(token)] for token in np.asarray(tokens))

    return Codec(name, len(of_token), encode, decode, is_text=True, opening=b"\n")


def bytes_of(codec: Codec) -> np.ndarray:
    """The number of bytes that each token stands for, int32 ``[V]``."""
    return np.array([len(codec.decode([token])) for token in range(codec.vocab_size)], np.int32)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "tokenizers other than bytes need the library: pip install tokenizers"
        ) from None
    return tokenizers


def _is_byte_level(definition: Any) -> bool:
    """Whether the decoder, or one of its parts, is byte-level."""
    decoder = definition.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _bytes_of_tokens(built: "tokenizers.Tokenizer") -> list[bytes]:
    """The bytes of each token; those of tokens that stand for none, such as marks, are empty."""
    of_character = {character: byte for byte, character in enumerate(_characters())}
    special = built.get_added_tokens_decoder()
    found = []
    for token in range(built.get_vocab_size()):
        characters = built.id_to_token(token) if token not in special else ""
        try:
            found.append(bytes(of_character[c] for c in characters or ""))
        except KeyError:
            found.append(b"")
    return found


def _characters() -> list[str]:
    """The character that a byte-level tokenizer writes for each byte, 256 of them.

    What is printable in Latin-1 stands for itself, the others are numbered from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
