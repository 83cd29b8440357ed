"""Texts cut into passages, and a file for more passages than fit into memory."""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from dht.memory import MAX_LABEL_CHARACTERS, MAX_LICENSE_CHARACTERS, Passage
from peer.formatting import printable
from peer.wire import memory_pb2
from trainer_client.data.sources import Document, read_documents
from trainer_client.memory.encoder import UNSPACED, words_of

WORDS = 100
"""The approximate number of words in a passage."""
UNKNOWN_LICENSE = "unknown"
_FEWEST, _MOST = 70, 130
"""The fewest and the most words of a passage that ends at the end of a sentence. The last passage of a text may have
fewer.
"""
_LONGEST = 2000
"""The most characters of a passage, however few words they are."""
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]+")
_SPACE = re.compile(r"\s+")
_END_OF_SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")
_DIGEST_BYTES = 16


def read_passages(
    files: Sequence[Path], field: str = "text", title_field: str = "title", license: str = ""
) -> Iterator[Passage]:
    """The passages of all documents, in order.

    A line or row has its title in the field `title_field`, and its licence in the field `license`. For all others, the
    title is the file's name, and the licence the given one. Raises DataError, which names the place of anything that is
    not text.
    """
    for document in read_documents(files, field, (title_field, "license")):
        title, source, terms = _labels(document, title_field, license)
        for offset, text in split(document.pieces):
            yield Passage(text, title, source, offset, terms)


def split(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The passages of a text and where each begins, in characters. They do not overlap.

    A passage has about 100 words, and ends with a sentence if one ends near there. Passages without any letter or digit
    are left out.
    """
    buffer, begin = "", 0
    for piece in chain(pieces, [None]):
        is_last = piece is None
        buffer += piece or ""
        at = 0
        while (at := _after_space(buffer, at)) + (0 if is_last else _LONGEST) < len(buffer):
            window = buffer[at : at + _LONGEST]
            length = _length(window, is_rest=is_last and at + len(window) == len(buffer))
            text = window[:length].rstrip()
            if words_of(text):
                yield begin + at, text
            at += length
        buffer, begin = buffer[at:], begin + at


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _length(window: str, *, is_rest: bool) -> int:
    """The number of characters of the next passage, which starts at the beginning of this window of the text.
    `is_rest`: whether the window is all of the remaining text.
    """
    words = list(islice(_WORD.finditer(window), _MOST + 1))
    if is_rest and len(words) <= _MOST:
        return len(window)
    if len(words) == 1:
        return words[0].end()
    ends = [word.end() for word in words[:-1]]  # the last one may continue after the window
    good = [
        count
        for count in range(_FEWEST, len(ends) + 1)
        if _ends_sentence(words[count - 1][0], window[ends[count - 1] : words[count].start()])
    ]
    count = min(good, key=lambda count: abs(count - WORDS)) if good else min(WORDS, len(ends))
    return ends[count - 1]


def _ends_sentence(word: str, space: str) -> bool:
    return space.count("\n") > 1 or _END_OF_SENTENCE.search(word) is not None


def _labels(document: Document, title_field: str, license: str) -> tuple[str, str, str]:
    """The document's title, source and licence."""
    name = document.file.name
    title = printable(document.labels.get(title_field, ""), MAX_LABEL_CHARACTERS) or document.file.stem
    source = f"{name}:{document.number}" if document.number else name
    terms = (
        printable(document.labels.get("license", ""), MAX_LICENSE_CHARACTERS) or license or UNKNOWN_LICENSE
    )
    return printable(title, MAX_LABEL_CHARACTERS), printable(source, MAX_LABEL_CHARACTERS), terms


class PassageFile:
    """Passages on disk, by number. Of passages with equal texts, only the first is kept."""

    def __init__(self, path: Path, known: Iterable[str] = ()) -> None:
        """`known`: texts to leave out as well. Raises OSError."""
        self._file: BinaryIO = path.open("w+b")
        self._ends = array("q", [0])
        self._digests = {_digest(text) for text in known}
        self.duplicates = 0
        """Passages that were left out."""

    def add(self, passage: Passage) -> bool:
        """Returns whether it was new. Raises OSError."""
        digest = _digest(passage.text)
        if digest in self._digests:
            self.duplicates += 1
            return False
        self._digests.add(digest)
        data = passage.message().SerializeToString()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        return True

    def finish(self) -> None:
        """Ends writing: from now on passages are read. Raises OSError."""
        self._file.flush()
        self._digests = set()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Passage:
        begin, end = self._ends[number : number + 2]
        self._file.seek(begin)
        message = memory_pb2.Passage.FromString(self._file.read(end - begin))
        return Passage.parse(message)

    def size(self, number: int) -> int:
        """The size of the serialized passage, in bytes."""
        return self._ends[number + 1] - self._ends[number]

    def close(self) -> None:
        self._file.close()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
