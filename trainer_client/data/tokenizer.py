"""Text to token ids and back: the 256 byte values, or byte pairs (BPE) learned from the data."""

import hashlib
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from peer.errors import DataError
from peer.settings import require_extra

BYTES = 256
"""The size of the byte vocabulary."""
MOST_TOKENS = 2**16
"""A token takes two bytes on disk."""
_LEARNED_FROM = 2**26
"""Byte pairs are learned from about this many characters, spread over the whole text."""
_MOST_ADDED = 16
"""The most tokens that a tokenizer may add to each text, such as the first and the last one."""

Tokens = NDArray[np.uint8] | NDArray[np.uint16]


class Tokenizer(Protocol):
    """How a model reads text. Any text can be encoded."""

    @property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for, by id."""
        ...

    def encode(self, *texts: str) -> Tokens:
        """The tokens of the texts, one text after another."""
        ...

    def encode_prompt(self, prompt: str) -> Tokens:
        """The tokens of a text that goes on, without a mark that ends it."""
        ...

    def to_json(self) -> str:
        """JSON from which `load_tokenizer` restores the tokenizer."""
        ...


class ByteTokenizer:
    """Each byte of the text's UTF-8 is a token."""

    def __init__(self) -> None:
        self.token_bytes: list[bytes] = [bytes([value]) for value in range(BYTES)]

    def encode(self, *texts: str) -> Tokens:
        return np.frombuffer("".join(texts).encode(), dtype=np.uint8)

    def encode_prompt(self, prompt: str) -> Tokens:
        return self.encode(prompt)

    def to_json(self) -> str:
        return ""


class BytePairTokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2), in the format of the library `tokenizers`."""

    def __init__(self, json: str) -> None:
        """Raises DataError if it is not such a tokenizer."""
        require_extra("tokenizers", "bpe", "a tokenizer of byte pairs")
        from tokenizers import Tokenizer as Library
        from tokenizers.pre_tokenizers import ByteLevel

        try:
            self._library = Library.from_str(json)
        except BaseException as error:
            # the library raises plain Exception, and something wider if it panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"this is not a tokenizer: {error}") from error
        stands_for = byte_letters()
        vocabulary = self._library.get_vocab()
        if (
            sorted(vocabulary.values()) != list(range(len(vocabulary)))
            or len(vocabulary) > MOST_TOKENS
            or not set(ByteLevel.alphabet()) <= vocabulary.keys() <= _words(vocabulary, stands_for)
        ):
            raise DataError(f"this is not a tokenizer of byte pairs with at most {MOST_TOKENS} tokens")
        if (added := self._library.num_special_tokens_to_add(False)) > _MOST_ADDED:
            raise DataError(f"this tokenizer adds {added} tokens to each text; at most {_MOST_ADDED}")
        # parts that have nothing to do with training
        self._library.no_padding()
        self._library.no_truncation()
        if max(self._library.encode("a").ids, default=0) >= len(vocabulary):
            raise DataError("this tokenizer adds tokens that are not in its vocabulary")
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        self.token_bytes: list[bytes] = [bytes(stands_for[letter] for letter in token) for token in by_id]
        # marks that it adds to each text, such as <|begin_of_text|>, stand for none of the text's bytes
        for mark in self._library.get_added_tokens_decoder().keys() & set(self._library.encode("").ids):
            self.token_bytes[mark] = b""
        text = self._library.encode("a", add_special_tokens=False).ids
        marked = self._library.encode("a").ids
        ends = (marked[: len(marked) - count][-len(text) :] == text for count in range(len(marked)))
        self._end_marks = next((count for count, is_end in enumerate(ends) if is_end), 0)
        self._json = json

    @classmethod
    def learn(cls, text: Iterable[str], characters: int, vocabulary: int) -> "BytePairTokenizer":
        """`characters`: roughly how many the text has. A short text yields fewer than `vocabulary` tokens."""
        require_extra("tokenizers", "bpe", "a tokenizer of byte pairs")
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        every = max(1, characters // _LEARNED_FROM)
        library.train_from_iterator(islice(text, 0, None, every), trainer)
        return cls(library.to_str())

    def encode(self, *texts: str) -> Tokens:
        """Encodes the texts in parallel, on all cores."""
        encoded = self._library.encode_batch_fast(list(texts))
        return np.fromiter(chain.from_iterable(each.ids for each in encoded), dtype=np.uint16)

    def encode_prompt(self, prompt: str) -> Tokens:
        tokens = self.encode(prompt)
        return tokens[: len(tokens) - self._end_marks]

    def to_json(self) -> str:
        return self._json


def load_tokenizer(json: str) -> Tokenizer:
    """Restores a tokenizer from its `to_json`. Raises DataError."""
    return BytePairTokenizer(json) if json else ByteTokenizer()


def read_tokenizer(name: str) -> Tokenizer:
    """`name`: `bytes`, or the path of a `tokenizer.json`, the format of the library `tokenizers`. Raises DataError."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    try:
        return BytePairTokenizer(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no tokenizer {path}: give bytes, bpe, or the path of a tokenizer.json") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path}: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def byte_letters() -> dict[str, int]:
    """The byte that each letter of the library's byte-level alphabet stands for. Printable letters stand for
    themselves.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(BYTES) if value not in plain]
    letters = {chr(value): value for value in plain}
    return letters | {chr(BYTES + index): value for index, value in enumerate(others)}


def _words(vocabulary: Iterable[str], letters: Iterable[str]) -> set[str]:
    """The words of the vocabulary that consist only of these letters."""
    known = set(letters)
    return {word for word in vocabulary if known.issuperset(word)}
