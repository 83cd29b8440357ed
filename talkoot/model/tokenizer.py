"""The tokenizer of a model folder, in the format of the library `tokenizers`. A stranger may have written it."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from peer.errors import DataError
from peer.formatting import printable
from trainer_client.data.tokenizer import ByteTokenizer, Tokenizer, byte_letters, load_tokenizer

_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that can't make a text much longer."""
_SPLITS = frozenset({"ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"})
_ODDITIES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_REPEATS = re.compile(r"[*+?{(]|\\g")
"""Repetitions, groups, and calls of the whole pattern within itself."""
_LONGEST_PATTERN = 1000
"""A pattern may have many alternatives, which are all tried at each character."""
_MOST_STEPS = 16


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer in the format of the library `tokenizers`: the byte tokenizer is byte pairs without any learned
    pair.
    """
    return tokenizer.to_json() or json.dumps(_bytes_as_json())


def _bytes_as_json() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": byte_letters(),
        "merges": [],
    }
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": level, "decoder": level, "model": model}
    return {"version": "1.0", "added_tokens": [], **rest, **parts}


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a folder. Raises DataError if a trainer can't have made it, or if it may take unlimited time or
    memory.
    """
    try:
        found = json.loads(text)
        model = found["model"]
        is_bytes = model["merges"] == [] and model["vocab"] == _bytes_as_json()["model"]["vocab"]
        is_plain = model.get("type", "BPE") == "BPE" and not any(map(model.get, _ODDITIES))
        normalizer = found.get("normalizer")
        splits, processors = (
            list(islice(_steps(found.get(part), steps), _MOST_STEPS + 1))
            for part, steps in (("pre_tokenizer", "pretokenizers"), ("post_processor", "processors"))
        )
        is_bounded = normalizer is None or normalizer["type"] in _NORMALIZERS
        is_bounded = is_bounded and max(len(splits), len(processors)) <= _MOST_STEPS
        is_bounded = is_bounded and all(map(_is_bounded, splits))
        # each one may write a byte as two
        is_bounded = is_bounded and sum(step["type"] == "ByteLevel" for step in splits if step) <= 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"this is not a tokenizer: {printable(str(error))}") from error
    if not is_plain:
        raise DataError("this is not a tokenizer of byte pairs, or it has a dropout, a prefix or a suffix")
    if not is_bounded:
        raise DataError(
            "before or after it looks for byte pairs, this tokenizer could take unlimited time or memory"
        )
    return ByteTokenizer() if is_bytes else load_tokenizer(text)


def _steps(part: Any, steps: str) -> Iterator[Any]:
    """The steps of one part of a tokenizer. `steps`: the key of a sequence's steps."""
    if part is not None and part["type"] == "Sequence":
        for each in part[steps]:
            yield from _steps(each, steps)
    else:
        yield part


def _is_bounded(step: Any) -> bool:
    """Whether the time of a step that splits a text is proportional to the text's length."""
    if step is None or step["type"] != "Split":
        return step is None or step["type"] in _SPLITS
    if "Regex" not in step["pattern"]:
        return True
    pattern = step["pattern"]["Regex"]
    # no repetition, so no backtracking
    return len(pattern) <= _LONGEST_PATTERN and not _REPEATS.search(pattern)
