"""Names of experts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.uid import UID, grid_coordinates
from peer.errors import WireError

NUMBERS = st.integers(0, 999_999)
UIDS = st.builds(UID, NUMBERS, st.lists(NUMBERS, min_size=1, max_size=8).map(tuple))


@given(UIDS)
def test_parse_gives_back_what_was_written(uid: UID) -> None:
    assert UID.parse(str(uid)) == uid


@given(st.text(alphabet="0123456789. -+\n٣", max_size=12))
def test_only_the_one_normal_form_is_parsed(text: str) -> None:
    try:
        uid = UID.parse(text)
    except WireError:
        return
    assert str(uid) == text


def test_a_uid_reads_layer_then_coordinate() -> None:
    assert str(UID(0, (3, 1))) == "0.3.1"
    assert UID.parse("2.31.0") == UID(layer=2, coordinate=(31, 0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0.",
        ".0",
        "0..1",
        "00.1",
        "0.01",
        "-1.0",
        "0.-1",
        "0.1 ",
        "0.1\n",
        "+0.1",
        "a.b",
        "0.1.x",
        "1000000.0",
        "0.1000000",
        "0.1.2.3.4.5.6.7.8.9",
        "٣.٣",
    ],
)
def test_a_malformed_uid_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="not an expert UID"):
        UID.parse(text)


def test_the_refusal_of_a_huge_text_stays_short() -> None:
    with pytest.raises(WireError) as caught:
        UID.parse("9" * 10_000)
    assert len(str(caught.value)) < 200


def test_uids_sort_by_layer_then_coordinate() -> None:
    assert sorted([UID(1, (0, 0)), UID(0, (2, 0)), UID(0, (1, 9))]) == [
        UID(0, (1, 9)),
        UID(0, (2, 0)),
        UID(1, (0, 0)),
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
def test_grid_coordinates_are_all_there_in_order(grid: tuple[int, ...]) -> None:
    coordinates = list(grid_coordinates(grid))
    total = 1
    for size in grid:
        total *= size
    assert len(coordinates) == total
    assert coordinates == sorted(set(coordinates))
    assert all(0 <= x < size for c in coordinates for x, size in zip(c, grid, strict=True))
