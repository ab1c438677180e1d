"""Text under a cipher whose key is drawn anew for every task: learning to learn, on real text.

No model can know the key, so joint pretraining cannot do better than the frequencies of the
symbols; a model that has learned to learn finds the key from the support. The plain text is
letters and blanks, or bytes, of whole books or of a text that comes with Python.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.errors import UserError
from metaopt.ranges import Checked, Count, Length, Range, Seed
from metaopt.tasks.codecs import BYTES, Codec, symbols
from metaopt.tasks.fresh import fresh_tasks
from metaopt.tasks.sources.text import folder_domains, python_help
from metaopt.types import Array, Batch, Key, TaskFamily

LETTERS = " abcdefghijklmnopqrstuvwxyz"
"""The symbols of the alphabet ``letters``, in the order of their numbers."""
VOCAB_SIZES = {"letters": len(LETTERS), "bytes": 256}

Alphabet = Literal["letters", "bytes"]
Cipher = Literal["substitution", "caesar", "vigenere", "reversed", "none"]
KeyLength = Annotated[int, Range(1, 1024)]
_MOST_SYMBOLS = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CipherConfig(Checked):
    """Which text, under which cipher, and how it is cut into episodes.

    Attributes:
      cipher: ``substitution`` renames the symbols by a random permutation; ``caesar`` moves each by
        the same number; ``vigenere`` by the numbers of a short key, in turn; ``reversed`` turns
        the order of the words round in half of the tasks; ``none`` leaves the text as it is.
      key_length: Number of symbols of the key of ``vigenere``.
      alphabet: ``letters``: a to z and the blank, without accents, all else a blank; or ``bytes``.
      folder: Folder of books, one file each; None for `pydoc_data.topics`, the 465,000
        characters of English that come with Python.
      num_support: S, sequences to adapt on.
      num_query: Q, sequences to be judged on.
      length: L, symbols in a sequence.
      num_valid_domains: Number of books held out for validation.
      num_test_domains: Number of books held out for the test.
      split_seed: Seed of the choice of held-out books.
    """

    cipher: Cipher = "substitution"
    key_length: KeyLength = 5
    alphabet: Alphabet = "letters"
    folder: str | None = None
    num_support: Count = 16
    num_query: Count = 8
    length: Length = 64
    num_valid_domains: Count = 3
    num_test_domains: Count = 6
    split_seed: Seed = 0

    @property
    def vocab_size(self) -> int:
        """V, the number of symbols."""
        return VOCAB_SIZES[self.alphabet]

    @property
    def passage(self) -> int:
        """Symbols of an episode: S + Q sequences of L + 1."""
        return (self.num_support + self.num_query) * (self.length + 1)


class Books(NamedTuple):
    """Texts, one after the other.

    Attributes:
      symbols: uint8 ``[N]``.
      starts: where each text starts, int32 ``[B]``.
      ends: the number of places, in this text and those before, where an episode can start,
        int32 ``[B]``.
    """

    symbols: Array
    starts: Array
    ends: Array


def ciphers(config: CipherConfig) -> TaskFamily:
    """Passages of text, each under a key of its own; int32 symbols ``[T, S, L]``.

    An episode is one passage, cut into S + Q sequences of L + 1 symbols that do not overlap:
    the first S are the support. Under the same key of a split, families that differ in their
    cipher alone have the same passages. Three splits share no book; of the one text that comes
    with Python they are its first 80 % and two times 10 %.

    Raises:
      UserError: the folder is missing or unreadable, has too few books, or a book is too short.
    """
    draw = functools.partial(_draw_examples, config)
    splits = tuple(_books(texts, config) for texts in read_books(config))
    return fresh_tasks(f"ciphers, {config.cipher}", draw, config.num_support, splits)


def read_books(config: CipherConfig) -> tuple[list[np.ndarray], ...]:
    """The plain texts for training, validation and test, each uint8 ``[n]``.

    Raises:
      UserError: see `ciphers`.
    """
    if config.folder is None:
        whole = to_symbols(python_help().encode(), config.alphabet)
        cuts = [len(whole) * 8 // 10, len(whole) * 9 // 10]
        return tuple([part] for part in np.split(whole, cuts))
    domains = folder_domains(Path(config.folder).expanduser())
    held_out = config.num_valid_domains + config.num_test_domains
    if len(domains) <= held_out:
        raise UserError(
            f"{config.folder} has {len(domains)} books, too few for {config.num_valid_domains} to "
            f"validate, {config.num_test_domains} to test and at least 1 to train on: add books "
            "or hold out fewer"
        )
    books = []
    for domain in domains:
        text = domain.read(0, domain.size).tobytes()
        books.append(to_symbols(text, config.alphabet))
        if len(books[-1]) < config.passage:
            raise UserError(
                f"{domain.name!r} has {len(books[-1])} symbols, and an episode needs "
                f"{config.passage}: remove it, or lower num_support, num_query or length"
            )
    order = np.random.default_rng(config.split_seed).permutation(len(books)).tolist()
    test, valid, train = np.split(order, [config.num_test_domains, held_out])
    return tuple([books[i] for i in sorted(part)] for part in (train, valid, test))


def digest(config: CipherConfig) -> str:
    """The digest of the plain texts.

    Raises:
      UserError: see `ciphers`.
    """
    found = hashlib.sha256()
    for texts in read_books(config):
        for text in texts:
            found.update(hashlib.sha256(text.tobytes()).digest())
    return found.hexdigest()[:16]


def to_symbols(text: bytes, alphabet: Alphabet) -> np.ndarray:
    """The symbols of a text, uint8 ``[n]``.

    For ``letters``, letters lose their case and accents, and each run of anything else is one
    blank. What is no UTF-8 is a blank too.
    """
    if alphabet == "bytes":
        return np.frombuffer(text, np.uint8)
    decomposed = unicodedata.normalize("NFKD", text.decode("utf-8", errors="replace").casefold())
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    plain = re.sub("[^a-z]+", " ", letters).strip().encode("ascii")
    codes = np.frombuffer(plain, np.uint8)
    return np.where(codes == ord(" "), 0, codes - ord("a") + 1).astype(np.uint8)


def codec(config: CipherConfig) -> Codec:
    """How the symbols of a config are written; a text for ``letters`` is read by `to_symbols`."""
    if config.alphabet == "bytes":
        return BYTES._replace(is_text=False)
    return symbols(LETTERS)._replace(
        encode=lambda data: to_symbols(data, "letters").astype(np.int32)
    )


def encrypt(config: CipherConfig, key: Key, plain: Array) -> Array:
    """A text under the cipher of a config, with a key drawn from ``key``; int32 ``[n]``."""
    size = config.vocab_size
    match config.cipher:
        case "substitution":
            return jax.random.permutation(key, size)[plain].astype(jnp.int32)
        case "caesar":
            return (plain + jax.random.randint(key, (), 0, size)) % size
        case "vigenere":
            shifts = jax.random.randint(key, (config.key_length,), 0, size)
            return (plain + shifts[jnp.arange(len(plain)) % config.key_length]) % size
        case "reversed":
            is_blank = plain == (0 if config.alphabet == "letters" else ord(" "))
            word = jnp.cumsum(is_blank) - is_blank  # a blank belongs to the word before it
            turned = plain[jnp.argsort(-word, stable=True)]
            return jnp.where(jax.random.bernoulli(key), turned, plain)
        case "none":
            return plain


def _books(texts: list[np.ndarray], config: CipherConfig) -> Books:
    sizes = np.array([len(text) for text in texts])
    places = sizes - config.passage + 1
    if sizes.sum() > _MOST_SYMBOLS or places.min() < 1:
        raise UserError(
            f"an episode of {config.passage} symbols does not fit a text of {sizes.min()}: lower "
            "num_support, num_query or length"
            if places.min() < 1
            else f"{sizes.sum()} symbols are more than {_MOST_SYMBOLS}: give fewer books"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    as_int32 = (x.astype(np.int32) for x in (starts, np.cumsum(places)))
    return Books(jnp.asarray(np.concatenate(texts)), *map(jnp.asarray, as_int32))


def _draw_examples(config: CipherConfig, key: Key, books: Books) -> Batch:
    place_key, cipher_key = jax.random.split(key)
    place = jax.random.randint(place_key, (), 0, books.ends[-1])
    book = jnp.searchsorted(books.ends, place, side="right")
    before = jnp.where(book > 0, books.ends[book - 1], 0)
    start = books.starts[book] + place - before
    plain = jax.lax.dynamic_slice(books.symbols, (start,), (config.passage,)).astype(jnp.int32)
    sequences = encrypt(config, cipher_key, plain).reshape(-1, config.length + 1)
    return Batch(sequences[:, :-1], sequences[:, 1:])
