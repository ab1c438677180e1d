"""Text as tokens and back: what the tokens of a vocabulary are called.

A model knows numbers from 0 to V - 1. What they mean is said by a `Codec`: bytes of text, or
symbols such as letters, of tasks that are no text.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaopt.errors import UserError


class Codec(NamedTuple):
    """How text is written as tokens.

    Attributes:
      name: what the tokens are, in words.
      vocab_size: V.
      encode: bytes of text to int32 tokens ``[n]``. It raises UserError if they hold something
        that is not in the vocabulary.
      decode: integers ``[n]`` to bytes of text.
      is_text: whether the bytes of the text are what counts: losses are then given in bits a byte,
        and in nats a token otherwise.
      opening: text to continue if none is given, of one token.
    """

    name: str
    vocab_size: int
    encode: Callable[[bytes], np.ndarray]
    decode: Callable[[Sequence[int] | np.ndarray], bytes]
    is_text: bool
    opening: bytes

    def show(self, tokens: Any) -> str:
        """Tokens as text, with ``�`` for what is not UTF-8."""
        return self.decode(np.asarray(tokens)).decode("utf-8", errors="replace")


BYTES = Codec(
    name="bytes",
    vocab_size=256,
    encode=lambda data: np.frombuffer(data, np.uint8).astype(np.int32),
    decode=lambda tokens: np.asarray(tokens).astype(np.uint8).tobytes(),
    is_text=True,
    opening=b"\n",
)


def letters(vocab_size: int) -> Codec:
    """Tokens as the letters a to z, and from 26 on as numbers: ``<26>``, ``<27>`` ..."""
    return symbols([chr(ord("a") + t) if t < 26 else f"<{t}>" for t in range(vocab_size)])


def symbols(names: Sequence[str]) -> Codec:
    """Tokens by name; line breaks in a text are passed over.

    Args:
      names: the name of each token in their order, all different: one character, or a number in
        angle brackets.
    """
    number = {name: token for token, name in enumerate(names)}
    vocabulary = f"{len(names)} symbols, {names[0]!r} to {names[-1]!r}"

    def encode(data: bytes) -> np.ndarray:
        found = re.findall(r"<\d+>|[^\r\n]", data.decode("utf-8", errors="replace"))
        unknown = next((name for name in found if name not in number), None)
        if unknown is not None:
            raise UserError(f"{unknown!r} is not in the vocabulary of {vocabulary}")
        return np.array([number[name] for name in found], np.int32)

    def decode(tokens: Sequence[int] | np.ndarray) -> bytes:
        return "".join(names[int(token)] for token in np.asarray(tokens)).encode()

    return Codec(vocabulary, len(names), encode, decode, False, names[0].encode())
