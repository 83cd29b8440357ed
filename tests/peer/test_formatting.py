"""Counts as people read them."""

import pytest

from peer.formatting import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes"), (1234567, "1234567 nodes")]
)
def test_one_alone_is_singular(number: int, words: str) -> None:
    assert counted(number, "node") == words


def test_thousands_are_parted_on_request() -> None:
    assert counted(1234567, "row", ",") == "1,234,567 rows"
