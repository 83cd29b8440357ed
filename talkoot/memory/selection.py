"""Which passages of a memory to revoke: those with given hashes, and those that contain a phrase.

A phrase that is not found stays public, so it is compared as people read it, not as it is encoded.
"""

import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Self, TypeAlias

from dht.memory import MAX_REVOKED, Passage, Place
from expert_server.memory.shard import PrimaryShard
from expert_server.memory.store import MemoryStore
from peer.errors import LibraryError, SettingsError
from peer.formatting import printable
from peer.merkle import HASH_BYTES
from trainer_client.memory.encoder import UNSPACED

FEWEST_DIGITS = 16
"""The fewest digits of a hash that name a passage."""
_AROUND, _EXCERPT_CHARACTERS = 50, 200
"""How many characters before and after a phrase are shown, and how many of a passage at most."""
_REVOKED = (
    "or it was revoked before. If the command was stopped then, run `talkoot memory publish` with this folder, so that "
    "all hosts delete it"
)
_MOST_BETWEEN = 100
"""The most blanks between two passages of a text that are read as one."""
_UNSEEN = "\u00ad"
"""What `folded` returns for characters that are not printed."""
_HYPHENS = "\u2010\u2011\u2012\u2013\ufe63\uff0d"
_APOSTROPHES = "\u2018\u2019\u02bc\uff07"
_UNSEEN_MARKS = "\u034f\u180b\u180c\u180d\u180f" + "".join(map(chr, range(0xFE00, 0xFE10)))
"""Marks that are not printed, although Python calls them printable, such as the selectors of a glyph's variant."""
_UNSEEN_RUN = re.compile(f"[ {_UNSEEN}]*{_UNSEEN}[ {_UNSEEN}]*")
_SPACES = re.compile(" {2,}")
_TOKEN = re.compile(f"(?<=[^ {_UNSEEN}])- |.")
_NO_LETTERS = re.compile(f"[- {_UNSEEN}]+")


class _Alike(dict[int, str]):
    """For each character, the one that is compared: for `str.translate`."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character.isspace():
            alike = " "
        elif not character.isprintable() or character in _UNSEEN_MARKS:
            alike = _UNSEEN
        elif character in _HYPHENS:
            alike = "-"
        elif character in _APOSTROPHES:
            alike = "'"
        else:
            alike = "i" if character == "\u0131" else character  # a Turkish capital I may be either
        self[code] = alike
        return alike


_ALIKE = _Alike()
_Document: TypeAlias = tuple[str, str]
"""The title and the source of passages. Texts may have both in common."""


def folded(text: str) -> str:
    """The text for comparison: in lower case, without differences in how characters are encoded, with one space for
    each run of white space. (Unicode Standard, section 3.13.5, compatibility caseless matching.)
    """
    if text.isascii():
        text = text.casefold()
    else:
        text = unicodedata.normalize("NFD", text)
        for _ in range(2):
            text = unicodedata.normalize("NFKC", text.casefold())
        text = text.replace("i\u0307", "i")  # a Turkish capital I with its dot
    text = text.translate(_ALIKE)
    if _UNSEEN in text:
        text = _UNSEEN_RUN.sub(_UNSEEN, text)
    return _SPACES.sub(" ", text) if "  " in text else text


class Phrase:
    """Words to find in passages. Any white space between them is the same, and a word may be hyphenated at the end of
    a line.
    """

    def __init__(self, text: str) -> None:
        """Raises SettingsError if nothing of the text is printed."""
        phrase = folded(text).strip(f" {_UNSEEN}")
        if not phrase:
            raise SettingsError("--match: give words to look for")
        self._pattern = re.compile(_pattern(phrase))
        letters = _NO_LETTERS.sub("", phrase)
        self._reach = 3 * len(phrase)  # in a text, each character may be followed by a hyphen and a space
        self._beginnings = tuple(letters[:n] for n in range(1, len(letters)))
        self._ends = tuple(letters[n:] for n in range(1, len(letters)))

    def find(self, text: str) -> tuple[int, int] | None:
        """Where the phrase is in a folded text."""
        found = self._pattern.search(text)
        return None if found is None else found.span()

    def find_across(self, text: str, border: int) -> tuple[int, int] | None:
        """Where the phrase is in a folded text, if part of it is before `border` and part after."""
        start = 0
        while (found := self._pattern.search(text, start)) and found.start() < border:
            if found.end() > border:
                return found.span()
            start = found.start() + 1
        return None

    def may_begin_in(self, text: str) -> bool:
        """Whether a folded text could end with the beginning of the phrase."""
        return _NO_LETTERS.sub("", text[-self._reach :]).endswith(self._beginnings)

    def may_end_in(self, text: str) -> bool:
        """Whether a folded text could begin with the end of the phrase."""
        return _NO_LETTERS.sub("", text[: self._reach]).startswith(self._ends)


def _pattern(phrase: str) -> str:
    """What matches a folded phrase in folded texts."""
    space, some_space = f"[ {_UNSEEN}]", f"[ {_UNSEEN}]?"
    hyphenated = f"(?:-{space}|{_UNSEEN})?"
    unspaced = re.compile(f"[{UNSPACED}]{{2}}")
    special = {" ": space, _UNSEEN: some_space, "-": f"-{some_space}", "- ": f"(?:-{some_space})?"}
    tokens: list[str] = _TOKEN.findall(phrase)
    pattern = special.get(tokens[0], re.escape(tokens[0]))
    for before, token in pairwise(tokens):
        if unspaced.match(before + token):  # a line may end between any two such characters
            pattern += some_space
        elif before not in special and token not in special:
            pattern += hyphenated
        pattern += special.get(token, re.escape(token))
    return pattern


@dataclass(frozen=True)
class Selected:
    """A passage that will be revoked."""

    passage: Passage
    leaf: bytes
    text: str
    """The text that is shown: of the passage or, if the phrase is cut, of two passages."""
    found: tuple[int, int] = (0, 0)
    """Where the phrase is in the folded text; empty if the passage was selected by its hash."""
    is_cut: bool = False
    """Whether the phrase begins in one passage and ends in the next one."""

    @property
    def excerpt(self) -> str:
        """The phrase with its surroundings, or the beginning of the passage."""
        begin, end = self.found
        if begin == end:
            return printable(self.text, 2 * _AROUND)
        first = max(0, _origin(self.text, begin) - _AROUND)
        last = _origin(self.text, end - 1) + 1 + _AROUND
        shown = printable(self.text[first:last], _EXCERPT_CHARACTERS)
        return f"{'…' if first else ''}{shown}{'…' if last < len(self.text) else ''}"


def _origin(text: str, at: int) -> int:
    """The character of a text from which the character `at` of the folded text comes."""
    return bisect_left(range(len(text) + 1), at + 1, key=lambda length: len(folded(text[:length]))) - 1


@dataclass(frozen=True)
class _Stored:
    """A passage, and where it is stored."""

    place: Place
    passage: Passage
    leaf: bytes

    @property
    def begin(self) -> int:
        return self.passage.offset

    @property
    def end(self) -> int:
        return self.passage.offset + len(self.passage.text)


@dataclass(frozen=True)
class Selection:
    """Which passages to revoke."""

    leaves: frozenset[str] = frozenset()
    """The first digits of their hashes, in hexadecimal."""
    phrase: Phrase | None = None
    """Selects passages with this in their text or title."""

    @classmethod
    def parse(cls, leaves: Sequence[str], text: str | None) -> Self:
        """The selection from `--passage` and `--match`. Raises SettingsError if it is not valid."""
        if not leaves and not (text or "").strip():
            raise SettingsError(
                "say which passages: --match TEXT, or --passage HASH as `talkoot search --json` prints it"
            )
        for leaf in leaves:
            is_hash = FEWEST_DIGITS <= len(leaf) <= 2 * HASH_BYTES and set(leaf.lower()) <= set(
                "0123456789abcdef"
            )
            if not is_hash:
                raise SettingsError(
                    f"--passage {printable(leaf, 80)}: not a passage's hash, of {FEWEST_DIGITS} to "
                    f"{2 * HASH_BYTES} hexadecimal digits"
                )
        phrase = Phrase(text) if text and text.strip() else None
        return cls(frozenset(leaf.lower() for leaf in leaves), phrase)

    def find(self, store: MemoryStore) -> dict[Place, Selected]:
        """Raises LibraryError if there are none, or too many."""
        found: dict[Place, Selected] = {}
        beginnings: dict[_Document, list[_Stored]] = defaultdict(list)
        ends: dict[_Document, list[_Stored]] = defaultdict(list)
        for stored in _passages(store):
            passage = stored.passage
            if any(stored.leaf.hex().startswith(wanted) for wanted in self.leaves):
                found[stored.place] = Selected(passage, stored.leaf, passage.text)
            if self.phrase is None:
                continue
            text = folded(passage.text)
            if (span := self.phrase.find(f"{folded(passage.title)} {text}")) is not None:
                whole = f"{passage.title}\n{passage.text}"
                found[stored.place] = Selected(passage, stored.leaf, whole, span)
            document = passage.title, passage.source
            if self.phrase.may_begin_in(text):
                beginnings[document].append(stored)
            if self.phrase.may_end_in(text):
                ends[document].append(stored)
        for document, some in beginnings.items():
            for stored, selected in self._across(some, ends[document]):
                found.setdefault(stored.place, selected)
        hashes = [selected.leaf.hex() for selected in found.values()]
        for wanted in sorted(self.leaves):
            if not any(each.startswith(wanted) for each in hashes):
                raise LibraryError(f"{store.folder} has no passage {wanted}, {_REVOKED}")
        if not found:
            raise LibraryError(f"no passage of {store.folder} contains that text, {_REVOKED}")
        if len(found) + len(store.manifest.revoked) > MAX_REVOKED:
            raise LibraryError(
                f"the memory would have {len(found) + len(store.manifest.revoked):,} revoked passages, more than "
                f"{MAX_REVOKED:,}: build the memory again without them, under another name"
            )
        return found

    def _across(self, beginnings: list[_Stored], ends: list[_Stored]) -> Iterator[tuple[_Stored, Selected]]:
        """Both parts of phrases that the border of two passages cuts. All are from one text, or from texts of the same
        name.
        """
        assert self.phrase is not None, "they are parts of a phrase"
        ends = sorted(ends, key=attrgetter("begin"))
        for first in beginnings:
            for second in ends[bisect_left(ends, first.end, key=attrgetter("begin")) :]:
                between = second.begin - first.end
                if between > _MOST_BETWEEN:
                    break
                text = f"{first.passage.text}{' ' if between else ''}{second.passage.text}"
                span = self.phrase.find_across(folded(text), len(folded(first.passage.text)))
                if span is not None:
                    for part in (first, second):
                        yield part, Selected(part.passage, part.leaf, text, span, is_cut=True)


def _passages(store: MemoryStore) -> Iterator[_Stored]:
    """All passages that are not revoked."""
    for shard in store.shards.values():
        if isinstance(shard, PrimaryShard):
            for position, (passage, leaf) in enumerate(zip(shard.passages(), shard.leaves(), strict=True)):
                if passage is not None:
                    yield _Stored(Place(shard.root, position), passage, leaf)
