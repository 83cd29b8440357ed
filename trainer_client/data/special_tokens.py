"""Tokens that are not text: those that an encoder-decoder reads and writes in addition to the tokenizer's."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer_client.data.tokenizer import Tokenizer

SENTINELS = 100
"""The number of sentinels: as many as T5 has."""
_MARK = re.compile(r"<mask>|<extra_id_(\d{1,2})>")


def has_marks(prompt: str) -> bool:
    """Whether the prompt names special tokens."""
    return _MARK.search(prompt) is not None


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of special tokens, which follow the tokenizer's."""

    first: int
    """The first id: the tokenizer's number of tokens."""

    @property
    def end(self) -> int:
        """Ends a text that the decoder writes, and also begins it (BART)."""
        return self.first

    @property
    def mask(self) -> int:
        """Stands for any number of tokens (BART)."""
        return self.first + 1

    @property
    def sentinels(self) -> range:
        """Each stands for a span of tokens (T5)."""
        return range(self.first + 2, self.first + 2 + SENTINELS)

    @property
    def vocabulary(self) -> int:
        """The number of tokens, including the tokenizer's."""
        return self.first + 2 + SENTINELS

    def written(self, token_bytes: Sequence[bytes]) -> list[bytes]:
        """How each token is written in a text, by id: `token_bytes`, and then T5's and BART's marks."""
        return [*token_bytes, b"", b"<mask>", *(b"<extra_id_%d>" % number for number in range(SENTINELS))]

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The tokens of a prompt, with marks encoded as special tokens. In a text to learn from, marks are ordinary
        text.
        """
        return list(self._encoded(text, tokenizer))

    def _encoded(self, text: str, tokenizer: Tokenizer) -> Iterator[int]:
        done = 0
        for mark in _MARK.finditer(text):
            yield from tokenizer.encode(text[done : mark.start()]).tolist()
            yield self.mask if mark[1] is None else self.sentinels[int(mark[1])]
            done = mark.end()
        yield from tokenizer.encode(text[done:]).tolist()
