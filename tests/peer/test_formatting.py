"""Counts in a readable form, and text from other peers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.formatting import counted, printable


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes"), (1234567, "1234567 nodes")]
)
def test_one_alone_is_singular(number: int, words: str) -> None:
    assert counted(number, "node") == words


def test_thousands_are_parted_on_request() -> None:
    assert counted(1234567, "row", ",") == "1,234,567 rows"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("\x1b[31mred", "[31mred"),
        ("right\u202eleft", "right left"),
        ("a line\nanother\x00one", "a line another one"),
        ("  much   blank  ", "much blank"),
        ("ä" * 99, "ä" * 32),
        ("half a pair: \ud800", "half a pair:"),
    ],
)
def test_a_strangers_text_is_one_short_line_without_controls(text: str, shown: str) -> None:
    assert printable(text, 32) == shown


@given(st.text(), st.integers(0, 50))
def test_whatever_a_stranger_writes_stays_on_one_line(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) <= most
    assert printable(shown, most) == shown


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), max_size=5))
def test_plain_words_stay_as_they_are(words: list[str]) -> None:
    assert printable(" ".join(words), 500) == " ".join(words)[:500].rstrip()
