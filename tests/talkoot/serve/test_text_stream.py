"""Text from tokens: the same however the bytes are split into tokens, and only what is certain."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from talkoot.serve.text import TextStream

LETTERS = "ab€"


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first complete stop sequence, found letter by letter, and whether there was one."""
    for end in range(1, len(text) + 1):
        ended = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(ended)], True
    return text, False


@given(
    data=st.data(),
    text=st.text(LETTERS, max_size=30),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_stop_sequence_that_is_complete_first(
    data: st.DataObject, text: str, stops: list[str]
) -> None:
    raw = text.encode()
    places = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=8)) | {0, len(raw)})
    tokens = [raw[start:end] for start, end in pairwise(places)]
    stream, given_out = TextStream(tokens, stops), ""
    expected, stops_there = cut(text, stops)
    for token in range(len(tokens)):
        given_out += stream.feed(token)
        assert expected.startswith(given_out)
        assert stream.length == len(given_out)
        if stream.has_stopped:
            break
    else:
        given_out += stream.finish()
    assert (given_out, stream.has_stopped) == (expected, stops_there)


@given(st.binary(max_size=20))
def test_any_bytes_are_text(raw: bytes) -> None:
    stream = TextStream([bytes([value]) for value in range(256)])
    text = "".join(map(stream.feed, raw)) + stream.finish()
    assert text == raw.decode(errors="replace")


def test_what_cannot_be_a_stop_sequence_is_not_held_back() -> None:
    stream = TextStream([b"a", b"b", b"c"], ["abc"])
    assert [stream.feed(token) for token in (0, 1, 0, 0)] == ["", "", "ab", "a"]
    assert stream.decoded == 4
    assert stream.finish() == "a"
